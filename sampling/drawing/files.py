"""Pictures, animations and arrays of images as files, by their extensions, with what they are of inside them.

Shapes: N images, F frames.
"""

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ditmoe.data.storage.files import make_folder, new_file, replacing
from ditmoe.model.errors import UserError
from ditmoe.model.outside.nearest import meant, one_of
from ditmoe.model.outside.text import is_address

PICTURES: Final = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
"""Extension → Pillow's name of the format."""
ANIMATIONS: Final = {"webp": "WEBP", "gif": "GIF", "apng": "PNG", "png": "PNG", "mp4": "MP4"}
"""The same of those that may move; those that are no pictures always do."""
ARRAYS: Final = ("npz", "npy")
KNOWN: Final = tuple(dict.fromkeys((*PICTURES, *ANIMATIONS, *ARRAYS)))
LAST_FRAME_SECONDS: Final = 1.0
"""How much longer the last frame of an animation stays: it is the image."""
_DESCRIPTION: Final = 0x010E
"""The tag of EXIF for what a picture shows."""


class Target(NamedTuple):
    """Where images go."""

    path: Path
    single: bool
    """The path is a folder, with a file for each image; otherwise it is one file of all."""
    extension: str
    """Of the file, or of those in the folder."""
    moves: bool
    """What is written is an animation."""


def find_target(out: str, *, moves: bool = False, extension: str | None = None) -> Target:
    """What a user means by the name of an output.

    A folder is named with a slash at its end, is there already, or has no dot in its name.

    Args:
        moves: animations are asked for; some extensions ask for them by themselves.
        extension: of the files in a folder; None: the usual one.

    Raises:
        UserError: an extension is not known, does not fit, or is told twice.
    """
    path = Path(out)
    if is_address(out):
        raise UserError(f"--out {out}: an address; expected a file or a folder of this machine")
    if out.endswith("/") or path.is_dir() or not path.suffix:
        extension = (extension or ("webp" if moves else "png")).lower().lstrip(".")
        single, named = True, f"--format {extension}"
    else:
        if extension is not None:
            raise UserError(f"--format {extension}: goes with --out FOLDER/, whose files it is of; --out is {out}")
        extension = path.suffix[1:].lower()
        single, named = False, f"--out {out}"
    if extension not in KNOWN:
        folder = "" if single else ", or a folder, whose name ends with /"
        near = meant(extension, KNOWN, 0.5)
        raise UserError(f"{named}: {extension!r} is no known kind of file; expected {one_of(KNOWN)}{folder}{near}")
    moves = moves or (extension in ANIMATIONS and extension not in PICTURES)
    if moves and extension not in ANIMATIONS:
        raise UserError(f"{named}: {extension} does not move; expected one of {', '.join(ANIMATIONS)}")
    if moves and extension == "mp4":
        _video_library()
    if single and path.exists() and not path.is_dir():
        raise UserError(f"--out {out}: is a file; expected a folder, or a name that is free")
    return Target(path, single, extension, moves)


def check_free(paths: Sequence[Path], *, overwrite: bool) -> None:
    """UserError where files are there already and are not to be written over."""
    there = [] if overwrite else [path for path in paths if path.exists()]
    if there:
        more = f", and {len(there) - 1} more of the {len(paths)}" if len(there) > 1 else ""
        raise UserError(f"{there[0]}{more}: there already; expected another --out, or --overwrite")


def save_still(picture: Image.Image, path: Path, facts: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write a picture in the format of its extension, whole or not at all; its folder is made.

    Args:
        facts: what it shows: text of a PNG by these keys, otherwise JSON as the EXIF description.

    Raises:
        UserError: the file is there, cannot be written, or the format holds no picture of the size.
    """
    form = PICTURES[path.suffix[1:].lower()]
    if form == "PNG":
        options: dict[str, Any] = {"pnginfo": png_text(facts)}
    else:
        options = {"exif": _exif(facts), **({"lossless": True} if form == "WEBP" else {"quality": 95})}
        options |= {"subsampling": 0} if form == "JPEG" else {}
    _save(picture, path, form, options, overwrite)


def save_animation(
    frames: Sequence[Image.Image],
    path: Path,
    seconds: float,
    fps: float,
    facts: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write frames, all of one size, as an animation in the format of the extension.

    Args:
        seconds: how long they last together; the last one stays `LAST_FRAME_SECONDS` longer.
        fps: pictures per second of a video; the other formats have a duration for each frame.
        facts: as of `save_still`.

    Raises:
        UserError: as `save_still`; there is no library for videos.
    """
    form = ANIMATIONS[path.suffix[1:].lower()]
    if form == "MP4":
        with _opened(path, overwrite) as file:
            _write_video(frames, file, seconds, fps, facts)
        return
    each = max(20, round(1000 * seconds / len(frames)))
    durations = [each] * (len(frames) - 1) + [each + round(1000 * LAST_FRAME_SECONDS)]
    options: dict[str, Any] = {
        "save_all": True,
        "append_images": list(frames[1:]),
        "duration": durations,
        "loop": 0,
    }
    if form == "PNG":
        options["pnginfo"] = png_text(facts)
    elif form == "WEBP":
        options |= {"exif": _exif(facts), "quality": 90}
    else:
        options["comment"] = _json(facts).encode()
    _save(frames[0], path, form, options, overwrite)


def save_arrays(
    path: Path,
    image_NHWC: NDArray[np.uint8],
    label_N: NDArray[np.int64],
    seed_N: NDArray[np.int64],
    facts: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write images as an array: `.npy` them alone, `.npz` as `arr_0` with labels `arr_1`, `seeds` and `facts`."""
    with _opened(path, overwrite) as file:
        if path.suffix.lower() == ".npy":
            np.save(file, image_NHWC, allow_pickle=False)
        else:
            np.savez(file, arr_0=image_NHWC, arr_1=label_N, seeds=seed_N, facts=np.array(_json(facts)))


def png_text(facts: Mapping[str, Any]) -> PngInfo:
    """Facts as text chunks."""
    text = PngInfo()
    for key, value in facts.items():
        text.add_text(key, str(value))
    return text


def _save(picture: Image.Image, path: Path, form: str, options: Mapping[str, Any], overwrite: bool) -> None:
    # Written to memory first: what is no fault of the file system is told as what it is.
    written = io.BytesIO()
    try:
        picture.save(written, format=form, **options)
    except (OSError, ValueError, MemoryError) as error:
        raise UserError(
            f"{path}: no {form} file can be made of {picture.width:,} × {picture.height:,} pixels ({error}); "
            "expected fewer images, or a folder, whose name ends with /"
        ) from error
    with _opened(path, overwrite) as file:
        file.write(written.getbuffer())


def _opened(path: Path, overwrite: bool) -> AbstractContextManager[BinaryIO]:
    make_folder(path.parent)
    return replacing(path, synced=False) if overwrite else new_file(path)


def _json(facts: Mapping[str, Any]) -> str:
    return json.dumps(dict(facts))


def _exif(facts: Mapping[str, Any]) -> Image.Exif:
    exif = Image.Exif()
    exif[_DESCRIPTION] = _json(facts)
    return exif


def _video_library() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(
            "mp4 is written by PyAV, which is not installed: pip install 'ditmoe[video]'; "
            "webp and gif need nothing more"
        ) from error
    return av


def _write_video(
    frames: Sequence[Image.Image], file: BinaryIO, seconds: float, fps: float, facts: Mapping[str, Any]
) -> None:
    """H.264 in MP4, its sides made even; each frame stays for as many pictures as its time has."""
    from fractions import Fraction

    av = _video_library()
    pictures = max(len(frames), round(seconds * fps))
    shown = [frames[picture * len(frames) // pictures] for picture in range(pictures)]
    shown += [frames[-1]] * round(LAST_FRAME_SECONDS * fps)
    with av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = _json(facts)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = (side + side % 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18"}
        for picture in shown:
            even = Image.new("RGB", (stream.width, stream.height), "white")
            even.paste(picture)
            container.mux(stream.encode(av.VideoFrame.from_image(even)))
        container.mux(stream.encode())
