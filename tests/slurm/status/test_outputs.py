"""What a run printed: the newest output is found, and followed from one job to the next."""

import os
from pathlib import Path

import pytest

from ditmoe.model.errors import UserError
from ditmoe.slurm.job_folder import training_folder
from ditmoe.slurm.status.outputs import followed, last_lines, output_of


def written(path: Path, text: str = "x\n", at: float = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (at, at))
    return path


def test_the_newest_output_is_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no log\.txt and no output of a job found"):
        output_of(tmp_path)
    log = written(tmp_path / "log.txt")
    assert output_of(tmp_path) == log
    first = written(training_folder(tmp_path).output("7"), at=990)
    assert output_of(tmp_path) == first  # it has all that the log has
    second = written(training_folder(tmp_path).output("8"), at=995)
    assert output_of(tmp_path) == second
    written(log, at=2000)  # somebody goes on without a job
    assert output_of(tmp_path) == log


def test_one_rank_has_its_own_output(tmp_path: Path) -> None:
    log = written(tmp_path / "log.txt")
    written(training_folder(tmp_path).output("7"), at=2000)
    own = written(tmp_path / "ranks/rank-1.txt")
    assert output_of(tmp_path, 1) == own and output_of(tmp_path, 0) == log
    with pytest.raises(UserError, match=r"rank-2\.txt: not found; expected rank-1\.txt"):
        output_of(tmp_path, 2)


@pytest.mark.parametrize(("lines", "expected"), [(0, ""), (1, "c"), (2, "b\nc"), (9, "a\nb\nc")])
def test_the_last_lines(tmp_path: Path, lines: int, expected: str) -> None:
    assert last_lines(written(tmp_path / "log.txt", "a\nb\nc"), lines) == (expected, 5)


def test_an_output_is_followed_to_the_end_of_the_run(tmp_path: Path) -> None:
    first = written(training_folder(tmp_path).output("7"), "a\n", at=1000)
    moments = iter(range(9))

    def has_ended() -> bool:
        """Called each time when all is read: what happens meanwhile."""
        moment = next(moments)
        if moment == 0:
            first.write_bytes(b"a\nb\xc3")  # within a letter
            os.utime(first, (1001, 1001))
        elif moment == 1:
            first.write_bytes(b"a\nb\xc3\xa9\n")
            os.utime(first, (1002, 1002))
        elif moment == 2:
            written(training_folder(tmp_path).output("8"), "c\n", at=1003)
        elif moment == 3:
            written(training_folder(tmp_path).output("8"), "c\nd\n", at=1005)
        return moment == 4

    pieces = list(followed(lambda: output_of(tmp_path), (first, 2), has_ended, poll=0))
    second = training_folder(tmp_path).output("8")
    assert "".join(pieces) == f"b\u00e9\n==> {second} <==\nc\nd\n"


def test_an_output_that_was_cut_is_read_from_its_beginning(tmp_path: Path) -> None:
    log = written(tmp_path / "log.txt", "new\n")
    assert list(followed(lambda: log, (log, 100), lambda: True, poll=0)) == ["new\n"]
