"""How long the command takes to answer: help of each verb, and a plan of 4,096 GPUs (processor seconds).

    python benchmarks/answers.py

The tests hold what decides it by counting: modules that help imports, and tensors that a plan walks.
"""

import resource
import subprocess
import sys
from pathlib import Path

from ditmoe.launcher.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    print(f"{'command':<28}{'processor s':>12}")
    for verb in ("", *VERBS):
        _show(*verb.split(), "--help")
    configuration = ROOT / "configs" / "dit-g-2-16e2a-512-128gpus.yaml"
    _show("plan", str(configuration), "train.batch=4096", "--gpus", "4096")


def _show(*arguments: str) -> None:
    """The least of three times."""
    seconds = []
    for _ in range(3):
        begin = _processor_seconds()
        command = [sys.executable, "-m", "ditmoe.launcher", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(_processor_seconds() - begin)
    name = " ".join(argument for argument in arguments if not argument.endswith(".yaml"))
    print(f"{name:<28.28}{min(seconds):>12.2f}")


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
