"""Denoising Langevin Gibbs (DLG): chains through images and noise levels, whose states an integrator finishes.

DMCMC (arXiv 2209.14593): a chain walks in the product space of images and σ, mostly at small σ, so that only the
last part of the reverse process is left for each sample. Chains run in batches of any classes; each is a function
of (seed, its number) and its class alone, to rounding. Rounding can turn a close choice between two levels, after
which a chain goes another way, so that where bits matter batches should have one shape.

    chains = dlg.start(range(64), label_B, shape, device)
    for sample in dlg.samples(chains, finish):
        sample.x0_BCHW  # and sample.chains, which can continue

Shapes: B chains.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ditmoe.model.errors import UserError
from ditmoe.sampling.chains.langevin import State, draw_sigma, langevin_gibbs, smaller
from ditmoe.sampling.chains.state import ChainDraws, Chains
from ditmoe.sampling.integrators.flow import Drawn, NoiseSource
from ditmoe.sampling.network.denoiser import Denoiser
from ditmoe.sampling.noise_level.levels import NoisePosterior
from ditmoe.sampling.settings.chains import DlgConfig
from ditmoe.sampling.settings.names import StepRule


class Finish(Protocol):
    """An integrator with its settings bound: from (x, σ) to samples at σ = 0."""

    def __call__(
        self, denoiser: Denoiser, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor, noise: NoiseSource
    ) -> Drawn:
        """Arguments as those of an integrator, `noise` for those that want some."""
        ...


class Selected(NamedTuple):
    """The states of a stretch that are to be denoised, one of each chain."""

    x_BCHW: Tensor
    sigma_B: Tensor
    label_B: Tensor
    chain_B: Tensor
    step_B: Tensor
    """Steps of the chain at the end of the stretch."""
    number_B: Tensor
    """Place of the sample among those of its chain, from 0."""
    trace_BT: Tensor
    """σ after each step of the stretch, float64."""


class DlgSample(NamedTuple):
    """A sample of each chain."""

    x0_BCHW: Tensor
    selected: Selected
    """What it was made of."""
    chains: Chains
    """The chains after it, which go on from their last states."""


@dataclass(frozen=True)
class _ChainNoise:
    """Noise for an integrator that starts or finishes chains at their present steps."""

    draws: ChainDraws
    purpose: str
    chain_B: Tensor
    step_B: Tensor
    like_BCHW: Tensor

    def __call__(self, step: int) -> Tensor:
        purpose, shape = f"{self.purpose} {step}", tuple(self.like_BCHW.shape[1:])
        return self.draws.normal(purpose, self.chain_B, self.step_B, shape).to(self.like_BCHW)


@dataclass(frozen=True)
class Dlg:
    """Moves chains. It keeps no state of its own but the denoiser's count of evaluations."""

    denoiser: Denoiser
    posterior: NoisePosterior
    config: DlgConfig
    draws: ChainDraws
    """`SeededDraws(seed)`, by which a chain is a function of (seed, number)."""
    initial: Finish
    """Draws, from pure noise at `sigma_max`, what a chain starts from; published: KAR2 in 20 levels."""

    def start(
        self,
        numbers: Sequence[int],
        label_B: Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
    ) -> Chains:
        """Chains at the end of their burn-in, on the labels' device.

        Args:
            numbers: number of each chain, 0 … 2^63 − 1.
            label_B: class of each chain, int64.
            shape: (C, H, W) of an image.

        Raises:
            UserError: `class_scales` has no factor for a class.
        """
        scales = self.config.class_scales
        if scales is not None and len(label_B) and int(label_B.max()) >= len(scales):
            raise UserError(
                f"class_scales has {len(scales)} numbers, and there is a class {int(label_B.max())}; "
                "expected one for each class"
            )
        chain_B = torch.tensor(numbers, dtype=torch.int64)
        zero_B = torch.zeros_like(chain_B)
        x_BCHW = torch.zeros(len(chain_B), *shape, dtype=dtype, device=label_B.device)
        sigma_B = torch.zeros(len(chain_B), dtype=torch.float64, device=label_B.device)
        return self._begin(Chains(x_BCHW, sigma_B, label_B, chain_B, zero_B, zero_B, zero_B, zero_B, zero_B))

    def advance(self, chains: Chains) -> tuple[Chains, Selected]:
        """One stretch: the chains after it, and the state of each that is to be denoised."""
        every = self.config.restart_every
        if every is not None:
            due_R = ((chains.samples_B > 0) & (chains.samples_B % every == 0)).nonzero()[:, 0]
            if len(due_R):
                chains = chains.with_rows(due_R, self._begin(chains.rows(due_R)))
        before = self.denoiser.nfe
        trace: list[Tensor] = []
        step_size_B = self._step_size(chains.label_B)
        for _ in range(self.config.thin):
            best = State(chains.x_BCHW, chains.sigma_B)  # the state before a stretch is the first to choose from
            for _ in range(self.config.skip):
                chains = self._step(chains, step_size_B, self.config.step_rule)
                now = State(chains.x_BCHW, chains.sigma_B)
                trace.append(now.sigma_B)
                best = smaller(best, now) if self.config.select == "smallest" else now
        selected = Selected(
            best.x_BCHW,
            best.sigma_B,
            chains.label_B,
            chains.chain_B,
            chains.step_B,
            chains.samples_B,
            torch.stack(trace, 1),
        )
        spent = self.denoiser.nfe - before
        return (
            replace(chains, samples_B=chains.samples_B + 1, chain_nfe_B=chains.chain_nfe_B + spent),
            selected,
        )

    def finish(self, selected: Selected, finish: Finish) -> Drawn:
        """Denoise selected states, each from its own σ."""
        noise = _ChainNoise(self.draws, "chain/finish", selected.chain_B, selected.step_B, selected.x_BCHW)
        return finish(self.denoiser, selected.x_BCHW, selected.sigma_B, selected.label_B, noise)

    def samples(self, chains: Chains, finish: Finish) -> Iterator[DlgSample]:
        """Samples of the chains without end, one of each chain at a time."""
        while True:
            chains, selected = self.advance(chains)
            drawn = self.finish(selected, finish)
            chains = replace(chains, finish_nfe_B=chains.finish_nfe_B + _spent(drawn))
            yield DlgSample(drawn.x_BCHW, selected, chains)

    def _begin(self, chains: Chains) -> Chains:
        """The chains started from pure noise and burnt in; their counts go on."""
        config = self.config

        def fresh(purpose: str) -> NoiseSource:
            return _ChainNoise(self.draws, purpose, chains.chain_B, chains.step_B, chains.x_BCHW)

        sigma_B = torch.full_like(chains.sigma_B, self.denoiser.sigma_max)
        x_BCHW = fresh("chain/start")(0) * self.denoiser.sigma_max
        drawn = self.initial(self.denoiser, x_BCHW, sigma_B, chains.label_B, fresh("chain/initial"))
        before = self.denoiser.nfe
        x_BCHW = drawn.x_BCHW + config.initial_noise * fresh("chain/start")(1)
        uniform_B = self.draws.uniform("chain/start level", chains.chain_B, chains.step_B)
        sigma_B = draw_sigma(self.posterior, x_BCHW, chains.label_B, config.level_rule, uniform_B)
        velocity_BCHW = fresh("chain/start")(2) if config.step_rule == "underdamped" else None
        chains = replace(chains, x_BCHW=x_BCHW, sigma_B=sigma_B, velocity_BCHW=velocity_BCHW)
        for _ in range(config.burn_in_first):
            chains = self._step(chains, torch.full_like(sigma_B, config.burn_in_step_size), "constant")
        step_size_B = self._step_size(chains.label_B)
        for _ in range(config.burn_in):
            chains = self._step(chains, step_size_B, config.step_rule)
        spent_B = _spent(drawn) + self.denoiser.nfe - before
        return replace(chains, initial_nfe_B=chains.initial_nfe_B + spent_B)

    def _step(self, chains: Chains, step_size_B: Tensor, step_rule: StepRule) -> Chains:
        """One Langevin–Gibbs step of every chain."""
        shape = tuple(chains.x_BCHW.shape[1:])
        noise_BCHW = self.draws.normal("chain/noise", chains.chain_B, chains.step_B, shape).to(chains.x_BCHW)
        uniform_B = self.draws.uniform("chain/level", chains.chain_B, chains.step_B)
        state = langevin_gibbs(
            self.denoiser,
            self.posterior,
            State(chains.x_BCHW, chains.sigma_B, chains.velocity_BCHW),
            chains.label_B,
            step_size_B,
            noise_BCHW,
            uniform_B,
            step_rule=step_rule,
            level_rule=self.config.level_rule,
            momentum=self.config.momentum,
        )
        return replace(
            chains,
            x_BCHW=state.x_BCHW,
            sigma_B=state.sigma_B,
            velocity_BCHW=state.velocity_BCHW,
            step_B=chains.step_B + 1,
        )

    def _step_size(self, label_B: Tensor) -> Tensor:
        """η of each chain, float64 `[B]`; to be asked once for many steps, as it is copied to the device."""
        scales = torch.tensor(self.config.class_scales or (1.0,), dtype=torch.float64, device=label_B.device)
        scale_B = scales[label_B] if self.config.class_scales else scales.expand(len(label_B))
        return self.config.step_size * scale_B


def _spent(drawn: Drawn) -> Tensor | int:
    """Evaluations of each image, on the CPU as the counts of chains are."""
    return drawn.nfe if drawn.nfe_B is None else drawn.nfe_B.cpu()
