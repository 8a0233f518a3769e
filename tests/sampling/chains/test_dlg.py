"""Denoising Langevin Gibbs chains: a chain is a function of (seed, number), and every evaluation is counted."""

import math
from itertools import islice

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ditmoe.model.errors import UserError
from ditmoe.sampling.chains.dlg import Dlg, DlgSample
from ditmoe.sampling.chains.langevin import State, langevin, smaller
from ditmoe.sampling.chains.state import Chains, SeededDraws, load_chains, save_chains
from ditmoe.sampling.integrators.ddpm import ancestral
from ditmoe.sampling.integrators.flow import euler, heun
from ditmoe.sampling.integrators.samplers import tweedie
from ditmoe.sampling.network.denoiser import DdpmDenoiser, FlowDenoiser
from ditmoe.sampling.noise_level.classifier import NoiseClassifier, NoiseNetwork, NoiseSpace
from ditmoe.sampling.noise_level.levels import choose_levels, log_uniform_levels
from ditmoe.sampling.settings.chains import DlgConfig
from tests.sampling.mixture import GaussianMixture, MixtureDenoiser, MixturePosterior

MIXTURE = GaussianMixture.of([[-1, 0], [1, 0.5], [0, -1]], [0.3, 0.2, 0.4], [1, 2, 3])
SHAPE = (2, 1, 1)
LEVELS = log_uniform_levels(0.05, 20.0, 50)
PUBLISHED = DlgConfig(skip=3)
EXACT = DlgConfig(skip=3, level_rule="sample", select="last", step_rule="proportional", step_size=0.2)
UNDERDAMPED = EXACT.model_copy(update={"step_rule": "underdamped", "restart_every": 3})


def heun_4(denoiser, x, sigma, label, noise):
    return heun(denoiser, x, sigma, label, 4)


def heun_4_and_tweedie(denoiser, x, sigma, label, noise):
    return tweedie(denoiser, heun(denoiser, x, sigma, label, 4), sigma, label)


def ancestral_3(denoiser, x, sigma, label, noise):
    return ancestral(denoiser, x, sigma, label, 3, noise)


def dlg_of(config: DlgConfig, seed: int = 0) -> Dlg:
    denoiser = MixtureDenoiser(MIXTURE, sigma_min=0.05, sigma_max=20.0)
    return Dlg(denoiser, MixturePosterior(MIXTURE, LEVELS), config, SeededDraws(seed), ancestral_3)


def run(dlg: Dlg, numbers: list[int], count: int, chains: Chains | None = None) -> list[DlgSample]:
    if chains is None:
        chains = dlg.start(numbers, torch.tensor(numbers) % 2, SHAPE, torch.float64)
    return list(islice(dlg.samples(chains, ancestral_3), count))


def assert_same(found: Chains, expected: Chains) -> None:
    assert found.tensors().keys() == expected.tensors().keys()
    for name, tensor in found.tensors().items():
        torch.testing.assert_close(tensor, expected.tensors()[name])


@pytest.mark.parametrize("config", [PUBLISHED, EXACT, UNDERDAMPED, EXACT.model_copy(update={"restart_every": 2})])
def test_a_chain_is_the_same_in_any_batch(config):
    numbers = [5, 0, 2**40, 3]
    together = run(dlg_of(config), numbers, 5)
    for row, number in enumerate(numbers):
        alone = run(dlg_of(config), [number], 5)
        for here, there in zip(alone, together, strict=True):
            torch.testing.assert_close(here.x0_BCHW, there.x0_BCHW[row : row + 1])
        assert_same(alone[-1].chains, together[-1].chains.rows(torch.tensor([row])))
    assert not torch.allclose(together[0].x0_BCHW[0], together[0].x0_BCHW[1])
    other_seed = run(dlg_of(config, seed=1), numbers, 1)
    assert not torch.allclose(other_seed[0].x0_BCHW, together[0].x0_BCHW)


@pytest.mark.parametrize("config", [PUBLISHED, UNDERDAMPED, EXACT.model_copy(update={"restart_every": 2})])
def test_chains_go_on_from_a_file(config, tmp_path):
    path = tmp_path / "new" / "chains.safetensors"
    whole = run(dlg_of(config), [0, 1, 7], 5)
    first = run(dlg_of(config), [0, 1, 7], 2)
    save_chains(path, first[-1].chains, "seed 0")
    rest = run(dlg_of(config), [], 3, load_chains(path, "seed 0")[0])
    for here, there in zip(first + rest, whole, strict=True):
        assert torch.equal(here.x0_BCHW, there.x0_BCHW)
    assert_same(rest[-1].chains, whole[-1].chains)
    # And in other company: two of the three, with one that is behind.
    late = dlg_of(config).start([9], torch.tensor([1]), SHAPE, torch.float64)
    both = Chains(
        **{
            name: torch.cat((tensor[1:], late.tensors()[name]))
            for name, tensor in load_chains(path, "seed 0")[0].tensors().items()
        }
    )
    mixed = run(dlg_of(config), [], 3, both)
    torch.testing.assert_close(mixed[-1].x0_BCHW[:2], whole[-1].x0_BCHW[1:])


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "chains.safetensors"
    with pytest.raises(UserError, match="no state of chains"):
        load_chains(path, "a")
    save_chains(path, dlg_of(PUBLISHED).start([0], torch.tensor([0]), SHAPE), "a")
    with pytest.raises(UserError, match="another seed, model, classifier, batch or settings"):
        load_chains(path, "b")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="no state of chains"):
        load_chains(path, "a")


@pytest.mark.parametrize(("restart_every", "starts"), [(None, 1), (2, 3), (1, 5)])
def test_every_evaluation_is_counted(restart_every, starts):
    config = PUBLISHED.model_copy(update={"restart_every": restart_every, "thin": 2})
    dlg = dlg_of(config)
    chains = dlg.start(range(4), torch.zeros(4, dtype=torch.int64), SHAPE)
    assert dlg.denoiser.nfe == 3 + 10 + 10 and chains.nfe_per_sample() == math.inf
    samples = list(islice(dlg.samples(chains, heun_4_and_tweedie), 5))
    chains = samples[-1].chains
    assert chains.initial_nfe_B.tolist() == [starts * 23] * 4
    assert chains.chain_nfe_B.tolist() == [5 * 3 * 2] * 4
    assert chains.finish_nfe_B.tolist() == [5 * (7 + 1)] * 4
    assert chains.nfe_per_sample() == pytest.approx(23 * starts / 5 + 6 + 8)
    # Of this batch every evaluation was of all its chains.
    assert dlg.denoiser.nfe == chains.nfe_per_sample() * 5
    assert [sample.selected.number_B.tolist() for sample in samples] == [[n] * 4 for n in range(5)]
    assert chains.step_B.tolist() == [starts * 20 + 5 * 6] * 4


def test_restarts_start_anew_with_other_noise():
    config = EXACT.model_copy(update={"restart_every": 1, "burn_in_first": 0, "burn_in": 0, "skip": 1})
    samples = run(dlg_of(config), [0, 1], 3)
    for earlier, later in ((0, 1), (1, 2)):
        assert not torch.allclose(samples[earlier].x0_BCHW, samples[later].x0_BCHW)


def test_the_smallest_sigma_of_a_stretch_is_taken():
    """Against the states of a chain that is denoised after every step, the one before the stretch among them."""
    start = dlg_of(EXACT).start([0, 1, 2], torch.tensor([0, 1, 0]), SHAPE, torch.float64)
    every = run(dlg_of(EXACT.model_copy(update={"skip": 1})), [0, 1, 2], 12)
    states = [State(start.x_BCHW, start.sigma_B)]
    states += [State(sample.selected.x_BCHW, sample.selected.sigma_B) for sample in every]
    before = 0
    for thin, skip in ((1, 4), (2, 3)):
        config = EXACT.model_copy(update={"skip": skip, "thin": thin, "select": "smallest"})
        for number, sample in enumerate(run(dlg_of(config), [0, 1, 2], 12 // (skip * thin))):
            last = (number + 1) * skip * thin
            window = states[last - skip : last + 1]
            for row in range(3):
                best = min(window, key=lambda state: state.sigma_B[row].item())  # the first of them
                before += best is window[0]
                torch.testing.assert_close(sample.selected.x_BCHW[row], best.x_BCHW[row])
                torch.testing.assert_close(sample.selected.sigma_B[row], best.sigma_B[row])
            # The chain goes on from its last state.
            torch.testing.assert_close(sample.chains.x_BCHW, states[last].x_BCHW)
    assert before > 0


def test_integrators_start_at_the_sigma_of_each_chain():
    dlg, seen = dlg_of(PUBLISHED), []

    def finish(denoiser, x, sigma, label, noise):
        seen.append((x, sigma, label, noise(0), noise(1), noise(0)))
        return euler(denoiser, x, sigma, label, 2)

    chains = dlg.start([0, 1, 2], torch.tensor([1, 0, 1]), SHAPE)
    sample = next(dlg.samples(chains, finish))
    x, sigma, label, first, second, again = seen[0]
    assert torch.equal(x, sample.selected.x_BCHW) and torch.equal(sigma, sample.selected.sigma_B)
    assert label.tolist() == [1, 0, 1] and x.dtype == torch.float32 and sigma.dtype == torch.float64
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize("make", [FlowDenoiser, DdpmDenoiser])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_denoisers_of_networks(make, cfg_scale):
    """A network of images in float32, with a classifier that knows nothing yet."""

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.cat((0.9 * x, 0.1 * label.view(-1, 1, 1, 1).expand_as(x)), dim=1)

    def passed(count: int) -> DlgSample:
        denoiser = make(network, 10, cfg_scale=cfg_scale)
        torch.manual_seed(0)
        space = NoiseSpace((2, 8, 8), "", (), denoiser.sigma_min, denoiser.sigma_max, 100)
        classifier = NoiseClassifier(NoiseNetwork(2, 8, 100), space, {}, space.level_N, "")
        dlg = Dlg(denoiser, classifier, EXACT, SeededDraws(0), heun_4)
        chains = dlg.start(range(count), torch.arange(count) % 10, (2, 8, 8))
        sample = list(islice(dlg.samples(chains, heun_4), 2))[-1]
        assert denoiser.nfe == sample.chains.nfe_per_sample() * 2
        assert denoiser.network_evaluations == denoiser.nfe * (1 if cfg_scale == 1 else 2)
        return sample

    sample = passed(6)
    assert sample.x0_BCHW.dtype == torch.float32 and sample.x0_BCHW.isfinite().all()
    torch.testing.assert_close(passed(3).x0_BCHW, sample.x0_BCHW[:3], rtol=1e-3, atol=1e-3)


def test_step_size_of_a_class():
    scaled = DlgConfig(step_size=0.1, class_scales=(1.0, 3.0), burn_in_first=0, skip=2)
    plain = DlgConfig(step_size=0.1, burn_in_first=0, skip=2)
    thrice = plain.model_copy(update={"step_size": 0.3})
    found = run(dlg_of(scaled), [0, 1], 2)[-1].x0_BCHW
    torch.testing.assert_close(found[:1], run(dlg_of(plain), [0], 2)[-1].x0_BCHW)
    torch.testing.assert_close(found[1:], run(dlg_of(thrice), [1], 2)[-1].x0_BCHW)
    with pytest.raises(UserError, match="class_scales has 2 numbers, and there is a class 2"):
        dlg_of(scaled).start([0], torch.tensor([2]), SHAPE)


def test_settings_that_cannot_be():
    with pytest.raises(ValidationError, match="at most 1"):
        DlgConfig(step_rule="exponential", step_size=0.6, class_scales=(1.0, 2.0))
    with pytest.raises(ValidationError, match="numbers above 0"):
        DlgConfig(class_scales=(1.0, -2.0))


def step(rule: str, eta: float, x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    denoiser, label = MixtureDenoiser(MIXTURE), torch.zeros(len(x), dtype=torch.int64)
    return langevin(denoiser, State(x, sigma), label, torch.full_like(sigma, eta), noise, rule)


def test_step_rules():
    """The published step is x + ½η·s + √η·z to the letter; the others are the same to first order in η."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 6, *SHAPE, generator=generator, dtype=torch.float64)
    sigma = torch.linspace(0.2, 3, 6, dtype=torch.float64)
    score = MIXTURE.score(x.flatten(1), sigma).view(x.shape)
    torch.testing.assert_close(step("constant", 0.3, x, sigma, noise), x + 0.15 * score + math.sqrt(0.3) * noise)
    wide = sigma.view(-1, 1, 1, 1)
    expected = x + 0.15 * wide**2 * score + math.sqrt(0.3) * wide * noise
    torch.testing.assert_close(step("proportional", 0.3, x, sigma, noise), expected)
    difference = [step(rule, 1e-4, x, sigma, noise) for rule in ("proportional", "exponential")]
    torch.testing.assert_close(difference[0], difference[1], rtol=0, atol=1e-7)
    # A whole exponential step forgets x but for D.
    denoised = MIXTURE.denoise(x.flatten(1), sigma).view(x.shape)
    torch.testing.assert_close(step("exponential", 1.0, x, sigma, noise), denoised + wide * noise)


def test_smaller():
    first = State(torch.zeros(3, 1, 1, 1), torch.tensor([1.0, 2.0, 3.0]))
    second = State(torch.ones(3, 1, 1, 1), torch.tensor([2.0, 2.0, 1.0]))
    best = smaller(first, second)
    assert best.x_BCHW.flatten().tolist() == [0, 0, 1] and best.sigma_B.tolist() == [1, 2, 1]


def test_levels():
    levels = log_uniform_levels(0.002, 80.0)
    assert len(levels) == 1000 and levels[0] == 0.002 and levels[-1] == 80.0
    ratios = levels[1:] / levels[:-1]
    torch.testing.assert_close(ratios, torch.full_like(ratios, 40_000 ** (1 / 999)))
    assert log_uniform_levels(0.5, 0.5, 1).tolist() == [0.5]


def test_a_drawn_level_has_its_probability():
    probability = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = choose_levels(probability.log().expand(1000, -1), "sample", uniform)
    assert drawn.bincount(minlength=6).tolist() == [0, 250, 0, 500, 250, 0]
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose_levels(probability.log().expand(2, -1), "sample", edges).tolist() == [1, 4]
    assert choose_levels(probability.log(), "argmax", uniform[:1]).tolist() == [3]


def test_the_posterior_of_the_mixture_is_the_plain_one():
    x = MIXTURE.sample(20, sigma=0.5)
    found = MixturePosterior(MIXTURE, LEVELS)(x.view(-1, *SHAPE), torch.zeros(20, dtype=torch.int64))
    torch.testing.assert_close(found.exp(), MIXTURE.sigma_posterior(x, LEVELS))


def test_no_two_steps_of_any_chains_share_their_draws():
    draws = SeededDraws(0)
    chain, step_of_it = torch.tensor([0, 0, 1, 1, 2, 2**40]), torch.tensor([1, 2, 0, 1, 0, 0])
    drawn = draws.uniform("a", chain, step_of_it)
    assert len(set(drawn.tolist())) == 6
    assert len({tuple(row) for row in draws.normal("a", chain, step_of_it, (3,)).tolist()}) == 6
