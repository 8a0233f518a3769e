"""Saving a run's checkpoints while it goes on.

Training waits for a copy of each rank's share to host memory. A thread of each rank then writes it, through
torch.distributed.checkpoint and in a process group of its own, so that its collectives and training's never mix.
One save is under way at a time. All ranks' threads end with the same outcome, but not at the same moment: what
training does about a failure, it must do on all ranks at the same step (`failed` says how).
"""

import errno
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ditmoe.model.errors import UserError
from ditmoe.parallel.alone import from_first_rank
from ditmoe.parallel.checkpoint.box_storage import Piece, save_pieces
from ditmoe.parallel.checkpoint.folder import (
    checkpoint_path,
    checkpoints,
    newest_checkpoint,
    start_partial,
    superseded,
    write_marker,
)
from ditmoe.parallel.checkpoint.holds import letting_go
from ditmoe.parallel.checkpoint.removal import Removal
from ditmoe.parallel.checkpoint.training_state import PARTS, owned_pieces
from ditmoe.parallel.config import CheckpointConfig
from ditmoe.parallel.engine.training_engine import TrainingEngine

TIMEOUT = timedelta(hours=2)
"""Longest wait of a rank that has written its share for the others."""
SECONDS_TO_FINISH = 10.0
"""Seconds that a program which fails gives the save under way to finish. A second Ctrl-C is given none."""

SECONDS_TO_REMOVE = 30.0
"""Seconds that a program which ends well gives old checkpoints to be deleted, while the others wait for rank 0;
the next start deletes the rest."""

T = TypeVar("T")
Best = Callable[[Sequence[Path]], Collection[int]]
"""Of a run's checkpoints, the steps of those that are kept for being good; called on rank 0, in its thread."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    path: Path
    copy_seconds: float
    """How long training waited for the copy to host memory."""
    write_seconds: float
    """How long it then took to be complete; training waited for this too where `asynchronous` is off."""


class CheckpointSaver:
    """Saves checkpoints of a run, and lets older ones go; a context manager that all ranks make together."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, best: Best = lambda paths: ()) -> None:
        self._run_dir = run_dir
        self._config = config
        self._best = best
        self._removal = Removal(run_dir)
        if dist.get_rank() == 0:
            self._removal.sweep()
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._host = _HostMemory()
        self._writing: Future[Saved] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
            self._removal.wait(SECONDS_TO_REMOVE)
        elif self._writing is not None and isinstance(error, Exception):
            wait([self._writing], SECONDS_TO_FINISH)
        self._host.close()

    def save(
        self,
        engine: TrainingEngine,
        images: int,
        sums: dict[str, Any],
        config: dict[str, Any],
        dataset: dict[str, Any],
        started_from: dict[str, Any] | None = None,
    ) -> Path:
        """Save the engine's step; a collective call, which waits for the last save first.

        Args:
            images: images seen, which is the position in the global sample order.
            sums: what the run's records have summed up since the last one, plain data.
            config: the resolved configuration as plain data.
            started_from: where the run's first weights are from.

        Returns:
            The folder that the checkpoint will have once it is complete.

        Raises:
            UserError: this save (only where `asynchronous` is off) or the last could not be written, such as on a
                full disk; earlier checkpoints are untouched.
        """
        self.wait()
        start = time.perf_counter()
        path = checkpoint_path(self._run_dir, engine.step)
        pieces = {part: owned_pieces(engine, part) for part in PARTS}
        facts = {
            "step": engine.step,
            "images": images,
            "sums": sums,
            "parts": list(PARTS),
            "layout": vars(engine.layout),
            "config": config,
            "dataset": dataset,
            **({} if started_from is None else {"started_from": started_from}),
        }
        if self._config.asynchronous:
            pieces = self._host.copy(pieces, engine.device)
        copied = time.perf_counter()

        def write() -> Saved:
            self._write(path, pieces, facts)
            return Saved(path, copied - start, time.perf_counter() - copied)

        self._writing = Future()
        if self._config.asynchronous:
            # A daemon: a program that fails does not wait for it beyond its patience.
            arguments = (self._writing, write)
            threading.Thread(target=_fulfil, args=arguments, name="checkpoint", daemon=True).start()
        else:
            _fulfil(self._writing, write)
            self.wait()
        return path

    def wait(self) -> float:
        """Wait until no save is under way; the seconds it took.

        Raises:
            UserError: it could not be written. All ranks raise it, if all of them wait.
        """
        if self._writing is None:
            return 0.0
        start = time.perf_counter()
        self._writing.result()
        return time.perf_counter() - start

    def finished(self) -> Saved | None:
        """The save that has become complete since the last call, if any. Never waits, and never raises."""
        if self._writing is None or not self._writing.done() or self.failed:
            return None
        saved, self._writing = self._writing.result(), None
        return saved

    def problems(self) -> list[str]:
        """What could not be removed of old checkpoints since the last call; it is tried again at the next save."""
        return self._removal.problems()

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save under way has failed.

        Ranks learn it at different steps. So one alone must not raise: it has training's own all-reduce tell the
        others, and then all of them `wait`, which raises on each.
        """
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def _write(
        self,
        path: Path,
        pieces: Mapping[str, Sequence[Piece]],
        facts: dict[str, Any],
    ) -> None:
        """Write a checkpoint; a collective call in the saver's own group."""
        partial = self._on_first_rank(path, "begins to write", lambda: start_partial(path))
        files: dict[str, dict[str, Any]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        try:
            for part in PARTS:
                written = save_pieces(partial / part, pieces[part], self._group)
                files |= {f"{part}/{name}": file for name, file in written.files.items()}
                shapes |= written.shapes
        except (OSError, CheckpointException) as error:
            self._on_first_rank(path, "gives up", lambda: shutil.rmtree(partial, ignore_errors=True))
            if not any(isinstance(cause, OSError) for cause in _causes(error)):
                raise  # no disk's refusal, but an error of the program
            raise write_failure(error, self._run_dir, path) from None
        facts = {**facts, "shapes": {name: list(shape) for name, shape in sorted(shapes.items())}}
        self._on_first_rank(path, "completes", lambda: self._finish(partial, path, facts, files))

    def _finish(self, partial: Path, path: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
        finish(partial, path, facts, files, self._config, self._removal, self._best)

    def _on_first_rank(self, path: Path, what: str, action: Callable[[], T]) -> T:
        """Do something on rank 0, and have its result on all; if it fails, every rank raises."""

        def attempt() -> tuple[Any, tuple[int | None, str] | None]:
            try:
                return action(), None
            except OSError as error:
                return None, (error.errno or errno.EIO, error.strerror or str(error))
            except Exception:
                return None, (None, traceback.format_exc())

        result, failure = from_first_rank(attempt, f"{what} {path}", self._group, thread="saves")
        if failure is None:
            found: T = result
            return found
        number, text = failure
        if number is None:
            raise RuntimeError(f"rank 0 could not finish {path}:\n{text}")
        raise write_failure(OSError(number, text), self._run_dir, path)


def _fulfil(future: Future[Saved], work: Callable[[], Saved]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)  # raised by who waits for it


class _HostMemory:
    """Copies of pieces in host memory."""

    def __init__(self) -> None:
        self._pinned: Tensor | None = None

    @torch.no_grad()
    def copy(self, pieces: Mapping[str, Sequence[Piece]], device: torch.device) -> dict[str, list[Piece]]:
        """Copy a rank's pieces, each of them whole when this returns.

        From a GPU into memory that is pinned once and used again: the copy before must be written by now.
        """
        size = sum(piece.box.size for part in pieces.values() for piece in part)
        memory = self._pin(size) if device.type == "cuda" else torch.empty(size)
        copies: dict[str, list[Piece]] = {part: [] for part in pieces}
        at = 0
        for part, piece in ((part, piece) for part, of_part in pieces.items() for piece in of_part):
            target = memory[at : at + piece.box.size].view(piece.tensor.shape)
            target.copy_(piece.tensor, non_blocking=True)
            copies[part].append(Piece(piece.name, piece.shape, piece.box, target))
            at += piece.box.size
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return copies

    def _pin(self, size: int) -> Tensor:
        """Pinned memory of exactly this size: torch's own allocator would round it up to a power of two."""
        if self._pinned is None:
            self._pinned = torch.empty(size)
            cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(cuda.cudaHostRegister(self._pinned.data_ptr(), self._pinned.nbytes, 0))
        assert len(self._pinned) == size, "what a rank owns does not change"
        return self._pinned

    def close(self) -> None:
        """Let go of pinned memory."""
        if self._pinned is not None:
            cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(cuda.cudaHostUnregister(self._pinned.data_ptr()))
            self._pinned = None


def finish(
    partial: Path,
    path: Path,
    facts: dict[str, Any],
    files: dict[str, dict[str, Any]],
    retention: CheckpointConfig,
    removal: Removal,
    best: Best = lambda paths: (),
) -> None:
    """Make the checkpoint visible, and only then let older ones go, which never fails.

    Args:
        partial: the folder that it was written into.
        path: its final name.
    """
    if os.path.lexists(path):  # a damaged checkpoint of this step, which loading passed over
        removal.set_aside(path)
    write_marker(partial, facts, files, path)
    # Later ones are damaged, and were passed over too: counted, they would push out the good ones.
    found = {int(folder.name.removeprefix("step-")): folder for folder in checkpoints(path.parent.parent)}
    found = {step: folder for step, folder in found.items() if step <= facts["step"]}
    kept = best(list(found.values()))
    for step in superseded(list(found), retention.keep_last, retention.keep_every, kept):
        with letting_go(found[step]) as free:
            if free:  # otherwise the next save lets it go
                removal.set_aside(found[step])
    removal.sweep()


def _causes(error: BaseException) -> list[BaseException]:
    """Each failed rank's error."""
    if isinstance(error, CheckpointException):
        return [failure[0] for failure in error.failures.values()]
    return [error]


def write_failure(error: BaseException, run_dir: Path, path: Path) -> UserError:
    """The user's message for a file of a run that could not be written."""
    causes = _causes(error)
    disk = next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
    newest = newest_checkpoint(run_dir)
    hint = "free some space" if getattr(disk, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else "mend that"
    reason = getattr(disk, "strerror", None) or disk
    return UserError(
        f"{path}: could not be written ({reason}). "
        f"The newest complete checkpoint is {newest or 'none yet'}; "
        f"{hint} and repeat the command to continue from it"
    )
