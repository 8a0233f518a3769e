"""Starting a load and a save of a checkpoint of many ranks, simulated in one process: headers, plans and proof.

    python benchmarks/checkpoint_ranks.py [--ranks 128 512 1024] [--baseline 128] [--preset DiT-G/2-16E2A]

The boxes are those of ZeRO 3 over all ranks, with the experts dealt to as many ranks as there are experts: the
most boxes that a layout has. The files have their real headers and sizes; what is between is a hole, so they take
no room on the disk.

    save     what each rank announces, as it is sent; on the first rank, that all of them tile every parameter
    headers  of all four parts of a training state, which the ranks divide among them; here one process reads all
    proof    that what is stored is the whole model, on the first rank
    plan     which bytes of which files a rank needs: of all ranks, one after the other, though each makes its own

All are seconds of a core, so that other work on the machine hardly counts. `alone` is what the first rank does
while the others wait. The baseline does the same with the public parts of torch.distributed.checkpoint
(`HuggingFaceStorageReader.read_metadata`, `create_read_items_for_chunk_list`, plans of `WriteItem`s) and a sweep
over the rows in Python; its plans are timed on a few ranks.
"""

import argparse
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ditmoe.model.canonical import canonical_shapes
from ditmoe.model.config import ModelConfig
from ditmoe.parallel.boxes import Box, boxes_of_run, tiling_problems, whole
from ditmoe.parallel.checkpoint.box_storage import Announced, Piece, StoredBoxes, keyed, unsound, write_item
from ditmoe.parallel.checkpoint.box_table import BoxTable
from ditmoe.parallel.checkpoint.shard_files import header_of, read_header

PARTS: Final = ("weights", "ema", "exp_avg", "exp_avg_sq")
Shapes = dict[str, tuple[int, ...]]
RANKS_OF_BASELINE: Final = 2
"""Whose plans are timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[128, 512, 1024])
    parser.add_argument(
        "--baseline", type=int, nargs="*", default=[128], help="numbers of ranks that torch plans for"
    )
    parser.add_argument("--preset", default="DiT-G/2-16E2A")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="written to, and left as it was")
    arguments = parser.parse_args()
    config = ModelConfig(preset=arguments.preset, image_size=64, channels=4, num_classes=1000)
    shapes = canonical_shapes(config)
    shapes.pop("pos_embed")
    print(f"{cpu_name()}, {os.cpu_count()} cores; torch {torch.__version__}; {date.today()}; {arguments.folder}")
    print(
        f"{arguments.preset}: {sum(map(_numel, shapes.values())) / 1e9:.1f} billion numbers"
        f" in {len(shapes)} tensors"
    )
    columns = ("ranks", "boxes", "save", "headers", "proof", "plan", "in all", "alone", "announced")
    print(f"{'':<10}" + "".join(f"{name:>12}" for name in columns))
    for ranks in sorted({*arguments.ranks, *arguments.baseline}):
        folder = Path(tempfile.mkdtemp(prefix="ditmoe-benchmark-", dir=arguments.folder))
        try:
            write(folder, shapes, config, ranks)
            for name, numbers, measure in (
                ("ours", arguments.ranks, ours),
                ("baseline", arguments.baseline, torchs),
            ):
                if ranks in numbers:
                    print(f"{name:<10}{ranks:>12}" + measure(folder, shapes, config, ranks), flush=True)
        finally:
            shutil.rmtree(folder)


def ours(folder: Path, shapes: Shapes, config: ModelConfig, ranks: int) -> str:
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
    total = save + headers + proof + plan
    seconds = "".join(f"{value:>10.2f} s" for value in (save, headers, proof, plan, total, save + proof))
    return f"{len(table):>12,}{seconds}{sum(map(len, sent)) / 2**20:>8.0f} MiB"


def torchs(folder: Path, shapes: Shapes, config: ModelConfig, ranks: int) -> str:
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
    total = save + headers + proof + plans
    seconds = "".join(f"{value:>10.2f} s" for value in (save, headers, proof, plans, total, save + proof))
    boxes = sum(len(each.chunks) for found in stored.values() for each in found.values())
    return f"{boxes:>12,}{seconds}{sum(map(len, sent)) / 2**20:>8.0f} MiB"


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


def pieces_of(shapes: Shapes, config: ModelConfig, ranks: int, rank: int) -> list[Piece]:
    """What a rank owns of one part of the state."""
    return list(_pieces_of(shapes, config, ranks, rank))


def _pieces_of(shapes: Shapes, config: ModelConfig, ranks: int, rank: int) -> Iterator[Piece]:
    experts = config.experts or 1
    memory = torch.empty(0)
    for name, shape in shapes.items():
        number = name.partition(".experts.")[2].partition(".")[0]
        if number and int(number) != rank % experts:
            continue
        place, cuts = (rank // experts, ranks // experts) if number else (rank, ranks)
        length = -(-_numel(shape) // cuts)
        first, last = min(place * length, _numel(shape)), min((place + 1) * length, _numel(shape))
        for _, box in boxes_of_run(whole(shape), first, last - first):
            yield Piece(name, shape, box, memory)


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
