"""Which ranks are taken for hung, over heartbeats as they come, and what a rank writes of itself."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe.slurm import heartbeats
from ditmoe.slurm.heartbeats import (
    FOLDER_VARIABLE,
    TERMS,
    Heart,
    Heartbeat,
    Phase,
    Terms,
    read_heartbeats,
    read_terms,
)
from ditmoe.slurm.supervision.watchdog import STALE_WRITES, Watchdog

LIMITS = {"start": 100.0, "step": 20.0, "save": 200.0, "evaluation": 400.0}
TERMS_OF_TEST = Terms(1, LIMITS, 1.0)


def heartbeat(rank: int, phase: Phase = "step", beats: int = 1, clock: float = 0.0, ranks: int = 4) -> Heartbeat:
    """Of two ranks per host; `clock` is when the rank wrote it."""
    return Heartbeat(rank, ranks, f"n{rank // 2 + 1}", 100 + rank, 1, phase, beats, "", beats, clock, clock)


def of_all(phase: Phase = "step", beats: int = 1, clock: float = 0.0, ranks: int = 4) -> dict[int, Heartbeat]:
    return {rank: heartbeat(rank, phase, beats, clock, ranks) for rank in range(ranks)}


def test_a_stopped_process_is_told_from_those_that_wait_for_it() -> None:
    watch = Watchdog(TERMS_OF_TEST, 0.0)
    for second in range(21):
        found = of_all(clock=float(second))
        found[3] = heartbeat(3, clock=0.0)
        assert watch.look(found, float(second)) is None
    found = of_all(clock=21.0)
    found[3] = heartbeat(3, clock=0.0)
    silence = watch.look(found, 21.0)
    assert silence is not None and silence.reason.startswith("no progress for 21 s of rank 3 (n2) in step 1")
    assert "write nothing" in silence.reason
    assert silence.hosts == (), "rank 2 on the same host is alive"


def test_workers_do_not_wait_for_one_another() -> None:
    """The one that is furthest ahead hangs: the others, which came later, are no excuse."""
    together, alone = Watchdog(TERMS_OF_TEST, 0.0), Watchdog(TERMS_OF_TEST, 0.0, in_step=False)
    for second in range(22):
        found = {rank: heartbeat(rank, beats=1 + second, clock=float(second)) for rank in range(3)}
        found[3] = heartbeat(3, beats=1000)
        silences = [watch.look(found, float(second)) for watch in (together, alone)]
        if second < 21:
            assert silences == [None, None]
    assert silences[0] is None
    assert silences[1] is not None and silences[1].reason.startswith("no progress for 21 s of rank 3 (n2)")


def test_a_host_that_fell_silent_is_named() -> None:
    watch = Watchdog(TERMS_OF_TEST, 0.0)
    watch.look(of_all(), 0.0)
    found = {**of_all(clock=30.0), 2: heartbeat(2), 3: heartbeat(3)}
    silence = watch.look(found, 30.0)
    assert silence is not None and silence.hosts == ("n2",)
    assert "rank 2 (n2), rank 3 (n2)" in silence.reason


def test_ranks_that_all_wait_blame_no_host() -> None:
    watch = Watchdog(TERMS_OF_TEST, 0.0)
    watch.look(of_all(), 0.0)
    silence = watch.look(of_all(clock=30.0), 30.0)
    assert silence is not None and silence.hosts == () and "their stacks are in the output" in silence.reason


def test_who_is_behind_is_named_and_held_to_its_own_limit() -> None:
    """Ranks 0 to 2 wait in their step for rank 3, which saves."""
    watch = Watchdog(TERMS_OF_TEST, 0.0)
    for second in range(0, 200, 5):
        found = of_all(beats=2, clock=float(second))
        found[3] = heartbeat(3, "save", 1, float(second))
        assert watch.look(found, float(second)) is None
    found[3] = heartbeat(3, "save", 1, 205.0)
    silence = watch.look(found, 205.0)
    assert silence is not None and "of rank 3 (n2) in save" in silence.reason


@given(
    gaps=st.lists(st.floats(0.1, LIMITS["step"]), min_size=1, max_size=30),
    skew=st.floats(-1e6, 1e6),
)
def test_ranks_that_get_further_are_never_taken_for_hung(gaps: list[float], skew: float) -> None:
    """However far their clocks are off."""
    watch, now = Watchdog(TERMS_OF_TEST, 0.0), 0.0
    for beats, gap in enumerate(gaps):
        now += gap
        assert watch.look(of_all(beats=beats, clock=now + skew), now) is None


@given(late=st.floats(0.5, 1e5), phase=st.sampled_from(["start", "step", "save", "evaluation"]))
def test_no_rank_that_stands_still_is_missed(late: float, phase: Phase) -> None:
    watch = Watchdog(TERMS_OF_TEST, 0.0)
    watch.look(of_all(phase), 5.0)
    assert watch.look(of_all(phase), 5.0 + LIMITS[phase]) is None
    assert watch.look(of_all(phase), 5.0 + LIMITS[phase] + late) is not None


def test_ranks_that_never_write() -> None:
    watch = Watchdog(TERMS_OF_TEST, 10.0)
    assert watch.look({}, 110.0) is None
    silence = watch.look({}, 111.0)
    assert silence is not None and "have not written anything yet" in silence.reason and silence.hosts == ()
    watch = Watchdog(TERMS_OF_TEST, 10.0)
    three = {rank: heartbeat(rank) for rank in (0, 1, 3)}
    silence = watch.look(three, 111.0)
    assert silence is not None and "of rank 2 (host unknown) in start" in silence.reason


def test_ranks_that_have_ended_are_left_alone() -> None:
    watch = Watchdog(TERMS_OF_TEST, 0.0)
    watch.look(of_all("ended"), 0.0)
    assert watch.look(of_all("ended"), 1e9) is None
    one_left = {**of_all("ended"), 1: heartbeat(1)}
    watch.look(one_left, 1e9)
    silence = watch.look(one_left, 1e9 + 21)
    assert silence is not None and "of rank 1 (n1)" in silence.reason


def test_a_new_process_of_a_rank_counts_anew() -> None:
    watch = Watchdog(TERMS_OF_TEST, 0.0)
    watch.look(of_all(), 0.0)
    other = {rank: replace(found, pid=7) for rank, found in of_all().items()}
    assert watch.look(other, 30.0) is None


def test_what_a_rank_writes_is_read(tmp_path: Path) -> None:
    terms = Terms(3, {**LIMITS, "start": 1000.0}, 0.01)
    (tmp_path / "rank-9.json").write_text("{}")
    terms.write(tmp_path)
    assert read_terms(tmp_path) == terms
    assert read_heartbeats(tmp_path, 3) == {}, "what an earlier attempt left is gone"
    with Heart.of_this_process(1, 4, {FOLDER_VARIABLE: str(tmp_path)}) as heart:
        heart.beat("step", 17, "computes")
        deadline = time.monotonic() + 20
        while (found := read_heartbeats(tmp_path, 3).get(1)) is None or found.beats == 0:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert (found.phase, found.step, found.doing, found.ranks) == ("step", 17, "computes", 4)
        assert read_heartbeats(tmp_path, 2) == {}, "another attempt's do not count"
    assert read_heartbeats(tmp_path, 3)[1].phase == "ended"
    (tmp_path / "rank-1.json").write_text('{"rank": 1')
    assert read_heartbeats(tmp_path, 3) == {}
    with pytest.raises(OSError):
        read_heartbeats(tmp_path / "gone", 3)


def test_another_phase_is_written_at_once(tmp_path: Path) -> None:
    """Who is stopped then is held to the limit of this phase, not to that of a long start before it."""
    Terms(1, LIMITS, 3600.0).write(tmp_path)
    with Heart(tmp_path, 0, 1) as heart:
        phases: tuple[Phase, ...] = ("step", "save", "step", "evaluation")
        for number, phase in enumerate(phases, 1):
            heart.beat(phase, number)
            deadline = time.monotonic() + 20
            while (found := read_heartbeats(tmp_path, 1).get(0)) is None or found.phase != phase:
                assert time.monotonic() < deadline, found
                time.sleep(0.005)
            assert found.step == number
    assert read_heartbeats(tmp_path, 1)[0].phase == "ended"


def test_a_thread_that_is_late_does_not_bring_an_earlier_phase_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It beats while the folder is slow: after the rank's end and before that is written."""
    Terms(1, LIMITS, 3600.0).write(tmp_path)
    answers = threading.Event()
    replaces = heartbeats._replace

    def slow(path: Path, values: dict[str, object]) -> None:
        if values["phase"] == "step":
            answers.wait(30)
        replaces(path, values)

    monkeypatch.setattr(heartbeats, "_replace", slow)
    monkeypatch.setattr(heartbeats, "LAST_WRITE_SECONDS", 0.1)
    with Heart(tmp_path, 0, 1) as heart:
        heart.beat("step", 1)
        time.sleep(0.1)  # the thread is writing that
    heart.beat("evaluation", 2)
    answers.set()
    deadline = time.monotonic() + 20
    while (found := read_heartbeats(tmp_path, 1).get(0)) is None or found.phase in ("start", "step"):
        assert time.monotonic() < deadline, found
        time.sleep(0.005)
    assert found.phase == "ended"


def test_all_beats_of_several_threads_count(tmp_path: Path) -> None:
    Terms(1, LIMITS, 3600.0).write(tmp_path)
    with Heart(tmp_path, 0, 1) as heart, ThreadPoolExecutor(8) as pool:
        for _ in range(4000):
            pool.submit(heart.beat, "step", 1)
        pool.shutdown()
    assert read_heartbeats(tmp_path, 1)[0].beats == 4001  # and its end


def test_without_a_watcher_nothing_happens(tmp_path: Path) -> None:
    with Heart.of_this_process(0, 1, {}) as heart:
        heart.beat("step", 1)
    assert not list(tmp_path.iterdir())


def test_terms_that_cannot_be_read_are_the_defaults(tmp_path: Path) -> None:
    for text in ("", "[]", '{"attempt": 1}', '{"attempt": 1, "limits": 3, "interval": 1}'):
        (tmp_path / TERMS).write_text(text)
        assert read_terms(tmp_path) == Terms()


PROGRAM = """
import sys, time
from pathlib import Path
from ditmoe.slurm.heartbeats import Heart
with Heart(Path(sys.argv[1]), 0, 1) as heart:
    heart.beat("step", 1)
    def the_place_where_it_hangs():
        time.sleep(30)
    the_place_where_it_hangs()
"""


def test_a_rank_that_hangs_prints_its_stacks_and_goes_on_writing(tmp_path: Path) -> None:
    Terms(1, {**LIMITS, "step": 0.5}, 0.05).write(tmp_path)
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        lines = []
        while not any(b"the_place_where_it_hangs" in line for line in lines):
            lines.append(process.stderr.readline())
            assert lines[-1], b"".join(lines)
        first = second = read_heartbeats(tmp_path, 1)[0]
        deadline = time.monotonic() + 20
        while second.time == first.time and time.monotonic() < deadline:
            second = read_heartbeats(tmp_path, 1)[0]
        process.kill()
    assert first.beats == second.beats == 1 and second.time > first.time
    assert STALE_WRITES > 1
    assert json.loads((tmp_path / TERMS).read_text())["attempt"] == 1


def test_those_that_waited_for_a_long_save_are_not_late_when_it_ends() -> None:
    """Rank 3 saves for longer than a step may take; once it has caught up, all compute the step together."""
    watch = Watchdog(TERMS_OF_TEST, 0.0)
    waiting = {rank: heartbeat(rank, beats=3) for rank in range(3)}
    for second in range(100):
        assert (
            watch.look({**waiting, 3: heartbeat(3, "save", beats=1, clock=float(second))}, float(second)) is None
        )
    for second in range(100, 121):
        assert watch.look({**waiting, 3: heartbeat(3, beats=3, clock=float(second))}, float(second)) is None
    silence = watch.look({**waiting, 3: heartbeat(3, beats=3, clock=121.0)}, 121.0)
    assert silence is not None, "from then on they are held to the limit of the step"
