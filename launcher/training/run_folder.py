"""A run's folder: where its files are, its lock, and the configuration that it was started with."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from ditmoe.data.places.redaction import has_secrets, without_secrets
from ditmoe.data.storage.files import open_appending, open_regular, replacing
from ditmoe.launcher.configuration.problems import problem_list
from ditmoe.launcher.configuration.resolve import config_yaml
from ditmoe.launcher.configuration.resume import Change, changed_keys, may_change
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.configuration.validation import shown
from ditmoe.model.errors import UnwritableError, UserError
from ditmoe.model.outside.yaml_reader import read_yaml
from ditmoe.model.settings import message_of
from ditmoe.model.weights.untrusted import first_problem
from ditmoe.parallel.checkpoint.folder import (
    CheckpointInfo,
    checkpoint_entries,
    checkpoints,
    read_info,
    weights_alone,
)
from ditmoe.parallel.checkpoint.marker import MARKER
from ditmoe.slurm.heartbeats import FOLDER_VARIABLE

SUPERVISED_SECONDS: Final = 120.0
"""How long a supervised run waits for another process that holds it: an earlier attempt may be about to end."""


class RunFolder:
    """The files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        """The resolved configuration."""
        self.log = path / "log.txt"
        """What the run said, with times."""
        self.history = path / "history.jsonl"
        """One object per change of a key at a resume, and per step that was skipped."""
        self.stats = path / "stats.jsonl"
        """One object per logged step."""
        self.sample_keys = path / "samples.jsonl"
        """One object per step: the keys of its samples. Where `train.log_samples` asks for it."""
        self.tensorboard = path / "tensorboard"
        self.boards = path / "loggers"
        """What W&B and MLflow call the run, and what they print and keep."""
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.evaluations = path / "evaluations"
        self.ranks = path / "ranks"
        """What the ranks other than 0 printed: rank-N.txt."""
        self.lock_file = path / "lock"

    @contextmanager
    def lock(self, patience: float | None = None) -> Iterator[None]:
        """Hold the run for this process (rank 0 of a run); the system lets go of it when the process ends.

        Args:
            patience: how long to wait for another process that holds it, s; None: not at all, or where a job's
                supervisor watches this process, `SUPERVISED_SECONDS`.

        Raises:
            UserError: another process holds it, the folder cannot be made, or its file system has no locks.
        """
        if patience is None:
            patience = SUPERVISED_SECONDS if FOLDER_VARIABLE in os.environ else 0.0
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made the run folder: {error.strerror}") from error
        _held.add(descriptor)
        try:
            try:
                _lock(descriptor, patience)
            except BlockingIOError:
                raise UserError(self._locked_message()) from None
            except OSError as error:
                raise UserError(
                    f"{self.lock_file}: cannot be locked ({error.strerror}); expected a file system with locks,"
                    " such as NFS, or Lustre mounted with -o flock"
                ) from error
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(owner).encode() + b"\n", 0)
            except OSError as error:
                raise UnwritableError(self.lock_file, error.strerror or str(error)) from error
            yield
        finally:
            _held.discard(descriptor)
            os.close(descriptor)

    def check(self, config: RunConfig) -> None:
        """Find out, before any process starts, whether a run can be started or resumed; writes nothing of it.

        Raises:
            UserError: as `lock` and `compare_config` raise it.
        """
        if self.config.exists() or (self.path / MARKER).exists() or checkpoint_entries(self.path):
            with self.lock():
                self.compare_config(config)

    def store_config(self, config: RunConfig, changes: Sequence[Change] = (), step: int = 0) -> None:
        """Write the resolved configuration, and what changed in it since the last start to the run's history.

        Where a source has a password or a command, nobody but the file's owner may read the configuration.

        Args:
            step: that the run goes on after.
        """
        for change in changes:
            self.keep_in_history(step, **without_secrets(change._asdict()))
        with replacing(self.config, private=has_secrets(config.plain())) as file:
            file.write(config_yaml(config).encode())

    def keep_in_history(self, step: int, **facts: Any) -> None:
        """Append to the run's history, which only grows: what was done to the run, and at which step."""
        entry = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "step": step, **facts}
        with open_appending(self.history) as file:
            file.write(json.dumps(entry).encode() + b"\n")

    def compare_config(self, config: RunConfig) -> list[Change]:
        """Compare the resolved configuration with the one that the run was last started with.

        That is config.yaml, or where there is none what the newest checkpoint says.

        Returns:
            Each key that changed and may change; any may while the run has no checkpoint.

        Raises:
            UserError: a key changed that decides the run's loss curve: all such keys, a line each; the stored
                configuration cannot be read; or the folder holds weights that no training can go on from.
        """
        changes = []
        newest = self._newest_of_training()
        stored = self.stored_config() if self.config.exists() else _config_of(newest)
        if stored is not None:
            problems = []
            trained = bool(checkpoints(self.path))
            for change in changed_keys(stored.plain(), config.plain()):
                if may_change(change.key) or not trained:
                    changes.append(change)
                else:
                    problems.append(
                        f"{change.key} = {shown(change.now)}, but the run was started with"
                        f" {shown(change.before)}; expected the same, or another run.dir"
                    )
            if problems:
                raise UserError(problem_list(f"{self.path} cannot be resumed", problems))
        return changes

    def trained_config(self) -> RunConfig | None:
        """The configuration that the run was last started with; None: it has no checkpoint to go on from.

        Raises:
            UserError: it cannot be read.
        """
        if not checkpoints(self.path):
            return None
        return self.stored_config() if self.config.exists() else _config_of(self._newest_of_training())

    def _newest_of_training(self) -> CheckpointInfo | None:
        """The newest readable checkpoint that training can go on from; None where there is none.

        Raises:
            UserError: all that can be read are weights alone.
        """
        weights = []
        if (self.path / MARKER).exists():
            weights.append(weights_alone(read_info(self.path)) or f"{self.path}: is a checkpoint itself")
        for path in reversed(checkpoint_entries(self.path)):
            try:
                info = read_info(path)
            except UserError:
                continue  # loading tells of it
            problem = weights_alone(info)
            if problem is None:
                return info
            weights.append(problem)
        if weights:
            raise UserError(
                f"{weights[0]}. `ditmoe sample`, `evaluate` and `convert` take them;"
                " to train, choose another run.dir"
            )
        return None

    def stored_config(self) -> RunConfig:
        """What config.yaml says. UserError where it is not the configuration of a run of this version."""
        try:
            open_regular(self.config).close()
        except OSError as error:
            raise UserError(f"{self.config}: cannot be read: {error.strerror}") from error
        values, problems = read_yaml(self.config)
        try:
            if not problems:
                return RunConfig.model_validate(values)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {message_of(e)}" for e in error.errors()]
        raise UserError(problem_list(f"{self.config}: not the configuration of a run of this version", problems))

    def _locked_message(self) -> str:
        try:
            owner = json.loads(self.lock_file.read_text(encoding="utf-8"))
            who = f"process {owner['pid']} on {owner['host']} has written it since {owner['since']}"
        except (OSError, ValueError, KeyError):
            who = "another process writes it"  # it has the lock and has not yet said who it is
        return f"{self.path}: {who}; expected no other: stop it, or choose another run.dir"


def _config_of(info: CheckpointInfo | None) -> RunConfig | None:
    """The configuration that a checkpoint keeps. UserError where it is not one of this version."""
    if info is None:
        return None
    try:
        return RunConfig.model_validate(info.config)
    except ValidationError as error:
        raise UserError(
            f"{info.path}: its configuration is not one of a run of this version ({first_problem(error)}), and"
            " the run has no config.yaml to compare with; expected the config.yaml that it was started with"
        ) from None


_LOCK_POLL_SECONDS: Final = 0.5
_held: Final[set[int]] = set()
"""Descriptors of the locks that this process holds."""


def _lock(descriptor: int, patience: float) -> None:
    """Lock a file; BlockingIOError where another process still holds it after so many seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LOCK_POLL_SECONDS)


def _let_go() -> None:
    """In a forked process: close the locks, so that a data worker that outlives a killed run does not hold it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
