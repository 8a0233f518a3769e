"""Small packed datasets, and a way to plant faults in them."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.digits import Digits
from ditmoe.data.making.sources.shapes import Shapes
from ditmoe.data.shards.writer import ShardLimits

Change = Callable[[dict[str, bytes]], dict[str, bytes]]


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """100 digits in 4 shards of 25."""
    out = tmp_path / "digits"
    pack(Digits(), out, PackSettings(count=100, limits=ShardLimits(samples=25)))
    return out


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """30 RGB images of 16×16 in 3 shards of 10, 5 classes."""
    out = tmp_path / "shapes"
    pack(Shapes(30, 5, 16, seed=1), out, PackSettings(limits=ShardLimits(samples=10)))
    return out


@pytest.fixture
def rewrite() -> Callable[..., str]:
    """Change the members (`key.ext` → bytes) of one sample of a shard; returns the sample's key.

    With `reindex` the index's size and checksum follow, so that only the sample itself is at fault.
    """

    def change_sample(folder: Path, shard: int, sample: int, change: Change, reindex: bool = True) -> str:
        values = json.loads((folder / "index.json").read_text())
        entry = values["shards"][shard]
        path = folder / entry["file"]
        with tarfile.open(path) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
        keys = list(dict.fromkeys(name.split(".")[0] for name, _ in members))
        key = keys[sample]
        changed = change({name.split(".")[1]: data for name, data in members if name.split(".")[0] == key})
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for each in keys:
                named = changed if each == key else {n.split(".")[1]: d for n, d in members if n.startswith(each)}
                for extension, data in named.items():
                    info = tarfile.TarInfo(f"{each}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        if reindex:
            data = path.read_bytes()
            entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            (folder / "index.json").write_text(json.dumps(values))
        return key

    return change_sample
