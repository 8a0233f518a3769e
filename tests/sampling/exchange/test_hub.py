"""Names on the hub: local paths go first, a cached snapshot needs no network, an error says what was tried.

The cache is one that the test lays out as huggingface_hub does; nothing is asked of any network.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from ditmoe.launcher.commands.convert import command as convert
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import read_info, read_weights
from ditmoe.sampling.exchange.hub import local_folder
from tests.sampling.exchange.test_diffusers import make_stock

NAME = "some-org/DiT-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which is not to be asked, in another folder than the current one."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def put(cache: Path, name: str = NAME) -> Path:
    """A network of diffusers as the cache keeps it: files by checksum, and a snapshot of links to them."""
    home = cache / f"models--{name.replace('/', '--')}"
    make_stock(home / "made", most="20KB")
    snapshot = home / "snapshots" / COMMIT / "transformer"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted((home / "made").iterdir())):
        blob = home / "blobs" / f"{number:064x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    index = home / "blobs" / "f"
    index.write_text('{"_class_name": "DiTPipeline"}')
    (snapshot.parent / "model_index.json").symlink_to(os.path.relpath(index, snapshot.parent))
    return snapshot.parent


def test_a_cached_snapshot_is_read_without_a_network(cache: Path, tmp_path: Path) -> None:
    snapshot = put(cache)
    assert local_folder(Path(NAME)) == snapshot == local_folder(Path(f"{NAME}@main"))
    convert(Path(NAME), tmp_path / "by-name", objective="ddpm")
    convert(snapshot, tmp_path / "by-path", objective="ddpm")
    assert read_info(tmp_path / "by-name").model == read_info(tmp_path / "by-path").model
    by_name, by_path = read_weights(tmp_path / "by-name"), read_weights(tmp_path / "by-path")
    assert all(torch.equal(by_name[each], by_path[each]) for each in by_path)


def test_a_local_path_goes_before_a_name(cache: Path, tmp_path: Path) -> None:
    put(cache)
    make_stock(tmp_path / "here" / NAME, num_layers=1)
    assert local_folder(Path(NAME)) == Path(NAME)
    convert(Path(NAME), tmp_path / "out", objective="ddpm")
    assert read_info(tmp_path / "out").model.depth == 1


def test_an_error_says_what_was_tried(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        convert(Path(NAME), tmp_path / "out", objective="ddpm")
    text = str(caught.value)
    assert text.startswith(f"{NAME}: no file or folder has this path (in {tmp_path / 'here'})")
    assert f"the hub's cache has no such name ({cache})" in text and "HF_HUB_OFFLINE forbids" in text
    # Without the library there is no hub; and what can be no name there is a path that is not there.
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="huggingface_hub is not installed"):
        local_folder(Path(NAME))
    for path in ("org/name/file.pt", "../name", "weights.pt", "org/na me", "/org/name"):
        assert local_folder(Path(path)) == Path(path)
    with pytest.raises(UserError, match=r"org/name/file\.pt: no such file"):
        convert(Path("org/name/file.pt"), tmp_path / "out")


def test_the_network_is_asked_where_it_may_be(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For the files that a network is read from, and no others; what the hub answers is in the message."""
    asked = {}

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        raise OSError("401 Client Error: it is private\nand more")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match=r"the hub: 401 Client Error: it is private$"):
        local_folder(Path(f"{NAME}@v2"))
    assert asked["name"] == NAME and asked["revision"] == "v2"
    assert "transformer/*" in asked["patterns"] and "*.py" not in asked["patterns"]
