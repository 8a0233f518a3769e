"""The record of attempts: what is written is read, whatever a killed writer left."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ditmoe.model.errors import UserError
from ditmoe.slurm.attempts import (
    ATTEMPTS,
    Attempt,
    End,
    Record,
    read_attempts,
    record_cancel,
    record_end,
    record_start,
    record_submission,
)
from tests.small_disk import small_file_system


def attempt(number: int, job: str = "7", step: int | None = 0) -> Attempt:
    return Attempt(number, job, number - 1, ("n1", "n2"), step, 10.0 * number)


END = End("stopped", "SIGUSR2 came", 0, 40, ("n1", "n2"), ("n2",), ("n3",), "requeue", 15.5)


def test_what_is_recorded_is_read(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) == Record()
    record_submission(tmp_path, "7", 1.25)
    record_start(tmp_path, attempt(1))
    record_end(tmp_path, 1, END)
    record_start(tmp_path, attempt(2, step=None))
    record = read_attempts(tmp_path)
    assert [(submission.job, submission.time) for submission in record.submissions] == [("7", 1.25)]
    first, second = record.attempts
    assert first.end == END and first.hosts == ("n1", "n2") and first.step == 0
    assert second == attempt(2, step=None)
    assert record.damaged == ()


def test_attempts_since_a_submission(tmp_path: Path) -> None:
    """A chain's later jobs count all of its attempts; a job that somebody submits anew counts from there."""
    for job in ("7", "8"):
        record_submission(tmp_path, job, 1.0)
    record_start(tmp_path, attempt(1, "7"))
    record_end(tmp_path, 1, END)
    record_start(tmp_path, attempt(2, "8"))
    record_submission(tmp_path, "9", 2.0)
    record = read_attempts(tmp_path)
    assert [found.number for found in record.since("7")] == [1, 2]
    assert [found.number for found in record.since("8")] == [1, 2]
    assert record.since("9") == record.since("unheard of") == ()
    assert record.waiting("7") == ("9",)
    record_start(tmp_path, attempt(3, "10"))
    assert [found.number for found in read_attempts(tmp_path).since("10")] == [3], "its own start counts"
    record_submission(tmp_path, "10", 3.0)
    assert [found.number for found in read_attempts(tmp_path).since("10")] == [3], "recorded late"


def test_a_cancel_concerns_the_jobs_on_record(tmp_path: Path) -> None:
    record_submission(tmp_path, "7", 1.0)
    record_start(tmp_path, attempt(1, "8"))
    record_cancel(tmp_path, 2.0)
    record_submission(tmp_path, "9", 3.0)
    assert read_attempts(tmp_path).cancelled == {"7", "8"}


@example(cut=202, rubbish=b"}")
@given(cut=st.integers(0, 400), rubbish=st.binary(max_size=20))
def test_a_line_of_a_killed_writer_costs_that_line_alone(
    tmp_path_factory: pytest.TempPathFactory, cut: int, rubbish: bytes
) -> None:
    folder = tmp_path_factory.mktemp("job")
    record_start(folder, attempt(1))
    whole = (folder / ATTEMPTS).read_bytes()
    record_end(folder, 1, END)
    written = (folder / ATTEMPTS).read_bytes()[len(whole) :]
    # What the disk holds after the cut may be anything, but not the very end that is missing.
    left = rubbish.replace(b"\n", b"").replace(b"}", b"")
    (folder / ATTEMPTS).write_bytes(whole + written[: min(cut, len(written) - 2)] + left)
    record_start(folder, attempt(2))
    record = read_attempts(folder)
    assert record.attempts == (attempt(1), attempt(2))


@pytest.mark.parametrize(
    "line", ['{"event": "end", "attempt": 5}', "[]", "null", '{"event": "start"}', "\x00\x00"]
)
def test_lines_that_say_nothing_are_told(tmp_path: Path, line: str) -> None:
    record_start(tmp_path, attempt(1))
    with open(tmp_path / ATTEMPTS, "a") as file:
        file.write(line + "\n")
    record = read_attempts(tmp_path)
    assert record.attempts == (attempt(1),) and record.damaged == (2,)


def test_a_record_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / ATTEMPTS).mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_attempts(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    with small_file_system(tmp_path / "disk", 1) as folder:
        yield folder


def fill(disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"), (disk / "ballast").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_an_end_finds_room_on_a_full_disk(small_disk: Path) -> None:
    """That of the attempt that met it, however long its reason; one line more than fits is refused whole."""
    folder = small_disk / "job"
    record_start(folder, attempt(1))
    fill(small_disk)
    end = replace(END, reason="No space left on device " * 300)
    record_end(folder, 1, end)
    assert read_attempts(folder).attempts[0].end == end
    fill(small_disk)
    before = (folder / ATTEMPTS).read_bytes()
    with pytest.raises(UserError, match=r"attempts\.jsonl: could not be written: No space left"):
        record_end(folder, 1, replace(end, reason="again " * 2000))
    assert (folder / ATTEMPTS).read_bytes() == before
    (small_disk / "ballast").unlink()
    record_start(folder, attempt(2))
    fill(small_disk)
    record_end(folder, 2, end)
    assert [found.end for found in read_attempts(folder).attempts] == [end, end]
