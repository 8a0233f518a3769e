"""What a network takes the clean image for, step by step: the frames of an animation of the denoising.

Shapes: B images of a batch.
"""

from collections.abc import Callable
from typing import Final

from torch import Tensor

from ditmoe.sampling.network.denoiser import Denoised, Denoiser

See = Callable[[Tensor, Tensor], None]
"""(sigma_B, x0_BCHW) of an evaluation."""


class WatchedDenoiser(Denoiser):
    """A denoiser whose estimates are shown to others, and are as they were."""

    def __init__(self, denoiser: Denoiser, see: See) -> None:
        super().__init__()
        self._denoiser, self._see = denoiser, see
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max
        self.sigma_prior, self.prior_deviation = denoiser.sigma_prior, denoiser.prior_deviation

    def denoise(self, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Denoised:
        """As that of the denoiser."""
        found = self._denoiser.denoise(x_BCHW, sigma_B, label_B)
        self.nfe, self.network_evaluations = self._denoiser.nfe, self._denoiser.network_evaluations
        self._see(sigma_B, found.x0_BCHW)
        return found

    def own_schedule(self, sigma_B: Tensor, steps: int) -> Tensor:
        """As that of the denoiser."""
        return self._denoiser.own_schedule(sigma_B, steps)


def frame_numbers(steps: int, frames: int) -> list[int]:
    """Which of `steps` are shown: all, or so many at even distances, the first and the last among them."""
    if frames >= steps:
        return list(range(steps))
    if frames == 1:
        return [steps - 1]
    return [round(frame * (steps - 1) / (frames - 1)) for frame in range(frames)]


class Film:
    """The estimates of one batch, one for each noise level that the images went through, the last one the images.

    A step may ask several times at a level, and above it where it adds noise: the last estimate stands for it.
    The images of the batch must go through the same levels.
    """

    def __init__(self, steps: int, frames: int, keep: Callable[[Tensor], Tensor]) -> None:
        """Of a sampler of so many steps; of more steps than frames those of `frame_numbers` are kept.

        Args:
            keep: x0_BCHW → what is kept of it until the batch is done.
        """
        self._keep: Final = keep
        self._chosen: Final = frozenset(frame_numbers(steps, frames))
        self._frames: list[Tensor] = []
        self._number = 0
        self._lowest = float("inf")
        self._newest: Tensor | None = None

    def see(self, sigma_B: Tensor, x0_BCHW: Tensor) -> None:
        """Take the estimate of an evaluation."""
        sigma = float(sigma_B[0])
        if sigma < self._lowest and self._newest is not None:
            if self._number in self._chosen:
                self._frames.append(self._keep(self._newest))
            self._number += 1
        self._lowest = min(sigma, self._lowest)
        # Samplers may use the memory of an estimate for what they make of it.
        self._newest = x0_BCHW.clone()

    def cut(self) -> list[Tensor]:
        """What was kept of the frames; the film is empty then, for the next batch."""
        assert self._newest is not None
        frames = [*self._frames, self._keep(self._newest)]
        self._frames, self._number, self._lowest, self._newest = [], 0, float("inf"), None
        return frames


def watched(denoiser: Denoiser, film: Film | None, on_evaluation: Callable[[int], None] | None) -> Denoiser:
    """The denoiser, with a film of its estimates where one is wanted.

    Args:
        on_evaluation: called after each evaluation with the images that it was of; None: nobody is.
    """
    if film is None and on_evaluation is None:
        return denoiser

    def see(sigma_B: Tensor, x0_BCHW: Tensor) -> None:
        if film is not None:
            film.see(sigma_B, x0_BCHW)
        if on_evaluation is not None:
            on_evaluation(len(sigma_B))

    return WatchedDenoiser(denoiser, see)
