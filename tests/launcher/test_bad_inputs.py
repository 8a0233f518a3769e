"""Whatever a user hands over, the command ends in one message and exit code 2: no traceback, no hang, no silence.

The cases run in this process through the command's own `main`; a few also as processes of their own.
"""

import contextlib
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from ditmoe.launcher import cli
from tests.forked import DITMOE, run_forked
from tests.launcher.bad_inputs import FAMILIES, Case, Workshop, cases
from tests.sampling.small_run import write_digits, write_run

SEED = 20_240_807
LONGEST_SECONDS = 60
"""Against hangs alone; on an idle machine no case takes two."""


class HangError(BaseException):
    """No `except Exception` may take it for a failure of the case."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    return Workshop(write_digits(folder / "shards"), write_run(folder / "run"))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FAMILIES)
def test_bad_inputs_end_in_one_message(
    name: str, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = []
    made = cases(name, SEED, workshop)
    assert len(made) == FAMILIES[name][1]
    for number, case in enumerate(made):
        folder = tmp_path / str(number)
        folder.mkdir()
        case.prepare(folder)
        monkeypatch.chdir(folder)
        code, out, err = run_here(case, monkeypatch)
        problem = fault(code, out, err)
        if problem is not None:
            wrong.append(f"{case.name}: {problem}: {' '.join(case.arguments)[:200]!r}\n{err[-1500:]}{out[-200:]}")
    assert not wrong, f"{len(wrong)} of {len(made)}\n\n" + "\n\n".join(wrong)


def test_there_are_more_than_300() -> None:
    assert sum(count for _, count in FAMILIES.values()) > 300


@pytest.mark.parametrize("name", FAMILIES)
def test_a_process_of_its_own_ends_alike(
    name: str, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forked from one that has done the imports; where the system limits files, started as a user does."""
    case = cases(name, SEED, workshop)[-1]
    folder = tmp_path / "case"
    folder.mkdir()
    case.prepare(folder)
    monkeypatch.chdir(folder)
    for variable, value in case.variables.items():
        monkeypatch.setenv(variable, value)
    if case.file_bytes is None:
        done = run_forked([*DITMOE, *case.arguments], tmp_path / "output")
    else:
        done = subprocess.run(
            [sys.executable, *DITMOE, *map(os.fsencode, case.arguments)],
            capture_output=True,
            text=True,
            preexec_fn=lambda: _limit_files(case),
            timeout=300,
        )
    problem = fault(done.returncode, done.stdout, done.stderr)
    assert problem is None, f"{problem}\n{done.stderr[-2000:]}"


def fault(code: int | None, out: str, err: str) -> str | None:
    """What is wrong with an end; None if nothing is."""
    if code is None:
        return "hangs"
    if "Traceback" in err:
        return "a traceback"
    if code != cli.USER_ERROR:
        return f"exit code {code}"
    if out.rstrip().endswith((" problem", " problems")):
        return None  # `data verify` lists what is wrong as its output
    messages = sum(line.startswith(("error: ", "Usage: ")) for line in err.splitlines())
    return None if messages == 1 else f"{messages} messages"


def run_here(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[int | None, str, str]:
    """The exit code (None: it did not end), output and errors of the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = dict(os.environ)
    with monkeypatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["ditmoe", *case.arguments])
        for variable, value in case.variables.items():
            patch.setenv(variable, value)
        try:
            with _ends(), _small_files(case):
                cli.main()
            code: int | None = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except HangError:
            code = None
    os.environ.clear()
    os.environ.update(before)
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def _ends() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _small_files(case: Case) -> Iterator[None]:
    if case.file_bytes is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    _limit_files(case)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _limit_files(case: Case) -> None:
    assert case.file_bytes is not None
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_bytes, most))
