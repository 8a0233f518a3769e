"""Every layout that works today has one loss curve, and checkpoints move between them: `make test-layouts`.

{data 1, 2, 4} × {expert 1, 2, 4} × {ZeRO 0, 1, 2, 3} × {accumulation 1, 2} × {recomputation off, on}, every legal
cell over 50 steps, half of them with clipping and each with one of the two objectives in turn, in fp32. Then every
pair of eight layouts: saved at one, continued at the other.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

Runner = Callable[..., list[dict[str, Any]]]
Cell = tuple[int, int, int, int, bool]
"""data, expert, ZeRO, accumulation, recomputation."""

BATCH: Final = 8
STEPS: Final = 50
EXACT: Final = 1e-5
CELLS: Final[list[Cell]] = [
    (data, expert, zero, accumulation, recomputation)
    for data in (1, 2, 4)
    for expert in (1, 2, 4)
    if expert <= data
    for zero in (0, 1, 2, 3)
    for accumulation in (1, 2)
    for recomputation in (False, True)
]


def variant(number: int) -> dict[str, Any]:
    """Objective and clipping of a cell: the four combinations in turn."""
    return {"objective": ("rectified_flow", "ddpm")[number % 2], "clip": (None, 0.3)[number // 2 % 2]}


def case(number: int, cell: Cell) -> dict[str, Any]:
    data, expert, zero, accumulation, recomputation = cell
    return {
        **variant(number),
        "expert": expert,
        "zero": zero,
        "batch": BATCH,
        "micro_batch": BATCH // (data * accumulation),
        "steps": STEPS,
        "checkpointing": recomputation,
    }


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_layout_has_one_loss_curve(run_cases: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    references = run_cases(
        1, [{**variant(n), "zero": 0, "batch": BATCH, "micro_batch": BATCH, "steps": STEPS} for n in range(4)]
    )
    results: dict[int, dict[str, Any]] = {}
    for data in (1, 2, 4):
        numbers = [number for number, cell in enumerate(CELLS) if cell[0] == data]
        results |= zip(numbers, run_cases(data, [case(n, CELLS[n]) for n in numbers]), strict=True)
    lines = [
        f"{'data':>4} {'expert':>6} {'ZeRO':>4} {'accum':>5} {'recompute':>9} {'objective':>14} {'clip':>4}"
        "  largest difference"
    ]
    worst = 0.0
    for number, (data, expert, zero, accumulation, recomputation) in enumerate(CELLS):
        expected = np.array(references[number % 4]["curve"])
        difference = float(np.max(np.abs(np.array(results[number]["curve"]) / expected - 1)))
        worst = max(worst, difference)
        shown = variant(number)
        lines.append(
            f"{data:>4} {expert:>6} {zero:>4} {accumulation:>5} {'yes' if recomputation else 'no':>9}"
            f" {shown['objective']:>14} {shown['clip'] or '–':>4}  {difference:.1e}"
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines) + f"\n{len(CELLS)} layouts, {STEPS} steps, largest difference {worst:.1e}")
    assert worst <= EXACT


PAIRED: Final = ((1, 1, 0), (1, 1, 3), (2, 1, 2), (2, 2, 1), (2, 2, 3), (4, 2, 0), (4, 2, 1), (4, 4, 3))
"""data, expert, ZeRO of the layouts between which checkpoints move."""
SAVED: Final = 5
CONTINUED: Final = 10


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_checkpoints_move_between_layouts(
    run_cases: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, moments, EMA, step and position: the curve and the EMA at the end are those of one process."""
    names = [f"data {data}, expert {expert}, ZeRO {zero}" for data, expert, zero in PAIRED]
    (reference,) = run_cases(1, [{"zero": 0, "steps": CONTINUED, "clip": 0.3}])
    layouts = [{"expert": expert, "zero": zero, "clip": 0.3} for _, expert, zero in PAIRED]
    worlds = sorted({data for data, _, _ in PAIRED})
    for world in worlds:
        members = [n for n, (data, _, _) in enumerate(PAIRED) if data == world]
        run_cases(world, [{**layouts[n], "steps": SAVED, "save": str(tmp_path / str(n))} for n in members])
    differences = np.zeros((len(PAIRED), len(PAIRED)))
    expected = np.array(reference["curve"])[SAVED:]
    for world in worlds:
        pairs = [
            (source, target)
            for target, (data, _, _) in enumerate(PAIRED)
            if data == world
            for source in range(len(PAIRED))
        ]
        cases = [{**layouts[t], "steps": CONTINUED, "load": str(tmp_path / str(s))} for s, t in pairs]
        for (source, target), result in zip(pairs, run_cases(world, cases), strict=True):
            curve = np.max(np.abs(np.array(result["curve"]) / expected - 1))
            differences[source, target] = max(curve, abs(result["ema"] / reference["ema"] - 1))
    with capsys.disabled():
        print("\nsaved at (down), continued at (across, in the same order): largest difference")
        for name, row in zip(names, differences, strict=True):
            print(f"{name:<28}" + "".join(f"{value:>9.1e}" for value in row))
    assert differences.max() <= EXACT
