"""The noise of images, drawn by threads before it is asked for: the network does not wait for it.

What is drawn depends on (seed, purpose, image number) alone, never on who draws it or when.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from ditmoe.model.randomness import fill_normal

MOST_THREADS: Final = 4
"""Threads that draw noise: more would wait for each other while they begin each image's stream."""


@contextmanager
def noise_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that noise is drawn in; what waits at the end is not drawn any more."""
    pool = ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0))), "noise")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class ImageNoise:
    """The noise of some images: their streams hold one stretch for each step.

    With `threads`, the noise of a step is drawn while the step before is at work.
    """

    seed: int
    image_numbers: Sequence[int]
    shape: tuple[int, ...]
    """(C, H, W) of one image."""
    device: torch.device
    threads: ThreadPoolExecutor | None = None
    """None: noise is drawn when it is asked for."""
    seeds: Sequence[int] | None = None
    """Of each image one of its own; None: all have `seed`."""
    _ahead: dict[str, "_Pending"] = field(default_factory=dict, init=False, repr=False)

    def prepare(self) -> None:
        """Have threads draw what the images start from."""
        self._begin("image/start")

    def initial(self) -> Tensor:
        """What the images start from, standard normal `[B, C, H, W]`."""
        return self._draw("image/start")

    def __call__(self, step: int) -> Tensor:
        """What a stochastic integrator adds at a step, standard normal `[B, C, H, W]`."""
        drawn = self._draw(f"image/step {step}")
        self._begin(f"image/step {step + 1}")
        return drawn

    def forget(self) -> None:
        """Give up what was drawn ahead and is not wanted: there is no step after the last."""
        for pending in self._ahead.values():
            for future in pending.futures:
                future.cancel()
        self._ahead.clear()

    def _begin(self, purpose: str) -> None:
        if self.threads is not None and purpose not in self._ahead:
            self._ahead[purpose] = _Pending(self, purpose, self.threads)

    def _draw(self, purpose: str) -> Tensor:
        self._begin(purpose)
        out_BCHW = self._ahead.pop(purpose).result() if self.threads is not None else self._empty()
        if self.threads is None:
            self.fill(out_BCHW, slice(None), purpose)
        # From pinned memory, which is not used anew before the copy is done.
        return out_BCHW.to(self.device, non_blocking=True)

    def fill(self, out_RCHW: Tensor, rows: slice, purpose: str) -> None:
        """Draw the noise of some of the images."""
        numbers = self.image_numbers[rows]
        if self.seeds is None:
            fill_normal(out_RCHW, self.seed, purpose, numbers)
            return
        for row, (seed, number) in enumerate(zip(self.seeds[rows], numbers, strict=True)):
            fill_normal(out_RCHW[row : row + 1], seed, purpose, [number])

    def _empty(self) -> Tensor:
        return torch.empty(len(self.image_numbers), *self.shape, pin_memory=self.device.type == "cuda")


class _Pending:
    """Noise on its way: each thread fills some rows."""

    def __init__(self, noise: ImageNoise, purpose: str, threads: ThreadPoolExecutor) -> None:
        self._out_BCHW = noise._empty()
        share = -(-len(noise.image_numbers) // MOST_THREADS)
        self.futures: list[Future[None]] = [
            threads.submit(noise.fill, self._out_BCHW[first : first + share], slice(first, first + share), purpose)
            for first in range(0, len(noise.image_numbers), share)
        ]

    def result(self) -> Tensor:
        """All rows, waited for."""
        for future in self.futures:
            future.result()
        return self._out_BCHW
