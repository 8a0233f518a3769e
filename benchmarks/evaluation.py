"""What an evaluation costs beside its sampler: images per second, memory, and the rate of reference statistics.

    python benchmarks/evaluation.py [--images 512] [--more 4000] [--rows 8192] [--repeats 5] [--json FILE]

- A job (chunks that are claimed, drawn, made bytes, written and synced) against the bare loop over the same
  sampler, network and batches, which throws its images away; as much noise is drawn in both. One process of one
  thread each.
- Memory of a whole job (drawing, describing, scoring, writing) of 1,000 images and of more: the most that its
  process had, beside what it had before.
- Means and covariances of 2,048 features, as they come in batches of 64: in blocks on all threads, against one
  product for every 512 rows in one thread, as it was done before; and images decoded by processes against by one.

What is compared takes turns, so that a noisy machine meets both. Ratios are medians of the
turns' ratios, with the least and the greatest.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.shapes import Shapes
from ditmoe.data.shards.writer import ShardLimits
from ditmoe.data.stream.config import SourceConfig
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.initialise import initialise
from ditmoe.model.threads import one_thread
from ditmoe.sampling.drawing.generate import default_labels, draw, generate
from ditmoe.sampling.drawing.noise import ImageNoise
from ditmoe.sampling.evaluation.job import Evaluation, Job
from ditmoe.sampling.evaluation.of_run import drawn_images
from ditmoe.sampling.evaluation.run_job import run_job
from ditmoe.sampling.jobs.chunks import ChunkStore, DrawnImages
from ditmoe.sampling.metrics import reference as reference_module
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER
from ditmoe.sampling.metrics.moments import Moments
from ditmoe.sampling.metrics.reference import open_reference
from ditmoe.sampling.network.denoiser import make_denoiser
from ditmoe.sampling.network.load import LoadedModel
from ditmoe.sampling.settings.config import SamplerConfig

BATCH: Final = 32
SAMPLER: Final = SamplerConfig(sampler="euler", steps=10, cfg_scale=1.5)
FEATURES: Final = 2048
BLOCK_BEFORE: Final = 512
FORK: Final = multiprocessing.get_context("fork")


def small_model() -> LoadedModel:
    """A network of pixels whose pass takes milliseconds: with a larger one the job costs a smaller share."""
    config = ModelConfig(
        depth=4,
        hidden=128,
        heads=4,
        patch=2,
        experts=4,
        experts_per_token=2,
        image_size=16,
        channels=3,
        num_classes=10,
    )
    network = DiT(config)
    initialise(network, 0)
    names = tuple(str(label) for label in range(10))
    return LoadedModel(network.eval(), config, ObjectiveConfig(), names, None, "benchmark")


def alone(function: Callable[[], Any]) -> Any:
    """The function's result, from a process of its own with one thread: its memory is its own."""
    receiver, sender = FORK.Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(1)  # others than this one would be waited for: they are not forked
        sender.send(function())

    process = FORK.Process(target=work)
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def ratio_of(first: Callable[[], float], second: Callable[[], float], repeats: int) -> dict[str, Any]:
    """Rates of both in turns, and the ratio of the first to the second."""
    pairs = [(first(), second()) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "rate": statistics.median(a for a, _ in pairs),
        "beside": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "least": ratios[0],
        "greatest": ratios[-1],
        "repeats": repeats,
    }


def bare_loop(model: LoadedModel, images: int) -> float:
    """Images per second of the sampler alone."""
    config = SAMPLER.resolved(model.objective_config)
    denoiser = make_denoiser(model.network, model.model_config, model.objective_config, config)
    labels = default_labels(range(images), 10)
    started = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, images, BATCH):
            numbers = list(range(first, first + BATCH))
            noise = ImageNoise(config.seed, numbers, model.image_shape, torch.device("cpu"))
            draw(denoiser, labels[first : first + BATCH], noise.initial(), noise, config)
    return images / (time.perf_counter() - started)


def job_of_chunks(model: LoadedModel, images: int, folder: Path) -> float:
    """Images per second of a job's drawing."""

    def draw_chunk(numbers: list[int], label_N: NDArray[np.int64]) -> DrawnImages:
        return drawn_images(generate(model, torch.from_numpy(label_N), numbers, SAMPLER, BATCH))

    def labels_of(numbers: list[int]) -> NDArray[np.int64]:
        return default_labels(numbers, 10).numpy()

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        store = ChunkStore(Path(scratch) / "chunks", images, 2 * BATCH, "benchmark", draw_chunk, labels_of)
        started = time.perf_counter()
        store.draw_pending()
        return images / (time.perf_counter() - started)


def job_memory(shards: Path, folder: Path, images: int) -> float:
    """Bytes that a whole job took at most, beside what its process had before; its images are noise."""
    generator = np.random.default_rng(0)

    def draw_chunk(numbers: list[int], label_N: NDArray[np.int64]) -> DrawnImages:
        return DrawnImages(generator.integers(0, 256, (len(numbers), 64, 64, 3), dtype=np.uint8))

    evaluation = Evaluation(
        weights="benchmark",
        which="ema",
        step=0,
        sampler=SamplerConfig(sampler="euler", schedule="own", steps=1),
        count=images,
        labels="balanced",
        num_classes=10,
    )
    classifier = FEATURE_CLASSIFIER.__class__(**{**vars(FEATURE_CLASSIFIER), "passes": 1})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        job = Job(
            evaluation=evaluation,
            folder=Path(scratch) / "job",
            real=open_reference(SourceConfig(path=str(shards))),
            cache=folder / "cache",
            recogniser=False,
            feature_classifier=classifier,
        )
        run_job(job, draw_chunk)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024.0


def rows_of(rows: int) -> Iterator[NDArray[np.floating]]:
    """Features as a network gives them, 64 images at a time."""
    batch_NF = np.random.default_rng(0).normal(size=(64, FEATURES)).astype(np.float32)
    return (batch_NF for _ in range(rows // 64))


def moments_now(rows: int) -> float:
    """Rows per second of the sums in blocks."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    started = time.perf_counter()
    assert Moments.of_stream(rows_of(rows), FEATURES).count == rows
    rate = rows / (time.perf_counter() - started)
    torch.set_num_threads(1)
    return rate


def moments_before(rows: int, block: int) -> float:
    """Rows per second of a product in one thread, and a merge, for every block of rows."""
    started = time.perf_counter()
    total, waiting = Moments.empty(FEATURES), list[NDArray[np.floating]]()
    for batch_NF in rows_of(rows):
        waiting.append(batch_NF)
        if len(waiting) * 64 < block:
            continue
        x_NF, waiting = np.concatenate(waiting).astype(np.float64), []
        mean_F = x_NF.mean(axis=0)
        x_NF -= mean_F
        with one_thread():
            scatter_FF = (torch.from_numpy(x_NF).T @ torch.from_numpy(x_NF)).numpy()
        total = total.merge(Moments(len(x_NF), mean_F, scatter_FF))
    assert total.count == rows
    return rows / (time.perf_counter() - started)


def decoding(shards: Path, processes: int) -> float:
    """Images per second that are decoded by so many processes; 0: by the one that reads them."""
    reference_module.decoding_processes = lambda images: processes
    reference = open_reference(SourceConfig(path=str(shards)))
    started = time.perf_counter()
    images = sum(len(batch.label_N) for batch in reference.read_all(64))
    return images / (time.perf_counter() - started)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="drawn by the job and by the bare loop")
    parser.add_argument("--fewer", type=int, default=1000, help="images of the job whose memory is the measure")
    parser.add_argument("--more", type=int, default=4000, help="images of the job whose memory is compared")
    parser.add_argument("--rows", type=int, default=8192, help="rows of features that are added up")
    parser.add_argument("--decoded", type=int, default=2000, help="images of 256² that are decoded")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where chunks and shards are written")
    parser.add_argument("--json", type=Path, default=None, help="where all figures are written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    found: dict[str, Any] = {
        "date": str(date.today()),
        "machine": platform.processor() or platform.machine(),
        "cores": cores,
        "load_before": load,
        "torch": torch.__version__,
    }
    machine = f"{found['machine']}, {cores} cores (load {load:.1f} before)"
    print(f"{found['date']}, {machine}, torch {torch.__version__}\n", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        small, large = folder / "small", folder / "large"
        pack(Shapes(1000, 10, 64, seed=0), small, PackSettings(format="png", limits=ShardLimits(samples=500)))
        size = PackSettings(format="jpg", limits=ShardLimits(samples=max(1, options.decoded // 2)))
        pack(Shapes(options.decoded, 10, 256, seed=0), large, size)
        model = small_model()

        def compare(name: str, unit: str, first: Callable[[], float], second: Callable[[], float]) -> None:
            figures = found[name] = ratio_of(first, second, options.repeats)
            print(
                f"{name:<46}{figures['rate']:>10,.1f} against {figures['beside']:>10,.1f} {unit}, ratio "
                f"{figures['ratio']:.2f} ({figures['least']:.2f} to {figures['greatest']:.2f})",
                flush=True,
            )

        compare(
            "job against bare loop",
            "images/s",
            partial(alone, partial(job_of_chunks, model, options.images, folder)),
            partial(alone, partial(bare_loop, model, options.images)),
        )
        now = partial(moments_now, options.rows)
        for block in (BLOCK_BEFORE, 64):
            before = partial(moments_before, options.rows, block)
            compare(f"moments now against blocks of {block}", "rows/s", now, before)
        compare(
            f"decoding by {max(1, cores - 1)} processes against by one",
            "images/s",
            partial(alone, partial(decoding, large, max(1, cores - 1))),
            partial(alone, partial(decoding, large, 0)),
        )
        alone(partial(job_memory, small, folder, 64))  # trains the classifier, and computes the statistics
        memory = {n: alone(partial(job_memory, small, folder, n)) for n in (options.fewer, options.more)}
        found["memory"] = {"bytes": {str(n): most for n, most in memory.items()}}
        found["memory"]["ratio"] = memory[options.more] / max(memory[options.fewer], 1.0)
        told = ", ".join(f"{most / 2**20:,.0f} MiB for {n:,} images" for n, most in memory.items())
        print(f"{'memory of a whole job':<46}{told}, ratio {found['memory']['ratio']:.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
