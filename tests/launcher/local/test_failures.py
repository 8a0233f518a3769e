"""What is told of a failure: the system's refusals as a user's message, everything else with its traceback."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ditmoe.launcher.local.failures import FAILURE_VARIABLE, record_failure, refusal


def test_what_the_system_refuses_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as too_long:
        (tmp_path / ("x" * 300)).read_text()
    assert refusal(too_long.value) == f"{tmp_path}/{'x' * 300}: File name too long"
    with pytest.raises(OSError) as folder:
        tmp_path.read_text()
    assert refusal(folder.value) == f"{tmp_path}: Is a directory"
    assert "No space left on device" in str(refusal(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))


def test_memory_that_there_is_not() -> None:
    with pytest.raises(MemoryError) as numpy_s:
        np.empty(2**60, np.int8)
    with pytest.raises(RuntimeError) as torch_s:
        torch.empty(2**60, dtype=torch.int8)
    for error in (numpy_s.value, torch_s.value, MemoryError()):
        assert str(refusal(error)).startswith("not enough memory on this machine: ")


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), ValueError("y"), FileNotFoundError(errno.ENOENT, "no"), KeyError("z")]
)
def test_mistakes_of_the_program_are_no_refusals(error: Exception) -> None:
    assert refusal(error) is None


def test_a_failure_that_cannot_be_recorded_is_told_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAILURE_VARIABLE, str(tmp_path / "gone" / "failure.json"))
    assert record_failure("the disk is full", 2) is False
    monkeypatch.setenv(FAILURE_VARIABLE, str(tmp_path / "failure.json"))
    assert record_failure("the disk is full", 2) is True
