"""Nothing is collected inside, but at the steps for it."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from ditmoe.launcher.local.garbage import ALL_EVERY, YOUNG_EVERY, GarbageCollection


@pytest.fixture(autouse=True)
def _as_in_a_command() -> Iterator[None]:
    """Nothing is frozen before; afterwards the tests' own objects are again."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


class Knot:
    """Refers to itself, so that only a collection ends it."""

    def __init__(self) -> None:
        self.self = self


def test_cycles_are_collected_at_fixed_steps() -> None:
    with GarbageCollection() as garbage:
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        gone = weakref.ref(Knot())
        for step in range(1, YOUNG_EVERY):
            garbage.after_step(step)
            assert gone() is not None
        garbage.after_step(YOUNG_EVERY)
        assert gone() is None
        old = Knot()
        gc.collect(1)  # it is old now
        gone = weakref.ref(old)
        del old
        garbage.after_step(YOUNG_EVERY * 2)
        assert gone() is not None
        garbage.after_step(ALL_EVERY)
        assert gone() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_collecting_goes_on_after_an_error() -> None:
    with pytest.raises(KeyError), GarbageCollection():
        raise KeyError
    assert gc.isenabled()
