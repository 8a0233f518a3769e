"""The command prints the same figures whatever OMP_NUM_THREADS is: real processes, each with an empty cache."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.forked import DITMOE
from tests.sampling.small_run import write_digits, write_run


@pytest.mark.slow
def test_the_same_figures_with_1_2_and_4_threads(tmp_path: Path) -> None:
    shards, printed, found = write_digits(tmp_path / "shards"), [], []
    for threads in (1, 2, 4):
        run = write_run(tmp_path / f"run-{threads}")
        arguments = ["evaluate", str(run), "--count=100", "--batch=32", "--steps=4", f"--reference={shards}"]
        result = subprocess.run(
            [sys.executable, *DITMOE, *arguments],
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "XDG_CACHE_HOME": str(tmp_path / f"cache-{threads}"),
            },
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr
        assert "training the residual classifier" in result.stderr, "the cache is empty"
        printed.append(result.stdout.replace(str(run), "RUN").replace(f"cache-{threads}", "CACHE"))
        found.append(stored(run))
    assert re.search(r"FID.* \d+\.\d+", printed[0]) and "recognised" in printed[0]
    assert printed[0] == printed[1] == printed[2]
    assert found[0] == found[1] == found[2]


def stored(run: Path) -> tuple[bytes, Any]:
    """Images and results."""
    (folder,) = (run / "evaluations").glob("step-*")
    with np.load(folder / "samples.npz") as samples:
        return samples["arr_0"].tobytes(), json.loads((folder / "metrics.json").read_text())["results"]
