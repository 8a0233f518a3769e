"""A small packed folder's index, and a configuration file that fits it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables of a launcher around the tests; relative paths are below the test's folder."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with the index of 20 grey 8×8 images of 10 classes; it has no shards."""
    folder = tmp_path / "shards"
    folder.mkdir()
    index = {
        "format": "ditmoe-shards",
        "version": 1,
        "name": "tiny",
        "image_size": 8,
        "channels": 1,
        "num_classes": 10,
        "class_names": [str(label) for label in range(10)],
        "shards": [{"file": "tiny-000000.tar", "samples": 20, "bytes": 1000, "sha256": "0" * 64}],
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def write_config(tmp_path: Path, shards: Path) -> Callable[..., Path]:
    """Writes a valid configuration, with the given sections in place of its own."""

    def write(**sections: Any) -> Path:
        values = {
            "launch": {"processes": 2, "device": "cpu"},
            "model": {
                "depth": 2,
                "hidden": 32,
                "heads": 2,
                "patch": 2,
                "experts": 4,
                "experts_per_token": 2,
            },
            "data": {"sources": [{"path": str(shards)}]},
            "parallel": {"expert": 2},
            "train": {"steps": 20, "batch": 16, "micro_batch": 4, "precision": "fp32"},
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({**values, **sections}))
        return path

    return write
