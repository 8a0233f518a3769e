"""What follows an attempt: the decision is put on record, and Slurm is asked for it."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ditmoe.model.errors import UserError
from ditmoe.slurm.attempts import Attempt, End, read_attempts, record_end
from ditmoe.slurm.client import Queue, Unseen
from ditmoe.slurm.job_folder import Job, JobFolder
from ditmoe.slurm.requeue import Seen, Verdict, excludable, verdict
from ditmoe.slurm.supervision.patience import FOLDER_SECONDS, Shared

REQUEUED_SECONDS: Final = 600.0
"""How long to wait for Slurm to end this program, once it has taken the job back into its queue."""


@dataclass(frozen=True)
class FollowUp:
    """Decides, and does what was decided."""

    folder: JobFolder
    job_id: str
    queue: Queue
    shared: Shared
    say: Callable[[str], None]
    ignore_signals: Callable[[], None]
    """Slurm's own SIGTERM, which ends a job that it takes back, is not to cut short what is left to do."""
    script: int = 0
    """Process id of the batch script, this program's parent."""

    def conclude(self, job: Job, attempt: Attempt, seen: Seen, before: Sequence[Attempt]) -> int:
        """Decide, put it on record, and ask Slurm for what follows; the exit code."""
        found = verdict(seen, attempt, before, job.attempts)
        end = End(
            outcome=found.outcome,
            reason=found.reason,
            exit_code=seen.exit_code,
            step=seen.step,
            hosts=attempt.hosts,
            suspects=found.suspects,
            excluded=(),
            decision=found.decision,
            time=time.time(),
        )
        self.say(f"attempt {attempt.number} ended: {found.outcome}: {found.reason}")
        self._record(attempt.number, end)
        if found.decision == "requeue":
            return self._requeue(job, attempt, end, found)
        self.say({"done": "the job is done", "stop": "the job is not requeued"}[found.decision])
        return found.exit_code

    def _requeue(self, job: Job, attempt: Attempt, end: End, found: Verdict) -> int:
        """Put the job back into the queue, or leave it to the next of its chain."""
        partition = self._excludable(job, end.suspects)
        # From here on Slurm's own SIGTERM, which ends the job that it takes back, is not to cut this short.
        self.ignore_signals()
        if not self._is_queued_again(attempt):
            try:
                self.queue.requeue(self.job_id)
            except UserError as error:
                if not self._is_queued_again(attempt):
                    return self._without_scontrol(attempt, end, found, str(error))
        self.say("the job is queued again")
        if partition:
            try:
                excluded = self.queue.exclude(self.job_id, partition)
                missing = [host for host in partition if host not in excluded]
                note = f"the queue did not take {', '.join(missing)}" if missing else "the queue took that"
            except UserError as error:
                excluded, note = (), f"the queue refused: {error}"
            self.say(f"the next attempt is to leave out {', '.join(partition)}: {note}")
            self._record(attempt.number, replace(end, excluded=excluded))
        deadline = time.monotonic() + REQUEUED_SECONDS
        # Slurm ends this program sooner; but where the script is gone, some clusters do not find it any more.
        while os.getppid() == self.script and time.monotonic() < deadline:
            time.sleep(0.2)
        return found.exit_code

    def _is_queued_again(self, attempt: Attempt) -> bool:
        """Whether Slurm has taken the job back by itself, as at a preemption or an order of somebody else."""
        details = self.queue.details(self.job_id)
        return isinstance(details, dict) and int(details.get("Restarts", "0")) > attempt.restart

    def _without_scontrol(self, attempt: Attempt, end: End, found: Verdict, problem: str) -> int:
        """Where the job cannot be requeued from here: the next job of the chain goes on, if there is one."""
        record = self.shared.ask(lambda: read_attempts(self.folder.path), FOLDER_SECONDS)
        waiting = record.waiting(self.job_id)
        if waiting:
            self.say(f"the job cannot be requeued ({problem}); job {waiting[0]} of its chain goes on")
            return found.exit_code
        note = (
            f"the job cannot be requeued ({problem}), and no job of its chain waits: sbatch {self.folder.script}"
        )
        self.say(note)
        self._record(attempt.number, replace(end, decision="stop", reason=f"{end.reason}; {note}"))
        return found.exit_code or 1

    def _excludable(self, job: Job, suspects: Sequence[str]) -> tuple[str, ...]:
        """The hosts that the next attempt is to be kept from, the earlier ones among them; empty: no new ones."""
        if not suspects:
            return ()
        details = self.queue.details(self.job_id)
        if not isinstance(details, dict):
            return ()
        before = self.queue.excluded(self.job_id)
        already = () if isinstance(before, Unseen) else before
        there = self.queue.partition_hosts(details.get("Partition", ""))
        chosen = excludable(suspects, already, None if isinstance(there, Unseen) else there, job.nodes)
        if set(suspects) - set(chosen):
            left = ", ".join(sorted(set(suspects) - set(chosen)))
            self.say(f"{left} cannot be left out: the partition would have too few nodes for the job")
        return tuple(chosen) if set(chosen) - set(already) else ()

    def _record(self, number: int, end: End) -> None:
        """Put an end on record; where the folder refuses, the next start closes the attempt."""
        try:
            self.shared.ask(lambda: record_end(self.folder.path, number, end), FOLDER_SECONDS)
        except (TimeoutError, UserError) as error:
            self.say(f"the end of attempt {number} is not on record: {error}")
