"""What an evaluation costs beside its sampler: images per second, memory, and the rate of reference statistics.

    python benchmarks/evaluation.py --compact --text benchmarks/results/evaluation-cpu.txt

That takes less than ten minutes on two free cores. Without `--compact` more is drawn, and more often.

- A job (chunks that are claimed, drawn, made bytes, written and synced) against the bare loop over the same
  sampler, network, batches and processes, which throws its images away; as much noise is drawn in both. With one
  process, and with one for each core; each has one thread.
- `ditmoe evaluate` of digits from end to end, with the network of configs/demo.yaml: how long, and the most memory
  that its largest process had. Classifiers and statistics of the real images are there before.
- Means and covariances of 2,048 features, as they come in batches of 64: in blocks on all threads, against one
  product for every 64 rows in one thread, as it was done before, and against one for every 512; and images decoded
  by processes against by one.

What is compared takes turns, A B B A, so that a noisy machine meets both, each turn in processes of its own, which
have drawn a batch before they are timed. Ratios are medians of the turns' ratios, with the least and the greatest.
Beside each ratio of rates stands that of the processors' time, which other work on the machine does not change.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.data.making.sources.shapes import Shapes
from ditmoe.data.shards.writer import ShardLimits
from ditmoe.data.stream.config import SourceConfig
from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.initialise import initialise
from ditmoe.model.threads import one_thread
from ditmoe.parallel.checkpoint.folder import checkpoint_path, write_weights_checkpoint
from ditmoe.sampling.drawing.generate import default_labels, draw, generate
from ditmoe.sampling.drawing.noise import ImageNoise
from ditmoe.sampling.evaluation.of_run import drawn_images
from ditmoe.sampling.evaluation.run_job import default_chunk
from ditmoe.sampling.jobs.chunks import ChunkStore, DrawnImages
from ditmoe.sampling.metrics import reference as reference_module
from ditmoe.sampling.metrics.moments import Moments
from ditmoe.sampling.metrics.reference import open_reference
from ditmoe.sampling.network.denoiser import make_denoiser
from ditmoe.sampling.network.load import LoadedModel
from ditmoe.sampling.settings.config import SamplerConfig

BATCH: Final = 32
SAMPLER: Final = SamplerConfig(sampler="euler", steps=10, cfg_scale=1.5)
FEATURES: Final = 2048
BLOCKS_BEFORE: Final = (64, 512)
FORK: Final = multiprocessing.get_context("fork")
SECONDS: Final = 1800.0
"""The longest that one turn may take."""


class Turn(NamedTuple):
    """What one turn did."""

    rate: float
    """Units per second."""
    cpu: float
    """Seconds of the processors for a unit."""


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


def write_digits_run(folder: Path) -> tuple[Path, Path]:
    """A run with the network of configs/demo.yaml, which was never trained, and the digits as shards."""
    config = ModelConfig(
        depth=4,
        hidden=64,
        heads=4,
        patch=2,
        experts=4,
        experts_per_token=2,
        learn_sigma=False,
        image_size=8,
        channels=1,
        num_classes=10,
    )
    network = DiT(config)
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    state = canonical_state(network)
    path = checkpoint_path(folder / "run", 0)
    path.parent.mkdir(parents=True)
    write_weights_checkpoint(path, config, ObjectiveConfig(kind="rectified_flow"), state, state)
    pack(open_source("digits", count=None, seed=0), folder / "digits", PackSettings())
    return folder / "run", folder / "digits"


def in_processes(functions: list[Callable[[Any], float]], units: int) -> Turn:
    """Call each in a process of its own, of one thread; all begin at once.

    Args:
        functions: each is given a function to call where it is ready to be timed, and returns when it had done.
        units: that all of them do together.
    """
    ready = FORK.Barrier(len(functions))

    def work(function: Callable[[Any], float], sender: Any) -> None:
        torch.set_num_threads(1)  # others than this one would be waited for: they are not forked
        begun: list[float] = []
        before = 0.0

        def start() -> None:
            nonlocal before
            ready.wait(SECONDS)
            before = _cpu_seconds()
            begun.append(time.perf_counter())

        ended = function(start)
        sender.send((begun[0], ended, _cpu_seconds() - before))

    pipes = [FORK.Pipe(duplex=False) for _ in functions]
    processes = [
        FORK.Process(target=work, args=(function, sender))
        for function, (_, sender) in zip(functions, pipes, strict=True)
    ]
    for process in processes:
        process.start()
    found = []
    for receiver, _ in pipes:
        if not receiver.poll(SECONDS):
            raise TimeoutError(f"a turn takes longer than {SECONDS:g} s")
        found.append(receiver.recv())
    for process in processes:
        process.join()
    begun, ended, cpu = zip(*found, strict=True)
    return Turn(units / (max(ended) - min(begun)), sum(cpu) / units)


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def here(function: Callable[[], object], units: int) -> Turn:
    """Call it in this process."""
    before, begun = _cpu_seconds(), time.perf_counter()
    function()
    return Turn(units / (time.perf_counter() - begun), (_cpu_seconds() - before) / units)


def ratio_of(first: Callable[[], Turn], second: Callable[[], Turn], repeats: int) -> dict[str, Any]:
    """Rates of both in turns A B B A, and the ratios of the first to the second."""
    pairs = []
    for number in range(repeats):
        if number % 2:
            b = second()
            a = first()
        else:
            a = first()
            b = second()
        pairs.append((a, b))
    ratios = sorted(a.rate / b.rate for a, b in pairs)
    return {
        "rate": statistics.median(a.rate for a, _ in pairs),
        "beside": statistics.median(b.rate for _, b in pairs),
        "ratio": statistics.median(ratios),
        "least": ratios[0],
        "greatest": ratios[-1],
        "cpu_ratio": statistics.median(b.cpu / a.cpu for a, b in pairs),
        "repeats": repeats,
    }


def bare_loop(model: LoadedModel, batches: range, start: Callable[[], None]) -> float:
    """The sampler alone, on these batches; when it had done."""
    config = SAMPLER.resolved(model.objective_config)
    denoiser = make_denoiser(model.network, model.model_config, model.objective_config, config)

    def draw_batch(number: int) -> None:
        numbers = list(range(number * BATCH, (number + 1) * BATCH))
        noise = ImageNoise(config.seed, numbers, model.image_shape, torch.device("cpu"))
        draw(denoiser, default_labels(numbers, 10), noise.initial(), noise, config)

    with torch.inference_mode():
        draw_batch(0)
        start()
        for number in batches:
            draw_batch(number)
    return time.perf_counter()


def job_of_chunks(
    model: LoadedModel, images: int, folder: Path, rank: int, ranks: int, start: Callable[[], None]
) -> float:
    """The drawing of a job, as one of its processes; when it had done."""

    def draw_chunk(numbers: list[int], label_N: NDArray[np.int64]) -> DrawnImages:
        return drawn_images(generate(model, torch.from_numpy(label_N), numbers, SAMPLER, BATCH))

    def labels_of(numbers: list[int]) -> NDArray[np.int64]:
        return default_labels(numbers, 10).numpy()

    size = default_chunk(images, BATCH, ranks)
    store = ChunkStore(folder / "chunks", images, size, "benchmark", draw_chunk, labels_of)
    draw_chunk(list(range(BATCH)), labels_of(list(range(BATCH))))
    start()
    store.draw_pending(rank=rank, ranks=ranks)
    return time.perf_counter()


def bare_turn(model: LoadedModel, images: int, processes: int) -> Turn:
    """The bare loops of so many processes, on as many batches each."""
    each = images // BATCH // processes
    loops = [partial(bare_loop, model, range(rank * each, (rank + 1) * each)) for rank in range(processes)]
    return in_processes(list(loops), each * processes * BATCH)


def job_turn(model: LoadedModel, images: int, processes: int, folder: Path) -> Turn:
    """A job of so many processes."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        parts = [
            partial(job_of_chunks, model, images, Path(scratch), rank, processes) for rank in range(processes)
        ]
        return in_processes(list(parts), images)


class Whole(NamedTuple):
    """What a whole command took."""

    seconds: float
    most: int
    """Bytes that the largest of its processes had at most."""
    together: int
    """Bytes that all of them had at most at one time, pages that they share counted for each."""


def evaluate(run: Path, digits: Path, cache: Path, images: int, processes: int) -> Whole:
    """`ditmoe evaluate` of so many digits, from end to end."""
    command = [sys.executable, "-m", "ditmoe.launcher", "evaluate", str(run), "--reference", str(digits)]
    command += ["--cache", str(cache), "--count", str(images), "--steps", "4", "--processes", str(processes)]
    begun = time.perf_counter()
    most: dict[int, int] = {}
    together = 0
    with tempfile.TemporaryFile() as output, subprocess.Popen(command, stdout=output, stderr=output) as started:
        leader = psutil.Process(started.pid)
        while started.poll() is None:
            now = {}
            for process in _family(leader):
                try:
                    now[process.pid] = process.memory_info().rss
                except psutil.Error:
                    continue
                most[process.pid] = max(most.get(process.pid, 0), now[process.pid])
            together = max(together, sum(now.values()))
            time.sleep(0.1)
        seconds = time.perf_counter() - begun
        if started.returncode:
            output.seek(0)
            raise RuntimeError(output.read().decode(errors="replace"))
    return Whole(seconds, max(most.values()), together)


def _family(leader: psutil.Process) -> list[psutil.Process]:
    try:
        return [leader, *leader.children(recursive=True)]
    except psutil.Error:
        return []


def rows_of(rows: int) -> Iterator[NDArray[np.floating]]:
    """Features as a network gives them, 64 images at a time."""
    batch_NF = np.random.default_rng(0).normal(size=(64, FEATURES)).astype(np.float32)
    return (batch_NF for _ in range(rows // 64))


def moments_now(rows: int) -> None:
    """Add up rows in blocks, in all threads."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    assert Moments.of_stream(rows_of(rows), FEATURES).count == rows
    torch.set_num_threads(1)


def moments_before(rows: int, block: int) -> None:
    """Add them up by a product in one thread, and a merge, for every block of rows."""
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


def decoding(shards: Path, processes: int, start: Callable[[], None]) -> float:
    """Decode all images by so many processes; 0: by the one that reads them. When it had done."""
    reference_module.decoding_processes = lambda images: processes
    reference = open_reference(SourceConfig(path=str(shards)))
    start()
    assert sum(len(batch.label_N) for batch in reference.read_all(64)) == reference.count
    return time.perf_counter()


def hardware() -> str:
    """The processor, as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compact", action="store_true", help="the defaults of a measurement of ten minutes")
    parser.add_argument("--images", type=int, help="for each process of the job and the bare loop [512; 128]")
    parser.add_argument("--few", type=int, default=1000, help="digits of the smaller evaluation")
    parser.add_argument("--many", type=int, default=50_000, help="digits of the larger evaluation")
    parser.add_argument("--rows", type=int, help="rows of features that are added up [16384; 4096]")
    parser.add_argument("--decoded", type=int, help="images of 256² that are decoded [4000; 1000]")
    parser.add_argument("--repeats", type=int, help="of the job and the bare loop [9; 4]; the others: 3 at most")
    parser.add_argument("--folder", type=Path, help="where chunks and shards are written")
    parser.add_argument("--json", type=Path, help="where all figures are written")
    parser.add_argument("--text", type=Path, help="where what is printed is written too")
    options = parser.parse_args()
    usual = (128, 4096, 1000, 4) if options.compact else (512, 16384, 4000, 9)
    asked = (options.images, options.rows, options.decoded, options.repeats)
    images, rows, decoded, repeats = (each or value for each, value in zip(asked, usual, strict=True))
    torch.set_num_threads(1)
    cores, load, begun = len(os.sched_getaffinity(0)), os.getloadavg()[0], time.monotonic()
    found: dict[str, Any] = {
        "date": str(date.today()),
        "machine": hardware(),
        "cores": cores,
        "load_before": load,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    lines: list[str] = []

    def tell(line: str = "") -> None:
        print(line, flush=True)
        lines.append(line)

    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    tell(f"{found['date']}, {cores} cores ({found['machine']}), {versions}; load {load:.1f} before")
    if load > 0.5:
        tell("Other work was there: rates and times are not those of a free machine; memory is.")

    def compare(
        name: str, unit: str, first: Callable[[], Turn], second: Callable[[], Turn], turns: int, cpu: bool = False
    ) -> None:
        figures = found[name] = ratio_of(first, second, turns)
        tell(
            f"  {name:<50}{figures['rate']:>9,.1f} / {figures['beside']:>9,.1f} {unit:<9}{figures['ratio']:6.3f} "
            f"({figures['least']:.3f} to {figures['greatest']:.3f}, {turns} turns)"
            + (f"; processors' time {figures['cpu_ratio']:.3f}" if cpu else "")
        )

    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        model = small_model()
        tell(f"\nchunks of a job / bare sampler loop, {images} images for each process, batches of {BATCH}")
        for processes in dict.fromkeys((1, cores)):
            total = images * processes
            compare(
                f"{processes} process{'es' if processes > 1 else ''}",
                "images/s",
                partial(job_turn, model, total, processes, folder),
                partial(bare_turn, model, total, processes),
                repeats,
                cpu=True,
            )
        fewer = min(repeats, 3)
        tell(f"\nstatistics of real images: {rows:,} rows of {FEATURES:,} features; {decoded:,} images of 256²")
        for block in BLOCKS_BEFORE:
            compare(
                f"moments in blocks / one product for every {block}",
                "rows/s",
                partial(here, partial(moments_now, rows), rows),
                partial(here, partial(moments_before, rows, block), rows),
                fewer,
            )
        large = folder / "large"
        size = PackSettings(format="jpg", limits=ShardLimits(samples=max(1, decoded // 2)))
        pack(Shapes(decoded, 10, 256, seed=0), large, size)
        compare(
            f"decoding by {cores} processes / by one",
            "images/s",
            lambda: in_processes([partial(decoding, large, max(1, cores - 1))], decoded),
            lambda: in_processes([partial(decoding, large, 0)], decoded),
            fewer,
        )
        run, digits = write_digits_run(folder)
        tell(f"\nditmoe evaluate, digits of 8×8 in 4 steps, --processes {cores}: the whole command")
        first = evaluate(run, digits, folder / "cache", 40, cores)  # trains the classifiers
        tell(f"  {'images':>8}{'seconds':>10}{'images/s':>10}{'MiB of the largest process':>30}{'of all':>10}")
        found["evaluate"] = {"first": first._asdict()}
        for count in (options.few, options.many):
            whole = evaluate(run, digits, folder / "cache", count, cores)
            found["evaluate"][str(count)] = whole._asdict()
            tell(
                f"  {count:>8,}{whole.seconds:>10.1f}{count / whole.seconds:>10.1f}{whole.most / 2**20:>30,.0f}"
                f"{whole.together / 2**20:>10,.0f}"
            )
        tell(f"  the first command, of 40 images, took {first.seconds:.1f} s: it trained the classifiers")
    tell(f"\nin all {time.monotonic() - begun:.0f} s")
    if options.text is not None:
        options.text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
