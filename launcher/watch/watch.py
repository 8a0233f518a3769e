"""`ditmoe evaluate RUN --watch`: score each new checkpoint of a run while it trains, until it is complete."""

import hashlib
import json
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Final

from ditmoe.data.storage.claims import Claims
from ditmoe.data.storage.stopping import STOP_SIGNALS
from ditmoe.launcher.local.signals import StopSignal
from ditmoe.launcher.local.signs import Signs
from ditmoe.launcher.training.evaluations import stored_evaluations
from ditmoe.launcher.training.progress import Progress, read_progress
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.launcher.watch.records import HEADER, Records, evaluations_of, line_of, read_lines
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import checkpoints, damaged, incomplete, read_info, step_of
from ditmoe.parallel.checkpoint.holds import CheckpointGoneError, reading
from ditmoe.parallel.checkpoint.marker import MARKER
from ditmoe.sampling.evaluation.job import Job
from ditmoe.sampling.evaluation.run_job import stored_result
from ditmoe.sampling.evaluation.stored import answers

POLL_SECONDS: Final = 5.0
"""Between two looks at the run's folder."""
_NAP_SECONDS: Final = 0.5
"""Longest time until a signal is obeyed while waiting."""

Say = Callable[[str], None]


def watch_run(
    run: Path,
    prepare: Callable[[Path], Job],
    evaluate: Callable[[Job], int],
    say: Say,
    *,
    every: int = 1,
    patience: float | None = None,
    poll: float = POLL_SECONDS,
    signs: Signs | None = None,
) -> int:
    """Score a run's checkpoints, oldest first, as they become complete; the exit code.

    A checkpoint is held from before it is scored until the best is marked, so that training does not remove it.
    One that was removed before its turn is passed over with a word. What is stored is not scored again.

    Args:
        run: the run's folder.
        prepare: a checkpoint's evaluation. What is wrong with the settings raises UserError here.
        evaluate: does it, in processes of its own; their exit code, 128 + N where signal N was to end them.
        say: shows a line.
        every: score every so-manieth checkpoint, those whose step is a multiple of `every` ×
            `train.checkpoint_every`, and the last.
        patience: seconds without any sign of the run after which to give up; None: never.
        poll: seconds between two looks.
        signs: signs of life for a supervisor; None: nobody looks for them.

    Returns:
        0 when the run is complete and all that could be is scored; 2 or 1 where evaluations failed, 2 if all of
        them by a user's mistake; 128 + N after signal N.

    Raises:
        UserError: no run folder; the settings do not fit the run; patience ended.
    """
    if not run.is_dir() or (run / MARKER).exists():
        raise UserError(f"{run}: expected the folder of a run, whose checkpoints are scored as they come")
    return _Watch(run, prepare, evaluate, say, every, patience, poll, signs).follow()


class _Watch:
    def __init__(
        self,
        run: Path,
        prepare: Callable[[Path], Job],
        evaluate: Callable[[Job], int],
        say: Say,
        every: int,
        patience: float | None,
        poll: float,
        signs: Signs | None,
    ) -> None:
        self._signs = signs
        self._folder = RunFolder(run)
        self._prepare, self._evaluate, self._say = prepare, evaluate, say
        self._every, self._patience, self._poll = every, patience, poll
        self._stack = ExitStack()
        self._records: Records | None = None
        self._settings: str | None = None
        self._settled: set[tuple[int, int]] = set()
        """Step and time of the marker of each checkpoint that nothing more is to be done about."""
        self._failed: dict[int, int] = {}
        """Step → exit code."""
        self._passed = {line.get("step") for line in self._lines() if line.get("outcome") == "removed"}
        self._told = ""
        self._sign: tuple[float, float] = (0.0, time.monotonic())
        """When the run's files were last written by their own clock, and when that was seen."""
        self._table_begun = False
        self._settings_claimed = False

    def _lines(self) -> list[dict[str, object]]:
        return read_lines(Records(self._folder, "fid").file)

    def follow(self) -> int:
        with StopSignal() as stop, self._stack:
            while True:
                if stop.name is not None:
                    return self._stopped(128 + signal.Signals[stop.name])
                # Before the look at the checkpoints: where this says complete, the last one is among them.
                progress = read_progress(self._folder.path)
                pending = self._pending(progress)
                if pending:
                    code = self._score(pending[0], progress)
                    if code - 128 in STOP_SIGNALS:
                        return self._stopped(code)
                    self._sign = (self._sign[0], time.monotonic())
                elif progress.complete:
                    return self._end(progress)
                else:
                    self._wait(progress, stop)

    def _pending(self, progress: Progress) -> list[Path]:
        """Checkpoints that are to be scored, or seen to be, oldest first."""
        found = [path for path in checkpoints(self._folder.path) if self._wanted(step_of(path) or 0, progress)]
        self._pass_over({step_of(path) or 0 for path in found}, progress)
        return [path for path in found if (identity := _identity(path)) and identity not in self._settled]

    def _wanted(self, step: int, progress: Progress) -> bool:
        if self._every == 1 or progress.config is None:
            return self._every == 1
        train = progress.config.train
        return step % (self._every * train.checkpoint_every) == 0 or step == train.steps

    def _pass_over(self, there: set[int], progress: Progress) -> None:
        """Say once which checkpoints there must have been, and are neither there nor scored."""
        if progress.config is None or self._settings is None or not there:
            return
        rhythm = self._every * progress.config.train.checkpoint_every
        expected = set(range(rhythm, max(there) + 1, rhythm)) - there - self._passed - set(self._failed)
        if not expected:
            return
        scored = {one.step for one in evaluations_of(self._folder.evaluations, self._settings)}
        assert self._records is not None
        gone = sorted(expected - scored)
        self._passed |= expected
        for step in gone:
            self._records.append(step, "removed")
        if gone:
            steps = f"step {gone[0]:,}" if len(gone) == 1 else f"{len(gone)} steps, {gone[0]:,} to {gone[-1]:,}"
            self._say(
                f"passed over {steps}: the run let the checkpoint go before it was scored;"
                " checkpoint.keep_last and keep_every keep more, --every scores fewer"
            )

    def _score(self, path: Path, progress: Progress) -> int:
        """Score a checkpoint, or find that it is; the exit code of the evaluation."""
        step, identity = step_of(path) or 0, _identity(path)
        if identity is None:
            return 0  # gone since it was listed
        try:
            with reading(path):
                return self._score_held(path, step, identity, progress)
        except CheckpointGoneError:
            return 0

    def _score_held(self, path: Path, step: int, identity: tuple[int, int], progress: Progress) -> int:
        records = self._records_of(progress)
        problem = _damage(path)
        if problem is not None:
            self._settled.add(identity)
            self._say(f"passed over step {step:,}: {problem}")
            records.append(step, "damaged", reason=problem)
            return 0
        job = self._prepare(path)
        if not self._claim(job):
            return 0
        code = 0
        if stored_result(job) is None:
            with nullcontext() if self._signs is None else self._signs.works(job.folder, job.cache, step=step):
                code = self._evaluate(job)
            if code - 128 in STOP_SIGNALS:
                return code
        self._settled.add(identity)
        if code or stored_result(job) is None:
            self._failed[step] = code or 1
            self._say(f"step {step:,} could not be scored (exit code {code}); the message is above")
            records.append(step, "failed", exit_code=code)
            return code
        self._failed.pop(step, None)
        self._settings = next(
            one.settings
            for one in stored_evaluations(self._folder.evaluations)
            if one.id == job.folder.name and answers(one.figures, job.request)
        )
        self._tell(records)
        return 0

    def _tell(self, records: Records) -> None:
        """Bring the records up to what is stored, and show a line for each new evaluation."""
        assert self._settings is not None
        new, best = records.follow(self._settings)
        self._say_problems()
        if best is None:
            self._say_once(f"no evaluation has {records.metric}, as checkpoint.best_metric says: none is marked")
        # At the first look all that is there is shown, as the beginning of the table.
        shown = new if self._table_begun else evaluations_of(self._folder.evaluations, self._settings)
        if shown and not self._table_begun:
            self._say(HEADER)
            self._table_begun = True
        for one in shown:
            self._say(line_of(one, best is not None and one.id == best.id))

    def _records_of(self, progress: Progress) -> Records:
        """What is written; the best is that by `checkpoint.best_metric`, or by FID where that is the loss."""
        if self._records is None:
            metric = "fid" if progress.config is None else progress.config.checkpoint.best_metric
            loggers = () if progress.config is None else progress.config.train.loggers
            self._records = Records(self._folder, "fid" if metric == "loss" else metric, loggers)
            self._stack.callback(self._close_records)
        return self._records

    def _close_records(self) -> None:
        assert self._records is not None
        self._records.close()
        self._say_problems()

    def _say_problems(self) -> None:
        assert self._records is not None
        for problem in self._records.problems():
            self._say(problem)

    def _claim(self, job: Job) -> bool:
        """Whether this process alone watches with the settings; while another does, it waits."""
        if self._settings_claimed:
            return True
        claims = Claims(self._folder.evaluations / "watches")
        name = _settings_of(job)
        with ExitStack() as attempt:
            if attempt.enter_context(claims.taken(name)) is None:
                self._say_once(f"waiting: another process watches this run with these settings{claims.who(name)}")
                time.sleep(min(self._poll, _NAP_SECONDS))
                return False
            self._stack.push(attempt.pop_all())
        self._settings_claimed = True
        return True

    def _wait(self, progress: Progress, stop: StopSignal) -> None:
        """Wait for the next look. UserError where the run has shown no sign for too long."""
        if self._signs is not None:
            self._signs.waits(progress.step)
        if progress.signed != self._sign[0]:
            self._sign = (progress.signed, time.monotonic())
        steps = "?" if progress.config is None else f"{progress.config.train.steps:,}"
        where = f"step {progress.step:,} of {steps} is the newest checkpoint's"
        self._say_once(f"waiting for the next checkpoint ({progress.word or 'no state is known'}; {where})")
        silent = time.monotonic() - self._sign[1]
        if self._patience is not None and silent > self._patience:
            raise UserError(
                f"{self._folder.path}: no sign of training for {silent / 60:.0f} min; {where}. Expected it to go"
                " on (--patience); repeat both commands to continue"
            )
        end = time.monotonic() + self._poll
        while stop.name is None and time.monotonic() < end:
            time.sleep(max(0.0, min(_NAP_SECONDS, end - time.monotonic())))

    def _say_once(self, line: str) -> None:
        if line != self._told:
            self._told = line
            self._say(line)

    def _stopped(self, code: int) -> int:
        self._say(f"stopped by {signal.Signals(code - 128).name}; repeat the command to continue")
        return code

    def _end(self, progress: Progress) -> int:
        scored = 0 if self._settings is None else len(evaluations_of(self._folder.evaluations, self._settings))
        if self._records is not None:
            self._records.outcome = "complete"
        self._say(f"the run is complete: step {progress.step:,}; {scored} of its checkpoints are scored")
        if not self._failed:
            return 0
        self._say(f"could not be scored: {', '.join(f'step {step:,}' for step in sorted(self._failed))}")
        return 2 if set(self._failed.values()) == {2} else 1


def _identity(path: Path) -> tuple[int, int] | None:
    """Step, and when the marker was written: a step trained anew is another checkpoint. None: it is gone."""
    try:
        return step_of(path) or 0, (path / MARKER).stat().st_mtime_ns
    except OSError:
        return None


def _damage(path: Path) -> str | None:
    """Why a checkpoint cannot be scored; None where it can."""
    try:
        info = read_info(path)
        problems = damaged(info, [name for name in info.files if name.startswith(("ema/", "weights/"))])
        problems = problems or incomplete(info, [part for part in info.parts if part in ("ema", "weights")])
    except UserError as error:
        return str(error)
    return problems[0] if problems else None


def _settings_of(job: Job) -> str:
    """A name of all that two watches of one run must have in common to do the same work."""
    shared = {key: value for key, value in job.evaluation.plain().items() if key not in ("weights", "step")}
    content = json.dumps([shared, job.request], sort_keys=True, default=str)
    return f"watch-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
