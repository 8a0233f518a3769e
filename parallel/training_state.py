"""Saving and loading a training engine's whole state, each rank its own share."""

import errno
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint import (
    EMA,
    PARTIAL,
    WEIGHTS,
    CheckpointInfo,
    checkpoint_path,
    checkpoints,
    damaged,
    discard,
    file_facts,
    incomplete,
    newest_checkpoint,
    read_info,
    start_partial,
    superseded,
    write_marker,
)
from ditmoe.parallel.config import CheckpointConfig
from ditmoe.parallel.engine import TrainingEngine
from ditmoe.parallel.flat_storage import Run, load_runs, save_runs
from ditmoe.parallel.fragments import MOMENTS, Fragment
from ditmoe.parallel.processes import from_first_rank, gather_objects

PARTS = (WEIGHTS, EMA, *MOMENTS)


def save_training_state(
    run_dir: Path,
    engine: TrainingEngine,
    images: int,
    sums: dict[str, Any],
    config: dict[str, Any],
    dataset: dict[str, Any],
    retention: CheckpointConfig,
) -> Path:
    """Write the checkpoint of the engine's step; a collective call.

    Args:
        images: images seen, which is the position in the global sample order.
        sums: what the run's records have summed up since the last one, plain data.
        config: the resolved configuration as plain data.

    Returns:
        The new checkpoint's folder.

    Raises:
        UserError: it could not be written (such as a full disk); earlier checkpoints are untouched.
    """
    path = checkpoint_path(run_dir, engine.step)
    partial = path.with_name(path.name + PARTIAL)
    _on_first_rank(lambda: start_partial(path), run_dir, path)
    try:
        for part in PARTS:
            save_runs(partial / part, _runs(engine, part, writing=True))
    except (OSError, CheckpointException) as error:
        _on_first_rank(lambda: shutil.rmtree(partial, ignore_errors=True), run_dir, path)
        if not any(isinstance(cause, OSError) for cause in _causes(error)):
            raise  # no disk's refusal, but an error of the program
        raise unwritten(error, run_dir, path) from None
    facts = {
        "step": engine.step,
        "images": images,
        "sums": sums,
        "parts": list(PARTS),
        "layout": vars(engine.layout),
        "config": config,
        "dataset": dataset,
        "shapes": _shapes(engine.fragments),
    }
    files = _checksums(partial)
    _on_first_rank(lambda: _finish(run_dir, path, facts, files, retention), run_dir, path)
    return path


def _finish(
    run_dir: Path, path: Path, facts: dict[str, Any], files: dict[str, Any], retention: CheckpointConfig
) -> None:
    """Make the checkpoint visible, and only then let older ones go."""
    if path.exists():  # a damaged checkpoint of this step, which loading passed over
        discard(path)
    write_marker(path.with_name(path.name + PARTIAL), facts, files)
    # Later ones are damaged, and were passed over too: counted, they would push out the good ones.
    found = {int(folder.name.removeprefix("step-")): folder for folder in checkpoints(run_dir)}
    steps = [step for step in found if step <= facts["step"]]
    for step in superseded(steps, retention.keep_last, retention.keep_every):
        discard(found[step])


def load_training_state(run_dir: Path, engine: TrainingEngine) -> tuple[CheckpointInfo | None, list[str]]:
    """Load the newest intact checkpoint of a run into the engine; a collective call.

    Returns:
        The checkpoint's facts, or None where the run has no checkpoint yet, and what was skipped and why.

    Raises:
        UserError: none of the run's checkpoints is intact, or one is not of this model.
    """
    skipped: list[str] = []
    # Rank 0 looks for all: two machines need not see the same of a shared folder at the same time.
    for found in from_first_rank(lambda: [_info_or_problem(path) for path in reversed(checkpoints(run_dir))]):
        if isinstance(found, str):
            skipped.append(found)
            continue
        problems = _problems_on_any_rank(found)
        if problems:
            skipped.extend(problems)
            continue
        for part in PARTS:
            load_runs(found.path / part, _runs(engine, part, writing=False))
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
        return read_info(path)
    except UserError as error:
        return str(error)


def _runs(engine: TrainingEngine, part: str, writing: bool) -> list[Run]:
    """This rank's runs of one part; where several ranks hold the same (ZeRO 0), each writes its share of it."""
    runs = []
    for fragment, average in zip(engine.fragments, engine.ema, strict=True):
        tensor = {WEIGHTS: fragment.weight, EMA: average, **fragment.moments}[part]
        first, last = 0, tensor.numel()
        if writing:
            first = last * fragment.replica // fragment.replicas
            last = last * (fragment.replica + 1) // fragment.replicas
        if first < last:
            size = math.prod(fragment.shape)
            runs.append(Run(fragment.name, size, fragment.start + first, tensor[first:last]))
    return runs


def _shapes(fragments: Sequence[Fragment]) -> dict[str, list[int]]:
    """Shape of every parameter that any rank holds a part of."""
    own = {fragment.name: list(fragment.shape) for fragment in fragments}
    return {name: shape for shapes in gather_objects(own) for name, shape in sorted(shapes.items())}


def _checksums(partial: Path) -> dict[str, Any]:
    """Facts of all files, each read by one rank."""
    names = from_first_rank(
        lambda: sorted(str(file.relative_to(partial)) for file in partial.rglob("*.safetensors"))
    )
    own = {name: file_facts(partial / name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    return {name: facts for part in gather_objects(own) for name, facts in part.items()}


def _problems_on_any_rank(info: CheckpointInfo) -> list[str]:
    """Check all files, each by one rank, and that they hold the whole model; every rank gets the same answer."""
    names = sorted(info.files)[dist.get_rank() :: dist.get_world_size()]
    problems = [problem for problems in gather_objects(damaged(info, names)) for problem in problems]
    return problems or from_first_rank(lambda: incomplete(info))


def _on_first_rank(action: Any, run_dir: Path, path: Path) -> None:
    """Do something on rank 0; if the disk refuses, every rank raises the same error."""
    failure: OSError | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            failure = error
    messages = gather_objects(failure and (failure.errno, str(failure)))
    if messages[0] is not None:
        raise unwritten(OSError(*messages[0]), run_dir, path)


def _causes(error: BaseException) -> list[BaseException]:
    """Each failed rank's error."""
    if isinstance(error, CheckpointException):
        return [failure[0] for failure in error.failures.values()]
    return [error]


def unwritten(error: BaseException, run_dir: Path, path: Path) -> UserError:
    """The user's message for a file of a run that could not be written."""
    causes = _causes(error)
    disk = next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
    newest = newest_checkpoint(run_dir)
    hint = "free some space" if getattr(disk, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else "mend that"
    return UserError(
        f"{path}: could not be written ({disk}). "
        f"The newest complete checkpoint is {newest or 'none yet'}; "
        f"{hint} and repeat the command to continue from it"
    )
