"""The program that measures evaluations runs, and compares what it says it compares."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_the_benchmark_runs_small(tmp_path: Path) -> None:
    sizes = {"images": 32, "fewer": 64, "more": 256, "rows": 1024, "decoded": 64, "repeats": 1}
    arguments = [each for name, size in sizes.items() for each in (f"--{name}", str(size))]
    command = [sys.executable, str(ROOT / "benchmarks/evaluation.py"), *arguments, "--json", str(tmp_path / "all")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "all").read_text())
    compared = [figures for figures in found.values() if isinstance(figures, dict) and "rate" in figures]
    assert len(compared) == 4
    for figures in compared:
        assert figures["ratio"] == pytest.approx(figures["rate"] / figures["beside"])
    assert set(found["memory"]["bytes"]) == {"64", "256"}
