"""Rank 0 may work for all as long as it takes: the others wait beyond the time-out of a collective."""

import json
from pathlib import Path

import pytest

from tests.forked import run_forked

PROGRAM = """
import json, os, signal, sys, threading, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from ditmoe.model.errors import MissingProcessesError
from ditmoe.parallel.alone import first_rank_works, from_first_rank

timeout = timedelta(seconds=float(sys.argv[2]))
longer = 1.3 * timeout.total_seconds()
dist.init_process_group("gloo", timeout=timeout)
rank, found = dist.get_rank(), {}

# All at a time: work, what work makes, and a collective that nothing but the work holds up.
group, told_in = dist.new_group(timeout=timeout), dist.new_group(timeout=timeout)
dist.barrier()

def work():
    with first_rank_works("sleeps", timeout=timeout) as works:
        if works:
            time.sleep(longer)
        found["works"] = works

def make():
    wait = lambda: time.sleep(longer) or [rank, "made"]
    found["made"] = from_first_rank(wait, "sleeps, too", told_in, "another", timeout)

threads = [threading.Thread(target=each) for each in (work, make)]
for thread in threads:
    thread.start()
try:
    if rank == 0:
        threads[0].join()
    dist.barrier(group=group)
    found["collective"] = "waited"
except RuntimeError as error:
    found["collective"] = "gave up"
for thread in threads:
    thread.join()

if rank == 0:
    # Another process of the machine wakes it up again when the other rank has said what it met.
    if os.fork() == 0:
        while not Path(sys.argv[1], "1.json").exists():
            time.sleep(0.05)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
try:
    with first_rank_works("stands still", timeout=timeout) as works:
        if works:
            os.kill(os.getpid(), signal.SIGSTOP)
except MissingProcessesError as error:
    found["stopped"] = str(error)
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
os._exit(0)
"""


@pytest.mark.timeout(120)
def test_the_others_wait_as_long_as_they_hear_of_it(tmp_path: Path) -> None:
    """A collective alone would end; and a rank 0 that stands still is noticed after the time-out."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = run_forked([str(program), str(tmp_path), "2"], tmp_path / "output", processes=2)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first["works"], second["works"]) == (True, False)
    assert first["made"] == second["made"] == [0, "made"]
    assert second["collective"] == "gave up", "the work was longer than the time-out"
    assert second["stopped"].startswith("rank 0 stands still: nothing was heard of it for")
    said = [line for line in done.stderr.splitlines() if line.startswith("rank 0 ")]
    assert sorted(line.partition(", for ")[0] for line in said[:2]) == ["rank 0 sleeps", "rank 0 sleeps, too"]
    assert all(line.endswith("; the others wait") for line in said[:2])
