"""How far chains are from the distribution that they should keep, on data whose score and posterior are known.

    python -m benchmarks.chain_bias [--seeds 5]

Prints the tables of docs/dmcmc.md: means over seeds ± half the width of their 95% interval (Student's t).
"""

import argparse
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from scipy import stats
from torch import Tensor

from ditmoe.sampling.chains.dlg import Dlg, Finish
from ditmoe.sampling.integrators.samplers import initial_config, integrate
from ditmoe.sampling.noise_level.levels import log_uniform_levels
from ditmoe.sampling.settings.chains import DlgConfig
from ditmoe.sampling.settings.config import SamplerConfig
from tests.sampling.chains.dlg_oracle import distance
from tests.sampling.chains.test_dlg_exactness import CASES, IN_64_DIMS, Case, QuickDraws
from tests.sampling.mixture import GaussianMixture, MixtureDenoiser, MixturePosterior

CHAINS = 1000
SHARED = {"skip": 2, "samples_per_chain": 20}
PUBLISHED = {
    "published": {"preset": "published"},
    "the paper's figures unscaled": {
        "preset": "published",
        "step_size": 0.05,
        "burn_in_step_size": 0.5,
        "initial_noise": 0.5,
        "tweedie": False,
    },
}


def interval(values: Sequence[float]) -> str:
    """`0.86 ± 0.01`: the mean, and half the width of its 95% interval."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    reach = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} ± {reach:.3f}"


def deviation_of_sigma(case: Case, sigma_B: Tensor) -> float:
    """Total variation of σ from the uniform distribution over its levels; some of it is from sampling."""
    level_B = torch.searchsorted(case.level_N, sigma_B)
    share_N = level_B.bincount(minlength=case.levels).double() / len(level_B)
    return distance(share_N, torch.full_like(share_N, 1 / case.levels))


def choices(seeds: int) -> None:
    """The published choices of σ and of states against the exact ones."""
    print(f"\nTV of σ, and its median, after {CASES['64-D'].steps} steps of {CHAINS} chains from exact draws")
    for name, case in CASES.items():
        few = replace(case, chains=CHAINS)
        for level_rule, select in (
            *((None, None), ("sample", "last"), ("sample", "smallest")),
            *(("argmax", "last"), ("argmax", "smallest")),
        ):
            far, middle = [], []
            for seed in range(seeds):
                start = few.exact(seed=100 + seed)
                sigma_B = start.sigma_B
                if level_rule is not None:
                    dlg = replace(few.dlg(level_rule=level_rule, select=select), draws=QuickDraws(seed))
                    sigma_B = dlg.advance(start)[1].sigma_B
                far.append(deviation_of_sigma(few, sigma_B))
                middle.append(sigma_B.median().item())
            what = "exact draws" if level_rule is None else f"{level_rule}, {select}"
            print(f"  {name:<16} {what:<18} TV {interval(far)}, median σ {interval(middle)}", flush=True)


def rules(seeds: int) -> None:
    """How far each rule of the step drives σ in 64 dims."""
    print("\nmean log σ moved by, after 30 steps with η = 0.6·σ² from exact draws, 500 chains in 64 dims")
    for deviation in (0.01, 0.5):
        mixture = replace(IN_64_DIMS, deviations_K=torch.full((2,), deviation, dtype=torch.float64))
        case = replace(CASES["64-D"], mixture=mixture, chains=500)
        for rule in ("proportional", "exponential", "underdamped"):
            moved = []
            for seed in range(seeds):
                start = case.exact(seed=100 + seed)
                dlg = replace(case.dlg(step_rule=rule, step_size=0.6, skip=30), draws=QuickDraws(seed))
                _, last = dlg.advance(start)
                moved.append((last.sigma_B.log().mean() - start.sigma_B.log().mean()).item())
            print(f"  s = {deviation:<5} {rule:<13} {interval(moved)}", flush=True)


@dataclass(frozen=True)
class Settled:
    """What chains of one seed came to."""

    sigma: float
    """Median σ after the steps of the last half of the samples."""
    repeated: float
    """Share of samples that were made of the very state of the sample before."""
    same_mode: float
    """Share of samples nearest to the mode of the sample before."""
    nfe: float
    """Per sample."""


def settled(settings: dict[str, object], seed: int) -> Settled:
    """Chains on ten narrow modes in 768 dims, from σ = 0.02 to 100, finished by KAR1 in six levels."""
    random = torch.Generator().manual_seed(0)
    means_KD = 0.5 * torch.randn(10, 768, generator=random, dtype=torch.float64)
    mixture = GaussianMixture(means_KD, torch.full((10,), 0.1).double(), torch.full((10,), 0.1).double())
    dlg = DlgConfig.model_validate({**SHARED, **settings})
    config = SamplerConfig(sampler="dlg:kar1", steps=5, schedule="karras", dlg=dlg)

    def bound(of: SamplerConfig) -> Finish:
        return lambda denoiser, x, sigma, label, noise: integrate(denoiser, x, sigma, label, noise, of)

    denoiser = MixtureDenoiser(mixture, sigma_min=0.02, sigma_max=100.0)
    posterior = MixturePosterior(mixture, log_uniform_levels(0.02, 100.0, 1000))
    chains = Dlg(denoiser, posterior, dlg, QuickDraws(seed), bound(initial_config(config)))
    start = chains.start(range(32), torch.zeros(32, dtype=torch.int64), (3, 16, 16), torch.float64)
    samples = list(islice(chains.samples(start, bound(config)), dlg.samples_per_chain))
    traces = torch.cat([sample.selected.trace_BT for sample in samples[len(samples) // 2 :]], 1)
    modes_BS = torch.stack([torch.cdist(sample.x0_BCHW.flatten(1), means_KD).argmin(1) for sample in samples], 1)
    chosen = torch.stack([sample.selected.x_BCHW.flatten(1)[:, 0] for sample in samples], 1)
    return Settled(
        traces.median().item(),
        (chosen[:, 1:] == chosen[:, :-1]).double().mean().item(),
        (modes_BS[:, 1:] == modes_BS[:, :-1]).double().mean().item(),
        samples[-1].chains.nfe_per_sample(),
    )


def published(seeds: int) -> None:
    """Where published chains settle, in the right units and in the wrong ones."""
    print(
        "\nten modes of s = 0.1 in 768 dims, 32 chains of 20 samples, 2 steps a sample, finished by KAR1 in 9 NFE"
    )
    for name, settings in PUBLISHED.items():
        found = [settled(settings, seed) for seed in range(seeds)]
        print(
            f"  {name:<30} median σ {interval([one.sigma for one in found])}; "
            f"made of the state of the sample before {interval([one.repeated for one in found])}; "
            f"in its mode {interval([one.same_mode for one in found])}; NFE {found[0].nfe:.2f}",
            flush=True,
        )


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, … of each figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}, seeds 0 to {options.seeds - 1}")
    choices(options.seeds)
    rules(options.seeds)
    published(options.seeds)


if __name__ == "__main__":
    main()
