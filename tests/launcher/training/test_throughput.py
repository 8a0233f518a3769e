"""The clock of a run: every second between two records is counted once, to one part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe.launcher.training.throughput import PARTS, Clock


class Time:
    """A time that passes as a test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(
    events=st.lists(
        st.tuples(st.sampled_from([*PARTS, "step", "nested", "between"]), st.floats(0.001, 10)), min_size=1
    )
)
def test_the_parts_sum_to_the_time_that_passed(events: list[tuple[str, float]]) -> None:
    time = Time()
    clock, start, steps = Clock(time), time.now, 0
    for what, seconds in events:
        if what == "step":
            clock.step()
            steps += 1
        if what == "nested":
            with clock.part("save"), clock.part("record"):
                time.now += seconds
        elif what in PARTS:
            with clock.part(what):
                time.now += seconds
        else:
            time.now += seconds
    clock.step()
    found, passed = clock.take(8), time.now - start
    assert found["step_seconds"] * (steps + 1) == pytest.approx(passed)
    assert sum(found[f"{part}_seconds"] for part in PARTS) == pytest.approx(found["step_seconds"])
    assert found["images_per_second"] == pytest.approx(8 * (steps + 1) / passed)


def test_each_part_has_its_own_time_and_no_interval_is_lost() -> None:
    time = Time()
    clock = Clock(time)
    for _ in range(2):
        with clock.part("data_wait"):
            time.now += 1
        time.now += 4
        clock.step()
    with clock.part("record"):
        time.now += 2
        first = clock.take(10)
        time.now += 3  # writing the record: the next one counts it
    with clock.part("save"):
        time.now += 6
        with pytest.raises(KeyError), clock.part("preview"):
            time.now += 7
            raise KeyError
    time.now += 1
    clock.step()
    second = clock.take(10)
    assert first == {
        "images_per_second": 20 / 12,
        "step_seconds": 6,
        "compute_seconds": 4,
        "data_wait_seconds": 1,
        "record_seconds": 1,
        "save_seconds": 0,
        "preview_seconds": 0,
    }
    assert (second["record_seconds"], second["save_seconds"], second["preview_seconds"]) == (3, 6, 7)
    assert first["step_seconds"] * 2 + second["step_seconds"] == time.now - 100


def test_skipped_steps_pass_and_train_nothing() -> None:
    time = Time()
    clock, shares = Clock(time), []
    for updates in ((True, False, False, True), (False, False), (True,)):
        for update in updates:
            time.now += 1
            clock.step(update=update)
        shares.append(clock.share_trained())
        assert clock.take(8)["images_per_second"] == 8
    assert shares == [0.5, 0, 1]
