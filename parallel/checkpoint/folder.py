"""Checkpoint folders: layout-free, complete or invisible, and readable without any process group.

    checkpoints/step-00001000/
        weights/ ema/ exp_avg/ exp_avg_sq/    safetensors, one entry per canonical parameter, as a matrix, in boxes
        checkpoint.json                       written last: step, images, configuration, shapes, checksums

A checkpoint is written under a name that ends in `.partial` and renamed when its marker is on disk.
"""

import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ditmoe.model.canonical import canonical_shapes
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.outside.files import sync_folder, temporary_beside
from ditmoe.parallel.checkpoint.box_storage import StoredBoxes, save_pieces, whole_piece
from ditmoe.parallel.checkpoint.checked_files import ALONE, CheckedFiles, Readers, damage
from ditmoe.parallel.checkpoint.holds import reading
from ditmoe.parallel.checkpoint.marker import FORMAT, MARKER, Part, marker_text, read_marker

PARTIAL = ".partial"
PROBLEMS_SHOWN = 20
"""Of a checkpoint's problems, those that a message lists."""
WEIGHTS, EMA = "weights", "ema"
_NAME = re.compile(r"step-([0-9]{8,18})")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself."""

    path: Path
    step: int
    images: int
    """Images seen: the position in the global sample order at which training goes on."""
    sums: dict[str, Any]
    """What the run's records had summed up since the last one."""
    config: dict[str, Any]
    """The run's resolved configuration (a converted checkpoint: `model` and `objective`)."""
    dataset: dict[str, Any]
    """Name, image_size, channels, num_classes and class_names of the training data."""
    layout: dict[str, Any] | None
    """The layout that wrote it; None for a converted one."""
    started_from: dict[str, Any] | None
    """Where the run's first weights are from, as `parallel/start/` tells it; None: it began anew."""
    parts: tuple[str, ...]
    """The folders it has: `weights`, `ema`, `exp_avg`, `exp_avg_sq`."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every canonical parameter."""
    files: dict[str, dict[str, Any]]
    """Relative path → `bytes` and `sha256`."""
    fingerprint: str
    """Hash of all files' checksums."""
    stored: dict[str, StoredBoxes] = field(default_factory=dict, compare=False)
    """What is known of the headers of its parts: of those that `looked_at` has read."""

    @property
    def model(self) -> ModelConfig:
        """The network's configuration."""
        return ModelConfig.model_validate(self.config["model"])

    @property
    def objective(self) -> ObjectiveConfig:
        """The objective it was trained with."""
        return ObjectiveConfig.model_validate(self.config["objective"])


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that have a marker, oldest first."""
    return [path for path in checkpoint_entries(run_dir) if _has_marker(path)]


def checkpoint_entries(run_dir: Path) -> list[Path]:
    """All that has the name of a checkpoint in a run's folder, oldest first: also damaged ones, and files."""
    try:
        names = [path.name for path in (run_dir / "checkpoints").iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        problem = error.strerror or error
        raise UserError(f"{run_dir / 'checkpoints'}: cannot be read ({problem}); expected a folder") from None
    steps = sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)
    return [path for path in (checkpoint_path(run_dir, step) for step in steps) if path.name in names]


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's name states; None: it has another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def _has_marker(path: Path) -> bool:
    try:
        return (path / MARKER).is_file()
    except OSError:
        return True  # it cannot be looked at: who reads it is told why


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint of the latest step, or None."""
    return next(reversed(checkpoints(run_dir)), None)


def read_info(path: Path) -> CheckpointInfo:
    """Read a checkpoint's marker.

    Raises:
        UserError: there is none, it is unreadable, of another format, or of another step than the folder's name
            (weights that `ditmoe convert` wrote may have any name).
    """
    marker, facts = read_marker(path)
    named = step_of(path)
    if named not in (None, marker.step) and marker.layout is not None:
        raise UserError(f"{path / MARKER}: is of step {marker.step}, expected {named} as its folder's name says")
    checked = {"model": marker.config.model, "objective": marker.config.objective}
    files = {name: found.model_dump() for name, found in marker.files.items()}
    return CheckpointInfo(
        path=path,
        step=marker.step,
        images=marker.images,
        sums=marker.sums,
        config=facts["config"] | {name: section.model_dump(mode="json") for name, section in checked.items()},
        dataset=facts["dataset"],
        layout=facts.get("layout"),
        started_from=facts.get("started_from"),
        parts=tuple(marker.parts),
        shapes={name: tuple(shape) for name, shape in marker.shapes.items()},
        files=files,
        fingerprint=_fingerprint(files),
    )


def weights_alone(info: CheckpointInfo) -> str | None:
    """Why training cannot go on from a checkpoint that has no optimiser's state; None where it has."""
    missing = [part for part in get_args(Part) if part not in info.parts]
    if not missing:
        return None
    return (
        f"{info.path}: holds {' and '.join(info.parts)} without {' and '.join(missing)}, as `ditmoe convert`"
        " writes them; training cannot go on from these, but a new run can start from them: train.start_from"
    )


def _fingerprint(files: Mapping[str, Mapping[str, Any]]) -> str:
    lines = "\n".join(f"{name} {files[name]['sha256']}" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_weights(path: Path, which: Literal["ema", "weights"] = "ema") -> dict[str, Tensor]:
    """All canonical parameters of a checkpoint, fp32 on the CPU, read without a process group.

    Raises:
        UserError: the part is missing, or a file of it is damaged.
    """
    tensors: dict[str, Tensor] = {}

    def allocate(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
        tensors.update((name, torch.empty(shape)) for name, shape in shapes.items())
        return tensors

    load_weights(path, which, allocate)
    return tensors


def load_weights(
    path: Path,
    which: Literal["ema", "weights"],
    allocate: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, Tensor]],
    readers: Readers = ALONE,
) -> None:
    """Read canonical parameters into memory of any type, on any device; all readers call it.

    No second copy is made: of a file a few MiB at a time are on their way to their place, and to its checksum.

    Args:
        allocate: called with the shape of each parameter when the files are known to hold just these; gives the
            memory of those that are wanted, contiguous. Where this raises, it is worth nothing.

    Raises:
        UserError: the part is missing, or a file of it is damaged.
    """
    with looked_at(path, which, readers) as (info, files):
        memory = allocate(info.shapes)
        pieces = [whole_piece(name, tensor) for name, tensor in memory.items() if name in info.shapes]
        raise_problems(files.fill({which: pieces}))


@contextmanager
def looked_at(
    path: Path, which: Literal["ema", "weights"], readers: Readers
) -> Iterator[tuple[CheckpointInfo, CheckedFiles]]:
    """A part of a checkpoint whose headers hold the whole model, and which stays where it is for the body.

    Raises:
        UserError: the part is missing, or not whole; the bytes of its files are yet to be checked.
    """
    info = read_info(path)
    if which not in info.parts:
        raise UserError(f"{path}: has no {which} (found: {', '.join(info.parts)})")
    with reading(path):
        files = files_of(info, [which], readers)
        raise_problems(files.look())
        info = replace(info, stored=files.stored)
        problems = incomplete(info, [which])
        raise_problems(problems and (files.damaged() or problems))
        yield info, files


def raise_problems(problems: Sequence[str]) -> None:
    """One UserError of all problems, of which it lists the first; none where there are none."""
    if problems:
        raise UserError("\n".join(problems[:PROBLEMS_SHOWN]))


def files_of(info: CheckpointInfo, parts: Sequence[str], readers: Readers) -> CheckedFiles:
    """The files of some parts of a checkpoint."""
    return CheckedFiles(
        info.path, {name: facts for name, facts in info.files.items() if name.partition("/")[0] in parts}, readers
    )


def incomplete(info: CheckpointInfo, parts: Sequence[str] | None = None) -> list[str]:
    """What keeps a checkpoint from holding each parameter of its model, each expert of each block, exactly once.

    Compares the marker's shapes with those of the model that its configuration describes, and the files' headers
    with both. One message each; the files must not be damaged.

    Args:
        parts: those to look at; None: all.
    """
    path, expected = info.path, canonical_shapes(info.model)
    expected.pop("pos_embed")
    problems = [f"{path}: {name} is not in it" for name in expected if name not in info.shapes]
    problems += [f"{path}: {name} is no parameter of its model" for name in info.shapes if name not in expected]
    problems += [
        f"{path}: {name} is {shape} in it, and {expected[name]} in its model"
        for name, shape in info.shapes.items()
        if expected.get(name, shape) != shape
    ]
    for part in info.parts if parts is None else parts:
        problems += (info.stored.get(part) or StoredBoxes.of(path / part)).missing(info.shapes)
    return problems


def damaged(info: CheckpointInfo, names: Iterable[str]) -> list[str]:
    """Problems of these files of a checkpoint: missing, another size, another checksum; one message each."""
    found = (damage(info.path, name, info.files[name]) for name in names)
    return [problem for problem in found if problem is not None]


def write_marker(
    path: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]], final: Path
) -> None:
    """Write the marker into a partial checkpoint and give it its final name."""
    content = {"format": FORMAT, **facts, "files": dict(sorted(files.items()))}
    marker = path / MARKER
    with marker.open("w") as stream:
        stream.write(marker_text(content))
        stream.flush()
        os.fsync(stream.fileno())
    for folder in (*(child for child in path.iterdir() if child.is_dir()), path):
        sync_folder(folder)
    os.replace(path, final)
    sync_folder(path.parent)


def start_partial(path: Path) -> Path:
    """A new folder to write a checkpoint into, under a name that nothing has.

    That is `NAME.partial`, unless a leftover that cannot be removed, or somebody's file, has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        partial = path.with_name(f"{path.name}{f'.new-{number}' if number > 1 else ''}{PARTIAL}")
        with suppress(FileExistsError):
            partial.mkdir()
            return partial
    raise AssertionError("numbers do not end")


def discarded_name(path: Path) -> Path:
    """A name that nothing has, for a checkpoint that is about to be deleted."""
    names = (path.with_name(f"{path.name}.old-{number}{PARTIAL}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def superseded(
    steps: Sequence[int], keep_last: int, keep_every: int | None, best: Collection[int] = ()
) -> list[int]:
    """The steps whose checkpoints may go: none of the newest `keep_last`, of every `keep_every`, of the best."""
    older = sorted(steps)[: -keep_last or None]
    return [step for step in older if step not in best and (keep_every is None or step % keep_every)]


def write_weights_checkpoint(
    path: Path,
    model: ModelConfig,
    objective: ObjectiveConfig,
    weights: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None,
    class_names: Sequence[str] | None = None,
    latents: Mapping[str, Any] | None = None,
) -> None:
    """Write canonical weights (and EMA) as a checkpoint that sampling can use, without a process group.

    It is written under a name that nothing else has; when that fails, nothing is left.

    Args:
        latents: how what the network draws becomes pixels; None: it draws pixels, or nobody knows.

    Raises:
        UserError: the folder exists already.
    """
    if os.path.lexists(path):
        raise UserError(f"{path}: exists already; expected a new folder")
    partial = temporary_beside(path)
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, path, model, objective, weights, ema, class_names, latents)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_weights(
    partial: Path,
    path: Path,
    model: ModelConfig,
    objective: ObjectiveConfig,
    weights: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None,
    class_names: Sequence[str] | None,
    latents: Mapping[str, Any] | None,
) -> None:
    parts = {WEIGHTS: weights, EMA: weights if ema is None else ema}
    files: dict[str, dict[str, Any]] = {}
    for part, tensors in parts.items():
        stored = {name: tensor for name, tensor in tensors.items() if name != "pos_embed"}
        pieces = [whole_piece(name, tensor.float().contiguous()) for name, tensor in stored.items()]
        written = save_pieces(partial / part, pieces).files
        files |= {f"{part}/{name}": facts for name, facts in written.items()}
    facts = {
        "step": 0,
        "images": 0,
        "sums": {},
        "parts": list(parts),
        "config": {"model": model.model_dump(mode="json"), "objective": objective.model_dump(mode="json")},
        "dataset": {
            "name": "converted",
            "image_size": model.image_size,
            "channels": model.channels,
            "num_classes": model.num_classes,
            "class_names": list(class_names or map(str, range(model.num_classes or 0))),
            **({} if latents is None else {"latents": dict(latents)}),
        },
        "shapes": {name: list(tensor.shape) for name, tensor in weights.items() if name != "pos_embed"},
    }
    write_marker(partial, facts, files, path)
