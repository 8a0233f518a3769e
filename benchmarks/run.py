"""All figures of the suite in one table: ours, a plain baseline, and the limit of the machine, in the same run.

    python -m benchmarks.run [--device cpu] [--only training_step] [--rounds 7] [--to FILE.json]

(`make bench` and `make bench-gpu`.) Each family of figures is a module of `benchmarks/suite/`, and runs in a
process of its own. The table is printed, and with commit, versions and hardware it goes to `benchmarks/results/`;
`python benchmarks/compare.py A.json B.json` lists what has become slower. Run it on a machine that does nothing
else.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.suite import machine
from benchmarks.suite.figure import Figure, header, line
from benchmarks.suite.machine import Limits
from benchmarks.suite.settings import Settings

RESULTS: Final = machine.ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Family:
    """A module of figures."""

    name: str
    on_gpu: bool
    """Whether it says something about a GPU."""
    on_cpu: bool = True
    """Whether a CPU has the time for it, where it is not asked for by name."""


FAMILIES: Final = (
    Family("mixture_layer", True),
    Family("training_step", True),
    Family("sampling", True),
    Family("engine_overhead", True),
    Family("compiled", True, on_cpu=False),
    Family("stream", False),
    Family("checkpoint", False),
    Family("evaluation", False),
)


def main() -> int:
    """Measure, print and write; 1 where a family failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=[family.name for family in FAMILIES], metavar="FAMILY")
    parser.add_argument("--rounds", type=int, help="rounds of every figure; by default each family's own")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--folder", type=Path, help="where shards and checkpoints are written for a while")
    parser.add_argument("--to", type=Path, help="the JSON; a table goes beside it [benchmarks/results/…]")
    parser.add_argument("--alone", type=json.loads, help=argparse.SUPPRESS)  # limits: measure here, print JSON
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.alone is not None:
        _measure_here(options, device)
        return 0
    chosen = [
        family.name
        for family in FAMILIES
        if (
            family.name in options.only
            if options.only
            else (family.on_cpu if device.type == "cpu" else family.on_gpu)
        )
    ]
    found = machine.facts(device)
    limits = machine.measure_limits(device, options.small)
    lines: list[str] = []

    def tell(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    for text in _heading(found, limits):
        tell(text)
    tell(header())
    figures: list[Figure] = []
    failed = []
    target = options.to or RESULTS / f"suite-{options.device}-{found['date'][:10]}-{found['commit'][:8]}.json"
    begun = found.pop("begun")

    def write() -> None:
        found["seconds"] = round(time.time() - begun)
        result = {**found, "limits": limits.plain(), "figures": [figure.plain() for figure in figures]}
        target.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        target.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    for name in chosen:
        started = time.monotonic()
        try:
            measured = _in_process(name, limits, options)
        except subprocess.CalledProcessError as error:
            failed.append(name)
            tell(f"{name}: failed with {error.returncode}\n{error.stderr[-3000:]}")
            continue
        figures += measured
        for figure in measured:
            tell(line(figure))
        tell(f"  {name}: {time.monotonic() - started:.0f} s")
        write()  # a run that is stopped leaves what it has measured
    tell(f"in all {time.time() - begun:.0f} s")
    write()
    print(f"written to {target}")
    return 1 if failed else 0


def _heading(found: dict[str, Any], limits: Limits) -> list[str]:
    hardware = found["hardware"]
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    changed = " and changes" if found["changed"] else ""
    products = ", ".join(f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in limits.products.items())
    return [
        f"{found['date']} UTC, commit {found['commit'][:12]}{changed}, {versions}",
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB, {hardware['device']},"
        f" {' '.join(hardware['matrix_units'])}; load before {found['load_before']}",
        f"limits: matrix products {products}; memory {limits.bandwidth / 1e9:,.1f} GB/s",
        "",
    ]


def _in_process(name: str, limits: Limits, options: argparse.Namespace) -> list[Figure]:
    """A family's figures, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.run", "--only", name, "--device", options.device]
    command += ["--alone", json.dumps(limits.plain())]
    command += ["--small"] if options.small else []
    command += ["--rounds", str(options.rounds)] if options.rounds else []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        file = Path(scratch) / "figures.json"
        command += ["--folder", scratch, "--to", str(file)]
        done = subprocess.run(
            command, cwd=machine.ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr)
        return [Figure.read(values) for values in json.loads(file.read_text(encoding="utf-8"))]


def _measure_here(options: argparse.Namespace, device: torch.device) -> None:
    """As the process of one family."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = Settings(Limits(**options.alone), device, options.small, options.folder, options.rounds)
    family = importlib.import_module(f"benchmarks.suite.{options.only[0]}")
    figures = [figure.plain() for figure in family.measure(settings)]
    options.to.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
