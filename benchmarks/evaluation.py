"""What an evaluation costs beside the sampler alone, whether its memory stays flat, and the rate of moments.

    python benchmarks/evaluation.py drawing RUN [--count 1024] [--steps 10] [--rounds 5]
    python benchmarks/evaluation.py whole RUN [--counts 1000 50000] [--steps 4] [--processes 2]
    python benchmarks/evaluation.py moments [--features 2048] [--images 8192] [--rounds 5]

`drawing`: images per second of the chunks of a job, as it writes them, against the bare sampler loop on the same
network in the same process, in turn within each round. `whole`: `ditmoe evaluate` from the command to its figures,
with its seconds and the peak memory of its largest process. `moments`: means and covariances of features in blocks
against an update with every 64 images, and against one with every 512.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe.sampling.drawing.generate import draw, generate
from ditmoe.sampling.evaluation.of_run import drawn_images
from ditmoe.sampling.jobs.chunks import ChunkStore, DrawnImages
from ditmoe.sampling.metrics.moments import Moments
from ditmoe.sampling.network.denoiser import make_denoiser
from ditmoe.sampling.network.load import LoadedModel, load_model
from ditmoe.sampling.settings.config import SamplerConfig

BATCH = 64
CHUNK = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    drawing = what.add_parser("drawing")
    drawing.add_argument("run", type=Path)
    drawing.add_argument("--count", type=int, default=1024)
    drawing.add_argument("--steps", type=int, default=10)
    drawing.add_argument("--rounds", type=int, default=5)
    drawing.add_argument("--threads", type=int, default=torch.get_num_threads())
    whole = what.add_parser("whole")
    whole.add_argument("run", type=Path)
    whole.add_argument("--counts", type=int, nargs="+", default=[1000, 50_000])
    whole.add_argument("--steps", type=int, default=4)
    whole.add_argument("--processes", type=int, default=2)
    moments = what.add_parser("moments")
    moments.add_argument("--features", type=int, default=2048)
    moments.add_argument("--images", type=int, default=8192)
    moments.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    processor = platform.processor() or platform.machine()
    print(f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}, numpy {np.__version__}", flush=True)
    {"drawing": show_drawing, "whole": show_whole, "moments": show_moments}[options.what](options)


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, one after the other; a round to warm up is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def show(seconds: dict[str, list[float]], images: int, baseline: str) -> None:
    """Images per second, and the median of the rounds' ratios to the baseline with the least and the largest."""
    print(f"{'':<28}{'images/s':>12}{'ratio':>9}")
    for name, column in seconds.items():
        ratios = sorted(base / own for base, own in zip(seconds[baseline], column, strict=True))
        spread = "" if name == baseline else f"   ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{name:<28}{images / statistics.median(column):>12,.1f}{statistics.median(ratios):>9.2f}{spread}")


def show_drawing(options: argparse.Namespace) -> None:
    """The chunks of a job against the bare loop."""
    torch.set_num_threads(options.threads)
    model = load_model(options.run)
    config = SamplerConfig(sampler="euler", steps=options.steps).resolved(model.objective_config)
    labels = torch.arange(options.count) % (model.model_config.num_classes or 1)

    def job() -> None:
        def draw_chunk(numbers: list[int], label_N: NDArray[np.int64]) -> DrawnImages:
            return drawn_images(generate(model, torch.from_numpy(label_N), numbers, config, BATCH))

        with tempfile.TemporaryDirectory() as folder:
            store = ChunkStore(Path(folder), options.count, CHUNK, "x", draw_chunk, lambda n: labels[n].numpy())
            store.draw_pending()

    print(f"{options.count} images, batches of {BATCH}, {options.steps} steps, {options.threads} threads")
    seconds = in_turn({"bare loop": lambda: bare_loop(model, labels, config), "job": job}, options.rounds)
    show(seconds, options.count, "bare loop")


def bare_loop(model: LoadedModel, label_N: torch.Tensor, config: SamplerConfig) -> None:
    """The sampler alone: noise from the library's own generator, and nothing is kept."""
    shape = model.image_shape if model.vae is None else None
    assert shape is not None, "expected a network of pixels"
    device = next(model.network.parameters()).device
    network = model.network_in(config.precision)
    denoiser = make_denoiser(network, model.model_config, model.objective_config, config)
    with torch.inference_mode():
        for first in range(0, len(label_N), BATCH):
            label_B = label_N[first : first + BATCH].to(device)
            noise_BCHW = torch.randn(len(label_B), *shape, device=device)
            draw(denoiser, label_B, noise_BCHW, lambda step, noise=noise_BCHW: torch.randn_like(noise), config)


def show_whole(options: argparse.Namespace) -> None:
    """The command, on a copy of the run without its evaluations, and with a cache of its own."""
    print(f"{'images':>8}{'seconds':>10}{'images/s':>10}{'peak MiB of a process':>24}")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        shutil.copytree(options.run, run, ignore=shutil.ignore_patterns("evaluations", "lock", "samples"))
        # The first one trains the classifiers and reads the real images, for all.
        for count in (min(options.counts[0], 256), *options.counts):
            command = [sys.executable, "-m", "ditmoe.launcher", "evaluate", str(run), f"--count={count}"]
            command += [f"--steps={options.steps}", f"--processes={options.processes}", f"--cache={folder}/cache"]
            begin = time.perf_counter()
            with open(f"{folder}/output", "wb") as output:
                process = subprocess.Popen(command, stdout=output, stderr=output)
                _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - begin
            if os.waitstatus_to_exitcode(status):
                sys.exit(Path(f"{folder}/output").read_text())
            print(
                f"{count:>8,}{seconds:>10.1f}{count / seconds:>10.1f}{used.ru_maxrss / 1024:>24,.0f}", flush=True
            )


def show_moments(options: argparse.Namespace) -> None:
    """Moments of features that come 64 at a time."""
    x_NF = np.random.default_rng(0).standard_normal((options.images, options.features), dtype=np.float32)

    def arriving() -> list[NDArray[np.floating]]:
        return [x_NF[first : first + BATCH] for first in range(0, len(x_NF), BATCH)]

    def plain(block: int) -> Callable[[], object]:
        def run() -> Moments:
            total = Moments.empty(options.features)
            for first in range(0, len(x_NF), block):
                some_NF = x_NF[first : first + block].astype(np.float64)
                mean_F = some_NF.mean(0)
                deviation_NF = some_NF - mean_F
                total = total.merge(Moments(len(some_NF), mean_F, deviation_NF.T @ deviation_NF))
            return total

        return run

    print(f"{options.images:,} images, {options.features} features, {torch.get_num_threads()} threads")
    runs = {
        "an update with every 64": plain(BATCH),
        "an update with every 512": plain(512),
        "ours": lambda: Moments.of_stream(arriving(), options.features),
    }
    show(in_turn(runs, options.rounds), options.images, "an update with every 64")


if __name__ == "__main__":
    main()
