"""What a network takes the clean image for, step by step: the frames of an animation of the denoising.

Shapes: B images of a batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import torch
from torch import Tensor

from ditmoe.sampling.network.denoiser import Denoised, Denoiser, StepTaken
from ditmoe.sampling.network.pace import Pace


class Watcher(Protocol):
    """Takes what a network estimates on the way."""

    def see(self, sigma_B: Tensor, x0_BCHW: Tensor) -> None:
        """An evaluation of an integrator whose images step together."""

    def take(self, taken_B: Tensor, x0_BCHW: Tensor) -> None:
        """A step of those images that took one, bool `[B]`, and the estimates there."""


class WatchedDenoiser(Denoiser):
    """A denoiser whose estimates are shown to others, and are as they were."""

    def __init__(
        self, denoiser: Denoiser, watcher: Watcher | None, on_evaluation: Callable[[int], None] | None
    ) -> None:
        super().__init__()
        self._denoiser, self._watcher, self._on_evaluation = denoiser, watcher, on_evaluation
        self._steps_are_told = False
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max
        self.sigma_prior, self.prior_deviation = denoiser.sigma_prior, denoiser.prior_deviation

    def denoise(self, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Denoised:
        """As that of the denoiser."""
        before = self._denoiser.network_evaluations
        found = self._denoiser.denoise(x_BCHW, sigma_B, label_B)
        self.nfe, self.network_evaluations = self._denoiser.nfe, self._denoiser.network_evaluations
        self.cached_evaluations = self._denoiser.cached_evaluations
        if self._watcher is not None and not self._steps_are_told:
            self._watcher.see(sigma_B, found.x0_BCHW)
        rows = (self.network_evaluations - before) * len(sigma_B)
        if self._on_evaluation is not None and rows:
            self._on_evaluation(rows)
        return found

    @contextmanager
    def own_steps(self) -> Iterator[StepTaken]:
        """The steps are shown, in place of the evaluations."""
        if self._watcher is None:
            yield lambda taken_B, x0_BCHW: None
            return
        self._steps_are_told = True
        try:
            yield self._watcher.take
        finally:
            self._steps_are_told = False

    def follow(self, pace: Pace | None) -> None:
        """As that of the denoiser."""
        self._denoiser.follow(pace)

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

    def take(self, taken_B: Tensor, x0_BCHW: Tensor) -> None:
        """Images that step each at their own pace have a `PacedFilm`."""
        raise AssertionError("the images of this film go through the same levels")

    def cut(self) -> list[Tensor]:
        """What was kept of the frames; the film is empty then, for the next batch."""
        assert self._newest is not None
        frames = [*self._frames, self._keep(self._newest)]
        self._frames, self._number, self._lowest, self._newest = [], 0, float("inf"), None
        return frames


class PacedFilm:
    """The estimates of one batch whose images step each at their own pace: those of `rk45`, and of chains.

    Every image has all its steps, spread evenly over the film: its last frame is its last step.
    """

    def __init__(self, images: int, frames: int, keep: Callable[[Tensor], Tensor]) -> None:
        """Nothing is seen yet.

        Args:
            images: B of the batch.
            frames: at most.
            keep: x0_BCHW → what is kept of it until the batch is done.
        """
        self._images, self._count, self._keep = images, frames, keep
        self._kept: list[list[Tensor]] = [[] for _ in range(images)]

    def see(self, sigma_B: Tensor, x0_BCHW: Tensor) -> None:
        """All images take a step."""
        self.take(torch.ones(len(sigma_B), dtype=torch.bool, device=x0_BCHW.device), x0_BCHW)

    def take(self, taken_B: Tensor, x0_BCHW: Tensor) -> None:
        """Some images take a step."""
        assert len(taken_B) == self._images, "another batch than that of the film"
        rows = taken_B.nonzero()[:, 0]
        if len(rows):
            for row, image in zip(rows.tolist(), self._keep(x0_BCHW[rows]), strict=True):
                self._kept[row].append(image)

    def cut(self) -> list[Tensor]:
        """The frames, each of all images; the film is empty then."""
        longest = max(map(len, self._kept))
        count = min(self._count, longest)
        frames = [
            torch.stack([kept[_spread(frame, count, len(kept))] for kept in self._kept]) for frame in range(count)
        ]
        self._kept = [[] for _ in range(self._images)]
        return frames


def stretched(frames_BFHWC: Tensor, frames: int) -> Tensor:
    """As many frames as asked for: some stand for longer."""
    there = frames_BFHWC.shape[1]
    return frames_BFHWC[:, [_spread(frame, frames, there) for frame in range(frames)]]


def _spread(place: int, places: int, of: int) -> int:
    """Which of `of` things stands at a place of `places`: the first at the first, the last at the last."""
    return of - 1 if places == 1 else round(place * (of - 1) / (places - 1))


def watched(denoiser: Denoiser, film: Watcher | None, on_evaluation: Callable[[int], None] | None) -> Denoiser:
    """The denoiser, with a film of its estimates where one is wanted.

    Args:
        on_evaluation: called after each evaluation with the rows that went through the network for it; None:
            nobody is.
    """
    if film is None and on_evaluation is None:
        return denoiser
    return WatchedDenoiser(denoiser, film, on_evaluation)
