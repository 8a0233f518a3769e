"""Tars as other programs write them: ImageNet as a webdataset, and img2dataset's output."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

Members = dict[str, bytes]
Named = tuple[str, Members]
"""A key, and extension → bytes."""


def picture(format: str = "JPEG", size: tuple[int, int] = (20, 12), mode: str = "RGB", shade: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, shade if mode == "L" else (shade, 20, 200)).save(buffer, format=format)
    return buffer.getvalue()


def write_tar(path: Path, samples: Sequence[Named]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def imagenet(folder: Path) -> Path:
    """Three tars of four photographs of many sizes and kinds, classes as numbers in cls."""
    kinds = [("jpg", picture("JPEG")), ("png", picture("PNG", (9, 30))), ("webp", picture("WEBP", (16, 16)))]
    kinds.append(("jpeg", picture("JPEG", (14, 14), "L")))
    for shard in range(3):
        samples = []
        for place, (extension, data) in enumerate(kinds):
            label = str((shard + place) % 5).encode()
            samples.append((f"n{shard:02d}/{place:04d}", {extension: data, "cls": label}))
        write_tar(folder / f"imagenet-train-{shard:06d}.tar", samples)
    return folder


def img2dataset(folder: Path, values: Sequence[object] = ("cat", "dog", "ant", "dog")) -> Path:
    """Two tars as img2dataset writes them: the same keys in each, captions in txt, everything known in json."""
    for shard in range(2):
        samples = []
        for place, value in enumerate(values):
            facts = {"caption": f"a {value}", "meta": {"class": value, "aesthetic": 4 + shard + place / 10}}
            if place == 2:
                del facts["meta"]["aesthetic"]  # type: ignore[attr-defined]
            members = {
                "jpg": picture("JPEG", (30 + place, 20)),
                "json": json.dumps(facts).encode(),
                "txt": facts["caption"].encode(),  # type: ignore[union-attr,attr-defined]
            }
            samples.append((f"{place:09d}", members))
        write_tar(folder / f"{shard:05d}.tar", samples)
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder
