"""The profile of a run's first steps: taken while it trains, and written beside its other files."""

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile, record_function

from ditmoe.data.storage.files import replacing
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.planning.workload import workload_of
from ditmoe.launcher.profiling.limits import measure_limits
from ditmoe.launcher.profiling.parts import annotated
from ditmoe.launcher.profiling.table import RankProfile, table, times_of_parts
from ditmoe.launcher.profiling.timeline import draw_timeline
from ditmoe.launcher.profiling.trace import STEP, Trace, read_trace
from ditmoe.launcher.profiling.work import work_of_rank
from ditmoe.model.dit import DiT
from ditmoe.parallel import processes
from ditmoe.parallel.engine.training_engine import TrainingEngine
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.ledger import Ledger
from ditmoe.parallel.planner.traffic import step_traffic
from ditmoe.parallel.stages import stage_blocks
from ditmoe.sampling.drawing.picture import save_picture

WARM_UP: Final = 3
"""Steps before those that are profiled: first ones allocate memory, and check gradients."""
MOST_RANKS: Final = 8
"""Ranks that are profiled, spread evenly over all."""
UNFINISHED: Final = "unfinished-"
"""How folders begin in which traces are written."""


class Written(NamedTuple):
    """What rank 0 has of a profile."""

    folder: Path
    table: str
    timeline_HWC: NDArray[np.uint8]
    """uint8."""


@dataclass(frozen=True)
class Profiled:
    """What is profiled."""

    config: RunConfig
    layout: Layout
    network: DiT
    """This rank's part of it."""
    engine: TrainingEngine
    device: torch.device


class Profile:
    """Profiles some steps of a run after a few to warm up; a context manager around all of the training.

    Every rank goes through it alike: what follows the last step is a collective call. Steps without an update
    (`train.skip_steps`) are passed over: they compute and send nothing.

    Args:
        run: the run's folder, for `profile/step-N/`.
    """

    def __init__(self, profiled: Profiled, run: Path) -> None:
        steps, skipped = profiled.config.train.profile, profiled.config.train.skip_steps
        self._of = profiled
        self._run = run
        updates = (number for number in count(profiled.engine.step + 1) if number not in skipped)
        numbers = list(islice(updates, WARM_UP, WARM_UP + (steps or 0) + 1))
        self._timed = numbers[:-1]
        self._counted = numbers[-1]
        """What is sent is counted in this step."""
        self.first = numbers[0]
        """The first step that is profiled."""
        self._wanted = steps is not None
        self._rank, ranks = dist.get_rank(), dist.get_world_size()
        self._ranks = {place * ranks // min(ranks, MOST_RANKS) for place in range(min(ranks, MOST_RANKS))}
        self._taking = ExitStack()
        self._profiler: profile | None = None
        self._trace: Trace | None = None
        self._sent: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._taking.close()  # of a run that ends meanwhile

    def problem(self, last: int) -> str | None:
        """Why a run that goes on to step `last` will have no profile, if it is to have one."""
        if not self._wanted or last >= self._counted:
            return None
        return (
            f"no profile: the run ends after step {last}; train.profile = {self._of.config.train.profile} needs"
            f" steps {self.first} to {self._counted}, for it begins {WARM_UP} steps after a start and takes"
            " one more to count what is sent"
        )

    def left_out(self, number: int, last: int) -> str | None:
        """Why a run to step `last` that stops after this one has no profile; None: it has, or `problem` told."""
        if not self._wanted or number > self._counted or self.problem(last) is not None:
            return None
        return (
            f"no profile: the run stops after step {number}; train.profile = {self._of.config.train.profile} needs"
            f" steps {self.first} to {self._counted}; the next start begins anew with it, {WARM_UP} steps later"
        )

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step and all that follows it."""
        if not self._wanted or self._rank not in self._ranks or number not in self._timed:
            yield
            return
        if number == self.first:
            self._start()
        with record_function(STEP):
            yield
        if number == self._timed[-1]:
            self._stop()

    @contextmanager
    def counted(self, number: int) -> Iterator[None]:
        """Around the update of a step: count what it sends, in the step after those that are timed."""
        if self._trace is None or number != self._counted:
            yield
            return
        ledger = Ledger()
        with ledger:
            yield
        self._sent = ledger.sent

    def is_due(self, number: int) -> bool:
        """Whether the step was the last one that the profile needs."""
        return self._wanted and number == self._counted

    def finish(self) -> Written | None:
        """Write the profile; a collective call of all ranks.

        Returns:
            On rank 0, what was written; otherwise None.
        """
        limits = measure_limits(self._of.device, self._of.config.train.precision)
        mine: tuple[RankProfile, Trace] | None = None
        if self._trace is not None:
            mine = self._rank_profile(limits), self._trace
        found = [each for each in processes.gather_objects(mine) if each is not None]
        if self._rank != 0:
            return None
        profiles, traces = [each[0] for each in found], [(each[0].rank, each[1]) for each in found]
        self._remove_earlier({self._trace_file(each.rank) for each in profiles})
        written = table(profiles)
        with replacing(self.folder / "table.txt") as file:
            file.write(written.encode())
        with replacing(self.folder / "profile.json") as file:
            file.write(json.dumps([each.plain() for each in profiles], indent=1).encode() + b"\n")
        picture = draw_timeline(traces)
        save_picture(picture, self.folder / "timeline.png")
        return Written(self.folder, written, np.asarray(picture))

    @property
    def folder(self) -> Path:
        """Where the profile is written."""
        return self._run / "profile" / f"step-{self.first:08d}"

    def _trace_file(self, rank: int) -> Path:
        return self.folder / f"trace-rank-{rank:05d}.json.gz"

    def _remove_earlier(self, traces: set[Path]) -> None:
        """Remove what an earlier start from the same step left: traces of more ranks, and unfinished ones."""
        for path in self.folder.glob("trace-rank-*.json.gz"):
            if path not in traces:
                path.unlink()
        for path in self.folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._of.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._taking.enter_context(annotated(self._of.network))
        self._profiler = profile(activities=activities)
        with _quiet():
            self._profiler.start()
        self._taking.callback(self._end_profiler)

    def _end_profiler(self) -> None:
        assert self._profiler is not None
        if self._of.device.type == "cuda":
            torch.cuda.synchronize(self._of.device)
        with _quiet():
            self._profiler.stop()

    def _stop(self) -> None:
        """Write the trace, and read it: what it shows is then the same as what anybody sees in it."""
        self._taking.close()
        assert self._profiler is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._trace_file(self._rank)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=self.folder) as scratch:
            unfinished = Path(scratch) / path.name
            self._profiler.export_chrome_trace(str(unfinished))
            self._profiler = None
            os.replace(unfinished, path)
        self._trace = read_trace(path)

    def _rank_profile(self, limits: Any) -> RankProfile:
        assert self._trace is not None
        of, model = self._of, self._of.config.model
        workload = workload_of(of.config)
        owned = sum(fragment.weight.numel() for fragment in of.engine.fragments)
        blocks = stage_blocks(model, of.layout.pipe)[of.layout.stage(self._rank)]
        step_seconds, times, sending, hidden = times_of_parts(self._trace)
        return RankProfile(
            rank=self._rank,
            steps=len(self._trace.steps),
            step_seconds=step_seconds,
            parts=times,
            sending_seconds=sending,
            hidden_seconds=hidden,
            limits=limits,
            work=work_of_rank(model, of.layout, blocks, workload.number_bytes, owned),
            sent=dict(self._sent),
            planned=dict(step_traffic(model, of.layout, blocks, workload)),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that kineto writes to standard error where it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
