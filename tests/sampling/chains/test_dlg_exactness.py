"""Denoising Langevin Gibbs chains on mixtures keep the joint distribution of x and σ that they should.

Each test of a distribution takes the last states of thousands of chains that know nothing of each other, so that
samples are independent, and is run on wrong chains too, which it must catch. Figures for the documentation:
`pytest tests/sampling/chains/test_dlg_exactness.py -k "deviation or bias" -s`.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from scipy import stats
from torch import Tensor

from ditmoe.sampling.chains.dlg import Dlg
from ditmoe.sampling.chains.langevin import State, langevin, underdamped
from ditmoe.sampling.chains.state import Chains
from ditmoe.sampling.integrators.flow import heun
from ditmoe.sampling.network.denoiser import Denoised
from ditmoe.sampling.noise_level.levels import log_uniform_levels
from ditmoe.sampling.settings.chains import DlgConfig
from tests.sampling.chains.dlg_oracle import distance, stationary
from tests.sampling.mixture import GaussianMixture, MixtureDenoiser, MixturePosterior

FOUR_MODES = GaussianMixture.of([[-3], [-1], [1], [3.5]], [0.3, 0.4, 0.2, 0.5], [1, 2, 3, 1])
GRID = GaussianMixture.of(
    [[x, y] for x in (-1.5, 0, 1.5) for y in (-1, 1)], [0.2, 0.3, 0.4, 0.3, 0.2, 0.5], [1, 2, 3, 4, 5, 6]
)
IN_64_DIMS = GaussianMixture.of([[-1.0, 0.0] + [0.0] * 62, [1.0, 2.0] + [0.0] * 62], [0.3, 0.5], [1, 2])
SHAPES = {1: (1, 1, 1), 2: (2, 1, 1), 64: (1, 8, 8)}
CELLS = 8
TINY = 1e-6
"""A wrong chain's p-value must lie below it, and a right one's above 1e-3."""


class QuickDraws:
    """Draws from one generator, which is quick for thousands of chains, and fair where they are all new."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, purpose: str, chain_B: Tensor, step_B: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(len(chain_B), *shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, purpose: str, chain_B: Tensor, step_B: Tensor) -> Tensor:
        return torch.rand(len(chain_B), generator=self.generator, dtype=torch.float64)


class TooMuchNoise(QuickDraws):
    """Noise √(2η) in place of √η."""

    def normal(self, purpose: str, chain_B: Tensor, step_B: Tensor, shape: tuple[int, ...]) -> Tensor:
        return math.sqrt(2) * super().normal(purpose, chain_B, step_B, shape)


class WithoutHalf(MixtureDenoiser):
    """Twice the score: the step is η·s, its ½ forgotten."""

    def denoise(self, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Denoised:
        return Denoised(2 * super().denoise(x_BCHW, sigma_B, label_B).x0_BCHW - x_BCHW, None)


@dataclass(frozen=True)
class Case:
    mixture: GaussianMixture
    sigma_min: float
    sigma_max: float
    step_size: float
    steps: int
    chains: int = 6000
    levels: int = 24

    @property
    def level_N(self) -> Tensor:
        return log_uniform_levels(self.sigma_min, self.sigma_max, self.levels)

    @property
    def shape(self) -> tuple[int, ...]:
        return SHAPES[self.mixture.means_KD.shape[1]]

    def exact(self, seed: int) -> Chains:
        """Chains that start at independent draws from the joint distribution."""
        random = torch.Generator().manual_seed(seed)
        sigma_B = self.level_N[torch.randint(self.levels, (self.chains,), generator=random)]
        x_BD = self.mixture.sample(self.chains, seed=seed)
        x_BD = x_BD + sigma_B[:, None] * torch.randn(x_BD.shape, generator=random, dtype=torch.float64)
        zero_B = torch.zeros(self.chains, dtype=torch.int64)
        counts = [zero_B] * 5
        x_BCHW = x_BD.view(-1, *self.shape)
        velocity_BCHW = torch.randn(x_BCHW.shape, generator=random, dtype=torch.float64)
        return Chains(x_BCHW, sigma_B, zero_B, torch.arange(self.chains), *counts, velocity_BCHW)

    def dlg(self, fault: str | None = None, **changes) -> Dlg:
        config = {
            "step_size": self.step_size,
            "step_rule": "proportional",
            "skip": self.steps,
            "level_rule": "sample",
            "select": "last",
        }
        make = WithoutHalf if fault == "missing ½" else MixtureDenoiser
        return Dlg(
            make(self.mixture, sigma_min=self.sigma_min, sigma_max=self.sigma_max),
            MixturePosterior(self.mixture, self.level_N),
            DlgConfig.model_validate(config | changes),
            TooMuchNoise(1) if fault == "noise √(2η)" else QuickDraws(1),
            lambda d, x, s, label, noise: heun(d, x, s, label, 19),
        )


CASES = {
    "1-D four modes": Case(FOUR_MODES, 0.1, 3.0, step_size=0.1, steps=50),
    "2-D grid": Case(GRID, 0.1, 3.0, step_size=0.1, steps=50, chains=4000),
    "64-D": Case(IN_64_DIMS, 0.2, 2.0, step_size=0.02, steps=50, chains=1500),
}


def uniforms(mixture: GaussianMixture, x_BCHW: Tensor, sigma_B: Tensor) -> list[Tensor]:
    """Numbers that are uniform and independent, of each other and of σ, if x has the density p_σ (Rosenblatt).

    They are distribution functions: of the first coordinate, of the second given the first, and of the distance in
    the other dims given both. Means must be 0 in the other dims.
    """
    x_BD = x_BCHW.flatten(1)
    deviation_BK = (mixture.deviations_K.square() + sigma_B[:, None].square()).sqrt()
    share_BK = mixture.weights_K.expand(len(x_BD), -1)
    found = []
    for dim in range(min(2, x_BD.shape[1])):
        z_BK = (x_BD[:, dim, None] - mixture.means_KD[:, dim]) / deviation_BK
        found.append((share_BK * torch.special.ndtr(z_BK)).sum(1))
        share_BK = share_BK * (-0.5 * z_BK.square()).exp() / deviation_BK
        share_BK = share_BK / share_BK.sum(1, keepdim=True)
    if x_BD.shape[1] > 2:
        distance_BK = x_BD[:, 2:].square().sum(1, keepdim=True) / deviation_BK.square()
        below_BK = torch.from_numpy(stats.chi2.cdf(distance_BK.numpy(), x_BD.shape[1] - 2))
        found.append((share_BK * below_BK).sum(1))
    return found


def p_values(case: Case, x_BCHW: Tensor, sigma_B: Tensor) -> dict[str, float]:
    """Of χ² tests that σ is uniform over its levels, and x distributed as it should be at each third of them."""
    level_B = torch.searchsorted(case.level_N, sigma_B)
    found = {"σ": stats.chisquare(level_B.bincount(minlength=case.levels).numpy()).pvalue}
    third_B = level_B * 3 // case.levels
    for number, u_B in enumerate(uniforms(case.mixture, x_BCHW, sigma_B)):
        for third in range(3):
            cell = (u_B[third_B == third] * CELLS).long().clamp(max=CELLS - 1)
            count = cell.bincount(minlength=CELLS).numpy()
            found[f"x{number} at third {third}"] = stats.chisquare(count).pvalue if len(cell) else 0.0
    return found


def least(found: dict[str, float]) -> float:
    """The least p-value, times the number of tests (Bonferroni)."""
    return min(found.values()) * len(found)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("name", ["2-D grid", "64-D"])
def test_the_joint_distribution_stays_under_steps_with_a_velocity(name, momentum):
    case = replace(CASES[name], chains=1500)
    start = case.exact(seed=3)
    chains, last = case.dlg(step_rule="underdamped", step_size=0.3, skip=30, momentum=momentum).advance(start)
    found = p_values(case, last.x_BCHW, last.sigma_B)
    assert least(found) > 1e-3, found
    # The velocity is standard normal and knows nothing of where the chain is.
    assert chains.velocity_BCHW is not None
    assert chains.velocity_BCHW.var().item() == pytest.approx(
        1, abs=4 * math.sqrt(2 / chains.velocity_BCHW.numel())
    )
    _, loud = case.dlg("noise √(2η)", step_rule="underdamped", step_size=0.3, skip=30, momentum=momentum).advance(
        start
    )
    assert least(p_values(case, loud.x_BCHW, loud.sigma_B)) < TINY


@pytest.mark.parametrize("name", CASES)
def test_the_joint_distribution_stays(name):
    case = CASES[name]
    start = case.exact(seed=2)
    assert least(p_values(case, start.x_BCHW, start.sigma_B)) > 1e-3
    chains, last = case.dlg().advance(start)
    assert torch.equal(chains.step_B, torch.full((case.chains,), case.steps))
    found = p_values(case, last.x_BCHW, last.sigma_B)
    assert least(found) > 1e-3, found
    for fault in ("missing ½", "noise √(2η)"):
        _, wrong = case.dlg(fault).advance(start)
        assert least(p_values(case, wrong.x_BCHW, wrong.sigma_B)) < TINY, fault


@pytest.mark.parametrize("rule", ["constant", "exponential", "underdamped"])
def test_the_joint_distribution_stays_by_the_other_rules(rule):
    case = CASES["1-D four modes"]
    step_size = 0.002 if rule == "constant" else 0.2  # η/(4v) at the smallest v is 1%
    start = case.exact(seed=4)
    _, last = case.dlg(step_rule=rule, step_size=step_size).advance(start)
    found = p_values(case, last.x_BCHW, last.sigma_B)
    assert least(found) > 1e-3, found


def test_chains_find_the_joint_distribution_from_pure_noise():
    """Started at the integrator's own samples, without a burn-in, which are far from it."""
    case = replace(CASES["1-D four modes"], chains=3000)
    nothing = {"initial_noise": 0, "burn_in_first": 0, "burn_in": 0}
    dlg = case.dlg(step_size=0.2, skip=150, step_rule="exponential", **nothing)
    chains = dlg.start(range(case.chains), torch.zeros(case.chains, dtype=torch.int64), case.shape, torch.float64)
    first = p_values(case, chains.x_BCHW, chains.sigma_B)
    assert least(first) < TINY, "the start is right by itself, and the test without power"
    _, last = dlg.advance(chains)
    found = p_values(case, last.x_BCHW, last.sigma_B)
    assert least(found) > 1e-3, found


@pytest.mark.parametrize(
    ("rule", "eta"),
    [("constant", 0.8), ("constant", 0.4), ("proportional", 0.8), ("proportional", 0.4), ("exponential", 0.8)],
)
def test_bias_at_one_level_is_the_known_one(rule, eta):
    """On N(0, s²) noised by σ the variance that Langevin steps settle at is known in closed form."""
    count, deviation, sigma = 100_000, 0.6, 0.8
    variance = deviation**2 + sigma**2
    denoiser = MixtureDenoiser(GaussianMixture.of([[0.0]], [deviation], [1]))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64) * math.sqrt(variance)
    sigma_B, label_B = torch.full((count,), sigma, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
    for _ in range(25):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = langevin(denoiser, State(x, sigma_B), label_B, torch.full_like(sigma_B, eta), noise, rule)
    share = 1 - math.sqrt(1 - eta)
    expected = {
        "constant": variance / (1 - eta / (4 * variance)),
        "proportional": variance / (1 - eta * sigma**2 / (4 * variance)),
        "exponential": variance / (1 + share * deviation**2 / ((2 - share) * variance)),
    }[rule]
    error = math.sqrt(2 / count)
    assert abs(expected / variance - 1) > 10 * error, "the bias would not show"
    assert x.var().item() == pytest.approx(expected, rel=4 * error)


@pytest.mark.parametrize("deviation", [0.0, 0.6, 3.0])
@pytest.mark.parametrize("eta", [0.5, 4.0, 9.0])
def test_steps_with_a_velocity_are_exact_on_every_normal_distribution(deviation, eta):
    """They are a linear map of (x, velocity), which must turn it by a rotation, at any length."""
    sigma = 0.8
    variance = deviation**2 + sigma**2
    denoiser = MixtureDenoiser(GaussianMixture.of([[0.0]], [deviation], [1]))
    unit = torch.eye(2, dtype=torch.float64)  # (1, 0) and (0, 1) in units of the standard deviations
    x, velocity = unit[0].view(2, 1, 1, 1) * math.sqrt(variance), unit[1].view(2, 1, 1, 1)
    sigma_B, label_B = torch.full((2,), sigma, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    state = State(x, sigma_B, velocity)
    x, velocity = underdamped(denoiser, state, label_B, torch.full_like(sigma_B, eta), torch.zeros_like(x), 1.0)
    turned = torch.stack((x.flatten() / math.sqrt(variance), velocity.flatten()))
    torch.testing.assert_close(turned @ turned.T, unit)
    assert abs(turned[0, 1].item()) > 0.1, "it hardly moves"


def test_bias_of_the_joint_distribution_goes_with_the_step_size():
    """From the transition matrix, without sampling: what the chain settles at, against the truth."""
    level_N = log_uniform_levels(0.3, 3.0, 16)
    biases = {}
    for eta in (0.1, 0.2):
        _, chain_XN, true_XN = stationary(FOUR_MODES, level_N, eta)
        biases[eta] = distance(chain_XN, true_XN)
    _, without_half_XN, _ = stationary(FOUR_MODES, level_N, 0.1, drift=1.0)
    _, loud_XN, _ = stationary(FOUR_MODES, level_N, 0.1, noise=2.0)
    print(f"\n1-D from σ = 0.3: total variation from p(x, σ), by η/σ²: {biases}")
    print(f"  missing ½: {distance(without_half_XN, true_XN):.4f}, noise √(2η): {distance(loud_XN, true_XN):.4f}")
    assert biases[0.1] < 0.004 and biases[0.2] / biases[0.1] == pytest.approx(2, rel=0.15)
    assert distance(without_half_XN, true_XN) > 20 * biases[0.1]
    assert distance(loud_XN, true_XN) > 20 * biases[0.1]


def test_deviation_of_argmax_by_the_transition_matrix():
    level_N = log_uniform_levels(0.3, 3.0, 16)
    _, chain_XN, true_XN = stationary(FOUR_MODES, level_N, 0.1, level_rule="argmax")
    of_x, of_sigma = distance(chain_XN.sum(1), true_XN.sum(1)), distance(chain_XN.sum(0), true_XN.sum(0))
    print(f"\nargmax, 1-D from σ = 0.3, η = 0.1·σ²: total variation in x {of_x:.3f}, in σ {of_sigma:.3f}")
    assert of_x > 0.3 and of_sigma > 0.5


def describe(case: Case, x_BCHW: Tensor, sigma_B: Tensor) -> str:
    level_B = torch.searchsorted(case.level_N, sigma_B)
    share_N = level_B.bincount(minlength=case.levels).double() / len(level_B)
    variance_B = x_BCHW.flatten(1).square().mean(1)
    return (
        f"TV of σ {distance(share_N, torch.full_like(share_N, 1 / case.levels)):.3f}, "
        f"median σ {sigma_B.median():.3f}, mean x² {variance_B.mean():.3f}"
    )


@pytest.mark.parametrize("name", CASES)
def test_deviation_of_argmax_and_smallest(name):
    """How far the published choices are from the distribution that the exact ones keep."""
    case = replace(CASES[name], chains=1000)
    start = case.exact(seed=6)
    print(f"\n{name}: exact draws: {describe(case, start.x_BCHW, start.sigma_B)}")
    far = {}
    for level_rule in ("sample", "argmax"):
        for select in ("last", "smallest"):
            dlg = case.dlg(level_rule=level_rule, select=select)
            _, selected = dlg.advance(start)
            print(f"  {level_rule}, {select}: {describe(case, selected.x_BCHW, selected.sigma_B)}")
            far[level_rule, select] = least(p_values(case, selected.x_BCHW, selected.sigma_B))
    assert far["sample", "last"] > 1e-3
    assert max(p for chosen, p in far.items() if chosen != ("sample", "last")) < TINY, far


@pytest.mark.parametrize(("deviation", "holds"), [(0.01, True), (0.5, False)])
def test_deviation_by_step_rule_in_64_dims(deviation, holds):
    """In many dims a long Langevin step lengthens the noise, and so drives σ up.

    The exponential rule keeps it where data varies little beside σ; where data is as wide as the noise in every
    dim, it drives σ down. The underdamped one keeps it in both.
    """
    mixture = replace(IN_64_DIMS, deviations_K=torch.full((2,), deviation, dtype=torch.float64))
    case = replace(CASES["64-D"], mixture=mixture, chains=500)
    start = case.exact(seed=7)
    drift = {}
    for rule in ("proportional", "exponential", "underdamped"):
        _, last = case.dlg(step_rule=rule, step_size=0.6, skip=30).advance(start)
        drift[rule] = (last.sigma_B.log().mean() - start.sigma_B.log().mean()).item()
    print(f"\n64-D, s = {deviation}, η = 0.6·σ², 30 steps: mean log σ moved by {drift}")
    assert drift["proportional"] > 0.3
    assert abs(drift["exponential"]) < 0.05 if holds else drift["exponential"] < -0.1
    assert abs(drift["underdamped"]) < 0.05
