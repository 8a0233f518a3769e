"""The start of a run of many ranks, and loading and saving its checkpoints, simulated in one process.

    python -m benchmarks.checkpoint_ranks [--ranks 128 512 1024] [--baseline 128] [--to FILE.json]

The boxes are those of ZeRO 3 over all ranks, with the experts dealt to as many ranks as there are experts: the
most boxes that a layout has. The files have their real headers and sizes; what is between is a hole, so they take
no room on the disk.

    save     what each rank announces, as it is sent; on the first rank, that all of them tile every parameter
    headers  of all four parts of a training state, which the ranks divide among them; here one process reads all
    proof    that what is stored is the whole model, which every rank finds out by itself
    plan     which bytes of which files a rank needs: of all ranks, one after the other, though each makes its own
    alone    what the first rank does while the others wait
    values   the initial values of the rank in the middle, which draws half of each parameter; a resume makes none
    read     one rank reads its share of the state and its files' checksums

All are seconds of a core, so that other work on the machine hardly counts. The baseline of saves, headers, proof
and plans is the public parts of torch.distributed.checkpoint (`HuggingFaceStorageReader.read_metadata`,
`create_read_items_for_chunk_list`, plans of `WriteItem`s) and a sweep over the rows in Python; its plans are timed
on a few ranks. That of values is to make those of the whole network, of which a part is timed; that of reading is
one pass for the checksums and another for the values.
"""

import argparse
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from benchmarks.suite import machine
from ditmoe.model.canonical import canonical_shapes
from ditmoe.model.config import ModelConfig
from ditmoe.model.initialise import initial_value
from ditmoe.parallel.boxes import Box, boxes_of_run, tiling_problems, whole
from ditmoe.parallel.checkpoint.box_storage import Announced, Piece, StoredBoxes, keyed, unsound, write_item
from ditmoe.parallel.checkpoint.box_table import BoxTable
from ditmoe.parallel.checkpoint.checked_files import damage
from ditmoe.parallel.checkpoint.shard_files import header_of, read_header
from ditmoe.parallel.engine.initial import Part
from ditmoe.parallel.start.fresh import Fresh

PARTS: Final = ("weights", "ema", "exp_avg", "exp_avg_sq")
Shapes = dict[str, tuple[int, ...]]
RANKS_OF_BASELINE: Final = 2
"""Whose plans are timed."""
SHARE_OF_VALUES: Final = 16
"""Of the whole network's values, one in so many is timed."""


class Measured(NamedTuple):
    """Seconds of a core, and numbers."""

    ranks: int
    boxes: int
    save: float
    headers: float
    proof: float
    plan: float
    alone: float
    announced_bytes: int
    values: float
    read: float

    @property
    def in_all(self) -> float:
        """What the number of ranks decides."""
        return self.save + self.headers + self.proof + self.plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[128, 512, 1024])
    parser.add_argument(
        "--baseline", type=int, nargs="*", default=[128], help="numbers of ranks that torch plans for"
    )
    parser.add_argument("--preset", default="DiT-G/2-16E2A")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="written to, and left as it was")
    parser.add_argument("--to", type=Path, help="a JSON file for the figures; the table goes beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = ModelConfig(preset=arguments.preset, image_size=64, channels=4, num_classes=1000)
    shapes = canonical_shapes(config)
    shapes.pop("pos_embed")
    facts = machine.facts(torch.device("cpu"))
    names = ("save", "headers", "proof", "plan", "in all", "alone")
    lines = [
        f"{facts['date']} UTC, commit {facts['commit'][:12]}; {cpu_name()}, {os.cpu_count()} cores;"
        f" torch {torch.__version__}; load {facts['load_before']}",
        f"{arguments.preset}: {sum(map(_numel, shapes.values())) / 1e9:.1f} billion numbers"
        f" in {len(shapes)} tensors",
        f"{'':<10}" + "".join(f"{name:>12}" for name in ("ranks", "boxes", *names, "announced", "values", "read")),
    ]
    print("\n".join(lines), flush=True)
    found: dict[str, list[Measured]] = {"ours": [], "baseline": []}
    for ranks in sorted({*arguments.ranks, *arguments.baseline}):
        folder = Path(tempfile.mkdtemp(prefix="ditmoe-benchmark-", dir=arguments.folder))
        try:
            write(folder, shapes, config, ranks)
            for name, numbers, measure in (
                ("ours", arguments.ranks, ours),
                ("baseline", arguments.baseline, torchs),
            ):
                if ranks in numbers:
                    found[name].append(measure(folder, shapes, config, ranks))
                    lines.append(f"{name:<10}" + line(found[name][-1]))
                    print(lines[-1], flush=True)
        finally:
            shutil.rmtree(folder)
    if arguments.to is not None:
        figures = {name: [measured._asdict() for measured in rows] for name, rows in found.items()}
        arguments.to.write_text(json.dumps({**facts, "preset": arguments.preset, **figures}, indent=1) + "\n")
        arguments.to.with_suffix(".txt").write_text("\n".join(lines) + "\n")


def line(found: Measured) -> str:
    seconds = (found.save, found.headers, found.proof, found.plan, found.in_all, found.alone)
    rest = f"{found.announced_bytes / 2**20:>8.0f} MiB{found.values:>10.2f} s{found.read:>10.2f} s"
    return f"{found.ranks:>12}{found.boxes:>12,}" + "".join(f"{value:>10.2f} s" for value in seconds) + rest


def ours(folder: Path, shapes: Shapes, config: ModelConfig, ranks: int) -> Measured:
    """What this program does."""
    sent = [pickle.dumps(Announced.of(pieces_of(shapes, config, ranks, rank))) for rank in range(ranks)]
    save = timed(lambda: check(not unsound([pickle.loads(one) for one in sent])))
    files = sorted(file.name for file in (folder / PARTS[0]).iterdir())
    start = time.process_time()
    boxes = [[read_header(folder / part / file) for part in PARTS] for file in files]
    table = BoxTable([of_parts[0] for of_parts in boxes])
    assert all(of_parts[0] is each for of_parts in boxes for each in of_parts)
    headers = time.process_time() - start
    stored = {part: StoredBoxes(folder / part, tuple(files), table) for part in PARTS}
    proof = timed(lambda: check(not any(stored[part].missing(shapes) for part in PARTS)))
    plan = 0.0
    for rank in range(ranks):
        pieces = pieces_of(shapes, config, ranks, rank)
        plan += timed(lambda pieces=pieces: stored[PARTS[0]].plan(pieces))
    kept = list(_kept(shapes, config, ranks, ranks // 2, memory=True))
    values = timed(lambda: Fresh(0).fill(kept))
    read = share_read(stored, shapes, config, ranks, passes=1)
    announced = sum(map(len, sent))
    return Measured(ranks, len(table), save, headers, proof, plan, save, announced, values, read)


def share_read(
    stored: dict[str, StoredBoxes], shapes: Shapes, config: ModelConfig, ranks: int, passes: int
) -> float:
    """One rank reads its share and checks its files, whose checksums are those of holes."""
    pieces = pieces_of(shapes, config, ranks, 0, memory=True)
    for piece in pieces:
        piece.tensor.zero_()  # which has the system give the memory, as the first pass does with the files' pages
    seconds = 0.0
    for part, of_part in stored.items():
        name = f"{part}/{of_part.files[0]}"
        facts = {"bytes": (of_part.folder / of_part.files[0]).stat().st_size, "sha256": ""}
        plan = of_part.plan(pieces)
        damage(of_part.folder.parent, name, facts)
        if passes == 1:
            seconds += timed(partial(damage, of_part.folder.parent, name, facts, b"", plan, pieces))
        else:
            seconds += timed(partial(damage, of_part.folder.parent, name, facts))
            seconds += timed(partial(of_part.read, pieces))
    return seconds


def torchs(folder: Path, shapes: Shapes, config: ModelConfig, ranks: int) -> Measured:
    """The same by torch.distributed.checkpoint, for one part times four."""
    sent = [pickle.dumps(write_plan(pieces_of(shapes, config, ranks, rank))) for rank in range(ranks)]
    stored: dict[str, Any] = {}

    def global_plan() -> None:
        boxes: dict[str, list[Any]] = {}
        for item in (item for one in sent for item in pickle.loads(one).items):
            boxes.setdefault(item.index.fqn.partition("#")[0], []).append(item.tensor_data.chunk)
        check(
            not any(
                list(tiling_problems(name, list(map(box_of, found)), shapes[name]))
                for name, found in boxes.items()
            )
        )

    def read() -> None:
        for key, found in (
            HuggingFaceStorageReader(str(folder / PARTS[0])).read_metadata().state_dict_metadata.items()
        ):
            stored.setdefault(key.partition("#")[0], {})[key] = found

    def prove() -> None:
        boxes = {
            name: [box_of(chunk) for each in found.values() for chunk in each.chunks]
            for name, found in stored.items()
        }
        check(not any(list(tiling_problems(name, found, shapes[name])) for name, found in boxes.items()))

    def plan(rank: int) -> None:
        for piece in pieces_of(shapes, config, ranks, rank):
            for key, found in stored[piece.name].items():
                create_read_items_for_chunk_list(key, found, [piece.chunk])

    save, headers, proof = (len(PARTS) * timed(each) for each in (global_plan, read, prove))
    some = [timed(lambda rank=rank: plan(rank)) for rank in range(RANKS_OF_BASELINE)]
    plans = len(PARTS) * ranks * sum(some) / len(some)
    # Each rank read the headers by itself, all at once.
    boxes = sum(len(each.chunks) for found in stored.values() for each in found.values())
    some_names = list(shapes)[::SHARE_OF_VALUES]
    share = sum(_numel(shapes[name]) for name in some_names) / sum(map(_numel, shapes.values()))
    values = timed(lambda: [initial_value(name, shapes[name], 0) for name in some_names]) / share
    parts = {part: StoredBoxes.of(folder / part) for part in PARTS}
    both = share_read(parts, shapes, config, ranks, passes=2)
    announced = sum(map(len, sent))
    return Measured(ranks, boxes, save, headers, proof, plans, save + proof, announced, values, both)


def write(folder: Path, shapes: Shapes, config: ModelConfig, ranks: int) -> None:
    """The files of all ranks, of which only the headers are written."""
    for part in PARTS:
        (folder / part).mkdir()
    for rank in range(ranks):
        boxes = {key: piece.box for key, piece in sorted(keyed(pieces_of(shapes, config, ranks, rank)).items())}
        header = header_of(boxes)
        for part in PARTS:
            with (folder / part / f"shard-{rank + 1:05d}.safetensors").open("wb") as file:
                file.write(header)
                file.truncate(len(header) + 4 * sum(box.size for box in boxes.values()))


def pieces_of(shapes: Shapes, config: ModelConfig, ranks: int, rank: int, memory: bool = False) -> list[Piece]:
    """What a rank owns of one part of the state.

    Args:
        memory: whether it has any.
    """
    return list(_pieces_of(shapes, config, ranks, rank, memory))


def _pieces_of(shapes: Shapes, config: ModelConfig, ranks: int, rank: int, memory: bool) -> Iterator[Piece]:
    nothing = torch.empty(0)
    for part in _kept(shapes, config, ranks, rank, memory=False):
        for _, box in boxes_of_run(part.placement, part.start, len(part.memory)):
            yield Piece(part.name, part.shape, box, torch.empty(box.rows, box.columns) if memory else nothing)


def _kept(shapes: Shapes, config: ModelConfig, ranks: int, rank: int, *, memory: bool) -> Iterator[Part]:
    experts = config.experts or 1
    device = "cpu" if memory else "meta"
    for name, shape in shapes.items():
        number = name.partition(".experts.")[2].partition(".")[0]
        if number and int(number) != rank % experts:
            continue
        place, cuts = (rank // experts, ranks // experts) if number else (rank, ranks)
        length = -(-_numel(shape) // cuts)
        first, last = min(place * length, _numel(shape)), min((place + 1) * length, _numel(shape))
        if first < last:
            yield Part(name, shape, whole(shape), first, torch.empty(last - first, device=device))


def write_plan(pieces: list[Piece]) -> SavePlan:
    """A rank's plan in torch's own form."""
    return SavePlan([write_item(key, piece) for key, piece in keyed(pieces).items()])


def box_of(chunk: Any) -> Any:
    return Box(*chunk.offsets, *chunk.sizes)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def check(true: bool) -> None:
    assert true


def timed(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")


if __name__ == "__main__":
    sys.exit(main())
