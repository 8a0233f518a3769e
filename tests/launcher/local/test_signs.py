"""Signs of life of commands that work on files: while these grow, and not while the work hangs."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ditmoe.launcher.local.signs import Signs, signs_of_work
from ditmoe.slurm.heartbeats import Heart, Terms, read_heartbeats

FAST = 0.02


@pytest.mark.parametrize("watched", [True, False])
def test_a_rank_gives_signs_where_somebody_looks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    Terms(1, {"start": 9.0, "step": 9.0, "save": 9.0, "evaluation": 9.0}, FAST).write(tmp_path)
    monkeypatch.setenv("DITMOE_HEARTBEATS", str(tmp_path) if watched else "")
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_PORT", "1234")):
        monkeypatch.setenv(name, value)
    with signs_of_work(tmp_path / "work"):
        if watched:
            wait(lambda: 1 in read_heartbeats(tmp_path, 1))
            wait(lambda: read_heartbeats(tmp_path, 1)[1].phase == "evaluation")
    found = read_heartbeats(tmp_path, 1)
    assert {rank: seen.phase for rank, seen in found.items()} == ({1: "ended"} if watched else {})


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
        with signs.works(evaluation, step=50):
            wait(lambda: beats() == 3)  # its beginning, and the first look
            time.sleep(10 * FAST)
            assert beats() == 3  # nothing is added to it
            (tmp_path / "new").mkdir()
            (tmp_path / "new/chunk").touch()
            (tmp_path / "new").rename(evaluation)  # at once, as a look may come between two changes
            wait(lambda: beats() == 4)
            os.truncate(evaluation / "chunk", 5)  # it grows
            wait(lambda: beats() == 5)
            assert read_heartbeats(folder, 1)[0].doing == "works"
        after = beats()
        time.sleep(10 * FAST)
        assert beats() <= after + 1  # nobody looks any more
    assert read_heartbeats(folder, 1)[0].phase == "ended"
