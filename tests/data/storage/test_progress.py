"""Progress is told while it is made, and while a long part of the work is: never a silence."""

import gc
import threading
import time

import pytest

from ditmoe.data.storage import progress
from ditmoe.data.storage.progress import show_progress


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    monkeypatch.setattr(progress._Lines, "period", 0.01)


def tickers() -> int:
    return sum(thread.name == "progress" for thread in threading.enumerate())


def waited(condition) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.usefixtures("quick")
def test_it_is_told_also_while_nothing_is_done(capfd: pytest.CaptureFixture[str]) -> None:
    told = []

    def lines() -> list[str]:
        told.extend(capfd.readouterr().err.splitlines())
        return told

    shown = show_progress("chunks drawn", 3)
    assert waited(lambda: any(line.startswith("chunks drawn: 0 of 3, ") for line in lines()))
    shown(2)
    assert waited(lambda: any(line.startswith("chunks drawn: 2 of 3, ") for line in lines()))
    other = show_progress("figures")
    assert waited(lambda: any(line.startswith("figures: ") and " of " not in line for line in lines()))
    assert waited(lambda: tickers() == 1), "what was shown before is told no more"
    other(0)
    assert waited(lambda: tickers() == 0)


@pytest.mark.usefixtures("quick")
def test_what_nobody_holds_any_more_is_told_no_more() -> None:
    """As after an error."""
    shown = show_progress("parts", 3)
    assert tickers() == 1
    del shown
    gc.collect()
    assert waited(lambda: tickers() == 0)
