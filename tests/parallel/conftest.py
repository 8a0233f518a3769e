"""Starting the worker on real processes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditmoe.launcher.local.launch import spawn
from tests.forked import run_forked

WORKER = Path(__file__).with_name("worker.py")
Cases = list[dict[str, Any]]
SECONDS = 3000
"""Longest that a start may take; a test has a limit of its own."""


@pytest.fixture(scope="session")
def run_cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Cases]:
    """Runs cases one after the other on a number of processes; a result per case."""

    def run(world: int, cases: Cases, device: str = "cpu") -> Cases:
        tmp_path = tmp_path_factory.mktemp("cases")
        spec, out = tmp_path / f"cases-{world}.json", tmp_path / f"out-{world}.json"
        spec.write_text(json.dumps(cases))
        arguments = [str(WORKER), str(spec), str(out), device]
        if device != "gpu":
            done = run_forked(arguments, tmp_path / "ranks", world, seconds=SECONDS)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            code = spawn(arguments, world, program=[sys.executable], threads=1, log_dir=tmp_path / "ranks")
            assert code == 0
        results: Cases = json.loads(out.read_text())
        return results

    return run
