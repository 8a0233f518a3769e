"""The program that measures evaluations runs, and compares what it says it compares."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_the_benchmark_runs_small(tmp_path: Path) -> None:
    sizes = {"images": 32, "few": 64, "many": 128, "rows": 1024, "decoded": 64, "repeats": 2}
    arguments = [each for name, size in sizes.items() for each in (f"--{name}", str(size))]
    written = ["--json", str(tmp_path / "all"), "--text", str(tmp_path / "text"), "--folder", str(tmp_path)]
    command = [sys.executable, str(ROOT / "benchmarks/evaluation.py"), *arguments, *written]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "text").read_text() == done.stdout
    found = json.loads((tmp_path / "all").read_text())
    compared = {
        name: figures for name, figures in found.items() if isinstance(figures, dict) and "rate" in figures
    }
    assert len(compared) == (5 if found["cores"] > 1 else 4)
    for name, figures in compared.items():
        assert figures["least"] <= figures["ratio"] <= figures["greatest"], name
        assert figures["rate"] > 0 and figures["beside"] > 0 and figures["cpu_ratio"] > 0
        assert f"  {name:<50}" in done.stdout
    for count in ("64", "128"):
        whole = found["evaluate"][count]
        assert 0 < whole["most"] <= whole["together"] and whole["seconds"] > 0
