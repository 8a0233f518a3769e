"""A training engine's whole state as pieces of a checkpoint, and loading it, each rank its own share."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from ditmoe.model.errors import UserError
from ditmoe.parallel.boxes import boxes_of_run, whole
from ditmoe.parallel.checkpoint.box_storage import Piece, Read, StoredBoxes, shard_files
from ditmoe.parallel.checkpoint.box_table import BoxTable, FileBoxes
from ditmoe.parallel.checkpoint.folder import (
    EMA,
    PROBLEMS_SHOWN,
    WEIGHTS,
    CheckpointInfo,
    checkpoint_entries,
    damaged,
    incomplete,
    read_info,
    weights_alone,
)
from ditmoe.parallel.checkpoint.marker import MARKER
from ditmoe.parallel.checkpoint.shard_files import read_header
from ditmoe.parallel.engine.fragments import MOMENTS, Fragment
from ditmoe.parallel.engine.training_engine import TrainingEngine
from ditmoe.parallel.processes import from_first_rank, gather_objects

PARTS = (WEIGHTS, EMA, *MOMENTS)


def owned_pieces(engine: TrainingEngine, part: str) -> list[Piece]:
    """What this rank writes of one part: where several ranks hold the same run, each its share of it."""
    pieces: list[Piece] = []
    for fragment, tensor in _state(engine, part):
        length = tensor.numel()
        first = length * fragment.replica // fragment.replicas
        last = length * (fragment.replica + 1) // fragment.replicas
        pieces += _cut(fragment, tensor, first, last)
    return pieces


def held_pieces(engine: TrainingEngine, part: str) -> list[Piece]:
    """All that this rank holds of one part."""
    return [
        piece for fragment, tensor in _state(engine, part) for piece in _cut(fragment, tensor, 0, tensor.numel())
    ]


def _state(engine: TrainingEngine, part: str) -> Iterator[tuple[Fragment, Tensor]]:
    for fragment, average in zip(engine.fragments, engine.ema, strict=True):
        yield fragment, {WEIGHTS: fragment.weight, EMA: average, **fragment.moments}[part]


def _cut(fragment: Fragment, tensor: Tensor, first: int, last: int) -> Iterator[Piece]:
    """The elements from `first` to before `last` of a fragment's run, as boxes of the canonical parameter."""
    placement = fragment.placement or whole(fragment.shape)
    for offset, box in boxes_of_run(placement, fragment.start + first, last - first):
        memory = tensor[first + offset : first + offset + box.size].view(box.rows, box.columns)
        yield Piece(fragment.name, fragment.shape, box, memory)


def load_training_state(run_dir: Path, engine: TrainingEngine) -> tuple[CheckpointInfo | None, list[str]]:
    """Load the newest intact checkpoint of a run into the engine; a collective call.

    Returns:
        The checkpoint's facts, or None where the run has no checkpoint yet, and what was skipped and why.

    Raises:
        UserError: none of the run's checkpoints is intact, or one is not of this model.
    """
    skipped: list[str] = []
    # Rank 0 looks for all: two machines need not see the same of a shared folder at the same time.
    for found in from_first_rank(
        lambda: [_info_or_problem(path) for path in reversed(checkpoint_entries(run_dir))]
    ):
        if isinstance(found, str):
            skipped.append(found)
            continue
        stored, problems = _looked_at(found)
        if problems:
            skipped.extend(problems[:PROBLEMS_SHOWN])
            continue
        _load(stored, engine)
        engine.resume_at(found.step)
        return found, skipped
    if skipped:
        raise UserError(
            "\n".join(
                [*skipped, f"{run_dir}: no intact checkpoint is left; remove the folder to start the run anew"]
            )
        )
    return None, skipped


def _info_or_problem(path: Path) -> CheckpointInfo | str:
    try:
        info = read_info(path)
    except UserError as error:
        return str(error)
    return weights_alone(info) or info


def _looked_at(info: CheckpointInfo) -> tuple[dict[str, StoredBoxes], list[str]]:
    """Check all files, each by one rank, and that they hold the whole model; every rank gets the same answer.

    Each header is read by one rank, which tells the others; so are the bytes, for their checksums.

    Returns:
        What is stored in each part, and the problems: where there are any, the first may be empty.
    """
    # The files of one number have one header in all parts, and most likely one rank's state.
    names = sorted(info.files, key=lambda name: (name.partition("/")[2], name))
    number = {shard: place for place, shard in enumerate(sorted({name.partition("/")[2] for name in names}))}
    mine = [name for name in names if number[name.partition("/")[2]] % dist.get_world_size() == dist.get_rank()]
    boxes: dict[str, FileBoxes] = {}
    problems = damaged(info, mine)
    try:
        if not problems:
            boxes = {name: read_header(info.path / name) for name in mine}
    except UserError as error:
        problems = [str(error)]
    gathered = gather_objects((problems, boxes))
    problems = [problem for found, _ in gathered for problem in found]
    if problems:
        return {}, problems
    stored = _together(info, {name: found for _, of_rank in gathered for name, found in of_rank.items()})
    return stored, from_first_rank(lambda: _incomplete(info, stored))


def _together(info: CheckpointInfo, boxes: dict[str, FileBoxes]) -> dict[str, StoredBoxes]:
    """The parts, of which most often all have the same boxes: then these are put together once."""
    tables: dict[tuple[int, ...], BoxTable] = {}
    stored = {}
    for part in info.parts:
        names = sorted(name for name in boxes if name.startswith(f"{part}/"))
        of_part = [boxes[name] for name in names]
        key = tuple(map(id, of_part))
        if key not in tables:
            tables[key] = BoxTable(of_part)
        files = tuple(name.partition("/")[2] for name in names)
        stored[part] = StoredBoxes(info.path / part, files, tables[key])
    return stored


def _incomplete(info: CheckpointInfo, stored: dict[str, StoredBoxes]) -> list[str]:
    try:
        unlisted = [
            f"{info.path / part / file}: is not in the list of {MARKER}"
            for part in info.parts
            for file in shard_files(info.path / part)
            if f"{part}/{file}" not in info.files
        ]
        return unlisted or incomplete(replace(info, stored=stored))
    except UserError as error:
        return [str(error)]


def _load(stored: dict[str, StoredBoxes], engine: TrainingEngine) -> None:
    """Read this rank's share; all ranks fail together."""
    problem = None
    plans: dict[int, list[Read]] = {}  # parts with the same boxes have the same plan
    try:
        for part in PARTS:
            pieces, table = held_pieces(engine, part), id(stored[part].table)
            if table not in plans:
                plans[table] = stored[part].plan(pieces)
            stored[part].read(pieces, plans[table])
    except UserError as error:
        problem = str(error)
    problems = [found for found in gather_objects(problem) if found is not None]
    if problems:
        raise UserError(problems[0])
