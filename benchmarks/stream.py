"""Reading shards on one core: the stream against a bare loop of tar read and decode, on the same shards.

    python benchmarks/stream.py [--repeats 5] [--folder /tmp] [--endless 1000000]

The bare loop opens each tar with `tarfile`, reads its members in their order and decodes them: no order, no
batches, no checks. Both run in one process and thread, and take turns, so that a noisy machine meets both; their
ratio is the figure. Latents are drawn from their moments in both, the bare loop's noise coming from one generator.

Then: how long a resume at a random position takes until its first batch, and the resident memory over `--endless`
latents (0: not measured).
"""

import argparse
import io
import platform
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.shapes import Shapes
from ditmoe.data.shards.index import DatasetIndex, LatentFacts, load_index, write_index
from ditmoe.data.shards.latents import LatentFormat, encode_latent
from ditmoe.data.shards.writer import PackedSample, ShardLimits, write_shards
from ditmoe.data.stream.config import DataConfig
from ditmoe.data.stream.dataset import open_dataset
from ditmoe.data.stream.stream import Batch, dealing_of, open_stream

IMAGES: Final = 2_000
LATENTS: Final = 20_000
PER_SHARD: Final = 1_000
BATCH: Final = 32
LATENT_SHAPE: Final = (4, 32, 32)
SCALE: Final = 0.18215


def make_images(folder: Path, count: int = IMAGES) -> None:
    """Photographs would do better; what counts is that they are JPEG of 256×256."""
    settings = PackSettings(format="jpg", limits=ShardLimits(samples=PER_SHARD // 4))
    pack(Shapes(count, 10, 256, seed=0), folder, settings)


def make_latents(folder: Path, format: LatentFormat = "npy", count: int = LATENTS) -> None:
    """Moments in float16, as `ditmoe data encode` writes them, of random numbers."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()

    def samples() -> Iterator[PackedSample]:
        for number in range(count):
            mean, std = torch.randn(2, *LATENT_SHAPE, generator=generator)
            data = encode_latent(mean, std.abs(), "float16", format)
            yield PackedSample(f"{number:08d}", f"moments.{format}", data, number % 10, {"source": "random"})

    entries = write_shards(folder, "latents", samples(), ShardLimits(samples=PER_SHARD))
    index = DatasetIndex(
        name="latents",
        image_size=LATENT_SHAPE[1],
        channels=LATENT_SHAPE[0],
        num_classes=10,
        class_names=tuple(map(str, range(10))),
        latents=LatentFacts(vae="none", vae_sha256="0" * 64, scale=SCALE, pixels=256, dtype="float16"),
        shards=tuple(entries),
    )
    write_index(folder, index)


def bare_images(folder: Path) -> int:
    """Read and decode every image and label; how many there are."""
    count = 0
    for shard in load_index(folder).shards:
        with tarfile.open(folder / shard.file, "r:") as tar:
            for member in tar:
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".jpg"):
                    np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                    count += 1
                elif member.name.endswith(".cls"):
                    int(data)
    return count


def bare_latents(folder: Path) -> int:
    """Read, decode and draw every latent, and read its label; how many there are."""
    generator = np.random.default_rng(0)
    count = 0
    for shard in load_index(folder).shards:
        with tarfile.open(folder / shard.file, "r:") as tar:
            for member in tar:
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".npy"):
                    mean, std = np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32)
                    mean + std * generator.standard_normal(LATENT_SHAPE, dtype=np.float32) * np.float32(SCALE)
                    count += 1
                elif member.name.endswith(".cls"):
                    int(data)
    return count


def batches(folder: Path, start: int = 0, **settings: Any) -> Iterator[Batch]:
    """The stream, in this process."""
    config = DataConfig.model_validate({"sources": [{"path": str(folder)}], "workers": 0, **settings})
    return open_stream(open_dataset(config, 0), dealing_of(config, start=start, micro_batch=BATCH, ranks=1))


def streamed(folder: Path) -> int:
    """Read one epoch in batches; how many samples that are."""
    steps = load_index(folder).total // BATCH
    with closing(batches(folder)) as stream:  # type: ignore[type-var]
        return sum(len(batch.keys) for batch in islice(stream, steps))


def per_sample(folder: Path, bare: Callable[[Path], int], repeats: int) -> dict[str, list[float]]:
    """Seconds of a sample in each, in turns."""
    seconds: dict[str, list[float]] = {"bare loop": [], "stream": []}
    for _ in range(repeats):
        for what, read in (("bare loop", bare), ("stream", streamed)):
            began = time.perf_counter()
            count = read(folder)
            seconds[what].append((time.perf_counter() - began) / count)
    return seconds


def compare(name: str, folder: Path, bare: Callable[[Path], int], repeats: int) -> None:
    """Samples per second of both, in turns, and the median of their ratios."""
    seconds = per_sample(folder, bare, repeats)
    ratios = [theirs / ours for ours, theirs in zip(seconds["stream"], seconds["bare loop"], strict=True)]
    theirs, ours = (1 / statistics.median(seconds[what]) for what in ("bare loop", "stream"))
    print(
        f"{name:<22}{theirs:>14,.0f}{ours:>14,.0f}"
        f"{statistics.median(ratios):>10.2f}   ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def first_batch(name: str, folder: Path, repeats: int) -> None:
    """Seconds from opening the dataset at a random position to the first batch, which is of so many lanes."""
    index = load_index(folder)
    lanes = min(DataConfig.model_fields["lanes"].default, BATCH)
    chosen = random.Random(0)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        with closing(batches(folder, start=chosen.randrange(10 * index.total))) as stream:  # type: ignore[type-var]
            next(stream)
        seconds.append(time.perf_counter() - began)
    print(f"{name:<22}{statistics.median(seconds):>14.2f} s at most {max(seconds):.2f} s ({lanes} lanes met)")


def resident_mib() -> float:
    """Resident set of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def endless(folder: Path, samples: int) -> None:
    """Resident memory while many samples are read."""
    shown, step = samples // 10, 0
    print(f"\nresident memory while {samples:,} latents are read ({samples / LATENTS:,.0f} epochs), MiB:")
    with closing(batches(folder)) as stream:  # type: ignore[type-var]
        for batch in stream:
            step += len(batch.keys)
            if step % shown < len(batch.keys):
                print(f"  after {step:>9,}  {resident_mib():>8.1f}", flush=True)
            if step >= samples:
                return


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where the shards are written")
    parser.add_argument("--endless", type=int, default=1_000_000, help="latents over which memory is watched")
    options = parser.parse_args()
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, numpy {np.__version__}, Pillow {Image.__version__}"
    print(f"{date.today()}, {platform.processor() or platform.machine()}, one thread, {versions}\n")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        images, latents = Path(scratch) / "images", Path(scratch) / "latents"
        make_images(images)
        make_latents(latents)
        print(f"{'samples per second':<22}{'bare loop':>14}{'stream':>14}{'ratio':>10}")
        compare("JPEG 256²", images, bare_images, options.repeats)
        compare("latents 4×32×32 fp16", latents, bare_latents, options.repeats)
        print("\nfirst batch on resume")
        first_batch("JPEG 256²", images, options.repeats)
        first_batch("latents 4×32×32 fp16", latents, options.repeats)
        if options.endless:
            endless(latents, options.endless)


if __name__ == "__main__":
    main()
