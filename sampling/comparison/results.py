"""What a comparison found: its rows, and the tables in Markdown."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ditmoe.model.outside.text import printable
from ditmoe.sampling.comparison.cells import PLAIN, Cell
from ditmoe.sampling.comparison.verdicts import BEST, Judgement, Point, Verdict, between, verdicts

INDEPENDENT: Final = (
    "Independent: samples of chains are alike; their effective number in the feature network, as a share of them, "
    "from the chains of classes that have several."
)

_SPREAD: Final = ("fid", "precision", "recall")
"""Figures that are shown with their deviation over seeds."""
_MEANT: Final = ("nfe", "fid_error", "fid_floor", "recognised", "independent", "seconds")
"""Figures that are shown as means over seeds."""

Row = dict[str, Any]
Curves = dict[str, dict[str, list[Point]]]
"""Sampler → variant → its measured points, by NFE."""

HOW_JUDGED: Final = (
    "Each measured point of the chains, at NFE n, is compared with the sampler alone at n and 2n: its FID there "
    "is interpolated between the two measured points around it, along a line in (log NFE, log FID), its recall "
    "along one in log NFE. Nothing is said where n, or 2n, is outside what was measured of the sampler alone (not "
    "judged). A stretch a–b ends at measured points of the chains, and all measured in between win as well. "
    f"“{BEST}”: the points of all variants that no other point beats in FID at the same NFE or less; they are "
    "chosen by the FID that they are judged by. Of several seeds figures are means ± their deviation over seeds, "
    "and a point wins where its mean FID is the smaller one by more than twice the standard error of the "
    "difference. Of one seed, differences within the noise of FID are not told from others."
)


def row_of(cell: Cell, evaluation_id: str, metrics: Mapping[str, Any], key: str, seconds: float | None) -> Row:
    """A cell's row, as plain data.

    Args:
        metrics: of its evaluation, as in `metrics.json`.
        key: of the result there.
        seconds: what drawing and scoring it took; None where that is not known.
    """
    evaluation, result = metrics["evaluation"], metrics["results"][key]
    adaptive = cell.config.integrator == "rk45"
    return {
        "sampler": cell.sampler,
        "variant": cell.variant,
        "targets": list(cell.targets),
        "steps": None if adaptive else cell.config.steps,
        "tolerance": cell.config.tolerance if adaptive else None,
        "settings": evaluation["sampler"],
        "nfe": evaluation["nfe"],
        **{name: result.get(name) for name in ("fid", "fid_error", "fid_floor", "precision", "recall")},
        "recognised": result.get("recogniser", {}).get("accuracy"),
        "chains": result.get("chains"),
        "independent": (result.get("chains") or {}).get("features", {}).get("effective_share"),
        "seconds": seconds,
        "evaluation": evaluation_id,
    }


def mean_row(rows: Sequence[Row]) -> Row:
    """A cell's row from those of its seeds: means, and under `seeds` each seed's own figures.

    `deviations` has the standard deviation over seeds (n − 1 in its denominator) of what is shown with one.
    """
    if len(rows) == 1:
        return rows[0]
    means = {name: _mean([row[name] for row in rows]) for name in (*_SPREAD, *_MEANT)}
    deviations = {name: _deviation([row[name] for row in rows]) for name in _SPREAD}
    own = (*_SPREAD, *_MEANT, "chains", "evaluation", "seconds")
    seeds = [{"seed": row["settings"]["seed"], **{name: row[name] for name in own}} for row in rows]
    return {**rows[0], **means, "deviations": deviations, "seeds": seeds}


def _known(values: Sequence[float | None]) -> list[float]:
    """All of them, or nothing where one is missing."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []


def _mean(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return statistics.fmean(known) if known else None


def _deviation(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return statistics.stdev(known) if known else None


def curves_of(rows: Iterable[Row]) -> Curves:
    """The rows that have a FID and an NFE as curves, in the order of the rows."""
    curves: Curves = {}
    for row in rows:
        points = curves.setdefault(row["sampler"], {}).setdefault(row["variant"], [])
        if row["fid"] is not None and row["nfe"] is not None:
            points.append(Point(row["nfe"], row["fid"], row["recall"], _fid_error(row)))
    for variants in curves.values():
        for points in variants.values():
            points.sort(key=lambda point: (point.nfe, point.fid))
    return curves


def _fid_error(row: Row) -> float:
    """Standard error of a mean FID over seeds; 0 of a single one, of which it is not known."""
    deviation = row.get("deviations", {}).get("fid")
    return 0.0 if deviation is None else deviation / math.sqrt(len(row["seeds"]))


def markdown(title: str, rows: Sequence[Row], left_out: Sequence[str], warnings: Sequence[str]) -> str:
    """The page of a comparison: verdicts, every cell, and what was left out."""
    curves = curves_of(rows)
    lines = [f"# {_escaped(title)}", ""]
    found = verdicts(curves, PLAIN)
    if found:
        lines += ["## Chains against the sampler alone", "", *_verdict_table(found), "", HOW_JUDGED, ""]
    lines += ["## Every evaluation", "", *_cell_table(rows, curves), ""]
    if any(row["chains"] for row in rows):
        lines += [INDEPENDENT, ""]
    floors = sorted({row["fid_floor"] for row in rows if row["fid_floor"] is not None})
    if floors:
        lines += [f"FID between two random halves of the real images (the floor): {_list(floors)}.", ""]
    if left_out:
        lines += ["Left out:", "", *(f"- {_escaped(line)}" for line in left_out), ""]
    if warnings:
        lines += ["Warnings:", "", *(f"- {_escaped(line)}" for line in warnings), ""]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text in one line that Markdown shows as it is: names of classes and files are others' words."""
    return re.sub(r"[\\`*\[\]<>|&~#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(text))


def _verdict_table(found: Sequence[Verdict]) -> list[str]:
    header = ("sampler", "chains", "alone is beaten at equal NFE", "alone is beaten with twice the NFE")
    return _table(
        header, [(one.sampler, one.variant, _in_words(one.equal), _in_words(one.twice)) for one in found], left=4
    )


def _in_words(judgement: Judgement) -> str:
    """`at NFE 6–20, recall 0.52–0.61 against 0.55–0.66; not judged at 2`."""
    parts = []
    for stretch in judgement.won:
        here, there = stretch.chains, stretch.alone
        ends = (here[0], here[-1]) if len(here) > 1 else (here[0],)
        others = (there[0], there[-1]) if len(there) > 1 else (there[0],)
        words = f"at NFE {_list([point.nfe for point in ends], '–')}"
        if all(point.recall is not None for point in (*ends, *others)):
            words += f", recall {_list([point.recall for point in ends], '–')}"
            words += f" against {_list([point.recall for point in others], '–')}"
        parts.append(words)
    if not parts and judgement.lost:
        parts.append("nowhere")
    elif judgement.lost:
        parts.append(f"not at {_list(judgement.lost)}")
    if judgement.unjudged:
        parts.append(f"not judged at {_list(judgement.unjudged)}")
    return "; ".join(parts)


def _cell_table(rows: Sequence[Row], curves: Curves) -> list[str]:
    header = (
        *("sampler", "variant", "aimed at", "steps", "NFE", "FID", "alone, FID at NFE", "at 2·NFE"),
        *("precision", "recall", "independent", "recognised", "s"),
    )
    lines = []
    for row in rows:
        adaptive = row["tolerance"] is not None
        against = ["", ""]
        alone = curves[row["sampler"]].get(PLAIN, [])
        if row["variant"] != PLAIN and row["nfe"] is not None:
            found = [between(alone, factor * row["nfe"]) for factor in (1, 2)]
            against = ["–" if point is None else _figure(point.fid) for point in found]
        recognised = row["recognised"]
        lines.append(
            (
                *(row["sampler"], row["variant"]),
                ("tolerance " if adaptive else "") + _list(row["targets"]),
                "own" if adaptive else str(row["steps"]),
                *(_figure(row["nfe"]), _with_spread(row, "fid", 4), *against),
                *(_with_spread(row, "precision", 3), _with_spread(row, "recall", 3), _independent(row)),
                "–" if recognised is None else f"{recognised:.2%}",
                "–" if row["seconds"] is None else f"{row['seconds']:.0f}",
            )
        )
    return _table(header, lines, left=2)


def _with_spread(row: Row, name: str, digits: int) -> str:
    """`0.352 ± 0.04`: a figure, with its deviation over seeds where there are several."""
    deviation = row.get("deviations", {}).get(name)
    return _figure(row[name], digits) + ("" if deviation is None else f" ± {_figure(deviation, 2)}")


def _independent(row: Row) -> str:
    """The share of samples that so many independent ones are worth; `–` where chains do not tell."""
    if row["chains"] is None:
        return ""
    return "–" if row["independent"] is None else f"{row['independent']:.0%}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """A table of Markdown, laid out for a terminal as well; all but the first `left` columns end in line."""
    # Two columns of a rule at least: Markdown wants a dash before the colon.
    widths = [max(2, *(len(line[column]) for line in (header, *rows))) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return [line(header), f"| {' | '.join(rule)} |", *map(line, rows)]


def _list(values: Sequence[float | None], separator: str = ", ") -> str:
    return separator.join(_figure(value, 3) for value in values)


def _figure(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"
