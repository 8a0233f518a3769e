"""A figure of the suite: ours, the baseline, the limit of the machine, and what they are to each other.

Contenders take turns (A B A B …), so that a busy machine slows all of them alike. A figure is the median of its
rounds with their quartiles; a ratio is the median of the ratios within the rounds.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of some rounds."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Figure:
    """One row of the table."""

    name: str
    unit: str
    ours: Spread
    baseline: Spread | None = None
    speedup: Spread | None = None
    """How many times as fast as the baseline ours is; above 1 it is the faster one."""
    limit: float | None = None
    """What the machine could do at best, in the figure's unit."""
    more_is_better: bool = True
    rounds: int = 1
    against: str = ""
    """What the baseline is."""

    @property
    def of_limit(self) -> float | None:
        """Share of the limit that is reached, at most about 1."""
        if self.limit is None:
            return None
        return self.ours.median / self.limit if self.more_is_better else self.limit / self.ours.median

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "of_limit": self.of_limit}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """From plain data."""
        known = {key: value for key, value in values.items() if key != "of_limit"}
        for key in ("ours", "baseline", "speedup"):
            known[key] = None if known[key] is None else Spread(**known[key])
        return cls(**known)


def in_turns(
    contenders: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds that each contender takes in each round; the first rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-warm_up, rounds):
        for name, run in contenders.items():
            took = timed(run, device)
            if number >= 0:
                seconds[name].append(took)
    return seconds


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until what was asked for is done."""
    _wait(device)
    begun = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(
    name: str,
    unit: str,
    amount: float,
    ours: Sequence[float],
    baseline: Sequence[float] | None = None,
    *,
    limit: float | None = None,
    against: str = "",
) -> Figure:
    """A figure of so much per second, from seconds; the limit too is given in seconds."""
    return _figure(name, unit, lambda seconds: amount / seconds, True, ours, baseline, limit, against)


def duration(
    name: str,
    ours: Sequence[float],
    baseline: Sequence[float] | None = None,
    *,
    limit: float | None = None,
    against: str = "",
) -> Figure:
    """A figure in milliseconds, from seconds."""
    return _figure(name, "ms", lambda seconds: 1000 * seconds, False, ours, baseline, limit, against)


def _figure(
    name: str,
    unit: str,
    shown: Callable[[float], float],
    more_is_better: bool,
    ours: Sequence[float],
    baseline: Sequence[float] | None,
    limit: float | None,
    against: str,
) -> Figure:
    """A figure from seconds, which `shown` turns into its unit."""
    return Figure(
        name,
        unit,
        Spread.of(list(map(shown, ours))),
        None if baseline is None else Spread.of(list(map(shown, baseline))),
        _speedup(ours, baseline),
        None if limit is None else shown(limit),
        more_is_better,
        len(ours),
        against,
    )


def _speedup(ours: Sequence[float], baseline: Sequence[float] | None) -> Spread | None:
    if baseline is None:
        return None
    return Spread.of([theirs / mine for mine, theirs in zip(ours, baseline, strict=True)])


def header() -> str:
    """The names of the columns."""
    return (
        f"{'figure':<58}{'unit':>9}{'ours':>10}{'(quartiles)':>18}{'baseline':>10}{'limit':>10}"
        f"{'× baseline':>12}{'(quartiles)':>14}{'of limit':>10}"
    )


def line(figure: Figure) -> str:
    """A row."""
    ours, speedup = figure.ours, figure.speedup
    cells = [
        f"{figure.name:<58}{figure.unit:>9}{_number(ours.median):>10}",
        f"{f'({_number(ours.low)}–{_number(ours.high)})':>18}",
        f"{'' if figure.baseline is None else _number(figure.baseline.median):>10}",
        f"{'' if figure.limit is None else _number(figure.limit):>10}",
        f"{'' if speedup is None else f'{speedup.median:.2f}':>12}",
        f"{'' if speedup is None else f'({speedup.low:.2f}–{speedup.high:.2f})':>14}",
        f"{'' if figure.of_limit is None else f'{figure.of_limit:.0%}':>10}",
    ]
    return "".join(cells).rstrip()


def _number(value: float) -> str:
    """Three digits, and thousands in full."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
