"""The interface that leads to the others, and machines whose own name stands for 127.0.1.1."""

import ipaddress
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from ditmoe.parallel import interfaces
from ditmoe.parallel.interfaces import choose_interface, interface_of, source_address

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK, OUTSIDE = ipaddress.ip_address("127.0.1.1"), ipaddress.ip_address("192.0.2.7")


def test_the_way_to_this_machine() -> None:
    source = source_address("127.0.0.1")
    assert source is not None and source.is_loopback
    assert interface_of(source) in psutil.net_if_addrs()
    assert source_address("no.such.host.invalid") is None
    assert interface_of(OUTSIDE) is None


@pytest.mark.parametrize("name", ["127.0.1.1", "no.such.host.invalid"])
def test_an_interface_is_chosen_where_the_name_does_not_lead_here(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    monkeypatch.setattr(interfaces, "interface_of", lambda source: f"to {source}")
    monkeypatch.setattr(interfaces, "source_address", lambda peer: ipaddress.ip_address("192.0.2.1"))
    assert choose_interface(OUTSIDE, "192.0.2.9") == "to 192.0.2.7"
    assert choose_interface(LOOPBACK, "192.0.2.9") == "to 192.0.2.1"  # rank 0's machine
    assert choose_interface(None, "192.0.2.9") == "to 192.0.2.1"
    assert choose_interface(LOOPBACK, None) is None  # there is no other machine


def test_a_name_that_leads_here_is_left_to_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "192.0.2.7")
    assert choose_interface(OUTSIDE, "192.0.2.9") is None


@pytest.fixture
def machines() -> Iterator[dict[str, str]]:
    """Two network namespaces with a cable between them: name of the machine → name of the namespace."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    spaces = {name: f"ditmoe-{os.getpid()}-{name}" for name in ("n1", "n2")}
    with ExitStack() as stack:
        try:
            for space in spaces.values():
                _ip("netns", "add", space)
                stack.callback(_ip, "netns", "del", space)
            first, second = spaces.values()
            _ip("link", "add", "c1", "netns", first, "type", "veth", "peer", "name", "c2", "netns", second)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        for number, space in enumerate(spaces.values(), 1):
            _ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", f"c{number}")
            _ip("-n", space, "link", "set", f"c{number}", "up")
            _ip("-n", space, "link", "set", "lo", "up")
        yield spaces


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


def test_machines_that_call_themselves_127_0_1_1_reach_each_other(
    machines: dict[str, str], tmp_path: Path
) -> None:
    """Two tasks on each, with the variables that srun sets and the hosts file that Debian writes."""
    running = []
    for rank in range(4):
        node = rank // 2
        name, other = f"n{node + 1}", f"n{2 - node}"
        hosts = tmp_path / f"hosts-{name}"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n10.77.0.{2 - node} {other}\n")
        variables = {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NODELIST": "n[1-2]",
            "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank % 2),
            "SLURM_NODEID": str(node),
            "OMP_NUM_THREADS": "1",
        }
        become = f'hostname {name} && mount --bind "$0" /etc/hosts && exec "$@"'
        command = ["ip", "netns", "exec", machines[name], "unshare", "-m", "-u", "--propagation", "private"]
        command += ["sh", "-c", become, str(hosts), sys.executable, "-m", "tests.slurm.joining", str(tmp_path)]
        running.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": f"{ROOT / '.typing'}:{ROOT}", **variables},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        errors = [process.communicate(timeout=200)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    found = [tmp_path / f"rank-{rank}.json" for rank in range(4)]
    assert all(path.exists() for path in found), errors
    facts = [json.loads(path.read_text()) for path in found]
    assert [fact["host"] for fact in facts] == ["n1", "n1", "n2", "n2"]
    assert [fact["interface"] for fact in facts] == ["c1", "c1", "c2", "c2"]
    assert all(fact["ranks"] == [0, 1, 2, 3] for fact in facts)
