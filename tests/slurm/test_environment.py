"""What the tasks of a step know of each other, by variables as Slurm 22.05 sets them."""

import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe.model.errors import UserError
from ditmoe.parallel.meeting import PORTS_TRIED
from ditmoe.parallel.ranks import ThisProcess, this_process
from ditmoe.slurm.environment import FIRST_PORT, PORTS, Step, rank_variables, step_of

TASK = {
    "SLURM_JOB_ID": "71",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_LAUNCHER_PORT": "44685",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_CPUS_ON_NODE": "6",
}
"""Of the last of four tasks on two nodes."""
BATCH = {"SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
NODE_TASK = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


def test_a_task_of_several_on_a_node() -> None:
    found = rank_variables(TASK, cores=8)
    assert found.pop("DITMOE_MEETING") == "71.0.0.44685"
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1",
        "OMP_NUM_THREADS": "3",
    }
    process = this_process(rank_variables(TASK))
    assert process == ThisProcess(3, 4, 1, "n1", port, "71.0.0.44685", started=True, processes_here=2)
    assert not process.starts_ranks


def test_the_only_task_of_its_node_starts_ranks() -> None:
    found = rank_variables(TASK | NODE_TASK)
    assert "OMP_NUM_THREADS" not in found  # its ranks share the node's cores
    process = this_process(found)
    assert (process.rank, process.ranks, process.local_rank, process.starts_ranks) == (1, 2, 0, True)
    uneven = TASK | {"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
    assert not this_process(rank_variables(uneven)).starts_ranks


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH,
        BATCH | {"SLURM_STEP_ID": "4294967291"},  # as newer versions number a batch script
        TASK | {"SLURM_STEP_ID": "4294967290"},  # the shell of salloc
        TASK | NODE_TASK | {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_NODEID": "0"},
        TASK | {"RANK": "0", "WORLD_SIZE": "2"},  # torchrun below srun
        # A batch script that was submitted from a step, with what it inherited from there.
        {**TASK, **BATCH, "SLURM_JOB_NODELIST": "n1", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"},
    ],
    ids=["a laptop", "batch", "batch by number", "a shell", "one task", "torchrun", "submitted from a step"],
)
def test_what_is_no_rank(environment: dict[str, str]) -> None:
    if environment.get("SLURM_STEP_TASKS_PER_NODE") == "1":
        environment = {**environment, "SLURM_PROCID": "0"}
    assert rank_variables(environment) == {}


def test_no_two_starts_of_a_job_meet_alike() -> None:
    starts = [
        TASK | {"SLURM_RESTART_COUNT": restart, "SLURM_STEP_ID": step} for restart in "012" for step in ("0", "1")
    ]
    # Where srun passes no variables on, the restart is not known.
    starts += [TASK | {"SLURM_STEP_LAUNCHER_PORT": "33333"}]
    steps = [step_of(start) for start in starts]
    assert len({step.meeting for step in steps if step}) == len(starts)
    assert len({step.port for step in steps if step}) == len(starts)  # which is likely, not certain


@given(st.integers(1, 2**32), st.integers(0, 9), st.integers(0, 99))
def test_ports_are_below_those_that_the_system_hands_out(job: int, number: int, restart: int) -> None:
    step = Step(job, number, restart, "", 0, (1, 1), 0, 0, ("a", "b"))
    assert FIRST_PORT <= step.port < FIRST_PORT + PORTS <= 32768 - PORTS_TRIED


def test_a_user_may_say_where_to_meet() -> None:
    found = rank_variables(TASK | {"MASTER_ADDR": "n1-ib", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("n1-ib", "29500")
    assert "OMP_NUM_THREADS" not in found
    assert rank_variables(TASK | {"WORLD_SIZE": "4"})["WORLD_SIZE"] == "4"
    with pytest.raises(UserError, match=r"WORLD_SIZE = 8 .* step of 4 tasks"):
        rank_variables(TASK | {"WORLD_SIZE": "8"})


@pytest.mark.parametrize(("visible", "on_node", "local"), [("1", "2", "0"), ("0,1", "2", "1"), ("0", "1", "1")])
def test_the_number_of_a_task_s_gpu(visible: str, on_node: str, local: str) -> None:
    """One GPU bound to each task (`--gpus-per-task`): it is number 0 there. Two tasks of one GPU stay apart."""
    found = rank_variables(TASK | {"CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": on_node})
    assert found["LOCAL_RANK"] == local
    assert this_process(found).local_rank == int(local)


def test_a_share_of_the_cores() -> None:
    assert rank_variables(TASK, cores=2)["OMP_NUM_THREADS"] == "2"  # bound to two
    assert rank_variables(TASK | {"SLURM_CPUS_ON_NODE": "1"}, cores=8)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"SLURM_STEP_ID": "x"}, "SLURM_STEP_ID = 'x'"),
        ({"SLURM_PROCID": "4"}, "SLURM_PROCID = '4' in the environment; expected a number below 4"),
        ({"SLURM_LOCALID": "2"}, "SLURM_LOCALID = '2'"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID = '2'"),
        ({"SLURM_NODEID": None}, "without SLURM_NODEID"),
        ({"SLURM_STEP_NODELIST": "n[1-"}, "nodes 'n[1-'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, "tasks of 3 nodes, but SLURM_STEP_NODELIST names 2"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x99999)"}, "SLURM_STEP_TASKS_PER_NODE = '2(x99999)'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE = 'two'"),
        ({"SLURM_PROCID": "0"}, "rank 0 is on n2, but the first node of the step is n1"),
        ({"SLURM_RESTART_COUNT": "-1"}, "SLURM_RESTART_COUNT = '-1'"),
    ],
)
def test_what_contradicts_itself(changes: Mapping[str, str | None], words: str) -> None:
    environment = {key: value for key, value in {**TASK, **changes}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        rank_variables(environment)
    assert words in str(caught.value) and len(str(caught.value)) < 300


def test_any_environment_is_a_task_or_a_message() -> None:
    draw, read = random.Random(0), 0
    values = ["0", "1", "2", "-1", "", " 1", "1.0", "٣", "9" * 400, "\n", "n1", "n[1-2]", "1(x2)", "n[", "[1-2]"]
    for _ in range(5000):
        changed = draw.sample(sorted(TASK), draw.randint(0, 3))
        environment = {**TASK, **{name: draw.choice(values) for name in changed}}
        try:
            found = rank_variables(environment)
        except UserError as error:
            assert "SLURM_" in str(error) or "nodes " in str(error) or "rank 0 is on" in str(error)
        else:
            process = this_process(found)
            assert process.rank < process.ranks
            read += process.ranks > 1
    assert read > 500
