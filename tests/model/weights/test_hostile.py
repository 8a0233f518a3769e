"""Weight files as an accident or a stranger leaves them: one message that names the file, never a traceback."""

import json
import os
import random
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.weights.published import PublishedWeights, load_published, read_published, save_published

CONFIG = ModelConfig(depth=1, hidden=8, heads=2, patch=2, image_size=4, channels=1, num_classes=2)
ODD: tuple[Any, ...] = (
    None,
    True,
    "",
    "x\ny",
    "../x.safetensors",
    0,
    -1,
    10**15,
    10**400,
    0.5,
    [],
    {},
    [[]],
    [0] * 9,
)


def make_state() -> dict[str, Tensor]:
    return canonical_state(DiT(CONFIG))


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_published(path, **options)
    text = str(caught.value)
    assert path.name.partition(".")[0] in text and len(text) < 1500
    return text


def only_user_errors(path: Path, what: object) -> bool:
    """Whether a file was read; nothing but a UserError may come out."""
    try:
        read_published(path, config=CONFIG)
        return True
    except UserError:
        return False
    except Exception as error:
        raise AssertionError(f"{what!r:.300}: {type(error).__name__}: {error}") from error


def changes(value: Any) -> Iterator[Any]:
    """A JSON value with each value in it replaced by each odd one, or left out."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(inside):
        for odd in (*ODD, *changes(inner)):
            changed = value.copy()
            changed[key] = odd
            yield changed
        changed = value.copy()
        changed.pop(key)
        yield changed


def test_every_change_of_an_index(tmp_path: Path) -> None:
    state = make_state()
    parts = dict(list(state.items())[:2]), dict(list(state.items())[2:])
    for number, part in enumerate(parts):
        save_file(
            {name: tensor.contiguous() for name, tensor in part.items()}, tmp_path / f"w-{number}.safetensors"
        )
    weight_map = {name: f"w-{number}.safetensors" for number, part in enumerate(parts) for name in part}
    few = {name: weight_map[name] for name in list(weight_map)[:3]}
    path = tmp_path / "w.safetensors.index.json"
    good = {"metadata": {"total_size": 1, "ditmoe": "{}"}, "weight_map": few}
    tried = [changed for changed in changes(good) if isinstance(changed, dict)]
    for changed in tried:
        if isinstance(changed.get("weight_map"), dict) and changed["weight_map"]:
            changed["weight_map"] = {**weight_map, **changed["weight_map"]}
        path.write_text(json.dumps(changed))
        only_user_errors(path, changed)
    assert len(tried) > 80
    for text in ("", "null", "[" * 10**6, '{"weight_map":' * 10**5, "9" * 10**5):
        path.write_text(text)
        assert "index" in refusal(path)


def test_files_of_an_index_that_are_links(tmp_path: Path) -> None:
    """Out of the folder they are not followed, except to where the index itself is kept, as download caches do."""
    outside, blobs, snapshot = tmp_path / "outside", tmp_path / "blobs", tmp_path / "snapshot"
    for folder in (outside, blobs, snapshot):
        folder.mkdir()
    state = make_state()
    save_file(state, outside / "w.safetensors")
    save_file(state, blobs / "1234")
    (blobs / "5678").write_text(json.dumps({"weight_map": dict.fromkeys(state, "w-1.safetensors")}))
    index = snapshot / "w.safetensors.index.json"
    index.symlink_to(blobs / "5678")
    (snapshot / "w-1.safetensors").symlink_to(blobs / "1234")
    assert load_published(index, config=CONFIG)[1].keys() == state.keys()
    (snapshot / "w-1.safetensors").unlink()
    (snapshot / "w-1.safetensors").symlink_to(outside / "w.safetensors")
    assert "is a link that leads out of the folder" in refusal(index, config=CONFIG)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w.safetensors.index.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "is neither a file nor a folder, expected a file" in refusal(tmp_path / name)


def test_every_change_of_a_description(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    save_published(PublishedWeights(CONFIG, make_state(), class_names=["a", "b"]), path)
    content = torch.load(path, weights_only=True)
    held = json.loads(content["ditmoe"])
    texts = [json.dumps(changed) for changed in changes(held)]
    random.Random(0).shuffle(texts)
    for text in [*texts[:150], "[" * 10**5, "", "nonsense"]:
        torch.save({**content, "ditmoe": text}, path)
        only_user_errors(path, text)


def test_tensors_that_are_larger_than_their_file(tmp_path: Path) -> None:
    """Views that repeat one element, tensors without memory, and compressed archives."""
    path = tmp_path / "w.pt"
    for large in (torch.zeros(1).expand(10**6, 8, 10**3), torch.empty(2**50, device="meta")):
        torch.save({**make_state(), "extra": large}, path)
        assert "extra is" in refusal(path)
    torch.save({**make_state()}, path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data + b"\0" * 10**7 * name.endswith("data.pkl"))
    assert "data.pkl' in it is compressed" in refusal(path)
    many = {
        **make_state(),
        "blocks.900.x": torch.ones(1),
        "blocks.0.moe.experts.4000.up_proj.weight": torch.ones(1),
    }
    torch.save(many, path)
    assert "are no DiT" in refusal(path)


@pytest.mark.parametrize("name", ["w.pt", "legacy.pt", "w.safetensors"])
def test_changed_bytes(tmp_path: Path, name: str) -> None:
    """Bytes of the part that describes the tensors, which comes first in all but the archive."""
    path = tmp_path / name
    if name == "w.safetensors":
        save_file(make_state(), path)
    else:
        torch.save({"ema": make_state(), "epoch": 3}, path, _use_new_zipfile_serialization=name == "w.pt")
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 4))):
            changed[draw.randrange(min(len(content), 3000))] = draw.choice((0, 255, 40, draw.randrange(256)))
        path.write_bytes(changed)
        only_user_errors(path, bytes(changed[:200]))
    if name == "w.safetensors":
        for length in (0, 1, 2**40, 2**63, 2**64 - 1):
            path.write_bytes(struct.pack("<Q", length) + content[8:])
            assert "cannot be read" in refusal(path)
