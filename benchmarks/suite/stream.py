"""Reading shards in the stream's order against a bare loop of tar read and decode, in one thread."""

from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import stream
from benchmarks.suite.figure import Figure, rate
from benchmarks.suite.settings import Settings


def measure(settings: Settings) -> Iterator[Figure]:
    """JPEG images and latents."""
    torch.set_num_threads(1)
    images, latents = (stream.BATCH, stream.BATCH) if settings.small else (stream.IMAGES, stream.LATENTS // 4)
    kinds = (
        ("JPEG 256²", stream.make_images, images, stream.bare_images),
        ("latents 4×32×32 fp16", stream.make_latents, latents, stream.bare_latents),
    )
    for name, make, count, bare in kinds:
        folder = Path(settings.folder) / name.split()[0]
        make(folder, count=count)
        seconds = stream.per_sample(folder, bare, settings.rounds_of(5))
        yield rate(
            f"stream, {name}", "images/s", 1, seconds["stream"], seconds["bare loop"], against="a bare loop"
        )
