"""Saving a training state on the CPU: how long training waits, how long the save takes, and its memory.

    python benchmarks/checkpoint.py [--processes 2] [--repeats 3] [--folder /tmp]

Three ways: `asynchronous` (a copy, which is written while training goes on), not asynchronous (written from the
state itself), and as a baseline torch's own safetensors writer, not asynchronous and without checksums. Memory is
the peak of the resident set during a save above what was resident before it, and its ratio to the rank's share of
the state; of the ranks the largest is shown, of the repeats the median. A step is timed alone, and during a save.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from ditmoe.launcher.local.launch import spawn
from ditmoe.model import randomness
from ditmoe.model.config import EmaConfig, ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.objective import make_objective
from ditmoe.parallel import processes
from ditmoe.parallel.alone import from_first_rank
from ditmoe.parallel.checkpoint import box_storage
from ditmoe.parallel.checkpoint.saver import CheckpointSaver
from ditmoe.parallel.checkpoint.training_state import PARTS, owned_pieces
from ditmoe.parallel.config import CheckpointConfig, OptimConfig
from ditmoe.parallel.engine.training_engine import MicroBatch, TrainingEngine
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.processes import gather_objects
from ditmoe.parallel.start.fresh import Fresh

MODEL: Final = ModelConfig(
    depth=6,
    hidden=384,
    heads=6,
    patch=2,
    experts=8,
    experts_per_token=2,
    image_size=16,
    channels=4,
    num_classes=10,
)
SHAPE: Final = (4, 16, 16)
MIB: Final = 2**20


class TorchWriter(HuggingFaceStorageWriter):
    """torch's writer in the place of ours."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.files: dict[str, Any] = {}


@dataclass(frozen=True)
class Way:
    """A way of saving."""

    name: str
    asynchronous: bool
    torchs_writer: bool = False


WAYS: Final = (Way("asynchronous", True), Way("not asynchronous", False), Way("torch's writer", False, True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="written to, and left as it was")
    parser.add_argument("--depth", type=int, default=MODEL.depth, help="blocks of the network")
    parser.add_argument("--hidden", type=int, default=MODEL.hidden, help="its width")
    parser.add_argument("--json", type=Path, help="where the seconds and bytes of each repeat are written")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        changes = {"depth": arguments.depth, "hidden": arguments.hidden, "heads": arguments.hidden // 64 or 1}
        model = ModelConfig.model_validate({**MODEL.model_dump(), **changes})
        measure(model, arguments.repeats, arguments.folder, arguments.json)
    else:
        sys.exit(spawn([__file__, *sys.argv[1:]], arguments.processes, threads=1, program=[sys.executable]))


def measure(model: ModelConfig, repeats: int, parent: Path, written: Path | None) -> None:
    """One rank's part; rank 0 prints."""
    warnings.filterwarnings("ignore")
    processes.join(torch.device("cpu"))
    engine, batch = make_engine(model), make_batch()

    def step() -> None:
        engine.train_step([batch], lr=1e-5, stop_requested=False)

    step()
    shares = gather_objects(sum(piece.tensor.nbytes for part in PARTS for piece in owned_pieces(engine, part)))
    say(f"{cpu_name()}, {os.cpu_count()} cores; torch {torch.__version__}; {date.today()}")
    say(f"{len(shares)} processes, expert {engine.layout.expert}, ZeRO {engine.layout.zero}; {parent}")
    say(
        f"state: {sum(shares) / 4e6:.0f} million numbers, {sum(shares) / MIB:.0f} MiB; "
        f"share of a rank: {max(shares) / MIB:.0f} MiB"
    )
    say(f"{'':<18}{'training waits':>15}{'until complete':>15}{'memory':>12}{'of the share':>13}")
    rounds = [[save_once(engine, way, parent) for way in WAYS] for _ in range(repeats)]
    by_way = zip(WAYS, zip(*rounds, strict=True), strict=True)
    found = {way.name: list(zip(*runs, strict=True)) for way, runs in by_way}
    for way in WAYS:
        waits, complete, memory = (statistics.median(values) for values in found[way.name])
        say(
            f"{way.name:<18}{waits:>13.2f} s{complete:>13.2f} s{memory / MIB:>8.0f} MiB"
            f"{memory / max(shares):>12.0%}"
        )
    alone = statistics.median(timed(step) for _ in range(5))
    meanwhile = statistics.median(step_while_saving(engine, step, parent) for _ in range(repeats))
    say(f"a step: {alone:.2f} s; one that begins with a save under way: {meanwhile:.2f} s")
    if written is not None and dist.get_rank() == 0:
        keys = ("waits", "complete", "memory")
        written.write_text(json.dumps({name: dict(zip(keys, each, strict=True)) for name, each in found.items()}))
    processes.leave()


def save_once(engine: TrainingEngine, way: Way, parent: Path) -> tuple[float, float, float]:
    """Seconds that training waits, seconds until the checkpoint is complete, bytes; the largest of the ranks."""
    writer = patch.object(box_storage, "ShardWriter", TorchWriter) if way.torchs_writer else nullcontext()
    with run_folder(parent) as folder, writer, saver_of(folder, way.asynchronous) as saver:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = status("VmRSS")
        dist.barrier()
        start = time.perf_counter()
        saver.save(engine, 0, {}, {}, {})
        waited = time.perf_counter() - start
        saver.wait()
        complete = time.perf_counter() - start
        own = waited, complete, status("VmHWM") - before
        waits, totals, memory = (max(values) for values in zip(*gather_objects(own), strict=True))
    return waits, totals, memory


def step_while_saving(engine: TrainingEngine, step: Callable[[], None], parent: Path) -> float:
    """Seconds of a step that begins with a save under way."""
    with run_folder(parent) as folder, saver_of(folder, True) as saver:
        saver.save(engine, 0, {}, {}, {})
        return timed(step)


def saver_of(folder: Path, asynchronous: bool) -> CheckpointSaver:
    return CheckpointSaver(folder, CheckpointConfig(asynchronous=asynchronous))


@contextmanager
def run_folder(parent: Path) -> Iterator[Path]:
    """A folder that all ranks share and that is removed in the end."""
    make = partial(tempfile.mkdtemp, prefix="ditmoe-benchmark-", dir=parent)
    folder = Path(from_first_rank(make, "makes a folder"))
    yield folder
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def make_engine(model: ModelConfig) -> TrainingEngine:
    world = dist.get_world_size()
    layout = Layout(pipe=1, data=world, expert=world, tensor=1, zero=1, micro_batch=2, accumulation=1)
    return TrainingEngine(
        DiT(model),
        make_objective(ObjectiveConfig()),
        layout,
        OptimConfig(),
        EmaConfig(),
        "fp32",
        {},
        torch.device("cpu"),
        Fresh(0),
    )


def make_batch() -> MicroBatch:
    positions = [2 * dist.get_rank(), 2 * dist.get_rank() + 1]
    draws = make_objective(ObjectiveConfig()).draw(0, positions, SHAPE, label_dropout=0.1)
    x_BCHW = randomness.normal(1, "image", positions, SHAPE).clamp(-1, 1)
    return MicroBatch(x_BCHW, torch.tensor([0, 1]), draws)


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def status(key: str) -> float:
    """A figure of this process, bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
