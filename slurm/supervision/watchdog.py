"""Which ranks hang: a pure rule over what was read of their heartbeats, and when.

Clocks of hosts differ, so nothing is made of the times in the files: what counts is when the watcher saw them
change. And ranks wait for one another, so only those that are furthest behind are held to the limit of what they
are in: the others cannot get on before them. Workers of a crew do not, and are held to their limit each by itself.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from ditmoe.slurm.heartbeats import Heartbeat, Terms
from ditmoe.slurm.requeue import Silence

STALE_WRITES: Final = 4
"""Writes that a rank must have missed before its process counts as stopped."""
_NAMED: Final = 8


@dataclass(frozen=True)
class _Seen:
    """A rank as the watcher has seen it; times on the watcher's clock."""

    heartbeat: Heartbeat | None
    """None: it has written nothing yet."""
    further: float
    """When it was last seen to have got further."""
    written: float
    """When its file was last seen to have changed."""


class Watchdog:
    """Watches the ranks of one attempt.

    Args:
        terms: limits, and how often ranks write.
        start: when the ranks were started, s on the clock of all later times.
        in_step: whether ranks wait for one another.
    """

    def __init__(self, terms: Terms, start: float, in_step: bool = True) -> None:
        self._in_step = in_step
        self._terms = terms
        self._start = start
        self._ranks: dict[int, _Seen] = {}
        self._fewest = -1
        self._caught_up = start
        """When those furthest behind were last seen to have got further. Who waited for them until then, such as
        for a rank that saved for long, is held to its own limit from then on alone."""

    def look(self, heartbeats: Mapping[int, Heartbeat], now: float) -> Silence | None:
        """Take in what was read, and say which ranks hang, if any do.

        Args:
            heartbeats: by rank.
            now: when the folder answered, s. A folder that does not answer says nothing of the ranks.
        """
        for rank, heartbeat in heartbeats.items():
            before = self._ranks.get(rank)
            if before is None or before.heartbeat is None:
                self._ranks[rank] = _Seen(heartbeat, now, now)
                continue
            old = before.heartbeat
            moved = (heartbeat.beats, heartbeat.pid) != (old.beats, old.pid)
            self._ranks[rank] = _Seen(
                heartbeat,
                now if moved else before.further,
                now if heartbeat != old else before.written,
            )
        if not self._ranks:
            self._ranks[0] = _Seen(None, self._start, self._start)
        count = max((seen.heartbeat.ranks for seen in self._ranks.values() if seen.heartbeat), default=1)
        for rank in range(count):
            self._ranks.setdefault(rank, _Seen(None, self._start, self._start))
        return self._silence(now)

    def _silence(self, now: float) -> Silence | None:
        working = {
            rank: seen
            for rank, seen in self._ranks.items()
            if seen.heartbeat is None or seen.heartbeat.phase != "ended"
        }
        if not working:
            return None
        fewest = min(_beats(seen) for seen in working.values())
        if fewest != self._fewest:
            self._fewest, self._caught_up = fewest, now
        behind = {rank: seen for rank, seen in working.items() if _beats(seen) == fewest or not self._in_step}
        caught_up = self._caught_up if self._in_step else self._start
        late = {
            rank: seen for rank, seen in behind.items() if now - max(seen.further, caught_up) > self._limit(seen)
        }
        if not late:
            return None
        still = {
            rank: seen
            for rank, seen in late.items()
            if seen.heartbeat is None or now - seen.written > STALE_WRITES * self._terms.interval
        }
        blamed = still or late
        hosts = _hosts(blamed.values())
        others = [seen for rank, seen in self._ranks.items() if rank not in blamed]
        # Where a rank goes on that shares the host, or none does at all, the host is not what they lack.
        suspects = set(hosts) - set(_hosts(others)) if others else set()
        reason = self._reason(blamed, bool(still), now)
        return Silence(reason, tuple(host for host in hosts if host in suspects))

    def _limit(self, seen: _Seen) -> float:
        return self._terms.limits[_phase(seen)]

    def _reason(self, blamed: Mapping[int, _Seen], still: bool, now: float) -> str:
        """Ranks with their hosts, what they are in, for how long, and whether their processes still answer."""
        names = [f"rank {rank} ({_host(seen)})" for rank, seen in sorted(blamed.items())]
        shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        first = blamed[min(blamed)]
        seconds = now - min(seen.further for seen in blamed.values())
        if still:
            sign = "the processes write nothing any more: stopped, gone, or cut off from the shared folder"
            if first.heartbeat is None:
                sign = "they have not written anything yet"
        else:
            sign = "the processes live and wait; their stacks are in the output"
        limit = f"limit {self._limit(first):g} s"
        return f"no progress for {seconds:.0f} s of {shown} in {_place(first)} ({limit}); {sign}"


def _beats(seen: _Seen) -> int:
    return -1 if seen.heartbeat is None else seen.heartbeat.beats


def _phase(seen: _Seen) -> str:
    return "start" if seen.heartbeat is None else seen.heartbeat.phase


def _host(seen: _Seen) -> str:
    return "host unknown" if seen.heartbeat is None else seen.heartbeat.host


def _place(seen: _Seen) -> str:
    if seen.heartbeat is None:
        return "start"
    step = "" if seen.heartbeat.step is None else f" {seen.heartbeat.step}"
    doing = f" ({seen.heartbeat.doing})" if seen.heartbeat.doing else ""
    return f"{seen.heartbeat.phase}{step}{doing}"


def _hosts(ranks: Iterable[_Seen]) -> list[str]:
    """Each host once."""
    return list(dict.fromkeys(seen.heartbeat.host for seen in ranks if seen.heartbeat is not None))
