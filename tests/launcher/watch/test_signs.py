"""A watch's signs of life: while it waits, and while an evaluation gets further, but not while that hangs."""

import time
from collections.abc import Callable
from pathlib import Path

from ditmoe.launcher.watch.signs import Signs
from ditmoe.slurm.heartbeats import Heart, Terms, read_heartbeats

FAST = 0.02


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(FAST)


def test_signs_of_a_watch(tmp_path: Path) -> None:
    folder, evaluation = tmp_path / "heartbeats", tmp_path / "evaluation"
    Terms(1, {"start": 9.0, "step": 9.0, "save": 9.0, "evaluation": 9.0}, FAST).write(folder)

    def beats() -> int:
        found = read_heartbeats(folder, 1)
        return found[0].beats if found else -1

    with Heart(folder, 0, 1) as heart:
        signs = Signs(heart, FAST)
        signs.waits(40)
        wait(lambda: beats() == 1)
        found = read_heartbeats(folder, 1)[0]
        assert (found.phase, found.step, found.doing) == ("evaluation", 40, "waits for a checkpoint")
        with signs.scores(evaluation, 50):
            wait(lambda: beats() == 3)  # its beginning, and the first look
            time.sleep(10 * FAST)
            assert beats() == 3  # nothing is added to it
            evaluation.mkdir()
            (evaluation / "chunk").touch()
            wait(lambda: beats() >= 4)
            assert read_heartbeats(folder, 1)[0].doing == "scores"
        after = beats()
        time.sleep(10 * FAST)
        assert beats() <= after + 1  # nobody looks any more
    assert read_heartbeats(folder, 1)[0].phase == "ended"
