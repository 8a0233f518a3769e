"""The code of a job: a copy of this program as it is now, and the commit that it comes from.

A job that waits for days runs what was submitted, whatever happens to the checkout meanwhile.
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from ditmoe.data.storage.files import make_folder, replacing
from ditmoe.model.errors import UserError

PARTS: Final = ("configs", "data", "launcher", "model", "parallel", "sampling", "slurm")
"""The subpackages of ditmoe: all of it, beside the modules of the package itself."""
COMMIT: Final = "COMMIT.json"
_GIT_SECONDS: Final = 60


def take_snapshot(code: Path) -> dict[str, Any]:
    """Copy this program to `code/ditmoe/`, in place of what is there, and say in `code/COMMIT.json` what it is.

    Returns:
        What COMMIT.json says: `commit` (null where the code is not of a git repository), `dirty` (whether files
        differ from it; null with it), `version`, and `sha256` of all files.

    Raises:
        UserError: the file system refuses.
    """
    digest = hashlib.sha256()
    own = folder_of_package()
    folders = {part: folder_of(part) for part in PARTS}
    try:
        shutil.rmtree(code, ignore_errors=False) if code.is_dir() else code.unlink(missing_ok=True)
        files = [(Path("ditmoe", file.name), file) for file in sorted(own.glob("*.py"))]
        for part, folder in folders.items():
            files += [(Path("ditmoe", part, file.relative_to(folder)), file) for file in files_of(folder)]
        for name, file in files:
            content = file.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
            make_folder((code / name).parent)
            (code / name).write_bytes(content)
    except OSError as error:
        raise UserError(f"{error.filename or code}: the code could not be copied: {error.strerror}") from error
    facts = {**commit_of([*folders.values()]), "version": _version(), "sha256": digest.hexdigest()}
    with replacing(code / COMMIT) as file_:
        file_.write(json.dumps(facts, indent=1).encode() + b"\n")
    return facts


def folder_of(part: str) -> Path:
    """Where a folder of this program lies: beside this floor, in a checkout and in an installed package alike.

    The import system is not asked: of an editable installation it does not find `configs`, which is no module.
    """
    return Path(__file__).resolve().parents[2] / part


def folder_of_package() -> Path:
    """Where the modules of the package itself lie.

    Without its `__init__.py` a copy would be a namespace, which gives way to a package that is installed.
    """
    spec = find_spec("ditmoe")
    assert spec is not None and spec.origin is not None, "ditmoe is no package"
    return Path(spec.origin).resolve().parent


def files_of(folder: Path) -> Iterator[Path]:
    """The files of a subpackage in a fixed order, without what Python and editors leave."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and not name.endswith((".pyc", "~")):
                yield Path(place, name)


def commit_of(folders: list[Path]) -> dict[str, Any]:
    """The commit that folders of one checkout come from, and whether they differ from it; null where git has none.

    A file of theirs must be the repository's: an installed copy may lie within a repository of something else.
    """
    place, *_ = folders
    known = _git(place, "ls-files", "--error-unmatch", "--", *(str(next(files_of(folder))) for folder in folders))
    commit = _git(place, "rev-parse", "HEAD")
    changes = _git(place, "status", "--porcelain", "--", *map(str, folders))
    if known is None or commit is None or changes is None:
        return {"commit": None, "dirty": None}
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def _git(place: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails or is not there."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(place), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _version() -> str | None:
    try:
        return version("ditmoe")
    except PackageNotFoundError:
        return None
