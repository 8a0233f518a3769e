"""A training engine's whole state as pieces of a checkpoint, and loading it, each rank its own share."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from ditmoe.model.errors import UserError
from ditmoe.parallel.alone import from_first_rank
from ditmoe.parallel.boxes import boxes_of_run, whole
from ditmoe.parallel.checkpoint.box_storage import Piece
from ditmoe.parallel.checkpoint.checked_files import Readers
from ditmoe.parallel.checkpoint.folder import (
    EMA,
    PROBLEMS_SHOWN,
    WEIGHTS,
    CheckpointInfo,
    checkpoint_entries,
    files_of,
    incomplete,
    read_info,
    weights_alone,
)
from ditmoe.parallel.engine.fragments import MOMENTS, Fragment
from ditmoe.parallel.engine.training_engine import TrainingEngine
from ditmoe.parallel.processes import gather_objects

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
    readers = Readers(dist.get_rank(), dist.get_world_size(), gather_objects)
    # Rank 0 looks for all: two machines need not see the same of a shared folder at the same time.
    for path in reversed(from_first_rank(lambda: checkpoint_entries(run_dir), "looks for checkpoints")):
        info = from_first_rank(partial(_info_or_problem, path), f"reads the marker of {path}")
        if isinstance(info, str):
            skipped.append(info)
            continue
        problems = _filled(info, engine, readers)
        if problems:
            skipped.extend(problems[:PROBLEMS_SHOWN])
            continue
        engine.resume_at(info.step)
        return info, skipped
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


def _filled(info: CheckpointInfo, engine: TrainingEngine, readers: Readers) -> list[str]:
    """Read a checkpoint into the engine, each rank its own share, and check all of it.

    Returns:
        The problems, the same on every rank. Where there are any, the engine's state is worth nothing.

    Raises:
        UserError: on every rank; it is intact, and not of this engine, or could not be read.
    """
    files = files_of(info, info.parts, readers)
    problems = files.look()
    if not problems:
        problems = incomplete(replace(info, stored=files.stored))
        problems = problems and (files.damaged() or problems)
    return problems or files.fill({part: held_pieces(engine, part) for part in PARTS})
