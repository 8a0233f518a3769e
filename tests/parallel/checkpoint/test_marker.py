"""Markers and headers of checkpoints as an accident or a stranger leaves them: one message, never more."""

import copy
import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ditmoe.launcher.commands.checkpoint import app
from ditmoe.launcher.commands.convert import command as convert
from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.initialise import initialise
from ditmoe.parallel.checkpoint.box_storage import stored_boxes
from ditmoe.parallel.checkpoint.folder import damaged, read_info, read_weights, write_weights_checkpoint
from ditmoe.parallel.checkpoint.marker import CHECKSUM, MARKER, MOST_BYTES, marker_text, parse_marker
from ditmoe.sampling.network.load import load_model
from ditmoe.sampling.synthesis.plan import class_names_of
from tests.markers import change_marker

CONFIG = ModelConfig(
    depth=1,
    hidden=8,
    heads=2,
    patch=2,
    experts=2,
    experts_per_token=1,
    image_size=4,
    channels=1,
    num_classes=2,
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("marker") / "checkpoint"
    network = DiT(CONFIG)
    initialise(network, seed=0)
    write_weights_checkpoint(path, CONFIG, ObjectiveConfig(), canonical_state(network), None, ["a", "b"])
    # As a run's marker has them.
    latents = {"vae": "vae", "vae_sha256": "0" * 64, "scale": 0.5, "pixels": 8}
    layout = {"pipe": 1, "data": 2, "expert": 1, "tensor": 1, "zero": 1, "micro_batch": 4, "accumulation": 1}

    def as_of_a_run(facts: dict[str, Any]) -> None:
        facts["dataset"] |= {"latents": latents, "fingerprint": ["0" * 64]}
        facts |= {"layout": layout, "step": 5, "sums": {"steps": 1, "skips": {"a": {"total": 1, "by_epoch": {}}}}}
        facts["config"] |= {"data": {"sources": [{"path": "data"}]}, "seed": 0}

    change_marker(path, as_of_a_run)
    return path


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


ODD: tuple[Any, ...] = (
    None,
    True,
    "",
    "x\ny",
    "../../etc/passwd",
    "/etc/passwd",
    "\x00",
    "\ud800",
    "a" * 10_000,
    0,
    -1,
    0.5,
    10**9,
    10**15,
    2**63,
    10**400,
    float("inf"),
    float("nan"),
    [],
    {},
    [[]],
    {"": None},
    {"x": {"y": 1}},
    [10**18] * 3,
    deep(200),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values are in a marker; of many alike the first two."""
    yield path
    if isinstance(value, dict):
        keys = list(value)
        for key in keys[:2] if path in (("shapes",), ("files",)) else keys:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for number in range(min(2, len(value))):
            yield from places(value[number], (*path, number))


def single_changes(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value replaced by each odd one, left out, and joined by one more; every key by another name."""
    for path in places(facts):
        inside = facts
        for key in path:
            inside = inside[key]
        edits: list[tuple[str, Callable[[Any, Any], Any]]] = []
        if path:
            edits += [(f"= {str(odd)[:20]}", lambda at, key, odd=odd: at.__setitem__(key, odd)) for odd in ODD]
            edits.append(("left out", lambda at, key: at.pop(key)))
            names = ("../x", "/abs", "a/b", "weights/../x.safetensors", "a\nb", "")
            if isinstance(path[-1], str):
                edits += [(f"named {n!r}", lambda at, key, n=n: at.__setitem__(n, at.pop(key))) for n in names]
        if isinstance(inside, dict):
            edits.append(("one more", lambda at, key: (at[key] if key is not None else at).update(extra=1)))
        elif isinstance(inside, list):
            edits.append(("one more", lambda at, key: at[key].append(copy.deepcopy(at[key][0]) if at[key] else 1)))
        for what, edit in edits:
            changed = copy.deepcopy(facts)
            at: Any = changed
            for key in path[:-1]:
                at = at[key]
            edit(at, path[-1] if path else None)
            yield f"{'.'.join(map(str, path))} {what}", changed


def use(checkpoint: Path, out: Path) -> None:
    """Everything that reads a checkpoint; it may be refused."""
    uses: list[Callable[[], Any]] = [
        lambda: load_model(checkpoint),
        lambda: class_names_of(read_info(checkpoint)),
        lambda: convert(checkpoint, out / "x.safetensors"),
    ]
    for one in uses:
        with suppress(UserError):
            one()
    (out / "x.safetensors").unlink(missing_ok=True)
    shown = CliRunner().invoke(app, ["inspect", str(checkpoint)])
    if shown.exception is not None and not isinstance(shown.exception, UserError):
        raise shown.exception


@pytest.mark.timeout(240)
def test_no_single_change_of_a_marker_is_a_traceback(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the right checksum, as a stranger would write it; nothing but a `UserError` comes out."""
    facts = json.loads((checkpoint / MARKER).read_text())
    del facts[CHECKSUM]
    changes = list(single_changes(facts))
    assert len(changes) > 1500
    random.Random(0).shuffle(changes)
    readable = []
    for what, changed in changes:
        try:
            parse_marker(marker_text(changed).encode(), checkpoint / MARKER)
            readable.append((what, changed))
        except UserError as error:
            assert MARKER in str(error) and len(str(error)) < 1000, what
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert len(readable) < 0.3 * len(changes)
    for what, changed in readable[:60]:
        (checkpoint / MARKER).write_text(marker_text(changed))
        try:
            use(checkpoint, tmp_path)
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_as_many_class_names_as_classes(checkpoint: Path, names: list[str]) -> None:
    change_marker(checkpoint, lambda facts: facts["dataset"].update(class_names=names))
    with pytest.raises(UserError, match=rf"class_names has {len(names)}, and config\.model 2 classes"):
        read_info(checkpoint)


def test_a_damaged_marker_is_known_by_its_checksum(checkpoint: Path) -> None:
    """A change that the schema cannot see; markers without a checksum are those of earlier versions."""
    marker = checkpoint / MARKER
    text = marker.read_text()
    marker.write_text(text.replace('"images": 0', '"images": 8'))
    with pytest.raises(UserError, match="its contents have changed: its checksum of itself differs"):
        read_info(checkpoint)
    facts = json.loads(text)
    del facts[CHECKSUM]
    marker.write_text(json.dumps(facts))
    assert read_info(checkpoint).fingerprint and read_weights(checkpoint)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", "[" * 10**6, '{"a":' * 10**5, "\udcff", "9" * 10**6, "{}", "\x00\x00"]
)
def test_what_is_no_marker(checkpoint: Path, text: str) -> None:
    (checkpoint / MARKER).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"checkpoint\.json: not a checkpoint's marker"):
        read_info(checkpoint)


def test_sizes_and_kinds_of_files_are_looked_at_first(checkpoint: Path, tmp_path: Path) -> None:
    """A pipe is not waited for, a sparse file of a terabyte not read, a link not followed out of the folder."""
    marker, weights = checkpoint / MARKER, checkpoint / "weights"
    file, outside = next(weights.iterdir()), tmp_path / "outside"
    shutil.copytree(checkpoint, outside)
    info = read_info(checkpoint)

    file.unlink()
    os.mkfifo(file)
    assert damaged(info, info.files) == [f"{file}: is neither a file nor a folder, expected a file"]
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        stored_boxes(weights)
    file.unlink()
    assert "missing; expected" in damaged(info, info.files)[0]
    file.mkdir()
    assert "is a folder, expected a file" in damaged(info, info.files)[0]
    file.rmdir()
    file.symlink_to(outside / "weights" / file.name)
    assert "is a link that leads out of the checkpoint" in damaged(info, info.files)[0]
    with pytest.raises(UserError, match="is a link that leads out of the checkpoint"):
        read_weights(checkpoint, "weights")
    file.unlink()
    file.symlink_to(file.name)
    assert "is a link that leads out of the checkpoint" in damaged(info, info.files)[0]
    shutil.rmtree(weights)
    weights.symlink_to(outside / "weights")
    with pytest.raises(UserError, match="is a link that leads out of the checkpoint"):
        read_weights(checkpoint, "weights")

    marker.unlink()
    for make, message in (
        (lambda: os.mkfifo(marker), "is neither a file nor a folder"),
        (lambda: marker.symlink_to(outside / MARKER), "is a link that leads out of its folder"),
        (lambda: marker.symlink_to("/dev/zero"), "is a link that leads out of its folder"),
    ):
        make()
        with pytest.raises(UserError, match=message):
            read_info(checkpoint)
        marker.unlink()
    with marker.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(UserError, match=f"expected at most {MOST_BYTES:,}"):
        read_info(checkpoint)
    marker.unlink()
    marker.mkdir()
    with pytest.raises(UserError, match="is a folder, expected a file"):
        read_info(checkpoint)


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_no_single_change_of_a_header_is_a_traceback(checkpoint: Path) -> None:
    """The marker's checksums are those of the changed files: only the headers' own checks are left."""
    file = next((checkpoint / "ema").iterdir())
    header, tensors = header_of(file)
    places = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    # Two tensors are enough to be changed.
    few = {key: header[key] for key in ["__metadata__", *list(places)[:2]]}
    headers: list[Any] = [header | changed for _, changed in single_changes(few) if isinstance(changed, dict)]
    for _, changed in single_changes(dict(list(places.items())[:2])):
        info = json.dumps(changed if not isinstance(changed, dict) else places | changed)
        headers.append({**header, "__metadata__": header["__metadata__"] | {"DCP_SHARDING_INFO": info}})
    random.Random(0).shuffle(headers)
    texts = [json.dumps(changed).encode() for changed in headers[:250]]
    texts += [b"", b"null", b"[" * 10**5, b'{"a":' * 10**4, json.dumps(header).encode()[:-9]]
    for number, text in enumerate(texts):
        length = 2**62 if number == 3 else len(text)
        content = struct.pack("<Q", length) + text + tensors
        file.write_bytes(content)
        facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        change_marker(checkpoint, lambda marker, facts=facts: marker["files"].update({f"ema/{file.name}": facts}))
        try:
            read_weights(checkpoint)
        except UserError as error:
            assert str(checkpoint) in str(error)
        except Exception as error:
            raise AssertionError(f"{text[:300]!r}: {type(error).__name__}: {error}") from error
