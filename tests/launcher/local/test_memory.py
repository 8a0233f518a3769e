"""What a step frees is used by the next one, without pages that the system makes anew."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ditmoe.launcher.local.memory import keep_freed_memory

ROOT = Path(__file__).resolve().parents[3]
PATHS = {**os.environ, "PYTHONPATH": f"{ROOT / '.typing'}:{ROOT}"}
ROUNDS, MIB = 8, 64


def faults_of_rounds(keep: bool) -> int:
    """Pages made while blocks are taken, written and freed again and again, after the first time."""
    if keep:
        assert keep_freed_memory()
    blocks = (bytes(MIB * 2**20) for _ in range(ROUNDS))
    next(blocks)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for block in blocks:
        bytearray(block)[::4096] = bytes(len(block) // 4096)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_memory_is_kept() -> None:
    """In processes of their own: it cannot be undone."""
    found = []
    for keep in (False, True):
        program = f"from tests.launcher.local.test_memory import faults_of_rounds; print(faults_of_rounds({keep}))"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=PATHS, capture_output=True, text=True, check=True
        )
        found.append(int(done.stdout))
    pages_of_round = MIB * 2**20 // 4096
    given_back, kept = found
    assert given_back > (ROUNDS - 1) * pages_of_round
    assert kept < 4 * pages_of_round  # the blocks that live at one time, once
