"""How a run begins: anew, or from the weights of another; a resume takes neither."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ditmoe.model.outside.text import counted
from ditmoe.model.weights.transfer import Value, differences, listed, plan_transfer
from ditmoe.parallel.alone import from_first_rank
from ditmoe.parallel.checkpoint.checked_files import Readers
from ditmoe.parallel.checkpoint.folder import checkpoint_entries
from ditmoe.parallel.engine.initial import Initial
from ditmoe.parallel.processes import gather_objects
from ditmoe.parallel.start.copied import Copied
from ditmoe.parallel.start.fresh import Fresh
from ditmoe.parallel.start.source import Source, Start, opened


@dataclass(frozen=True)
class Beginning:
    """The first weights of a run."""

    initial: Initial | None
    """The values of its parameters; None: the run resumes, and a checkpoint has them."""
    facts: dict[str, Any] | None = None
    """Where they are from, as plain data; None: from nowhere, or the run resumes."""
    lines: tuple[str, ...] = ()
    """What the log says of it."""


@contextmanager
def begun(run_dir: Path, start: Start | None, seed: int) -> Iterator[Beginning]:
    """The first weights of a run, which can be asked for in the body; a collective call.

    Args:
        start: where they are from; None: all are fresh.
        seed: of fresh values.

    Raises:
        UserError: what the run is to start from is not there, or does not fit: the same on all ranks. Damage to
            its bytes is found where the values are asked for, and raised there.
    """
    if from_first_rank(lambda: bool(checkpoint_entries(run_dir)), "looks for checkpoints"):
        yield Beginning(None, lines=() if start is None else (_ignored(start),))
        return
    if start is None:
        yield Beginning(Fresh(seed))
        return
    with opened(start, Readers(dist.get_rank(), dist.get_world_size(), gather_objects)) as source:
        values = plan_transfer(source.config, start.model, str(start.path))
        copied = Copied(values, source, Fresh(seed))
        yield Beginning(copied, source.facts, tuple(_lines(start, source, values)))


def check_start(run_dir: Path, start: Start | None) -> list[str]:
    """Find out, before any process starts, whether a run can start from what it is to start from.

    Returns:
        What the log will say of it.

    Raises:
        UserError: as `begun`, but for damage to the bytes of a checkpoint's files.
    """
    if start is None:
        return []
    if checkpoint_entries(run_dir):
        return [_ignored(start)]
    with opened(start) as source:
        return list(_lines(start, source, plan_transfer(source.config, start.model, str(start.path))))


def _ignored(start: Start) -> str:
    return f"train.start_from = {start.path} is ignored: the run goes on from a checkpoint of its own"


def _lines(start: Start, source: Source, values: dict[str, Value]) -> Iterator[str]:
    """What the log says of a start from other weights: the fresh parts by name, and what else is different."""
    parts = [part for name, value in values.items() if (part := value.fresh_part(name)) is not None]
    where = f"{source.facts['checkpoint']} of {start.path}" if "checkpoint" in source.facts else str(start.path)
    copied = len(values) - len(parts)
    yield f"started from the {source.facts['set']} of {where}: {copied} of {len(values)} tensors are copied"
    for part in listed(parts):
        yield f"started fresh: {part}"
    yield from source.notes
    if source.objective is not None and source.objective.kind != start.objective.kind:
        yield (
            f"warning: the source was trained on {source.objective.kind}, and objective.kind ="
            f" {start.objective.kind}: the loss does not begin where its loss was"
        )
    for line in differences(source.config, start.model):
        yield f"differs from the source: {line}"
    pairs = zip(source.class_names, start.class_names, strict=False)
    renamed = [(number, there, here) for number, (there, here) in enumerate(pairs) if there != here]
    if renamed and source.config.num_classes == start.model.num_classes:
        number, there, here = renamed[0]
        yield (
            f"differs from the source: the names of {counted(len(renamed), 'class')}, whose rows of the label"
            f" table are copied by their numbers; class {number} is {here!r:.60} here and {there!r:.60} there"
        )
