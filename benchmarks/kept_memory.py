"""Whether the memory of a long training grows where its C library keeps what is freed.

    python -m benchmarks.kept_memory [--steps 2000] [--precision fp32]

Steps of a tiny DiT-MoE through our engine on one process, each on another batch and with other routers, so that
the experts' rows, and with them the sizes of what is allocated, are others in every step. Printed are the private
pages (`RssAnon`, MiB) after tenths of the steps: with freed memory kept, as `ditmoe train` has it on CPUs, and
without.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.suite import machine
from benchmarks.suite.networks import batch_for, lively_value
from ditmoe.launcher.local.launch import free_port
from ditmoe.launcher.local.memory import keep_freed_memory
from ditmoe.model.config import EmaConfig, ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.experts.moe import Experts, Router
from ditmoe.model.objective import RectifiedFlow, make_objective
from ditmoe.parallel import processes
from ditmoe.parallel.config import OptimConfig
from ditmoe.parallel.engine.initial import WholeValues
from ditmoe.parallel.engine.passes import MicroBatch
from ditmoe.parallel.engine.training_engine import TrainingEngine
from ditmoe.parallel.layout import Layout

MODEL: Final = ModelConfig(
    depth=2,
    hidden=64,
    heads=4,
    patch=2,
    experts=8,
    experts_per_token=2,
    image_size=16,
    channels=4,
    num_classes=10,
)
IMAGES: Final = 8
LOOKS: Final = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--keep", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.keep is not None:
        print(json.dumps(train(arguments.steps, arguments.precision, bool(arguments.keep))), flush=True)
        os._exit(0)  # threads of DeepSpeed's groups are still there
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['date']} UTC, commit {facts['commit'][:12]}; {facts['hardware']['cpu']}")
    for keep in (1, 0):
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": free_port()}
        more = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in {**alone, **more}.items()}}
        program = [sys.executable, "-m", "benchmarks.kept_memory", f"--steps={arguments.steps}", f"--keep={keep}"]
        program += [f"--precision={arguments.precision}"]
        done = subprocess.run(
            program, env=environment, cwd=machine.ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"freed memory {'kept' if keep else 'given back'}, {arguments.precision}: {found['seconds']:.0f} s,")
        print(f"  an expert's rows from {found['fewest']} to {found['most']} of {found['rows']}; MiB after steps")
        print("  " + "  ".join(f"{step}: {size}" for step, size in found["mib"].items()), flush=True)


def train(steps: int, precision: str, keep: bool) -> dict[str, Any]:
    """Train, and look at the memory after tenths of the steps, and early."""
    torch.manual_seed(0)
    processes.join(torch.device("cpu"))
    network = DiT(MODEL)
    layout = Layout(pipe=1, data=1, expert=1, tensor=1, zero=1, micro_batch=IMAGES, accumulation=1)
    settings = OptimConfig(), EmaConfig(), precision, dict[str, Any](), torch.device("cpu")
    objective = make_objective(ObjectiveConfig())
    engine = TrainingEngine(network, objective, layout, *settings, WholeValues(lively_value))
    if keep:
        assert keep_freed_memory()
    counts = Counter[int]()
    routers = [module for module in network.modules() if isinstance(module, Router)]
    for module in network.modules():
        if isinstance(module, Experts):
            module.register_forward_pre_hook(lambda _, given: counts.update(given[1].tolist()))
    batch, mib, begin = batch_for(MODEL, IMAGES, torch.device("cpu")), dict[int, float](), time.perf_counter()
    looks = {min(100, steps), *(steps * tenth // LOOKS for tenth in range(1, LOOKS + 1))}
    for step in range(1, steps + 1):
        with torch.no_grad():
            for router in routers:
                router.weight.copy_(
                    0.3 * torch.randn(router.weight.shape) + 0.1 * torch.randn(MODEL.experts or 1, 1)
                )
        draws = RectifiedFlow().draw(step, range(IMAGES), tuple(batch.x_BCHW.shape[1:]), label_dropout=0.1)
        x_BCHW = torch.randn_like(batch.x_BCHW) + torch.randn(1)
        engine.train_step([MicroBatch(x_BCHW, batch.label_B, draws)], lr=1e-5, stop_requested=False)
        if step in looks:
            mib[step] = _private_mib()
            print(f"{step} steps: {mib[step]} MiB", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - begin
    rows = IMAGES * (16 // 2) ** 2 * 2
    return {"mib": mib, "seconds": seconds, "fewest": min(counts), "most": max(counts), "rows": rows}


def _private_mib() -> float:
    (size,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return round(int(size) / 1024, 1)


if __name__ == "__main__":
    main()
