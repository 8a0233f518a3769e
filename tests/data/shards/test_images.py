"""What a decoder's failure is blamed on."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image, ImageFile, ImageOps

from ditmoe.data.shards.images import BadImage, blaming_bytes, load_pixels, open_image, upright


def picture() -> io.BytesIO:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "png")
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("module", "name", "decode"),
    [
        (Image, "open", lambda: open_image(picture(), ("PNG",))),
        (ImageFile.ImageFile, "load", lambda: load_pixels(open_image(picture(), ("PNG",)))),
        (ImageOps, "exif_transpose", lambda: upright(open_image(picture(), ("PNG",)))),
    ],
)
@pytest.mark.parametrize(("raised", "told"), [(MemoryError, MemoryError), (SyntaxError, BadImage)])
def test_memory_that_is_short_is_not_the_images_fault(
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    decode: Callable[[], object],
    raised: type[Exception],
    told: type[Exception],
) -> None:
    """A run that skips bad samples would otherwise train on others, without a word, when memory is short."""

    def fail(*_: object, **__: object) -> None:
        raise raised("odd")

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(told):
        decode()


def test_what_was_judged_is_judged_once() -> None:
    with pytest.raises(BadImage, match=r"^too large$"), blaming_bytes(BadImage, "undecodable"):
        raise BadImage("too large")
    with pytest.raises(BadImage, match=r"^undecodable: KeyError$"), blaming_bytes(BadImage, "undecodable"):
        raise KeyError
