"""The folder of compiled code ends with its process, and a killed process's with the next one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ditmoe.model.compiling.folder import IN_USE, PREFIX, VARIABLE, remove_abandoned_folders

PROGRAM = """
import os, sys
from ditmoe.model.compiling.folder import compile_into_own_folder
folder = compile_into_own_folder()
assert compile_into_own_folder() == folder and folder.stat().st_mode & 0o77 == 0
(folder / "code.so").touch()
if os.fork() == 0:
    sys.exit()
os.wait()
assert folder.exists(), "a child has removed it"
print(folder, flush=True)
sys.stdin.read()
"""


def started(parent: Path, **variables: str) -> tuple["subprocess.Popen[str]", Path]:
    """A process that has a folder there, and the folder."""
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "TMPDIR": str(parent), **variables},
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def age(folder: Path) -> None:
    """Let it look an hour old."""
    before = time.time() - 3600
    os.utime(folder, (before, before))


def test_it_ends_with_its_process(tmp_path: Path) -> None:
    process, folder = started(tmp_path)
    assert folder.parent == tmp_path and folder.name.startswith(PREFIX) and folder.exists()
    process.communicate()
    assert process.returncode == 0 and list(tmp_path.iterdir()) == []


def test_those_of_killed_processes_are_removed_by_the_next(tmp_path: Path) -> None:
    (killed, left), (living, held) = started(tmp_path), started(tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    young, half, foreign = (tmp_path / f"{PREFIX}{name}" for name in ("young", "half", "link"))
    young.mkdir()
    half.mkdir()  # killed before it had a lock
    other = tmp_path / "other"
    other.mkdir()
    (other / IN_USE).touch()
    foreign.symlink_to(other)
    for folder in (left, held, half, other):
        age(folder)
    remove_abandoned_folders(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {held.name, young.name, foreign.name, "other"}
    assert (held / "code.so").exists() and (other / IN_USE).exists()
    living.communicate()


def test_a_folder_that_the_user_names_stays(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    process, folder = started(tmp_path, **{VARIABLE: str(own)})
    process.communicate()
    assert process.returncode == 0 and folder == own and (own / "code.so").exists()
