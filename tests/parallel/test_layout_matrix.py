"""Every layout of up to 8 processes has one loss curve, and checkpoints move between them: `make test-layouts`.

{pipe 1, 2, 3} × {data 1, 2, 4} × {expert 1, 2, 4} × {ZeRO 0, 1, 2, 3} × {accumulation 1, 2} × {recomputation
off, on}, and {pipe} × {data} × {tensor 2, 4} × {ZeRO}: every legal cell over 50 steps in fp32, with and without
clipping and with each of the two objectives. Then bf16, whose bound is stated, and every pair of eight layouts:
saved at one, continued at the other.
"""

import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pytest

Runner = Callable[..., list[dict[str, Any]]]

BATCH: Final = 8
STEPS: Final = 50
EXACT: Final = 1e-5
"""Largest relative difference of loss, balance loss and gradient norm in fp32."""
BF16: Final = 0.005
"""Largest relative difference of the loss in bf16 from fp32's, over these steps."""
LARGEST: Final = 8
"""Processes."""
AT_ONCE: Final = 28
"""Cells in one start of processes: so rows are printed every few minutes."""


class Cell(NamedTuple):
    """A layout, and how it is trained."""

    pipe: int
    data: int
    expert: int
    tensor: int
    zero: int
    accumulation: int = 1
    recomputation: bool = False
    objective: str = "rectified_flow"
    clip: float | None = None
    precision: str = "fp32"

    @property
    def processes(self) -> int:
        return self.pipe * self.data * self.tensor

    @property
    def reference(self) -> "Cell":
        """The same training in one process, in fp32."""
        return Cell(1, 1, 1, 1, 0, objective=self.objective, clip=self.clip)

    def case(self) -> dict[str, Any]:
        """As the worker takes it."""
        return {
            **self._asdict(),
            "batch": BATCH,
            "micro_batch": BATCH // (self.data * self.accumulation),
            "steps": STEPS,
            "checkpointing": self.recomputation,
        }

    def row(self) -> str:
        return (
            f"{self.pipe:>4} {self.data:>4} {self.expert:>6} {self.tensor:>6} {self.zero:>4}"
            f" {self.accumulation:>5} {'yes' if self.recomputation else 'no':>9} {self.objective:>14}"
            f" {self.clip or '–':>4} {self.precision:>9}"
        )


HEADING: Final = "pipe data expert tensor ZeRO accum recompute      objective clip precision  largest difference"


def grids() -> Iterator[tuple[int, int, int, int, int]]:
    """Every legal (pipe, data, expert, tensor, ZeRO)."""
    for pipe, data, expert, tensor in product((1, 2, 3), (1, 2, 4), (1, 2, 4), (1, 2, 4)):
        if expert <= data and min(expert, tensor) == 1 and pipe * data * tensor <= LARGEST:
            for zero in (0, 1) if pipe > 1 else (0, 1, 2, 3):
                yield pipe, data, expert, tensor, zero


def cells() -> Iterator[Cell]:
    """Every grid with every way to cut a step up; each twice, so that it meets both objectives and clipping.

    Tensor ranks, which the layers see and the schedule does not, with one way to cut a step up.
    """
    for number, grid in enumerate(grids()):
        tensor = grid[3]
        for accumulation, recomputation in product((1, 2), (False, True)) if tensor == 1 else ((2, True),):
            for twice, clip in enumerate((None, 0.3)):
                objective = ("rectified_flow", "ddpm")[(number + accumulation + recomputation + twice) % 2]
                yield Cell(*grid, accumulation, recomputation, objective, clip)


def bf16_cells() -> Iterator[Cell]:
    """Every grid that computes in bf16."""
    for grid in grids():
        if grid[-1] > 0:
            yield Cell(*grid, accumulation=2, clip=0.3, precision="bf16")


def train(run_cases: Runner, chosen: list[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Run cells, those of one number of processes together, so many in one start of them."""
    for processes in sorted({cell.processes for cell in chosen}):
        members = [cell for cell in chosen if cell.processes == processes]
        for first in range(0, len(members), AT_ONCE):
            part = members[first : first + AT_ONCE]
            yield from zip(part, run_cases(processes, [cell.case() for cell in part]), strict=True)


def compare(run_cases: Runner, chosen: list[Cell], curves: int) -> float:
    """Run cells and print a line for each as it comes; the largest difference of all from one process in fp32."""
    start = time.monotonic()
    references = dict(train(run_cases, list({cell.reference: None for cell in chosen})))
    worst = 0.0
    print("\n" + HEADING)
    for cell, result in train(run_cases, chosen):
        found, expected = (np.array(r["curve"])[:, :curves] for r in (result, references[cell.reference]))
        assert found.shape == expected.shape == (STEPS, curves)
        difference = float(np.max(np.abs(found / expected - 1)))
        worst = max(worst, difference)
        print(f"{cell.row()}  {difference:.1e}", flush=True)
    seconds = time.monotonic() - start
    print(f"{len(chosen)} runs of {STEPS} steps, largest difference {worst:.1e} ({seconds:.0f} s)")
    return worst


@pytest.mark.slow
@pytest.mark.timeout(9000)
def test_every_layout_has_one_loss_curve(run_cases: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        assert compare(run_cases, list(cells()), curves=3) <= EXACT


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_bf16_stays_near_fp32(run_cases: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        assert compare(run_cases, list(bf16_cells()), curves=1) <= BF16


PAIRED: Final = (
    Cell(1, 1, 1, 1, 0),
    Cell(1, 2, 2, 1, 3),
    Cell(1, 4, 4, 1, 1),
    Cell(1, 2, 1, 2, 2),
    Cell(2, 2, 2, 1, 0),
    Cell(2, 1, 1, 2, 1),
    Cell(3, 2, 2, 1, 1),
    Cell(2, 4, 2, 1, 1),
)
"""The layouts between which checkpoints move."""
SAVED: Final = 5
CONTINUED: Final = 10


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_checkpoints_move_between_layouts(
    run_cases: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, moments, EMA, step and position: the curve and the EMA at the end are those of one process."""

    def run(pairs: list[tuple[int, int]], **more: Callable[[int, int], Any]) -> list[dict[str, Any]]:
        """Run pairs (source, target) at their targets, in the order given."""
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for processes in sorted({cell.processes for cell in PAIRED}):
            members = [(s, t) for s, t in pairs if PAIRED[t].processes == processes]
            cases = [{**layouts[t], **{key: value(s, t) for key, value in more.items()}} for s, t in members]
            found |= zip(members, run_cases(processes, cases), strict=True)
        return [found[pair] for pair in pairs]

    numbers = range(len(PAIRED))
    layouts = [
        {
            "pipe": cell.pipe,
            "expert": cell.expert,
            "tensor": cell.tensor,
            "zero": cell.zero,
            "clip": 0.3,
            "micro_batch": BATCH // cell.data,
            "steps": CONTINUED,
        }
        for cell in PAIRED
    ]
    (reference,) = run_cases(1, [{"zero": 0, "steps": CONTINUED, "clip": 0.3}])
    run([(n, n) for n in numbers], steps=lambda s, t: SAVED, save=lambda s, t: str(tmp_path / str(s)))
    pairs = [(source, target) for source in numbers for target in numbers]
    expected = np.array(reference["curve"])[SAVED:]
    differences = np.zeros((len(PAIRED), len(PAIRED)))
    for pair, result in zip(pairs, run(pairs, load=lambda s, t: str(tmp_path / str(s))), strict=True):
        curve = np.max(np.abs(np.array(result["curve"]) / expected - 1))
        differences[pair] = max(curve, abs(result["ema"] / reference["ema"] - 1))
    with capsys.disabled():
        print("\nsaved at (down), continued at (across, in the same order): largest difference")
        for cell, row in zip(PAIRED, differences, strict=True):
            name = (
                f"pipe {cell.pipe}, data {cell.data}, expert {cell.expert}, tensor {cell.tensor}, ZeRO {cell.zero}"
            )
            print(f"{name:<46}" + "".join(f"{value:>9.1e}" for value in row))
    assert differences.max() <= EXACT
