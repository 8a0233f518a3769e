"""The preset `published` beside a plain transcription of the published chain, number for number."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from ditmoe.sampling.chains.dlg import Dlg, Finish
from ditmoe.sampling.chains.state import SeededDraws
from ditmoe.sampling.integrators.samplers import initial_config, integrate, planned_nfe
from ditmoe.sampling.settings.chains import DlgConfig
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import IntegratorName
from tests.sampling.chains import published_oracle
from tests.sampling.chains.published_oracle import INITIAL_LEVELS, N_SKIP, PublishedChain
from tests.sampling.mixture import GaussianMixture, MixtureDenoiser, MixturePosterior

SHAPE = (1, 8, 8)
NUMBERS = [0, 5, 2**40]
SAMPLES = 6
MEANS = torch.rand(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HALF = GaussianMixture(MEANS, torch.tensor([0.1, 0.15, 0.2, 0.3]).double(), torch.full((4,), 0.25).double())
"""Data in 0…1."""
WHOLE = replace(HALF, means_KD=2 * MEANS - 1, deviations_K=2 * HALF.deviations_K)
"""The same in −1…1."""
FINISHERS = {"kar1": published_oracle.kar1, "kar2": published_oracle.kar2, "rk45": published_oracle.rk45}


def bound(config: SamplerConfig) -> Finish:
    return lambda denoiser, x, sigma, label, noise: integrate(denoiser, x, sigma, label, noise, config)


def ours(sampler: IntegratorName, numbers: list[int], **changes: object) -> tuple[list[dict[str, Tensor]], float]:
    """What the chains say of each sample, and their NFE per sample."""
    dlg = DlgConfig.model_validate({"preset": "published", "skip": N_SKIP, "samples_per_chain": SAMPLES} | changes)
    tolerance = 1e-8 if sampler == "rk45" else 1e-5
    config = SamplerConfig(sampler=f"dlg:{sampler}", steps=5, schedule="karras", tolerance=tolerance, dlg=dlg)
    sigma_min, sigma_max = 2 * published_oracle.SIGMA_MIN, 2 * published_oracle.SIGMA_MAX
    level_N = 2 * torch.tensor(published_oracle.LEVELS, dtype=torch.float64)
    denoiser = MixtureDenoiser(WHOLE, sigma_min=sigma_min, sigma_max=sigma_max)
    posterior = MixturePosterior(WHOLE, level_N)
    chains = Dlg(denoiser, posterior, dlg, SeededDraws(3), bound(initial_config(config)))
    start = chains.start(numbers, torch.zeros(len(numbers), dtype=torch.int64), SHAPE, torch.float64)
    found = [{"x": start.x_BCHW, "σ": start.sigma_B}]
    for sample in islice(chains.samples(start, bound(config)), SAMPLES):
        at, selected = sample.chains, sample.selected
        chosen = {"chosen x": selected.x_BCHW, "chosen σ": selected.sigma_B, "every σ": selected.trace_BT}
        found.append({"x": at.x_BCHW, "σ": at.sigma_B, **chosen, "sample": sample.x0_BCHW})
    nfe = sample.chains.nfe_per_sample()
    if sampler != "rk45":
        assert nfe == pytest.approx(planned_nfe(config))
    return found, nfe


def published(sampler: str, number: int) -> list[dict[str, Tensor]]:
    """The same of one published chain, brought to −1…1."""

    def noise(name: str) -> Tensor:
        purpose, step = name.split(" at ")
        drawn = SeededDraws(3).normal(purpose, torch.tensor([number]), torch.tensor([int(step)]), SHAPE)
        return drawn[0].double()

    chain = PublishedChain(HALF, noise)
    x, sigma = chain.start()
    found = [{"x": 2 * x - 1, "σ": torch.tensor(2 * sigma)}]
    for _ in range(SAMPLES):
        x, sigma, x_min, sigma_min, trace = chain.stretch(x, sigma)
        sample = chain.tweedie(FINISHERS[sampler](chain, x_min, sigma_min, "chain/finish"))
        chosen = {"chosen x": 2 * x_min - 1, "chosen σ": torch.tensor(2 * sigma_min)}
        found.append(
            {"x": 2 * x - 1, "σ": torch.tensor(2 * sigma), **chosen}
            | {"every σ": 2 * torch.tensor(trace), "sample": 2 * sample - 1}
        )
    return found


@pytest.mark.parametrize("sampler", FINISHERS)
def test_the_chain_is_the_published_one_step_for_step(sampler):
    together, _ = ours(sampler, NUMBERS)
    earlier = 0
    for row, number in enumerate(NUMBERS):
        expected = published(sampler, number)
        for place, (here, there) in enumerate(zip(together, expected, strict=True)):
            for name, value in there.items():
                apart = (here[name][row] - value).abs().max().item()
                assert apart < 1e-6 * (1 + value.abs().max().item()), f"{name} of sample {place}, chain {number}"
            earlier += place > 0 and not torch.isin(there["chosen σ"], there["every σ"]).item()
    assert earlier > 0, "no stretch was won by the state before it, and the rule is not tested"


@pytest.mark.parametrize(
    "change",
    [
        {"step_size": 0.05},
        {"burn_in_step_size": 0.5},
        {"initial_noise": 0.5},
        {"tweedie": False},
        {"select": "last"},
        {"level_rule": "sample"},
        {"initial_steps": 20},
        {"burn_in_first": 9},
        {"burn_in": 9},
        {"initial": "kar1"},
        {"step_rule": "proportional"},
    ],
)
def test_each_rule_of_the_preset_is_needed(change):
    right, wrong = ours("kar2", NUMBERS)[0][-1]["sample"], ours("kar2", NUMBERS, **change)[0][-1]["sample"]
    assert (right - wrong).abs().max() > 1e-4


def test_the_cost_of_a_published_sample():
    start = 2 * (INITIAL_LEVELS - 1) - 1 + 20
    finish = 2 * 5 - 1 + 1  # KAR2 in six levels, and Tweedie's formula
    assert ours("kar2", NUMBERS)[1] == pytest.approx(start / SAMPLES + N_SKIP + finish)


def test_rk45_takes_no_second_step_of_tweedie():
    with_it, nfe = ours("rk45", NUMBERS[:1])
    without, same = ours("rk45", NUMBERS[:1], tweedie=False)
    assert nfe == same and torch.equal(with_it[-1]["sample"], without[-1]["sample"])
