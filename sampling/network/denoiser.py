"""The one view that samplers have of a model: the denoiser D(x; σ, label) of the variance-exploding process.

There x = x_0 + σ·ε, D estimates x_0, and the score is (D − x)/σ², whatever the network was trained to predict
(Karras et al., arXiv 2206.00364, eq. 3). A network sees x divided by a scale s(σ) at a timestep t(σ):

    objective        s(σ)       t(σ)                                  D
    rectified flow   1 + σ      σ/(1 + σ)                             x/s − t·v
    DDPM             √(1 + σ²)  the timestep with σ² = (1 − ᾱ)/ᾱ      x − σ·ε

Shapes: B images, C channels, N noise levels. σ is float64 per image, images are float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple, cast

import torch
from torch import Tensor

from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.schedule import DdpmSchedule, evenly_spaced
from ditmoe.sampling.network.pace import Evaluation, Forecast, Pace, SplitNetwork
from ditmoe.sampling.settings.config import SamplerConfig

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(input_BCHW, timestep_B, label_B) → prediction, `[B, C or 2C, H, W]`."""

FLOW_SIGMA_MIN: Final = 0.002
FLOW_SIGMA_MAX: Final = 80.0
"""The range of a flow's σ on grids in σ, EDM's: t from 0.002 to 0.988. Training hardly ever draws t beyond it."""
FLOW_SIGMA_PRIOR: Final = 2.0**26
"""Stands for t = 1: the smallest power of two at which t = σ/(1 + σ) is 1 and x/(1 + σ) is ε in float32."""


class Denoised(NamedTuple):
    """A denoiser's estimate."""

    x0_BCHW: Tensor
    """D(x; σ, label)."""
    variance_share_BCHW: Tensor | None
    """Of a network with learned range: where the log variance of an ancestral step lies, 0 at β̃ and 1 at β."""


StepTaken = Callable[[Tensor, Tensor], None]
"""(taken_B, x0_BCHW): which images of the batch took a step, bool, and D where each is now."""


class Denoiser(ABC):
    """D(x; σ, label) with σ per image; counts what it is asked."""

    sigma_min: float
    """Smallest σ at which the network was trained, where grids in σ end."""
    sigma_max: float
    """Largest σ at which D is to be trusted, where grids in σ start."""
    sigma_prior: float
    """σ of pure noise, where the objective's own schedule starts."""
    prior_deviation: float
    """Deviation of x in pure noise at `sigma_prior`, which the network is shown as standard normal."""

    def __init__(self) -> None:
        self.nfe = 0
        """Evaluations of D so far, each on a whole batch; guidance does not count twice."""
        self.network_evaluations = 0
        """Images per image asked for that went through the network: 2 for each evaluation under guidance."""
        self.cached_evaluations = 0
        """Those whose blocks were foretold in its place."""

    def __call__(self, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        """D(x; σ, label), `[B, C, H, W]`. One evaluation."""
        return self.denoise(x_BCHW, sigma_B, label_B).x0_BCHW

    @abstractmethod
    def denoise(self, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Denoised:
        """D and the learned variance where there is one. One evaluation.

        Args:
            x_BCHW: noisy images in the variance-exploding view, float32.
            sigma_B: their noise levels, float64 (float32 is within rounding of a level), > 0.
            label_B: classes, int64.
        """

    @contextmanager
    def own_steps(self) -> Iterator[StepTaken]:
        """Around an integrator whose images take steps of their own, which it tells as it takes them.

        Its other evaluations are no steps. It matters to those who watch; here nobody does.
        """
        yield lambda taken_B, x0_BCHW: None

    def follow(self, pace: Pace | None) -> None:
        """Begin a batch whose evaluations do what is told; None: each is full, and guided if any is."""
        assert pace is None, "this denoiser asks no network"

    @abstractmethod
    def own_schedule(self, sigma_B: Tensor, steps: int) -> Tensor:
        """Noise levels of the objective's own sampler from each image's σ down to 0, float64 `[B, steps + 1]`."""


class NetworkDenoiser(Denoiser):
    """A denoiser made of a network, with classifier-free guidance (Ho & Salimans, arXiv 2207.12598).

    A guided D is not the posterior mean of any noised distribution.
    """

    def __init__(
        self, network: Network, null_label: int, *, cfg_scale: float = 1.0, cfg_channels: int | None = None
    ) -> None:
        """Wrap a network.

        Args:
            null_label: the label that stands for no class.
            cfg_scale: s of prediction = null + s·(class − null); 1 asks the network once.
            cfg_channels: guide only the first of the predicted channels; None: all.
        """
        super().__init__()
        self._network = network
        self._null_label = null_label
        self._cfg_scale = cfg_scale
        self._cfg_channels = cfg_channels
        self._pace: Pace | None = None
        self._forecast: Forecast | None = None
        self._first = 0

    def follow(self, pace: Pace | None) -> None:
        """As of the base class. Foretelling wants a `SplitNetwork`."""
        self._pace, self._first = pace, self.nfe
        foretells = pace is not None and pace.caches
        self._forecast = Forecast(cast(SplitNetwork, self._network), pace.order) if pace and foretells else None

    def _predict(self, input_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """The guided prediction and the channels after it (of the class, unguided), both `[B, C, H, W]`."""
        batch, channels = input_BCHW.shape[:2]
        evaluation = None if self._pace is None else self._pace[self.nfe - self._first]
        self.nfe += 1
        guides = self._cfg_scale != 1 and (evaluation is None or evaluation.guided)
        rows = 2 if guides else 1
        if evaluation is None or evaluation.full:
            self.network_evaluations += rows
        else:
            self.cached_evaluations += rows
        if not guides:
            output = self._ask(evaluation, input_BCHW, timestep_B, label_B).float()
            prediction = output[:, :channels]
        else:
            null_B = torch.full_like(label_B, self._null_label)
            both = self._ask(
                evaluation,
                torch.cat((input_BCHW, input_BCHW)),
                torch.cat((timestep_B, timestep_B)),
                torch.cat((label_B, null_B)),
            ).float()
            output, null = both[:batch], both[batch:, :channels]
            guided = self._cfg_channels or channels
            prediction = output[:, :channels].clone()
            prediction[:, :guided] = torch.lerp(null[:, :guided], prediction[:, :guided], self._cfg_scale)
        return prediction, output[:, channels:] if output.shape[1] == 2 * channels else None

    def _ask(
        self, evaluation: Evaluation | None, input_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor
    ) -> Tensor:
        """What the network predicts of these rows, from its blocks or with what they give foretold."""
        if evaluation is None or self._forecast is None:
            return self._network(input_BCHW, timestep_B, label_B)
        return self._forecast.predict(evaluation, input_BCHW, timestep_B, label_B)


class FlowDenoiser(NetworkDenoiser):
    """The view of a rectified flow: z = x/(1 + σ), t = σ/(1 + σ), D = z − t·v(z, t)."""

    sigma_min = FLOW_SIGMA_MIN
    sigma_max = FLOW_SIGMA_MAX
    sigma_prior = FLOW_SIGMA_PRIOR
    prior_deviation = FLOW_SIGMA_PRIOR  # to the last bit of float32, 1 + σ is σ

    def denoise(self, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Denoised:
        """D = z − t·v. There is no learned variance: the channels for it are not trained."""
        sigma_B = sigma_B.double()
        z_BCHW = x_BCHW / column(1 + sigma_B, x_BCHW)
        t_B = (sigma_B / (1 + sigma_B)).to(x_BCHW.dtype)
        v_BCHW, _ = self._predict(z_BCHW, t_B, label_B)
        return Denoised(z_BCHW - column(t_B, x_BCHW) * v_BCHW, None)

    def own_schedule(self, sigma_B: Tensor, steps: int) -> Tensor:
        """`flow_grid`; from `sigma_prior` the published sampler's."""
        return flow_grid(sigma_B, steps)


class DdpmDenoiser(NetworkDenoiser):
    """The view of a DDPM network: x_t = x/√(1 + σ²), D = x − σ·ε(x_t, t), exact at the schedule's levels."""

    def __init__(
        self,
        network: Network,
        null_label: int,
        *,
        cfg_scale: float = 1.0,
        cfg_channels: int | None = None,
        timestep: Literal["interpolate", "nearest"] = "interpolate",
    ) -> None:
        """As the base class; `timestep` says which t the network gets at a σ between two levels."""
        super().__init__(network, null_label, cfg_scale=cfg_scale, cfg_channels=cfg_channels)
        self._timestep = timestep
        alphas_bar = DdpmSchedule.linear().alphas_bar
        self._log_sigmas = 0.5 * (torch.log1p(-alphas_bar) - alphas_bar.log())
        self._timesteps = torch.arange(len(alphas_bar), dtype=torch.float64)
        self.sigma_min = float(self._log_sigmas[0].exp())
        self.sigma_max = self.sigma_prior = float(self._log_sigmas[-1].exp())
        # The published sampler starts at x_T = ε, and x is x_T/√ᾱ_T.
        self.prior_deviation = float(alphas_bar[-1].rsqrt())

    def timestep_of(self, sigma_B: Tensor) -> Tensor:
        """σ → t in 0…999, float64, any shape: linear in log σ between levels, clipped to the outer ones."""
        self._place(sigma_B.device)
        t = _interpolate(sigma_B.double().log(), self._log_sigmas, self._timesteps)
        return torch.where((t - t.round()).abs() < 1e-4, t.round(), t)  # rounding of σ, also of a float32 one

    def sigma_of(self, timestep: Tensor) -> Tensor:
        """t → σ, float64, any shape: the inverse of `timestep_of`."""
        self._place(timestep.device)
        return _interpolate(timestep.double(), self._timesteps, self._log_sigmas).exp()

    def _place(self, device: torch.device) -> None:
        """Put the tables there, once: a copy to a GPU at every evaluation would be waited for."""
        self._log_sigmas, self._timesteps = self._log_sigmas.to(device), self._timesteps.to(device)

    def denoise(self, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Denoised:
        """D = x − σ·ε, and the learned variance's share v = (output + 1)/2 (arXiv 2102.09672, eq. 15)."""
        sigma_B = sigma_B.double()
        t_B = self.timestep_of(sigma_B)
        if self._timestep == "nearest":
            t_B = t_B.round()
        input_BCHW = x_BCHW / column((1 + sigma_B.square()).sqrt(), x_BCHW)
        epsilon_BCHW, variance = self._predict(input_BCHW, t_B.to(x_BCHW.dtype), label_B)
        x0_BCHW = x_BCHW - column(sigma_B, x_BCHW) * epsilon_BCHW
        return Denoised(x0_BCHW, None if variance is None else (variance + 1) / 2)

    def own_schedule(self, sigma_B: Tensor, steps: int) -> Tensor:
        """Timesteps in equal steps from the t of σ down to 0, each rounded to a level, then σ = 0.

        From `sigma_max` with 2 to 1000 steps these are the levels of the respaced schedule; a single step goes
        from σ to 0, where the published choice would show pure noise to the network as timestep 0. Where the
        start lies so low that several steps would fall on one level, they are not rounded.
        """
        sigma_B = sigma_B.double()
        last_B = self.timestep_of(sigma_B)
        t_BN = evenly_spaced(last_B, steps).flip(1)
        t_BN = torch.where(last_B[:, None] >= steps - 1, t_BN.round(), t_BN)
        levels_BN = torch.minimum(self.sigma_of(t_BN), sigma_B[:, None])
        return torch.cat((sigma_B[:, None], levels_BN[:, 1:], torch.zeros_like(sigma_B)[:, None]), dim=1)


def flow_grid(sigma_B: Tensor, steps: int) -> Tensor:
    """σ at t = σ/(1 + σ) in equal steps from each image's t down to 0, float64 `[B, steps + 1]`."""
    sigma_B1 = sigma_B.double()[:, None]
    share_N = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=sigma_B.device)[1:]
    t_BN = sigma_B1 / (1 + sigma_B1) * share_N
    # The first level is the given one, which 1 − t would round at the prior.
    return torch.cat((sigma_B1, t_BN / (1 - t_BN)), dim=1)


def make_denoiser(
    network: Network, model: ModelConfig, objective: ObjectiveConfig, sampler: SamplerConfig
) -> NetworkDenoiser:
    """The denoiser of a network, guided as the sampler's settings say.

    Raises:
        UserError: guidance asks for more channels than there are, or for a null class that was never trained.
    """
    assert model.num_classes is not None
    check_guidance(model, sampler)
    scale, guided = sampler.cfg_scale, sampler.cfg_channels
    if objective.kind == "ddpm":
        return DdpmDenoiser(
            network, model.num_classes, cfg_scale=scale, cfg_channels=guided, timestep=sampler.ddpm_timestep
        )
    return FlowDenoiser(network, model.num_classes, cfg_scale=scale, cfg_channels=guided)


def check_guidance(model: ModelConfig, sampler: SamplerConfig) -> None:
    """UserError where a complete model cannot be guided as the sampler's settings say."""
    assert model.channels is not None
    if sampler.cfg_channels is not None and sampler.cfg_channels > model.channels:
        raise UserError(
            f"cfg_channels = {sampler.cfg_channels}: expected at most the model's {model.channels} channels"
        )
    if sampler.cfg_scale != 1 and model.label_dropout == 0:
        raise UserError(
            f"cfg_scale = {sampler.cfg_scale:g}: the model was trained with label_dropout = 0 and "
            "has no null class; expected cfg_scale = 1"
        )


def _interpolate(at: Tensor, x_N: Tensor, y_N: Tensor) -> Tensor:
    """The piecewise linear function through (x, y), x rising, at any points; constant beyond its ends."""
    upper = torch.searchsorted(x_N, at.contiguous()).clamp(1, len(x_N) - 1)
    low, high = x_N[upper - 1], x_N[upper]
    return torch.lerp(y_N[upper - 1], y_N[upper], ((at - low) / (high - low)).clamp(0, 1))


def column(value_B: Tensor, like_BCHW: Tensor) -> Tensor:
    """Per-image numbers as a factor of images, `[B, 1, …]` of the images' dtype and number of dims."""
    return value_B.to(like_BCHW.dtype).view(-1, *(1,) * (like_BCHW.ndim - 1))
