"""The virtual cluster does what the tests of jobs rely on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import GPUS, ROOT, Cluster, main, running, why_not


def test_steps_run_on_all_nodes_with_devices_and_this_checkout(cluster: Cluster) -> None:
    program = (
        "import os, socket, ditmoe.model.errors as errors\n"
        "print(socket.gethostname(), errors.__file__, os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    output = cluster.run(
        *("srun", "--nodes=2", "--ntasks-per-node=1", f"--gpus-per-node={GPUS}", "--time=1"),
        *("python", "-c", program),
    )
    module = ROOT / ".typing/ditmoe/model/errors.py"
    assert sorted(output.splitlines()) == [f"n1 {module} 0,1", f"n2 {module} 0,1"]


def test_nodes_find_each_other_by_name(cluster: Cluster) -> None:
    output = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "getent", "hosts", "n1", "n2")
    assert sorted(set(output.split())) == sorted({"n1", "n2", cluster.address("n1"), cluster.address("n2")})


def test_a_job_is_requeued_by_its_order_by_preemption_and_by_the_loss_of_a_node(
    cluster: Cluster, tmp_path: Path
) -> None:
    low = cluster.submit(
        f"echo $SLURM_RESTART_COUNT >> {tmp_path}/starts; sleep 100 & wait",
        *(
            "--requeue",
            "--nodes=2",
            "--exclusive",
            "--partition=ci",
            f"--output={tmp_path}/%j.txt",
            "--open-mode=append",
        ),
    )
    cluster.wait_for_state(low, "RUNNING")
    cluster.run("scontrol", "requeue", low)
    cluster.wait(lambda: cluster.job(low)["Restarts"] == "1", "a requeue", 30)
    cluster.wait_for_state(low, "RUNNING")
    high = cluster.submit("true", "--nodes=1", "--partition=high", f"--output={tmp_path}/%j.txt")
    cluster.wait_for_state(high, "COMPLETED")
    cluster.wait_for_state(low, "RUNNING")
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.wait_for_state(low, "PENDING")
    assert cluster.job(low)["Restarts"] == "3"
    assert (tmp_path / "starts").read_text().split() == ["1", "2"]


def test_a_node_is_clean_again_after_a_test_has_set_it_down(cluster: Cluster) -> None:
    cluster.run("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    job = cluster.submit("sleep 100", "--nodes=2", "--output=/dev/null")
    cluster.clear()
    assert cluster.node_states() == {"n1": "idle", "n2": "idle"}
    assert cluster.state(job) == "CANCELLED"


def test_killing_a_node_ends_all_that_runs_there(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(f"sleep 1234.5 & echo > {tmp_path}/running; wait", "--nodelist=n2", "--output=/dev/null")
    cluster.wait(lambda: (tmp_path / "running").exists(), "the job", 30)
    assert "sleep 1234.5" in cluster.on_node("n2", "ps", "-e", "-o", "args")
    assert "sleep 1234.5" not in cluster.on_node("n1", "ps", "-e", "-o", "args")
    cluster.kill_node("n2")
    assert "sleep\0001234.5" not in "\n".join(_command_lines())
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.wait_for_state(job, "PENDING")


def _command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return found


def test_clusters_run_side_by_side(cluster: Cluster, tmp_path: Path) -> None:
    with running(tmp_path, nodes=1) as other:
        assert other.node_states() == {"n1": "idle"}
        job = other.submit("true", "--output=/dev/null")
        other.wait_for_state(job, "COMPLETED")
        assert cluster.node_states() == {"n1": "idle", "n2": "idle"}
    assert cluster.node_states() == {"n1": "idle", "n2": "idle"}
    assert other.node_states() == {}


def test_a_cluster_ends_with_a_killed_test_run(cluster: Cluster, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from tests.slurm.cluster import running\n"
        "with running(Path(sys.argv[1]), nodes=1) as cluster:\n"
        "    cluster.submit('sleep 4321.5', '--output=/dev/null'); print('up', flush=True); time.sleep(100)"
    )
    tests = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert tests.stdout is not None and tests.stdout.readline() == "up\n"
    cluster.wait(lambda: any("4321.5" in line for line in _command_lines()), "its job", 30)
    os.kill(tests.pid, signal.SIGKILL)
    tests.wait()
    cluster.wait(
        lambda: not any(str(tmp_path) in line or "4321.5" in line for line in _command_lines()), "its end", 10
    )
    tests.stdout.close()


def test_the_command_starts_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if reason := why_not():
        pytest.skip(reason)
    try:
        main(["up", str(tmp_path), "--nodes=1"])
        main(["status", str(tmp_path)])
        assert "n1 idle\n" in capsys.readouterr().out
        main(["env", str(tmp_path)])
        settings = capsys.readouterr().out
        shown = subprocess.run(
            ["sh", "-c", f"{settings} sinfo -h -o %P"], capture_output=True, text=True, timeout=60
        )
        assert shown.stdout.split() == ["ci*", "high"]
    finally:
        main(["down", str(tmp_path)])
    assert not any(str(tmp_path) in line for line in _command_lines())
    with pytest.raises(SystemExit, match=r"no slurm\.conf"):
        main(["status", str(tmp_path / "elsewhere")])


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert why_not() == "a virtual Slurm cluster needs root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("tests.slurm.cluster.PROGRAMS", ("slurmctld-absent",))
    assert str(why_not()).startswith("a virtual Slurm cluster needs slurmctld-absent: apt-get install")
