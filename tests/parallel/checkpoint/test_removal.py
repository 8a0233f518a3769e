"""Old checkpoints that cannot be removed, and leftovers of any kind: told, tried again, and no reason to stop."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ditmoe.parallel.checkpoint.folder import PARTIAL, checkpoint_path, checkpoints, start_partial
from ditmoe.parallel.checkpoint.removal import Removal
from ditmoe.parallel.checkpoint.saver import CheckpointSaver, finish
from ditmoe.parallel.config import CheckpointConfig

RETENTION = CheckpointConfig(keep_last=1)


def save(run: Path, step: int, removal: Removal) -> None:
    """Finish a checkpoint that has nothing but its marker, as the saver does."""
    path = checkpoint_path(run, step)
    finish(start_partial(path), path, {"step": step}, {}, RETENTION, removal)
    removal.wait()


def steps(run: Path) -> list[int]:
    return [int(path.name[-1]) for path in checkpoints(run)]


def leftovers(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob(f"*{PARTIAL}"))


def test_what_cannot_be_deleted_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the `.nfs…` file of a reader."""
    removal = Removal(tmp_path)
    save(tmp_path, 3, removal)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        save(tmp_path, 4, removal)
        (problem,) = removal.problems()
        assert "step-00000003.old-1.partial could not be removed (Device or resource busy)" in problem
        save(tmp_path, 5, removal)
        (problem,) = removal.problems()  # the first is not told again
        assert "step-00000004.old-1.partial could not be removed" in problem
        assert steps(tmp_path) == [5] and len(leftovers(tmp_path)) == 2
    save(tmp_path, 6, removal)
    assert steps(tmp_path) == [6] and leftovers(tmp_path) == [] and removal.problems() == []


def busy(path: Path) -> None:
    raise OSError(16, "Device or resource busy", str(path))


def test_a_folder_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old checkpoint that cannot even be renamed stays what it is, and the new one is complete."""
    removal = Removal(tmp_path)
    save(tmp_path, 3, removal)

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        save(tmp_path, 4, removal)
    assert steps(tmp_path) == [3, 4]
    (problem,) = removal.problems()
    assert problem.startswith(f"{checkpoint_path(tmp_path, 3)} could not be removed (Permission denied); training")
    save(tmp_path, 5, removal)
    assert steps(tmp_path) == [5]


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_files_and_links_by_the_names_of_leftovers(tmp_path: Path) -> None:
    """They are somebody's: told, left alone, and in nobody's way; folders by these names go at a start."""
    others, folder = tmp_path / "others", tmp_path / "checkpoints"
    others.mkdir()
    (others / "precious").touch()
    for step in (3, 4, 5):
        checkpoint_path(tmp_path, step).parent.mkdir(exist_ok=True)
    (folder / "step-00000003.old-1.partial").symlink_to(others)
    (folder / "step-00000004.partial").symlink_to(others)
    (folder / "step-00000005.partial").write_text("precious")
    for name in ("step-00000009.partial", "step-00000008.old.partial", "step-00000007.new-2.partial"):
        (folder / name / "weights").mkdir(parents=True)
    (folder / "step-by-step.partial").mkdir()

    saver = CheckpointSaver(tmp_path, RETENTION)
    removal: Any = saver._removal
    removal.wait()
    told = saver.problems()
    assert [problem.partition(" was left alone: it is a ")[2][:4] for problem in told] == ["link", "link", "file"]
    for step in (3, 4, 5):
        save(tmp_path, step, removal)
    assert steps(tmp_path) == [5] and saver.problems() == []
    assert {path.name for path in leftovers(tmp_path)} == {
        "step-00000003.old-1.partial",
        "step-00000004.partial",
        "step-00000005.partial",
        "step-by-step.partial",
    }
    assert (others / "precious").exists() and (folder / "step-00000005.partial").read_text() == "precious"


def test_a_file_by_the_name_of_a_checkpoint_gives_way(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 3)
    path.parent.mkdir()
    path.write_text("precious")
    removal = Removal(tmp_path)
    save(tmp_path, 3, removal)
    assert steps(tmp_path) == [3]
    (left,) = leftovers(tmp_path)
    assert left.read_text() == "precious" and "it is a file" in removal.problems()[0]
