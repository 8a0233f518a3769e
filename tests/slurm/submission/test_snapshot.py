"""The code of a job: all of the program, exactly, importable from its copy alone, and of which commit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ditmoe.model.errors import UserError
from ditmoe.slurm.submission.snapshot import COMMIT, PARTS, commit_of, files_of, folder_of, take_snapshot

ROOT = Path(__file__).resolve().parents[3]


def test_every_subpackage_is_copied() -> None:
    folders = {path.name for path in (ROOT / ".typing" / "ditmoe").iterdir() if path.is_dir()}
    assert sorted(PARTS) == sorted(folders - {"__pycache__"})


def test_the_copy_is_exact_and_runs_by_itself(tmp_path: Path) -> None:
    code = tmp_path / "code"
    (code / "ditmoe" / "gone").mkdir(parents=True)
    facts = take_snapshot(code)
    assert json.loads((code / COMMIT).read_text()) == facts
    assert not (code / "ditmoe" / "gone").exists()
    for part in PARTS:
        here, there = folder_of(part), code / "ditmoe" / part
        assert [file.relative_to(here) for file in files_of(here)] == [
            file.relative_to(there) for file in files_of(there)
        ]
        assert all((there / file.relative_to(here)).read_bytes() == file.read_bytes() for file in files_of(here))
    program = (
        "import importlib, sys, ditmoe, ditmoe.slurm.submission.script as script\n"
        "assert ditmoe.__file__.startswith(sys.argv[1])  # a namespace would give way to an installed package\n"
        f"for part in {PARTS}:\n"
        "    module = importlib.import_module(f'ditmoe.{part}')\n"
        "    assert next(iter(module.__path__)).startswith(sys.argv[1]), module.__path__\n"
        "assert script.TEMPLATE.is_file() and str(script.TEMPLATE).startswith(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(code)], env={"PYTHONPATH": str(code)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert take_snapshot(tmp_path / "other")["sha256"] == facts["sha256"]


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", "-C", folder, *names, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> list[Path]:
    """Two folders with a file each, as a git repository has them."""
    folders = [tmp_path / "model", tmp_path / "data"]
    for folder in folders:
        folder.mkdir()
        (folder / "a.py").write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    return folders


def test_the_commit_and_whether_files_differ_from_it(
    checkout: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    head = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert commit_of(checkout) == {"commit": head, "dirty": False}
    (tmp_path / "notes.txt").write_text("beside the code")
    assert commit_of(checkout) == {"commit": head, "dirty": False}
    (checkout[1] / "new.py").write_text("2")
    assert commit_of(checkout) == {"commit": head, "dirty": True}


def test_code_that_no_repository_has_is_of_no_commit(checkout: list[Path], tmp_path: Path) -> None:
    """As a package that is installed below somebody's project."""
    installed = tmp_path / "venv"
    installed.mkdir()
    (installed / "a.py").write_text("1")
    assert commit_of([installed]) == {"commit": None, "dirty": None}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        take_snapshot(tmp_path / "file" / "code")
