"""`ditmoe plan`: which layout a run should have on a number of GPUs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ditmoe.launcher.configuration.run_config import RunConfig
    from ditmoe.parallel.planner.gpus import Gpu


def command(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to set, such as train.batch=2048 train.precision=fp32.", metavar="KEY=VALUE"),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, max=2**20, help="GPUs of the whole run. [default: the configuration's layout]"),
    ] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, b200, a100-40, a100-80, l40s or rtx4090.")] = "h100",
    memory: Annotated[float | None, typer.Option(min=1, help="GiB of one GPU. [default: of its kind]")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s from a GPU to others of its machine.")
    ] = None,
    node_bandwidth: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s from a GPU to other machines.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of a machine.")] = None,
    efficiency: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the peak that matrix products reach.")
    ] = 0.4,
    imbalance: Annotated[
        float, typer.Option(min=1, help="The fullest expert rank gets this many times the mean.")
    ] = 1.0,
    every: Annotated[bool, typer.Option("--all", help="Show every layout, also those that do not fit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Exact numbers, as JSON.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run one rank of the configuration's layout under fake tensors.")
    ] = False,
    rank: Annotated[int, typer.Option(min=0, help="The rank that --dry-run runs.")] = 0,
) -> None:
    """Estimate memory, traffic and speed of every layout of a configuration, and name the fastest that fits.

    With --dry-run the real network of one rank makes a step of the configuration's own layout, without memory.
    """
    from dataclasses import replace

    from ditmoe.launcher.planning.plan import as_json as plain
    from ditmoe.launcher.planning.plan import plans, report
    from ditmoe.parallel.planner.estimate import Machine

    run = _complete(config, overrides or [])
    given = {
        "memory_gib": memory,
        "bandwidth": bandwidth,
        "node_bandwidth": node_bandwidth,
        "gpus_per_node": gpus_per_node,
    }
    kind = replace(_gpu(gpu), **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    machine = Machine(kind, efficiency)
    if dry_run:
        from ditmoe.launcher.planning.plan_dry_run import dry_run_report

        typer.echo(dry_run_report(run, _number_of_gpus(run, gpus), rank, imbalance, as_json))
        return
    found = plans(run, _number_of_gpus(run, gpus), machine, imbalance)
    if as_json:
        import json

        shown = found if every else [plan for plan in found if machine.fits(plan.memory)][:SHOWN]
        typer.echo(json.dumps([plain(plan, machine) for plan in shown], indent=1))
        return
    typer.echo(report(run, found, machine, None if every else SHOWN))


SHOWN = 12
"""Layouts of the table."""


def _complete(path: Path, overrides: list[str]) -> "RunConfig":
    """The configuration with its network's input known: from the shards, where it leaves that out."""
    from ditmoe.data.stream.dataset import open_index
    from ditmoe.launcher.configuration.checks import with_input_of
    from ditmoe.launcher.configuration.run_config import load_config

    run = load_config(path, overrides)
    if run.model.complete:
        return run
    index = open_index(run.data.sources[0])
    return run.model_copy(update={"model": with_input_of(run.model, index)})


def _gpu(name: str) -> "Gpu":
    from ditmoe.model.errors import UserError
    from ditmoe.parallel.planner.gpus import GPUS

    if name not in GPUS:
        raise UserError(f"--gpu {name}: not known; expected one of {', '.join(GPUS)}")
    return GPUS[name]


def _number_of_gpus(run: "RunConfig", gpus: int | None) -> int:
    from ditmoe.launcher.processes import known_processes
    from ditmoe.model.errors import UserError

    parallel = run.parallel
    of_layout = parallel.data and parallel.data * parallel.pipe * parallel.tensor
    number = gpus or of_layout or known_processes(run.launch.processes, run.launch.device)
    if number is None:
        raise UserError("--gpus is missing: the configuration does not say how many processes there are")
    return number
