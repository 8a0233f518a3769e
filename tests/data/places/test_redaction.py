"""What is shown of a source has no password, no query and no command's arguments in it."""

from typing import Any

import pytest

from ditmoe.data.places.redaction import has_secrets, masked, shown_place, without_secrets

PLACES = [
    ("https://user:secret@host/shards?token=secret", "https://…@host/shards?…"),
    ("https://secret@host/shards", "https://…@host/shards"),
    ("https://user:sec/ret@host:8000/shards", "https://…@host:8000/shards"),
    ("https://user:sec@ret@host/", "https://…@host/"),
    ("https://host:8000/a@b/shards", "https://host:8000/a@b/shards"),
    ("https://host/p?token=se cret'secret", "https://host/p?…"),
    ("s3://key:secret@bucket/data", "s3://…@bucket/data"),
    (
        "simplecache::s3://key:secret@bucket/d::https://u:secret@h?secret",
        "simplecache::s3://…@bucket/d::https://…@h?…",
    ),
    ("pipe:TOKEN=secret curl -u user:secret https://h/{}", "pipe:curl …"),
    ("pipe:cat 'secret {}", "pipe:… …"),
    ("[{path: 'pipe:curl -u secret {}'}]", "[{path: 'pipe:…"),
    ("/data/what?/a@b", "/data/what?/a@b"),
    ("shards", "shards"),
]


@pytest.mark.parametrize(("path", "shown"), PLACES)
def test_places(path: str, shown: str) -> None:
    assert shown_place(path) == shown
    assert shown_place(shown) == shown, "what was shown is shown alike"
    assert "secret" not in shown and "sec/ret" not in shown
    assert has_secrets({"data": {"sources": [{"path": path}]}}) == (path != shown)


def test_plain_data_keeps_all_else() -> None:
    values: dict[str, Any] = {
        "data": {"sources": [{"path": path, "weight": 1.0, "index": None} for path, _ in PLACES]},
        "optim": {"betas": (0.9, 0.95)},
        "classes": {"who?me": "a"},
        "flip": True,
    }
    told = without_secrets(values)
    assert [source["path"] for source in told["data"]["sources"]] == [shown for _, shown in PLACES]
    assert told["optim"] == {"betas": [0.9, 0.95]} and told["classes"] == {"who?me": "a"} and told["flip"] is True
    assert values["data"]["sources"][0]["path"] == PLACES[0][0], "the original is left alone"


def test_texts_of_others_are_one_line_without_secrets() -> None:
    assert (
        masked("GET https://a:b@h/p?x=1&y=2 failed\nat s3://k:p/w@h") == "GET https://h/p?… failed at s3://k:p/w@h"
    )
    assert masked("user@host why? \x1b") == "user@host why? \\x1b"
