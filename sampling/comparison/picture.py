"""The picture of a comparison: FID and recall against NFE, a panel for each sampler, a line for each variant."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ditmoe.data.storage.files import replacing
from ditmoe.sampling.comparison.cells import PLAIN
from ditmoe.sampling.comparison.results import Row, curves_of

_ACROSS: Final = 4
"""Panels beside one another, at most."""
_PANEL: Final = (3.4, 2.7)
"""Inches."""
_LINES: Final = (
    ("#000000", "o"),
    ("#d55e00", "s"),
    ("#0072b2", "^"),
    ("#009e73", "D"),
    ("#cc79a7", "v"),
    ("#e69f00", "P"),
    ("#56b4e9", "X"),
)
"""Colours (Okabe and Ito, which the colour-blind can tell apart) and marks of the variants; the first is the
sampler alone."""


def write_picture(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Write the picture of a comparison's rows as PNG.

    Raises:
        UserError: the file cannot be written.
    """
    curves = curves_of(rows)
    floors = {row["sampler"]: row["fid_floor"] for row in rows if row["fid_floor"] is not None}
    variants = dict.fromkeys(name for found in curves.values() for name in found)
    styles = dict(zip(variants, _styles(len(variants), PLAIN in variants), strict=True))
    down = -(-len(curves) // _ACROSS)
    across = -(-len(curves) // down)
    # Two panels wide at least, for the title.
    figure = Figure((max(2, across) * _PANEL[0], 2 * down * _PANEL[1] + 0.9), layout="constrained")
    panels = figure.subplots(2 * down, across, squeeze=False, sharex=True)
    for place, (sampler, found) in enumerate(curves.items()):
        row, column = 2 * (place // across), place % across
        _draw_fid(panels[row][column], sampler, found, styles, floors.get(sampler))
        _draw_recall(panels[row + 1][column], found, styles)
        for panel, words in ((panels[row][column], "FID"), (panels[row + 1][column], "recall")):
            if column == 0:
                panel.set_ylabel(words)
    for place in range(len(curves), down * across):
        for row in (0, 1):
            panels[2 * (place // across) + row][place % across].set_axis_off()
    for row in (0, 1):
        _align([panels[2 * (place // across) + row][place % across] for place in range(len(curves))])
    handles = [Line2D([], [], color=colour, marker=mark, label=name) for name, (colour, mark) in styles.items()]
    if floors:
        handles.append(Line2D([], [], color="0.5", linestyle="--", label="floor: two halves of the real images"))
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * across), frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)


def _styles(count: int, with_plain: bool) -> list[tuple[str, str]]:
    """Colour and mark of each variant; black is for the sampler alone."""
    coloured = _LINES[1:]
    first = [_LINES[0]] if with_plain else []
    return first + [coloured[place % len(coloured)] for place in range(count - len(first))]


def _draw_fid(
    panel: Axes, sampler: str, found: Any, styles: dict[str, tuple[str, str]], floor: float | None
) -> None:
    panel.set_title(sampler, fontsize=10)
    if floor is not None:
        panel.axhline(floor, color="0.5", linestyle="--", linewidth=1)
    for variant, points in found.items():
        colour, mark = styles[variant]
        panel.errorbar(
            [point.nfe for point in points],
            [point.fid for point in points],
            yerr=[
                [min(2 * point.error, 0.9 * point.fid) for point in points],  # a log axis shows nothing below 0
                [2 * point.error for point in points],
            ],
            capsize=2,
            color=colour,
            marker=mark,
            markersize=4.5,
            linewidth=1.5,
        )
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    _dress(panel)


def _draw_recall(panel: Axes, found: Any, styles: dict[str, tuple[str, str]]) -> None:
    for variant, points in found.items():
        colour, mark = styles[variant]
        measured = [(point.nfe, point.recall) for point in points if point.recall is not None]
        panel.plot(
            [nfe for nfe, _ in measured],
            [recall for _, recall in measured],
            color=colour,
            marker=mark,
            markersize=4.5,
            linewidth=1.5,
        )
    panel.set_xlabel("NFE")
    _dress(panel)


def _dress(panel: Axes) -> None:
    """Evaluations along a log axis, in plain numbers, and a faint grid."""
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_formatter(NullFormatter())
    panel.grid(visible=True, color="0.9", linewidth=0.7)
    panel.tick_params(labelsize=8, labelbottom=True)


def _align(panels: Sequence[Axes]) -> None:
    """One range of figures for all, so that panels can be compared."""
    limits = [panel.get_ylim() for panel in panels]
    for panel in panels:
        panel.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
