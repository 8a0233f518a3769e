"""Starting the worker on real processes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditmoe.launcher.launch import spawn

WORKER = Path(__file__).with_name("worker.py")
Cases = list[dict[str, Any]]


@pytest.fixture(scope="session")
def run_cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Cases]:
    """Runs cases one after the other on a number of processes; a result per case."""

    def run(world: int, cases: Cases, *flags: str) -> Cases:
        tmp_path = tmp_path_factory.mktemp("cases")
        spec, out = tmp_path / f"cases-{world}.json", tmp_path / f"out-{world}.json"
        spec.write_text(json.dumps(cases))
        arguments = [str(WORKER), str(spec), str(out), *flags]
        code = spawn(arguments, world, program=[sys.executable], threads=1, log_dir=tmp_path / "ranks")
        assert code == 0
        results: Cases = json.loads(out.read_text())
        return results

    return run
