"""Host memory of real starts beside the planner's figures: fresh, resumed, and with a checkpoint saved at once.

    python -m benchmarks.start_memory [--only S] [--to FILE.json]

Each start is of real processes that talk over gloo and compute on the CPU. They join each other, build the
network, hand it to DeepSpeed, and fill it with initial values or load a checkpoint. Then a first checkpoint is
copied for its save. Compared is the most that the largest rank holds of private pages (`RssAnon`, looked at every
5 ms). Pages of libraries, which processes share (`RssFile`), are beside them: a busy machine takes them away.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.suite import machine
from ditmoe.launcher.local.launch import free_port
from ditmoe.model.config import ModelConfig
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.estimate import fullest_stage
from ditmoe.parallel.planner.host import LIBRARY_BYTES, STARTING_BYTES, host_memory
from ditmoe.parallel.planner.memory import Workload

GIB: Final = 2**30
SECONDS: Final = 240
"""Longest that a start may take."""


class Case(NamedTuple):
    """A start."""

    preset: str
    processes: int
    zero: int
    precision: str
    expert: int = 1
    saves: bool = True
    """Whether a checkpoint is saved at once, of a copy in memory."""

    @property
    def config(self) -> ModelConfig:
        """Of its network."""
        return ModelConfig(preset=self.preset, image_size=32, channels=3, num_classes=10)

    @property
    def layout(self) -> Layout:
        """Its processes are data ranks."""
        return Layout(1, self.processes, self.expert, 1, self.zero, 1, 1)

    def __str__(self) -> str:
        """As the table and tests call it."""
        expert = f" expert {self.expert}" if self.expert > 1 else ""
        return f"{self.preset} × {self.processes}, ZeRO {self.zero}{expert}, {self.precision}"


CASES: Final = (
    Case("DiT-S/2", 2, 1, "fp32"),
    Case("DiT-B/2", 2, 1, "bf16", saves=False),
    Case("DiT-S/2", 4, 3, "fp32"),
    Case("DiT-B/2", 4, 3, "bf16", saves=False),
    Case("DiT-S/2-4E2A", 2, 1, "fp32", expert=2, saves=False),
)


class Figure(NamedTuple):
    """Bytes of the rank that holds most."""

    start: str
    """`fresh`, `resumed`, or `saved`."""
    measured: int
    """Private pages, at most."""
    shared: int
    """Pages of mapped files beside them, most of them of libraries."""
    planned: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases with these words")
    parser.add_argument("--to", type=Path, help="a JSON file for the figures; the table goes beside it")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of is not None:
        _be_rank(*json.loads(arguments.rank_of))
        return
    import torch

    facts = machine.facts(torch.device("cpu"))
    versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items())
    lines = [
        f"{facts['date']} UTC, commit {facts['commit'][:12]}; {facts['hardware']['cpu']},"
        f" {facts['hardware']['memory_gib']} GiB; {versions}",
        "private pages of the largest rank, at most; beside them those of mapped files, which processes share",
        f"{'start':<52}{'measured':>12}{'shared':>12}{'planned':>12}{'planned / measured':>20}",
    ]
    print("\n".join(lines), flush=True)
    found = []
    for case in CASES:
        if arguments.only not in str(case):
            continue
        for figure in measure(case):
            gib = "".join(f"{size / GIB:>8.3f} GiB" for size in (figure.measured, figure.shared, figure.planned))
            lines.append(f"{f'{case}: {figure.start}':<52}{gib}{figure.planned / figure.measured:>20.3f}")
            print(lines[-1], flush=True)
            found.append({"case": case._asdict(), **figure._asdict()})
            if arguments.to is not None:
                arguments.to.write_text(json.dumps({**facts, "figures": found}, indent=1) + "\n")
                arguments.to.with_suffix(".txt").write_text("\n".join(lines) + "\n")


def measure(case: Case) -> Iterator[Figure]:
    """Start a case anew and with a checkpoint."""
    host, kept = planned(case)
    with _folder() as folder:
        ranks = _started(case, folder, "fresh")
        yield _figure("fresh", [rank["start"] for rank in ranks], host.start)
        if case.saves:
            yield _figure("saved", [rank["saved"] for rank in ranks], STARTING_BYTES + kept + host.copy)
        ranks = _started(case, folder, "resumed")
        yield _figure("resumed", [rank["start"] for rank in ranks], host.start)


def planned(case: Case) -> tuple[Any, int]:
    """Host memory as the planner has it, and what is kept of the start."""
    from ditmoe.parallel.planner.memory import start_of_stage
    from ditmoe.parallel.stages import stage_blocks

    workload = Workload(case.precision, False)
    _, memory = fullest_stage(case.config, case.layout, workload)
    host = host_memory(case.config, case.layout, workload, memory, on_cpu=True, asynchronous=case.saves, workers=0)
    (blocks,) = stage_blocks(case.config, 1)
    return host, start_of_stage(case.config, case.layout, blocks, workload, on_cpu=True).kept


def _figure(start: str, ranks: list[dict[str, int]], planned: int) -> Figure:
    most = max(ranks, key=lambda rank: rank["RssAnon"])
    return Figure(start, most["RssAnon"], most["RssFile"], planned - LIBRARY_BYTES)


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ditmoe-benchmark-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _started(case: Case, folder: Path, start: str) -> list[dict[str, Any]]:
    """Start the processes, and wait until they have ended; what each of them held."""
    port = free_port()
    program = [sys.executable, "-m", "benchmarks.start_memory", "--rank-of"]
    running = []
    for rank in range(case.processes):
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": case.processes,
            "LOCAL_WORLD_SIZE": case.processes,
            "MASTER_PORT": port,
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": 1,
        }
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        running.append(
            subprocess.Popen(
                [*program, json.dumps([list(case), str(folder), start])],
                env=environment,
                cwd=machine.ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        answers = [process.communicate(timeout=SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, answers, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(answer.splitlines()[-1]) for answer, _ in answers]


def _be_rank(values: list[Any], folder: str, start: str) -> None:
    """As a rank: start, save where there is nothing yet, and say what was held."""
    case, run = Case(*values), Path(folder)
    import torch

    torch.set_num_threads(1)
    from ditmoe.model.config import EmaConfig, ObjectiveConfig
    from ditmoe.model.dit import DiT
    from ditmoe.model.objective import make_objective
    from ditmoe.parallel import processes
    from ditmoe.parallel.checkpoint.saver import CheckpointSaver
    from ditmoe.parallel.checkpoint.training_state import load_training_state
    from ditmoe.parallel.config import CheckpointConfig, OptimConfig
    from ditmoe.parallel.engine.training_engine import TrainingEngine
    from ditmoe.parallel.start.fresh import Fresh

    watch, device = _Watch(), torch.device("cpu")
    processes.join(device)
    with torch.device("meta"):
        network = DiT(case.config)
    initial = None if start == "resumed" else Fresh(0)
    objective = make_objective(ObjectiveConfig())
    settings = OptimConfig(lr=1e-4), EmaConfig(), case.precision
    engine = TrainingEngine(network, objective, case.layout, *settings, {}, device, initial)
    info, _ = load_training_state(run, engine)
    assert (info is None) == (start == "fresh")
    found = {"start": watch.most()}
    if start == "fresh":
        with CheckpointSaver(run, CheckpointConfig(asynchronous=case.saves)) as saver:
            facts = {"model": case.config.model_dump(mode="json"), "objective": {"kind": "rectified_flow"}}
            saver.save(engine, 0, {}, facts, {})
        found["saved"] = watch.most()
    processes.leave()
    print(json.dumps(found), flush=True)
    os._exit(0)  # threads of DeepSpeed's groups are still there


class _Watch:
    """The most that this process holds, by kind of page."""

    def __init__(self) -> None:
        self._most: Counter[str] = Counter()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            text = Path("/proc/self/status").read_text()
            for key, size in re.findall(r"(RssAnon|RssFile):\s+(\d+) kB", text):
                self._most[key] = max(self._most[key], int(size) * 1024)
            time.sleep(0.005)

    def most(self) -> dict[str, int]:
        """Bytes since the last call; waits for a look at what is held now."""
        time.sleep(0.05)
        found, self._most = self._most, Counter()
        return dict(found)


if __name__ == "__main__":
    main()
