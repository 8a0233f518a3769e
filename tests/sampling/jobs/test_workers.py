"""The processes of a job are there for the same."""

from pathlib import Path

import pytest

from tests.forked import run_forked

PROGRAM = """
import sys
from ditmoe.model.errors import UserError
from ditmoe.sampling.jobs.workers import join_workers
from ditmoe.parallel.ranks import this_process
task = sys.argv[1 + this_process().rank]
try:
    workers = join_workers(task)
except UserError as error:
    print(error)
    sys.exit(2)
print("rank", workers.rank, "of", workers.ranks)
workers.leave()
"""


@pytest.mark.parametrize(("second", "code"), [("step-2", 0), ("step-4", 2)])
def test_processes_that_come_for_another_task_are_refused(tmp_path: Path, second: str, code: int) -> None:
    """As where training writes a checkpoint between the moments at which two of them look for the newest."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = run_forked([str(program), "step-2", second], tmp_path / "output", processes=2, seconds=120)
    assert done.returncode == code, done.stderr
    refused = "rank 0 is to do step-2, but rank 1 step-4; expected the same of all: name the checkpoint\n"
    assert done.stdout == ("rank 0 of 2\n" if code == 0 else refused)
