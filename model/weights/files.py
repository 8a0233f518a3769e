"""Files of named tensors, `.pt` and `.safetensors`, read without unpickling anything and written atomically.

A file made elsewhere is untrusted: `.pt` files are read with torch's restricted unpickler, file names in a
safetensors index must lie beside it, and whatever is wrong is one UserError that names the file.
"""

import argparse
import json
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from pydantic import BaseModel, Field, StrictStr, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ditmoe.model.errors import UserError
from ditmoe.model.outside.files import replacing
from ditmoe.model.weights.lazy import read, sizes_of
from ditmoe.model.weights.untrusted import first_problem, leads_out, parse_json, read_file, regular_file_bytes

PT_SUFFIXES = (".pt", ".pth", ".ckpt")
SAFETENSORS = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
DIFFUSERS_FILES: Final = ("diffusion_pytorch_model" + SAFETENSORS, "diffusion_pytorch_model" + INDEX_SUFFIX)
"""The weights of a model in diffusers' folders."""
SHARD_BYTES = 5 * 2**30
"""Largest safetensors file written, unless one tensor alone is larger."""

MOST_INDEX_BYTES: Final = 64 * 2**20
"""Of an index; a million tensors take no more."""
MOST_PICKLE_BYTES: Final = 256 * 2**20
"""Of the part of a .pt file that is no tensor."""
_DESCRIPTION_KEY = "ditmoe"
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"


def read_pt(path: Path) -> tuple[dict[str, Any], str | None]:
    """Read what `torch.save` wrote: a dictionary of plain data and CPU tensors, mapped from the file if possible.

    The one class accepted besides tensors and plain data is `argparse.Namespace`, which training scripts of this
    family store under `args`. It is safe: it has no code that loading would run, and the restricted unpickler only
    sets its attributes, to values that are themselves restricted to tensors and plain data.

    Returns:
        the dictionary and, if `write_pt` put it there, its description.

    Raises:
        UserError: no such file, not a `.pt` file, truncated, or holding anything but tensors and plain data.
    """
    magic = _magic(path)
    size = regular_file_bytes(path)
    if not magic.startswith((_ZIP_MAGIC, _PICKLE_MAGIC)):
        raise UserError(f"{path}: not a PyTorch weight file: it begins with {magic!r}{_guess(magic)}")
    is_zip = magic.startswith(_ZIP_MAGIC)
    try:
        if is_zip:
            _check_archive(path, size)
        if is_zip and (refused := set(get_unsafe_globals_in_checkpoint(path)) - {"argparse.Namespace"}):
            raise UserError(_refusal(path, sorted(refused)))
        with safe_globals([argparse.Namespace]):
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        named = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise UserError(_refusal(path, named)) from error
        raise UserError(f"{path}: cannot be read as a .pt file, it may be truncated ({_brief(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dictionary of tensors")
    description = content.pop(_DESCRIPTION_KEY, None)
    return content, description if isinstance(description, str) else None


def _check_archive(path: Path, size: int) -> None:
    """UserError where an archive holds more than the file is long: what `torch.save` writes is not compressed."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: {member.filename[:100]!r} in it is compressed, which torch.save never does")
        if member.filename.endswith("/data.pkl") and member.file_size > MOST_PICKLE_BYTES:
            raise UserError(
                f"{path}: its pickle has {member.file_size:,} bytes, expected at most {MOST_PICKLE_BYTES:,}"
            )
    if sum(member.file_size for member in members) > size:
        raise UserError(f"{path}: its members are larger than the file; it is damaged")


def write_pt(
    path: Path, content: Mapping[str, Any], description: str | None = None, *, overwrite: bool = False
) -> None:
    """Write a dictionary of tensors (or of such dictionaries) for `torch.load`, atomically.

    Raises:
        UserError: something has the name, and is not to be overwritten.
    """
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path}: exists already; give --overwrite, or choose another name")
    whole = dict(content) if description is None else {**content, _DESCRIPTION_KEY: description}
    with _writing(path) as file:
        torch.save(whole, file)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Read a safetensors file, or all files of an index (`NAME.safetensors.index.json`).

    Args:
        path: the file, the index, the name that the index belongs to, or the folder of one of these.

    Returns:
        CPU tensors and, if `write_safetensors` put it there, their description.

    Raises:
        UserError: a file is missing, truncated or not safetensors, or the index does not fit its files.
    """
    path = _locate_safetensors(path)
    if not path.name.endswith(INDEX_SUFFIX):
        tensors, metadata = _read_safetensors_file(path)
        return tensors, metadata.get(_DESCRIPTION_KEY)
    weight_map, description = _read_index(path)
    state: dict[str, Tensor] = {}
    for file in dict.fromkeys(weight_map.values()):
        # A download cache links the index and its files from one folder to another.
        if leads_out(path.with_name(file), path.parent, path.resolve().parent):
            raise UserError(f"{path.with_name(file)}: is a link that leads out of the folder of {path.name}")
        tensors, _ = _read_safetensors_file(path.with_name(file))
        expected = {name for name, holder in weight_map.items() if holder == file}
        if wrong := sorted(expected ^ tensors.keys()):
            where = "is missing from" if wrong[0] in expected else "is not in the index but in"
            raise UserError(f"{path}: {wrong[0]} {where} {file}")
        state.update(tensors)
    return {name: state[name] for name in weight_map}, description


def write_safetensors(
    path: Path,
    state: Mapping[str, Tensor],
    description: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write tensors to one safetensors file, or to numbered files and an index when they exceed `shard_bytes`.

    Each file is written atomically and the index last, so that an interrupted export is never read as a whole one.
    Of `LazyTensors` no more than one file's are held.

    Args:
        overwrite: in place of what has the name; its other files go too.
        progress: called with the bytes written so far after each file.

    Returns:
        the files written; the last is the one to read.

    Raises:
        UserError: something has the name, or the name of another of the files.
    """
    sizes = sizes_of(state)
    shards = _cut(sizes, shard_bytes)
    index_file = path.with_name(path.stem + INDEX_SUFFIX)
    files = [path]
    if len(shards) > 1:
        files = [
            path.with_name(f"{path.stem}-{number:05d}-of-{len(shards):05d}{SAFETENSORS}")
            for number in range(1, len(shards) + 1)
        ]
    if overwrite:
        _remove_export(path, index_file)
    for file in dict.fromkeys((path, index_file, *files)):
        if os.path.lexists(file) and not (overwrite and file == path):
            raise UserError(f"{file}: exists already; give --overwrite, or choose another name than {path.name}")
    metadata = {"format": "pt"} if description is None else {"format": "pt", _DESCRIPTION_KEY: description}
    written = 0
    for file, names in zip(files, shards, strict=True):
        _write_safetensors_file(file, read(state, names), metadata if len(shards) == 1 else {"format": "pt"})
        written += sum(sizes[name] for name in names)
        if progress is not None:
            progress(written)
    if len(shards) == 1:
        return files
    index = {
        "metadata": {**metadata, "total_size": sum(sizes.values())},
        "weight_map": {name: file.name for file, names in zip(files, shards, strict=True) for name in names},
    }
    with _writing(index_file) as stream:
        stream.write(json.dumps(index, indent=1).encode())
    return [*files, index_file]


def _remove_export(path: Path, index_file: Path) -> None:
    """Remove the several files of an earlier export, the index first; a single file is replaced when written."""
    if not os.path.lexists(index_file):
        return
    held, _ = _read_index(index_file)
    with suppress(FileNotFoundError):
        index_file.unlink()
    for file in set(held.values()):
        path.with_name(file).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _locate_safetensors(path: Path) -> Path:
    """The file or index that a path stands for."""
    if path.is_dir():
        found = sorted(path.glob("*" + INDEX_SUFFIX)) or sorted(path.glob("*" + SAFETENSORS))
        # diffusers keeps a file of each precision in one folder.
        found = [file for file in found if file.name in DIFFUSERS_FILES] or found
        if len(found) != 1:
            raise UserError(
                f"{path}: expected one {SAFETENSORS} file or one {INDEX_SUFFIX} in it, found {len(found)}"
            )
        return found[0]
    index = path.with_name(path.stem + INDEX_SUFFIX)
    if path.suffix == SAFETENSORS and not path.exists() and index.exists():
        return index
    return path


class _Metadata(BaseModel):
    description: StrictStr | None = Field(default=None, alias=_DESCRIPTION_KEY)


class _Index(BaseModel):
    """A safetensors index; other keys are of other programs."""

    weight_map: dict[StrictStr, Any]
    metadata: _Metadata = _Metadata()


def _read_index(path: Path) -> tuple[dict[str, str], str | None]:
    """The index's tensor name → file name, and the description in its metadata."""
    try:
        index = _Index.model_validate(parse_json(read_file(path, MOST_INDEX_BYTES)))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except ValidationError as error:
        raise UserError(f"{path}: not a safetensors index ({first_problem(error)})") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as a safetensors index ({_brief(error)})") from error
    if not index.weight_map:
        raise UserError(f"{path}: no weight_map, expected tensor names and the files that hold them")
    for name, file in index.weight_map.items():
        if not _is_beside(file):
            raise UserError(
                f"{path}: {name[:100]} is said to be in {repr(file)[:100]}, expected a {SAFETENSORS} file beside"
                " the index"
            )
    return index.weight_map, index.metadata.description


def _is_beside(file: Any) -> bool:
    """Whether a value from an index is a plain file name, which cannot lead anywhere else."""
    plain = isinstance(file, str) and Path(file).name == file and file.isprintable() and len(file) < 256
    return plain and file.endswith(SAFETENSORS)


def _read_safetensors_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _magic(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        detail = f"it may be truncated ({_brief(error)})"
        raise UserError(f"{path}: cannot be read as a {SAFETENSORS} file, {detail}") from error


def _write_safetensors_file(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    with _writing(path) as file:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file.name, metadata)
        # It puts a file of its own in the place: not on the disk yet, and for nobody but its owner.
        with open(file.name, "rb") as written:
            os.fchmod(written.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode))
            os.fsync(written.fileno())


def _cut(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Cut names, in their order, into pieces of at most `shard_bytes` (or one tensor)."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


@contextmanager
def _writing(path: Path) -> Iterator[BinaryIO]:
    """Open `path`, in a folder that is made for it, as `replacing` does; UserError too where a library refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            yield file
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: could not be written ({_brief(error)})") from error


def _magic(path: Path) -> bytes:
    """The first bytes of a file that must exist."""
    try:
        regular_file_bytes(path)
        with path.open("rb") as file:
            return file.read(12)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_brief(error)})") from error


def _guess(magic: bytes) -> str:
    """What a file is more likely to be."""
    if not magic:
        return " (the file is empty)"
    if magic.startswith(b"version http"):
        return " (a Git LFS pointer: fetch the file itself, with `git lfs pull`)"
    if magic.lstrip().startswith(b"<"):
        return " (a web page rather than the file?)"
    return ""


def _refusal(path: Path, names: list[str]) -> str:
    return f"{path}: holds pickled objects ({', '.join(names[:5])}), expected tensors and plain data only"


def _brief(error: BaseException) -> str:
    """The first sentence of an error's text."""
    text = str(error).strip() or type(error).__name__
    return re.split(r"\. |\n", text, maxsplit=1)[0][:200]
