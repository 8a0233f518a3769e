"""The tasks of srun join, on a real cluster of two nodes: same curve, shared work, nobody of another attempt."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditmoe.data.storage.stopping import EXIT_STOPPED
from ditmoe.launcher.local.launch import free_port
from tests.forked import DITMOE, run_forked
from tests.slurm.cluster import Cluster

CONFIG = """
run: {{dir: {run}}}
launch: {{processes: 4, device: cpu, threads: 1}}
model: {{depth: 2, hidden: 32, heads: 4, patch: 2, experts: 4, experts_per_token: 2}}
data: {{sources: [{{path: {shards}}}], workers: 1, flip: true}}
parallel: {{expert: 4, zero: 1}}
train: {{steps: 5, batch: 16, precision: fp32, log_every: 1, checkpoint_every: 100}}
optim: {{lr: 1.0e-3}}
"""
TASKS = ("--nodes=2", "--ntasks-per-node=2")
NODES = ("--nodes=2", "--ntasks-per-node=1")
SECONDS = 280
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The folder of a run of four processes on this machine, which has experts on each."""
    folder = tmp_path_factory.mktemp("local")
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(run=folder / "run", shards=shards))
    done = run_forked([*DITMOE, "train", str(config)], folder / "output", 4)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def make_config(tmp_path: Path, shards: Path) -> Callable[[], Path]:
    def make() -> Path:
        file = tmp_path / "run.yaml"
        file.write_text(CONFIG.format(run=tmp_path / "run", shards=shards))
        return file

    return make


def records(run: Path) -> list[dict[str, Any]]:
    file = run / "stats.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def assert_same_curve(run: Path, other: Path) -> None:
    found, expected = records(run), records(other)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5]
    for key in ("loss", "balance_loss", "grad_norm"):
        assert [record[key] for record in found] == pytest.approx([record[key] for record in expected], rel=1e-5)
    assert [record["expert_load"] for record in found] == [record["expert_load"] for record in expected]


def srun(cluster: Cluster, options: tuple[str, ...], *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Python in the tasks of a step."""
    return subprocess.run(
        ["srun", "--kill-on-bad-exit=1", *options, sys.executable, *command],
        env=cluster.environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def found_by(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


def test_every_task_knows_its_rank_and_so_does_accelerate(cluster: Cluster, tmp_path: Path) -> None:
    done = srun(cluster, TASKS, "-m", "tests.slurm.joining", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = found_by(tmp_path)
    assert [fact["rank"] for fact in found] == [0, 1, 2, 3]
    assert [fact["local_rank"] for fact in found] == [0, 1, 0, 1]
    assert [fact["host"] for fact in found] == ["n1", "n1", "n2", "n2"]
    for rank, fact in enumerate(found):
        assert fact["ranks"] == [0, 1, 2, 3]
        assert fact["accelerate"] == [rank, 4, rank % 2] and fact["accelerator"] == [rank, 4]


def test_what_is_left_of_an_earlier_attempt_does_not_join(cluster: Cluster, tmp_path: Path) -> None:
    """Ranks 0 and 2 of the first attempt still look for the others, at the same ports, when the second starts."""
    earlier, later = tmp_path / "earlier", tmp_path / "later"
    earlier.mkdir()
    later.mkdir()
    step = f"srun --overlap --nodes=2 --ntasks-per-node=2 {sys.executable} -m tests.slurm.joining"
    script = f"""
export MASTER_PORT={free_port()} OMP_NUM_THREADS=1
SLURM_RESTART_COUNT=0 {step} {earlier} 0,2 &
left=$!
while [ ! -e {earlier}/started-0 ] || [ ! -e {earlier}/started-2 ]; do sleep 0.1; done
SLURM_RESTART_COUNT=1 {step} {later}
code=$?
kill -0 $left && echo still waiting
kill $left
wait
exit $code
"""
    output = tmp_path / "output.txt"
    job = cluster.submit(script, *TASKS, f"--output={output}")
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=SECONDS) == "COMPLETED", output.read_text()
    found = found_by(later)
    assert [fact["ranks"] for fact in found] == [[0, 1, 2, 3]] * 4
    assert {fact["meeting"].split(".")[2] for fact in found} == {"1"}
    assert not found_by(earlier) and not list(earlier.glob("failed-*"))
    assert "still waiting" in output.read_text()


@pytest.mark.parametrize(
    ("tasks", "overrides"),
    [(TASKS, ()), (NODES, ("launch.processes=2",))],
    ids=["two tasks on each node", "one task on each node, with two processes of its own"],
)
def test_training_has_the_curve_of_four_local_processes(
    cluster: Cluster,
    tasks: tuple[str, ...],
    overrides: tuple[str, ...],
    make_config: Callable[[], Path],
    local: Path,
) -> None:
    config = make_config()
    done = srun(cluster, tasks, *DITMOE, "train", str(config), *overrides)
    assert done.returncode == 0, done.stderr
    run = config.with_suffix("")
    assert done.stdout.count("the run is complete: step 5") == 1
    assert_same_curve(run, local)


def test_signals_to_all_processes_of_a_step_stop_the_run_in_order(
    cluster: Cluster, make_config: Callable[[], Path], local: Path
) -> None:
    """Reading processes leave them to the ranks: the step is finished, a checkpoint written, and nothing lost."""
    config = make_config()
    run = config.with_suffix("")
    command = ["srun", *NODES, sys.executable, *DITMOE, "train", str(config), "launch.processes=2"]
    process = subprocess.Popen(
        [*command, "train.steps=100000"],
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        cluster.wait(lambda: len(records(run)) > 2 or process.poll() is not None, "the first steps", SECONDS)
        assert process.poll() is None, process.communicate()
        step = cluster.run("squeue", "--steps", "--noheader", "--format=%i").split()
        (number,) = [name for name in step if name.endswith(".0")]
        for name in ("CONT", "USR2", "USR1", "TERM"):
            cluster.run("scancel", f"--signal={name}", number, check=False)  # the step may have ended by the first
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == EXIT_STOPPED, err
    assert "reading process" not in err and "rank" not in err, err
    assert "stopped by " in out, out
    found, expected = records(run)[:5], records(local)
    last = int(sorted((run / "checkpoints").glob("step-*"))[-1].name.removeprefix("step-"))
    assert last == records(run)[-1]["step"] < 100000
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected[: len(found)]], rel=1e-5)


def test_evaluation_shares_its_work(cluster: Cluster, local: Path, tmp_path: Path) -> None:
    """The command itself, on each of two nodes, with a note of who has drawn which image."""
    program = tmp_path / "noting.py"
    program.write_text(NOTING)
    options = ["--count", "64", "--steps", "2", "--batch", "4", "--chunk", "4", "--no-recogniser"]
    options += ["--sampler", "euler", "--cache", str(tmp_path / "cache")]
    done = srun(cluster, NODES, str(program), str(tmp_path), "evaluate", *options, "--processes", "1", str(local))
    assert done.returncode == 0, done.stderr
    drawn = [(tmp_path / f"drawn-{rank}").read_text().split() for rank in (0, 1)]
    assert all(drawn) and sorted(map(int, drawn[0] + drawn[1])) == list(range(64))
    assert done.stdout.count("metrics  ") == 1
    (metrics,) = local.glob("evaluations/*/metrics.json")
    assert json.loads(metrics.read_text())["results"]["classifier"]["drawn_images"] == 64


def test_encoding_shares_its_shards(cluster: Cluster, make_vae: Callable[..., Path], tmp_path: Path) -> None:
    """Two processes on each of two nodes write the bytes of one."""
    vae = make_vae(tmp_path / "vae", in_channels=1, out_channels=1)
    pack = ["data", "pack", "digits", str(tmp_path / "digits"), "--count", "80", "--shard-samples", "10"]
    packed = run_forked([*DITMOE, *pack], tmp_path / "output")
    assert packed.returncode == 0, packed.stderr
    encode = [*DITMOE, "data", "encode", str(tmp_path / "digits")]
    options = ["--vae", str(vae), "--device", "cpu", "--processes"]
    alone = run_forked([*encode, str(tmp_path / "one"), *options, "1"], tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    done = srun(cluster, NODES, *encode, str(tmp_path / "four"), *options, "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("encoded 80 images") == 1
    expected = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.tar")}
    assert len(expected) == 8
    assert {path.name: path.read_bytes() for path in (tmp_path / "four").glob("*.tar")} == expected


NOTING = """
import sys
import time
from pathlib import Path
folder = Path(sys.argv.pop(1))
from ditmoe.launcher.cli import main
from ditmoe.parallel.ranks import this_process
from ditmoe.sampling.evaluation import of_run
generate = of_run.generate

def noting(model, label_N, numbers, *rest, **options):
    with (folder / f"drawn-{this_process().rank}").open("a") as file:
        file.write("".join(f"{number}\\n" for number in numbers))
    while not all((folder / f"drawn-{rank}").exists() for rank in (0, 1)):
        time.sleep(0.05)  # the other has begun as well, and may be slower
    return generate(model, label_N, numbers, *rest, **options)

of_run.generate = noting
main()
"""
