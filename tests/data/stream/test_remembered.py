"""What a checkpoint keeps of its data's places, and which of them a later command opens unasked."""

import json
from pathlib import Path
from typing import Any

import pytest

from ditmoe.data.stream.config import DataConfig
from ditmoe.data.stream.remembered import RememberedData, kept_in_checkpoint, remembered_data
from ditmoe.model.errors import UserError

SECRET = "https://user:secret@host/shards?token=secret"


def remembered(*paths: str, **changes: Any) -> RememberedData:
    sources = [{"path": path, "max_per_class": 5} for path in paths]
    found = remembered_data({"data": {"sources": sources, **changes}}, "run/step-00000009")
    assert found is not None
    return found


def kept(*sources: dict[str, Any]) -> dict[str, Any]:
    config = DataConfig.model_validate({"sources": sources})
    return kept_in_checkpoint({"data": config.model_dump(mode="json"), "seed": 3})


@pytest.mark.parametrize(
    "path",
    [
        "pipe:touch OWNED; cat d/{}",
        "pipe:ssh …",
        "sftp://host/shards",
        "ssh://host/shards",
        "simplecache::s3://bucket/shards",
        "SimpleCache::file:///shards",
        "s3://bucket::file:///shards",
        "reference://x",
        "hdfs://host/x",
        "github://org:repo@main/x",
        SECRET,
        "https://…@host/shards",
        "https://host/shards?…",
    ],
)
def test_what_might_do_more_than_be_read_is_opened_where_the_user_names_it(path: str) -> None:
    data = remembered(path)
    with pytest.raises(
        UserError, match=r"run/step-00000009: was trained on .*; name the source with --data"
    ) as raised:
        data.data()
    assert "secret" not in str(raised.value) and "OWNED" not in str(raised.value)
    assert data.data([path]).sources[0].path == path
    assert data.source(0, path).max_per_class == 5, "what is chosen of it stays"


@pytest.mark.parametrize(
    "path", ["/data/shards", "shards", "https://host/shards", "s3://bucket/shards", "gs://b/c", "file:///a@b"]
)
def test_plain_places_are_opened(path: str) -> None:
    assert remembered(path).data().sources[0].path == path


def test_checkpoints_keep_places_without_secrets_and_local_ones_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = kept({"path": "shards", "index": "other/index.json"}, {"path": SECRET}, {"path": "pipe:cat secret/{}"})
    assert found["seed"] == 3
    first, second, third = found["data"]["sources"]
    assert (first["path"], first["index"]) == (str(tmp_path / "shards"), str(tmp_path / "other/index.json"))
    assert second["path"] == "https://…@host/shards?…" and third["path"] == "pipe:cat …"
    assert "secret" not in json.dumps(found)
    monkeypatch.chdir("/")
    data = remembered_data(json.loads(json.dumps(found)), "run")
    assert data is not None and data.source(0).path == str(tmp_path / "shards")


def test_sources_are_named_once_each() -> None:
    data = remembered("pipe:x {}", "pipe:y {}")
    assert [source.path for source in data.data(["a", "b"]).sources] == ["a", "b"]
    with pytest.raises(UserError, match=r"--data is given 1 time, and run/.* was trained on 2 sources"):
        data.data(["a"])


def test_a_folder_for_remote_shards_is_used_where_it_is_and_never_made(tmp_path: Path) -> None:
    assert remembered("a", cache=str(tmp_path)).data().cache == tmp_path
    assert remembered("a", cache=str(tmp_path / "new")).data().cache is None
    assert not (tmp_path / "new").exists()


def test_a_section_that_cannot_be_read_is_told_without_its_values() -> None:
    with pytest.raises(UserError, match=r"run: its section `data` cannot be read: sources\.0\.secrets") as raised:
        remembered_data({"data": {"sources": [{"path": SECRET, "secrets": SECRET}]}}, "run")
    assert "token" not in str(raised.value)
    assert remembered_data({}, "run") is None
