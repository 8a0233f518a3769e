"""Crews of toy parts."""

import sys
from pathlib import Path

import pytest

import ditmoe

TOYS = Path(__file__).parent / "toys"
sys.path.insert(0, str(TOYS))  # workers get the path of the process that starts them
ditmoe.__path__.append(str(TOYS / "ditmoe"))  # and this process has imported the package already


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    folder = tmp_path / "journal"
    folder.mkdir()
    return folder
