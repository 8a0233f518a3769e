"""Weights that a run starts from: those of a run, of a checkpoint, or of a published file.

Opening them reads headers alone. What a rank keeps is read when it has memory for it, and of a checkpoint also the
rank's share of the files, in the same pass, for their checksums. Nothing is unpickled.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ditmoe.model.canonical import canonical_shapes
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.weights.lazy import parts_of
from ditmoe.model.weights.objective import with_objective
from ditmoe.model.weights.positions import check_position_embedding
from ditmoe.model.weights.published import PublishedWeights, read_published
from ditmoe.model.weights.sit import could_be_sit
from ditmoe.parallel.boxes import Box, matrix_shape
from ditmoe.parallel.checkpoint.box_reading import AT_ONCE, BYTES
from ditmoe.parallel.checkpoint.box_storage import Piece
from ditmoe.parallel.checkpoint.checked_files import ALONE, CheckedFiles, Readers
from ditmoe.parallel.checkpoint.folder import (
    CheckpointInfo,
    looked_at,
    newest_checkpoint,
    raise_problems,
    read_info,
)
from ditmoe.parallel.checkpoint.marker import MARKER

Set = Literal["ema", "weights"]
Objective = Literal["ddpm", "rectified_flow", "sit"]
"""What a file may be said to have been trained to predict."""


@dataclass(frozen=True)
class Start:
    """What is asked for."""

    path: Path
    """A run, a checkpoint, or a published file."""
    which: Set | None
    """None: the EMA if there is one."""
    said: Objective | None
    """What it was trained to predict, where it does not say so."""
    model: ModelConfig
    """The network that starts from it, complete."""
    objective: ObjectiveConfig
    """Of that network."""
    class_names: tuple[str, ...] = ()
    """Of its data; none: they are not known."""
    locate: Callable[[Path], Path] = Path
    """Where on this machine the path lies: it may be a name on a hub."""


@dataclass(frozen=True)
class Source:
    """Weights that are open."""

    config: ModelConfig
    """Of their network, complete."""
    objective: ObjectiveConfig | None
    """What it was trained to predict; None: nobody says."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of its parameters, by canonical name."""
    fill: Callable[[Sequence[Piece]], None]
    """Fills pieces of its parameters; all readers call it, once. Where the source is damaged or cannot be read it
    raises UserError on all of them, and what was filled is worth nothing."""
    facts: dict[str, Any]
    """What is kept of where they are from, as plain data."""
    class_names: tuple[str, ...] = ()
    """Of its classes; none: nobody says."""
    notes: tuple[str, ...] = ()
    """What a user should know of them."""


@contextmanager
def opened(start: Start, readers: Readers = ALONE) -> Iterator[Source]:
    """Open the weights that a run starts from, which stay where they are for the body.

    Args:
        readers: who reads them together; all of them call it.

    Raises:
        UserError: they are not there, no weights of a network of this family, their headers are damaged, or what
            they were trained to predict has to be known and is not.
    """
    path = start.locate(start.path)
    checkpoint = _checkpoint(path)
    if checkpoint is None:
        yield _of_file(start, path, readers)
        return
    info = read_info(checkpoint)
    which: Set = start.which or ("ema" if "ema" in info.parts else "weights")
    with looked_at(checkpoint, which, readers) as (info, files):
        yield _of_checkpoint(start, info, which, files)


def _checkpoint(path: Path) -> Path | None:
    """The checkpoint that a path stands for; None where it is a file, or a folder of published files."""
    if not path.is_dir():
        return None
    if (path / MARKER).is_file():
        return path
    if not (path / "checkpoints").is_dir():
        return None
    newest = newest_checkpoint(path)
    if newest is None:
        raise UserError(f"train.start_from = {path}: the run has no complete checkpoint")
    return newest


def _of_checkpoint(start: Start, info: CheckpointInfo, which: Set, files: CheckedFiles) -> Source:
    if start.said not in (None, info.objective.kind):
        raise UserError(
            f"train.start_objective = {start.said}, but {info.path} says {info.objective.kind}; expected it left"
            " out"
        )

    def fill(pieces: Sequence[Piece]) -> None:
        raise_problems(files.fill({which: pieces}))

    facts = {
        "path": str(start.path),
        "set": which,
        "objective": info.objective.kind,
        "checkpoint": info.path.name,
        "step": info.step,
        "images": info.images,
        "fingerprint": info.fingerprint,
    }
    names = tuple(info.dataset.get("class_names") or ())
    return Source(_completed(info), info.objective, info.shapes, fill, facts, names)


def _completed(info: CheckpointInfo) -> ModelConfig:
    """The network's configuration, with what it left to the data."""
    left_out = ("image_size", "channels", "num_classes")
    found = {key: info.dataset[key] for key in left_out if getattr(info.model, key) is None}
    return info.model.model_copy(update=found)


def _of_file(start: Start, path: Path, readers: Readers) -> Source:
    published = _published(start, path, readers)
    which: Set = start.which or ("ema" if published.ema is not None else "weights")
    state = published.state(which)
    note = check_position_embedding(state, published.config, published.origin, averaged=which == "ema")
    objective = published.objective
    facts = {
        "path": str(start.path),
        "set": which,
        "objective": None if objective is None else objective.kind,
        "bytes": path.stat().st_size if path.is_file() else None,
    }
    notes = [note] if note else []
    if objective is None:
        notes.append(f"{start.path} does not say what it was trained to predict; train.start_objective does")

    def fill(pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            _copy(parts_of(state, piece.name), piece)

    names = tuple(published.class_names or ())
    shapes = canonical_shapes(published.config)
    return Source(published.config, objective, shapes, fill, facts, names, tuple(notes))


def _published(start: Start, path: Path, readers: Readers) -> PublishedWeights:
    """Published weights with their objective. What takes reading more of them than a reader keeps is found out by
    one alone: whether they answer to noise as it says, and whether embedders that must be the same are. UserError
    on all readers."""
    published, problem, trusted = None, None, readers.rank > 0
    try:
        published = _with_objective(start, _read(start.model, path, trusted=trusted), trusted=trusted)
    except UserError as error:
        problem = str(error)
    problems = [found for found in readers.gather(problem) if found is not None]
    if published is None or problems:
        raise UserError(problems[0])
    return published


def _copy(parts: Sequence[Tensor], piece: Piece) -> None:
    """Fill a piece from a whole parameter's parts, of which no more is read where they are mapped from a file."""
    first = 0
    for part in parts:
        rows, columns = matrix_shape(part.shape)
        here = Box(first, 0, rows, columns)
        found = piece.box.overlap(here)
        if found is not None:
            found_RC = part.reshape(rows, columns)[found.within(here).slices]
            memory_RC = piece.tensor[found.within(piece.box).slices]
            step = max(1, AT_ONCE // (BYTES * found.columns))
            for values, memory in zip(torch.split(found_RC, step), torch.split(memory_RC, step), strict=True):
                memory.copy_(values if piece.scale == 1 else values.float() * piece.scale)
        first += rows


def _read(model: ModelConfig, path: Path, *, trusted: bool) -> PublishedWeights:
    """Read a file. What its weights do not say of their network is taken from the one that starts from it."""
    try:
        return read_published(path, trusted=trusted)
    except UserError:
        keys = ("heads", "image_size", "experts_per_token")
        config = {key: getattr(model, key) for key in keys if getattr(model, key)}
        return read_published(path, config=config, trusted=trusted)


def _with_objective(start: Start, published: PublishedWeights, *, trusted: bool) -> PublishedWeights:
    """The weights with what they were trained to predict. UserError: it matters, and nobody says it."""
    key, flows = "train.start_objective", start.objective.kind == "rectified_flow"
    if start.said is None and published.objective is None and flows and could_be_sit(published.config):
        raise UserError(
            f"{key} is left out, and {published.origin} does not say what it was trained to predict: DiT's files"
            " (ddpm) and SiT's, whose time runs the other way, look alike; expected ddpm, sit, or rectified_flow"
            " where t = 1 is noise"
        )
    return with_objective(published, start.said, key, trusted=trusted)
