"""Where chains beat the integrator that finishes them, at equal NFE and where it has twice as much: computed.

Each measured point of the chains, at n evaluations, is judged against the integrator alone at n and at 2n. Between
two measured points of the integrator its FID is a straight line in (log NFE, log FID), its recall one in log NFE;
outside its measured range nothing is said. A stretch of NFE ends at measured points of the chains: between a point
that wins and one that loses nothing is claimed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

BEST: Final = "best of the chains"
"""What all variants together reach: their points that no other point beats in FID at the same NFE or less."""


@dataclass(frozen=True)
class Point:
    """One measurement."""

    nfe: float
    fid: float
    recall: float | None = None
    error: float = 0.0
    """Standard error of the FID where it is a mean over seeds."""


@dataclass(frozen=True)
class Stretch:
    """Neighbouring points of the chains that win, all of them."""

    chains: tuple[Point, ...]
    alone: tuple[Point, ...]
    """The integrator at the NFE that they are judged at."""

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "nfe": [self.chains[0].nfe, self.chains[-1].nfe],
            "points": [
                {
                    "nfe": here.nfe,
                    "fid": here.fid,
                    "recall": here.recall,
                    "alone": {"nfe": there.nfe, "fid": there.fid, "recall": there.recall},
                }
                for here, there in zip(self.chains, self.alone, strict=True)
            ],
        }


@dataclass(frozen=True)
class Judgement:
    """Points of chains against an integrator that has `factor` times the NFE."""

    won: tuple[Stretch, ...]
    lost: tuple[float, ...]
    """NFE of the chains' points that do not win: their FID is not smaller by more than its error."""
    unjudged: tuple[float, ...]
    """NFE of those whose counterpart is outside the integrator's measured range."""

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "won": [stretch.plain() for stretch in self.won],
            "lost_at": list(self.lost),
            "not_judged_at": list(self.unjudged),
        }


@dataclass(frozen=True)
class Verdict:
    """One variant of chains, finished by one integrator, against that integrator alone."""

    sampler: str
    variant: str
    equal: Judgement
    twice: Judgement

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "sampler": self.sampler,
            "variant": self.variant,
            "at_equal_nfe": self.equal.plain(),
            "with_twice_the_nfe_alone": self.twice.plain(),
        }


def verdicts(curves: Mapping[str, Mapping[str, Sequence[Point]]], plain: str) -> list[Verdict]:
    """The verdicts on every variant of every sampler that was also measured alone, and on the best of them.

    Args:
        curves: sampler → variant → points.
        plain: the variant that is the sampler alone.
    """
    found = []
    for sampler, variants in curves.items():
        alone = variants.get(plain)
        if not alone:
            continue
        chains = {name: points for name, points in variants.items() if name != plain and points}
        if chains:
            chains[BEST] = frontier([point for points in chains.values() for point in points])
        found += [
            Verdict(sampler, name, judge(points, alone, 1), judge(points, alone, 2))
            for name, points in chains.items()
        ]
    return found


def judge(chains: Sequence[Point], alone: Sequence[Point], factor: float) -> Judgement:
    """Judge each point of chains against the integrator with `factor` times its NFE."""
    stretches: list[list[tuple[Point, Point]]] = [[]]
    lost: list[float] = []
    unjudged: list[float] = []
    for point in sorted(chains, key=lambda point: (point.nfe, point.fid)):
        against = between(alone, factor * point.nfe)
        if against is not None and point.fid + 2 * math.hypot(point.error, against.error) < against.fid:
            stretches[-1].append((point, against))
            continue
        (unjudged if against is None else lost).append(point.nfe)
        stretches.append([])
    won = tuple(Stretch(*zip(*pairs, strict=True)) for pairs in stretches if pairs)
    return Judgement(won, tuple(lost), tuple(unjudged))


def between(points: Sequence[Point], nfe: float) -> Point | None:
    """A curve at an NFE within its measured range; None outside it.

    Of two points with one NFE the better one counts.
    """
    best: dict[float, Point] = {}
    for point in points:
        if point.nfe not in best or point.fid < best[point.nfe].fid:
            best[point.nfe] = point
    if nfe in best:
        return best[nfe]
    below = max((at for at in best if at < nfe), default=None)
    above = min((at for at in best if at > nfe), default=None)
    if below is None or above is None:
        return None
    left, right = best[below], best[above]
    share = math.log(nfe / below) / math.log(above / below)
    # A power law meets a FID of 0 at 0 all the way.
    fid = left.fid ** (1 - share) * right.fid**share
    recall = None
    if left.recall is not None and right.recall is not None:
        recall = (1 - share) * left.recall + share * right.recall
    # The relative errors of independent means, as the logarithms are weighted.
    relative = math.hypot(
        *(weight * point.error / point.fid for weight, point in ((1 - share, left), (share, right)) if point.fid)
    )
    return Point(nfe, fid, recall, fid * relative)


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: each has a smaller FID than all that cost as much or less."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.nfe, point.fid)):
        if not kept or point.fid < kept[-1].fid:
            kept.append(point)
    return kept
