"""The suite's figures, and what counts as slower."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.compare import changes
from benchmarks.run import FAMILIES
from benchmarks.suite.figure import Figure, Spread, duration, header, in_turns, line, rate

ROOT = Path(__file__).resolve().parents[2]


def test_contenders_take_turns() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "AB"}
    seconds = in_turns(runs, 3, torch.device("cpu"), warm_up=2)  # type: ignore[arg-type]
    assert "".join(order) == "AB" * 5
    assert [len(each) for each in seconds.values()] == [3, 3]


def test_ratios_are_those_of_the_rounds() -> None:
    """A round in which the machine was slow for both leaves the ratio as it is."""
    figure = rate("step", "images/s", 4, [1, 1, 10], [2, 2, 20], limit=0.5)
    assert figure.speedup == Spread(2, 2, 2)
    assert figure.ours.median == 4 and figure.limit == 8 and figure.of_limit == 0.5
    took = duration("layer", [1e-3, 1e-3], [2e-3, 3e-3], limit=5e-4)
    assert took.ours.median == pytest.approx(1) and took.of_limit == pytest.approx(0.5)
    assert took.speedup == Spread(2.5, 2.25, 2.75)
    for each in (figure, took, duration("alone", [1.0])):
        assert Figure.read(json.loads(json.dumps(each.plain()))) == each
        assert line(each).startswith(each.name) and len(line(each)) <= len(header())


def test_slower_is_beyond_the_spread() -> None:
    def run(**ratios: tuple[float, float, float]) -> dict[str, object]:
        seconds = {
            name: Figure(name, "ms", Spread(1, 1, 1), Spread(1, 1, 1), Spread(*each))
            for name, each in ratios.items()
        }
        alone = Figure("alone", "ms", Spread(*ratios["a"]), more_is_better=False)
        return {"figures": [figure.plain() for figure in (*seconds.values(), alone)]}

    before = run(a=(2, 1.9, 2.1), b=(2, 1.5, 2.5), c=(2, 2, 2), d=(2, 2, 2), gone=(1, 1, 1))
    after = run(a=(1.5, 1.4, 1.6), b=(1.6, 1.4, 1.9), c=(1.99, 1.99, 1.99), d=(3, 3, 3))
    slower, faster, missing = changes(before, after)
    assert [text.partition(":")[0] for text in slower] == ["a"]
    assert [text.partition(":")[0] for text in faster] == ["d", "alone"]
    assert missing == ["gone"]
    assert "2 → 1.5 × baseline (-25%)" in slower[0]


def test_every_family_is_a_module_with_figures() -> None:
    for family in FAMILIES:
        text = (ROOT / "benchmarks" / "suite" / f"{family.name}.py").read_text(encoding="utf-8")
        assert re.search(r"^def measure\(settings: Settings\) -> Iterator\[Figure\]:", text, re.MULTILINE)


@pytest.mark.slow
def test_the_whole_suite_runs_small(tmp_path: Path) -> None:
    target = tmp_path / "suite.json"
    command = [sys.executable, "-m", "benchmarks.run", "--small", "--to", str(target), "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(target.read_text(encoding="utf-8"))
    figures = [Figure.read(values) for values in found["figures"]]
    assert len({figure.name for figure in figures}) == len(figures) > 20
    for figure in figures:
        assert figure.ours.median > 0 and figure.speedup is not None and figure.speedup.median > 0
        assert line(figure) in done.stdout and line(figure) in target.with_suffix(".txt").read_text(
            encoding="utf-8"
        )
    assert found["limits"]["bandwidth"] > 0 and found["versions"]["torch"] == torch.__version__
    assert changes(found, found) == ([], [], [])
