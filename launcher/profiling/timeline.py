"""A picture of one step on several ranks: what each computes, and above that what is on its way to others."""

from collections.abc import Sequence
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from ditmoe.launcher.profiling import parts
from ditmoe.launcher.profiling.trace import Stretch, Trace

_COLOURS: Final = {
    parts.ATTENTION: (78, 121, 167),
    parts.ROUTER: (255, 157, 167),
    parts.DISPATCH: (225, 87, 89),
    parts.EXPERTS: (242, 142, 43),
    parts.SHARED: (255, 190, 125),
    parts.MLP: (242, 142, 43),
    parts.NORMS: (118, 183, 178),
    parts.EMBEDDERS: (160, 203, 232),
    parts.FINAL_LAYER: (134, 188, 182),
    parts.OPTIMISER: (89, 161, 79),
    parts.EMA: (140, 209, 125),
    parts.COMMUNICATION: (176, 122, 161),
    parts.DATA: (156, 117, 95),
    parts.RECORDS: (211, 114, 149),
    parts.REST: (200, 200, 200),
}
_PAPER, _INK, _GRID = (255, 255, 255), (32, 32, 32), (225, 225, 225)
_LEFT, _RIGHT, _TOP, _LANE, _GAP, _LEGEND = 110, 20, 44, 22, 14, 20
_BACKWARD_SHADE: Final = 0.75
"""Backward passes are darker."""


def draw_timeline(traces: Sequence[tuple[int, Trace]], width: int = 1600) -> Image.Image:
    """Draw the last step that all of some ranks have, on one axis of time, ms.

    Args:
        traces: with their ranks; their clocks must agree, as those of one machine do.
        width: of the picture, pixels.
    """
    step = min(len(trace.steps) for _, trace in traces) - 1
    start = min(trace.steps[step][0] for _, trace in traces)
    end = max(trace.steps[step][1] for _, trace in traces)
    shown = [name for name in parts.PARTS if any(_has(trace, name, start, end) for _, trace in traces)]
    columns = max(1, (width - _LEFT - _RIGHT) // 170)
    legend_rows = -(-len(shown) // columns)
    height = _TOP + len(traces) * (2 * _LANE + _GAP) + 30 + legend_rows * _LEGEND
    picture = Image.new("RGB", (width, height), _PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    scale = (width - _LEFT - _RIGHT) / (end - start)
    draw.text((_LEFT, 6), f"one step, {(end - start) / 1e3:,.1f} ms; backward passes are darker", _INK, font)
    bottom = _TOP + len(traces) * (2 * _LANE + _GAP)
    for tick in range(11):
        x = _LEFT + tick / 10 * (width - _LEFT - _RIGHT)
        draw.line((x, _TOP - 6, x, bottom), _GRID)
        draw.text((x, _TOP - 20), f"{tick / 10 * (end - start) / 1e3:,.1f}", _INK, font, anchor="ma")
    for place, (rank, trace) in enumerate(traces):
        top = _TOP + place * (2 * _LANE + _GAP)
        for lane, (words, stretches) in enumerate((("sends", trace.sending), ("computes", trace.computing))):
            y = top + lane * _LANE
            draw.text((_LEFT - 8, y + _LANE // 2), f"rank {rank} {words}", _INK, font, anchor="rm")
            for stretch in stretches:
                if stretch.end > start and stretch.start < end:
                    left = _LEFT + (max(stretch.start, start) - start) * scale
                    right = _LEFT + (min(stretch.end, end) - start) * scale
                    draw.rectangle((left, y + 2, max(left, right - 1), y + _LANE - 3), _colour(stretch))
    for number, name in enumerate(shown):
        x, y = _LEFT + number % columns * 170, bottom + 20 + number // columns * _LEGEND
        draw.rectangle((x, y, x + 12, y + 12), _COLOURS[name])
        draw.text((x + 18, y + 6), name, _INK, font, anchor="lm")
    return picture


def _has(trace: Trace, part: str, start: float, end: float) -> bool:
    return any(s.part == part and s.end > start and s.start < end for s in (*trace.sending, *trace.computing))


def _colour(stretch: Stretch) -> tuple[int, int, int]:
    shade = _BACKWARD_SHADE if stretch.backward else 1.0
    red, green, blue = (round(shade * value) for value in _COLOURS[stretch.part])
    return red, green, blue
