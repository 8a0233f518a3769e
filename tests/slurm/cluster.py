"""A real Slurm on one machine: a controller and some virtual nodes, all of whose files lie in one folder.

    python -m tests.slurm.cluster up D [--nodes 2] [--port-base P]
    eval "$(python -m tests.slurm.cluster env D)"      # then sbatch, squeue, … speak to this cluster
    python -m tests.slurm.cluster status D
    python -m tests.slurm.cluster down D

It needs root and Slurm's programs (Debian: `slurmctld slurmd slurm-client munge`). Each daemon, and each node with
its jobs, has process numbers of its own, so that the kernel ends all of them with the first. Several clusters run
side by side: each has its own folder, ports, and addresses (from the first port).
"""

import argparse
import contextlib
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
SETTINGS: Final = ROOT / "slurm/test_cluster"
PROGRAMS: Final = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
PACKAGES: Final = "slurmctld slurmd slurm-client munge"
CPUS, MEMORY_MIB, GPUS = 8, 16000, 2
"""Of each node, on paper: the machine may have less."""
START_SECONDS: Final = 30
_MARK: Final = "DITMOE_TEST_CLUSTER"
"""The variable by which a cluster's processes are found again: its folder and the name of the daemon."""
_POLL_SECONDS: Final = 0.1


def why_not() -> str | None:
    """Why this machine cannot run a cluster, or None where it can."""
    if os.geteuid() != 0:
        return "a virtual Slurm cluster needs root"
    missing = [name for name in PROGRAMS if _find(name) is None]
    if missing:
        return f"a virtual Slurm cluster needs {', '.join(missing)}: apt-get install {PACKAGES}"
    spaces = subprocess.run(
        ["unshare", "-m", "-u", "-p", "--fork", "--mount-proc", "true"], capture_output=True, text=True, timeout=30
    )
    if spaces.returncode:
        return f"a virtual Slurm cluster needs namespaces: {spaces.stderr.strip()}"
    return None


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass(frozen=True)
class Cluster:
    """A cluster, running or not. Methods that ask it something need it to run."""

    folder: Path
    nodes: int = 2
    port_base: int = 17800
    """The controller's port; those after it are the nodes'. It also makes the nodes' addresses."""
    tied: bool = False
    """Ends with the process that started it, however that ends."""

    @property
    def names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    def address(self, node: str) -> str:
        """Within 127/8, and not that of another cluster's node."""
        return f"127.{self.port_base >> 8}.{self.port_base & 255}.{node[1:]}"

    @property
    def variables(self) -> dict[str, str]:
        """What Slurm's programs, and jobs of this checkout, find in their environment."""
        path = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"]
        return {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": ":".join(path),
            "PYTHONPATH": f"{ROOT / '.typing'}:{ROOT}",
        }

    @property
    def environment(self) -> dict[str, str]:
        """This process's, without what an outer Slurm job has set, and with `variables`."""
        outer = ("SLURM_", "SBATCH_", "SRUN_")
        return {key: value for key, value in os.environ.items() if not key.startswith(outer)} | self.variables

    # Starting and stopping.

    def up(self) -> None:
        """Start all daemons, with no memory of earlier jobs, and wait until every node is idle."""
        self.down()
        for name in ("state", "spool"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("state", "munge", "log", *(f"spool/{node}" for node in self.names)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write_settings()
        munge = self.folder / "munge"
        self._start(
            "munged",
            [
                *(
                    "munged",
                    "--foreground",
                    "--force",
                    f"--key-file={munge / 'key'}",
                    f"--socket={munge / 'socket'}",
                ),
                *(f"--pid-file={munge / 'pid'}", f"--log-file={self.folder / 'log/munged.log'}"),
                f"--seed-file={munge / 'seed'}",
            ],
        )
        self.wait(lambda: (munge / "socket").exists(), "munged's socket", START_SECONDS)
        self._start("slurmctld", ["slurmctld", "-D", "-c"], host="controller")
        for node in self.names:
            self.start_node(node)
        try:
            self.wait(lambda: set(self.node_states().values()) == {"idle"}, "idle nodes", START_SECONDS)
        except TimeoutError as error:
            logs = "\n".join(self.log(path.stem) for path in sorted((self.folder / "log").glob("slurm*.log")))
            self.down()
            raise TimeoutError(f"{error}\n{logs}") from None

    def down(self) -> None:
        """End all daemons and all jobs at once. Nothing happens where none run."""
        while pids := self._processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
            time.sleep(0.02)

    def start_node(self, node: str) -> None:
        """Start a node's daemon, as after a crash. The node is idle some seconds later."""
        self._start(node, ["slurmd", "-D", "-N", node], host=node)

    def kill_node(self, node: str) -> None:
        """Kill all that runs on a node at once, as a loss of power does. Slurm notices it after half a minute."""
        for pid in self._processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self.wait(lambda: not self._processes(node), f"the end of {node}", 10)

    def _write_settings(self) -> None:
        key = self.folder / "munge/key"
        key.write_bytes(random.randbytes(128))
        key.chmod(0o400)
        for number in range(GPUS):
            device = self.folder / f"gpu{number}"
            if not device.exists():
                os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        values = {"folder": self.folder, "nodes": self.nodes, "port": self.port_base, "address": "127.0.0.1"}
        for name in ("slurm.conf", "gres.conf", "cgroup.conf"):
            text = Template((SETTINGS / name).read_text(encoding="utf-8")).substitute(values)
            if name == "slurm.conf":
                text += "".join(
                    f"NodeName={node} NodeHostname={node} NodeAddr={self.address(node)}"
                    f" Port={self.port_base + number} CPUs={CPUS} RealMemory={MEMORY_MIB} Gres=gpu:{GPUS}\n"
                    for number, node in enumerate(self.names, 1)
                )
            (self.folder / name).write_text(text, encoding="utf-8")
        hosts = ["127.0.0.1 localhost", "::1 localhost ip6-localhost"]
        hosts += [f"{self.address(node)} {node}" for node in self.names]
        (self.folder / "hosts").write_text("".join(f"{line}\n" for line in hosts), encoding="utf-8")

    def _start(self, name: str, command: Sequence[str], host: str | None = None) -> None:
        """Start a daemon below a process that is number 1 of its own: when that ends, all below it end."""
        prepare = ""
        if host is not None:
            prepare = f"hostname {host} && mount --bind {shlex.quote(str(self.folder / 'hosts'))} /etc/hosts && "
        # The shell stays: it takes in processes whose parents have ended, which a daemon as number 1 would not.
        script = f"{prepare}{shlex.join(command)}; exit $?"
        spaces = [
            "unshare",
            "-m",
            "-u",
            "-p",
            "--fork",
            "--kill-child=SIGKILL",
            "--mount-proc",
            "sh",
            "-c",
            script,
        ]
        tie = ["setpriv", "--pdeathsig", "KILL"] if self.tied else []
        # Its jobs get the environment of those who submit them, not this one.
        variables = self.environment | {_MARK: f"{self.folder}:{name}"}
        with (self.folder / f"log/{name}.out").open("ab") as output:
            subprocess.Popen(
                [*tie, *spaces],
                cwd=self.folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _processes(self, name: str | None = None) -> list[int]:
        """The outermost process of each daemon, or of one."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                program = (folder / "cmdline").read_bytes().split(b"\0")[0]
                entries = (folder / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if program not in (b"unshare", b"setpriv"):
                continue
            for entry in entries:
                key, _, value = os.fsdecode(entry).partition("=")
                place, _, daemon = value.rpartition(":")
                if key == _MARK and place == str(self.folder) and name in (None, daemon):
                    found.append(int(folder.name))
        return found

    # Asking and ordering.

    def run(self, *command: str, seconds: float = 60, check: bool = True) -> str:
        """Run one of Slurm's programs, or another in the cluster's environment, and return what it prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=seconds)
        if check and done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def on_node(self, node: str, *command: str, seconds: float = 60) -> str:
        """Run a command as a process of a node, with its names, mounts and process numbers, but not in a job."""
        (pid,) = self._processes(node)
        (init,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return self.run("nsenter", "-t", init, "-m", "-u", "-p", *command, seconds=seconds)

    def submit(self, script: str, *options: str, environment: Mapping[str, str] | None = None) -> str:
        """Submit the lines of a script; returns the job's number. Its output is lost unless an option keeps it."""
        done = subprocess.run(
            ["sbatch", "--parsable", "--output=/dev/null", *options],
            env=self.environment | dict(environment or {}),
            input=f"#!/bin/bash\n{script}\n",
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"sbatch: {done.stderr}")
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, by its names: JobState, Restarts, NodeList, …"""
        words = shlex.split(self.run("scontrol", "-o", "show", "job", job), posix=False)
        return {key: value for key, sign, value in (word.partition("=") for word in words) if sign}

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait_for_state(self, job: str, *states: str, seconds: float = 60) -> str:
        """Wait until a job is in one of these states, such as COMPLETED; returns which."""
        self.wait(
            lambda: self.state(job) in states,
            lambda: f"job {job} to be {' or '.join(states)}; it is {self.job(job)}",
            seconds,
        )
        return self.state(job)

    def node_states(self) -> dict[str, str]:
        """Each node's state in one word, such as idle, allocated, down*, drained; none while nobody answers."""
        lines = self.run("sinfo", "-h", "-N", "-p", "ci", "-o", "%N %T", check=False).split("\n")
        return dict(line.split(maxsplit=1) for line in lines if line)

    def wait(self, condition: Callable[[], bool], what: str | Callable[[], str], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:.0f} s for {what if isinstance(what, str) else what()}")
            time.sleep(_POLL_SECONDS)

    def log(self, name: str, lines: int = 20) -> str:
        """The last lines of a daemon's log: slurmctld, slurmd-n1, …"""
        text = (self.folder / f"log/{name}.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join([f"{name}:", *text.splitlines()[-lines:]])

    def clear(self) -> None:
        """End all jobs at once, and bring every node back: what one test leaves behind, the next does not see."""
        for node in self.names:
            if not self._processes(node):
                self.start_node(node)
        self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        self.run("scancel", "--user=root", check=False)

        def clean() -> bool:
            states = self.node_states()
            for node, state in states.items():
                if state.rstrip("*").startswith(("down", "drain", "fail")):
                    # Refused while the node's daemon has not yet answered.
                    self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
            return set(states.values()) == {"idle"} and not self.run(
                "squeue", "-h", "-t", "all", "-t", "PD,R,CG,S"
            )

        self.wait(clean, lambda: f"idle nodes; they are {self.node_states()}", 60)


def _free_base(nodes: int) -> int:
    """A first port of a range in which nobody listens, below those that the kernel hands out."""
    while True:
        base = random.randrange(17000, 32000, 16)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(base, base + nodes + 1):
                    stack.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
        return base


@contextlib.contextmanager
def running(folder: Path, nodes: int = 2) -> Iterator[Cluster]:
    """A cluster on free ports that ends with this process at the latest."""
    cluster = Cluster(folder, nodes, _free_base(nodes), tied=True)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


def _read(folder: Path) -> Cluster:
    """The cluster that was started in a folder."""
    settings = folder / "slurm.conf"
    if not settings.is_file():
        sys.exit(f"{folder}: no slurm.conf; expected the folder of a cluster that was started by `up`")
    lines = settings.read_text(encoding="utf-8").splitlines()
    (port,) = (line.split("=")[1] for line in lines if line.startswith("SlurmctldPort="))
    return Cluster(folder, sum(line.startswith("NodeName=") for line in lines), int(port))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.cluster", description=__doc__)
    parser.add_argument("verb", choices=["up", "down", "status", "env", "shell"])
    parser.add_argument("folder", type=lambda text: Path(text).absolute())
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument(
        "--port-base", type=int, help="of as many ports as there are nodes, and one; default: free ones"
    )
    options = parser.parse_args(arguments)
    if options.verb == "up":
        if reason := why_not():
            sys.exit(reason)
        options.folder.mkdir(parents=True, exist_ok=True)
        cluster = Cluster(options.folder, options.nodes, options.port_base or _free_base(options.nodes))
        cluster.up()
        print(f"{cluster.folder}: {cluster.nodes} nodes, port {cluster.port_base}")
        return
    cluster = _read(options.folder)
    if options.verb == "down":
        cluster.down()
    elif options.verb == "status":
        for state in cluster.node_states().items():
            print(*state)
        print(cluster.run("squeue"), end="")
    elif options.verb == "env":
        for key, value in cluster.variables.items():
            print(f"export {key}={shlex.quote(value)}")
    else:
        shell = os.environ.get("SHELL", "/bin/sh")
        os.execve(shell, [shell], cluster.environment)


if __name__ == "__main__":
    main()
