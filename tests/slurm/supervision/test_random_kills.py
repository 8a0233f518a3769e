"""A run that is killed again and again, anywhere and at any time, ends where the undisturbed run ends."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from ditmoe.parallel.checkpoint.folder import newest_checkpoint, step_of
from tests.forked import DITMOE, run_forked
from tests.slurm.supervision.supervised import CONFIG, Supervised, curve, weights

SEED = 12
STEPS = 400
HOW_OFTEN = {
    "a rank": 6,
    "all of a node": 5,
    "the supervisor": 5,
    "the batch script": 4,
    "USR2 to the batch script": 3,
    "TERM to the batch script": 2,
    "TERM to the tasks": 3,
    "scontrol requeue": 3,
    "power of a node": 1,
}
"""Kind of kill → how many of it."""


@dataclass(frozen=True)
class Kill:
    """One kill, by chance alone."""

    kind: str
    node: int
    """0 or 1: the rank, or its node, where the kind has one."""
    steps: int | None
    """That the attempt trains before; None: it is still starting."""
    seconds: float
    """That pass then: after the start of the attempt where `steps` is None."""

    def __str__(self) -> str:
        when = "from the start" if self.steps is None else f"after {self.steps} steps"
        return f"{self.kind} ({self.node}), {self.seconds:.2f} s {when}"


def draw(seed: int) -> list[Kill]:
    """The kills in their order."""
    chance = random.Random(seed)
    kinds = [kind for kind, count in HOW_OFTEN.items() for _ in range(count)]
    chance.shuffle(kinds)
    kills = []
    for kind in kinds:
        steps = None if chance.random() < 0.3 else chance.randint(1, 12)
        seconds = chance.uniform(0, 8) if steps is None else chance.uniform(0, 0.4)
        kills.append(Kill(kind, chance.randrange(2), steps, seconds))
    return kills


def hit(run: Supervised, kill: Kill) -> None:
    """Do it, as soon as its victim is there."""
    cluster, job = run.cluster, run.job

    def rank_runs() -> bool:
        return bool(run.of_rank(kill.node))

    if kill.kind in ("a rank", "all of a node", "TERM to the tasks"):
        run.wait(rank_runs, f"rank {kill.node}")
    if kill.kind == "a rank":
        os.kill(run.of_rank(kill.node)[0], signal.SIGKILL)
    elif kill.kind == "all of a node":
        for pid in run.of_rank(kill.node):
            with suppress(ProcessLookupError):  # a data worker ends with its rank
                os.kill(pid, signal.SIGKILL)
    elif kill.kind in ("the supervisor", "the batch script"):
        run.wait(lambda: run.of_supervisor() is not None, "the supervisor")
        found = run.of_supervisor()
        assert found is not None
        os.kill(found[kill.kind == "the batch script"], signal.SIGKILL)
    elif kill.kind == "scontrol requeue":
        cluster.run("scontrol", "requeue", job)
    elif kill.kind == "power of a node":
        node = cluster.names[kill.node]
        cluster.kill_node(node)
        cluster.wait(lambda: cluster.node_states()[node].startswith("down"), "the loss to be seen", 90)
        cluster.start_node(node)
    else:
        name, where = kill.kind.split(maxsplit=1)
        cluster.run("scancel", *(["--batch"] if "script" in where else []), f"--signal={name}", job)


def newest(run: Path) -> int:
    found = newest_checkpoint(run)
    return 0 if found is None else step_of(found)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_random_kills(make_run: Callable[..., Supervised], shards: Path, tmp_path: Path) -> None:
    """Each costs what was trained since the last checkpoint, and nothing else."""
    kills = draw(SEED)
    assert len(kills) >= 30
    run = make_run(steps=STEPS)
    run.submit_as_a_user("--time=60", "--no-check", "--attempts=100", "--limit", "step=60")
    began = time.monotonic()
    saved = 0
    for number, kill in enumerate(kills, 1):
        if kill.steps is None:
            run.wait(lambda number=number: len(run.record.attempts) >= number, f"attempt {number}")  # type: ignore[misc]
        else:
            run.wait_for_training(number, kill.steps, saved=False)
        time.sleep(kill.seconds)
        attempts = run.record.attempts
        assert len(attempts) == number and attempts[-1].end is None, f"attempt {number} ended before {kill}"
        assert newest(run.run) >= saved, f"a checkpoint of {saved} steps is lost"
        saved = newest(run.run)
        print(f"{time.monotonic() - began:5.0f} s: kill {number}: {kill}; saved {saved}", flush=True)
        hit(run, kill)
        run.wait(lambda number=number: len(run.record.attempts) > number, f"a start after {kill}", 150)  # type: ignore[misc]
        begun = run.record.attempts[-1].step or 0
        assert begun >= saved, f"a checkpoint of {saved} steps is lost: attempt {number + 1} starts from {begun}"
    run.cluster.wait_for_state(run.job, "COMPLETED", seconds=400)
    print(f"{time.monotonic() - began:5.0f} s: complete")
    ends = [attempt.end for attempt in run.record.attempts]
    assert len(ends) == len(kills) + 1 and all(end is not None for end in ends)
    print(Counter(end.outcome for end in ends if end is not None))

    config = tmp_path / "undisturbed.yaml"
    config.write_text(CONFIG.format(run=tmp_path / "undisturbed", shards=shards, processes=2, steps=STEPS))
    alone = run_forked([*DITMOE, "train", str(config)], tmp_path / "output", 2)
    assert alone.returncode == 0, alone.stderr
    assert curve(run.run) == curve(tmp_path / "undisturbed")
    assert weights(run.run) == weights(tmp_path / "undisturbed")
