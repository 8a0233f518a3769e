"""`ditmoe plan`: which layout a run should have on a number of GPUs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditmoe.launcher.command_line.arguments import ConfigArgument, overrides_argument

if TYPE_CHECKING:
    from ditmoe.launcher.configuration.run_config import RunConfig
    from ditmoe.parallel.planner.gpus import Gpu


def command(
    config: ConfigArgument,
    overrides: Annotated[
        list[str] | None, overrides_argument("Keys to set, such as train.batch=2048 train.precision=fp32.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2**20,
            help="Number of GPUs. [default: the configuration's, else the fewest that hold the run]",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Kind of GPU: h100, h200, b200, a100-40, a100-80, l40s, rtx4090, or cpu (one core)."
            " [default: h100; cpu with launch.device=cpu]"
        ),
    ] = None,
    peak_tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Dense peak of one GPU in the run's precision, TFLOP/s. With --memory it describes any GPU.",
        ),
    ] = None,
    memory_bandwidth: Annotated[
        float | None,
        typer.Option(min=0.001, help="Bandwidth of a GPU's own memory, GB/s. [default: that of its kind]"),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=1, help="Memory of one GPU, GiB. [default: that of its kind]")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(min=0.001, help="Bandwidth from a GPU to others in its machine, GB/s.")
    ] = None,
    node_bandwidth: Annotated[
        float | None, typer.Option(min=0.001, help="Bandwidth from a GPU to other machines, GB/s.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs in each machine.")] = None,
    efficiency: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the peak speed that matrix products reach.")
    ] = 0.4,
    imbalance: Annotated[
        float,
        typer.Option(
            min=1, help="Assume that the fullest expert rank gets this many times the mean number of tokens."
        ),
    ] = 1.0,
    every: Annotated[bool, typer.Option("--all", help="Show every layout, even those that do not fit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print exact numbers, as JSON.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run one rank of the configuration's layout under fake tensors.")
    ] = False,
    rank: Annotated[int, typer.Option(min=0, help="The rank that --dry-run runs.")] = 0,
) -> None:
    """Estimate memory, traffic, speed and length of every layout of a run, and name the fastest that fits.

    If none fits, it proposes the nearest number of GPUs, batch, or offload. With --dry-run the real network of
    one rank makes a step of the configuration's own layout, without allocating its memory.

    Examples:
        ditmoe plan dit-g-2-16e2a-512-128gpus --gpus 128
        ditmoe plan dit-xl-2-8e2a-256 train.batch=2048 --gpus 16 --gpu a100-80
        ditmoe plan dit-g-2-16e2a-512-128gpus --dry-run --rank 3
    """
    from ditmoe.launcher.planning.plan import answer, report
    from ditmoe.launcher.planning.plan import as_json as plain
    from ditmoe.launcher.planning.workload import planned
    from ditmoe.parallel.planner.estimate import Machine

    run = _complete(config, overrides or [])
    given = {
        "memory_gib": memory,
        "memory_bandwidth": memory_bandwidth,
        "bandwidth": bandwidth,
        "node_bandwidth": node_bandwidth,
        "gpus_per_node": gpus_per_node,
    }
    kind = _gpu(run, gpu, peak_tflops, {key: value for key, value in given.items() if value is not None})
    machine = Machine(kind, efficiency)
    run, line = planned(run, "cpu" if kind.is_cpu else "cuda")
    if line is not None and not as_json:
        typer.echo(line)
    configured = _configured_gpus(run)
    if dry_run:
        from ditmoe.launcher.planning.plan_dry_run import dry_run_report

        typer.echo(dry_run_report(run, _number_of_gpus(gpus or configured), rank, imbalance, as_json))
        return
    found = answer(run, gpus, machine, imbalance, configured)
    shown = None if every else SHOWN
    if as_json:
        import json

        typer.echo(json.dumps(plain(found, shown), indent=1))
        return
    typer.echo(report(found, shown))


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


def _gpu(run: "RunConfig", name: str | None, peak: float | None, given: dict[str, Any]) -> "Gpu":
    """The GPU that is meant: a known one, or one that is described, with what is given in place of its own."""
    from dataclasses import replace

    from ditmoe.model.errors import UserError
    from ditmoe.model.outside.nearest import meant
    from ditmoe.parallel.planner.gpus import CPU_CORE, GPUS, described_gpu

    kinds = {**GPUS, "cpu": CPU_CORE}
    if name is None and peak is not None:
        if "memory_gib" not in given:
            raise UserError("--peak-tflops without --memory: expected the GiB of one GPU too, or a known --gpu")
        return replace(described_gpu(peak, given["memory_gib"]), **given)
    name = name or ("cpu" if run.launch.device == "cpu" else "h100")
    if name not in kinds:
        raise UserError(
            f"--gpu {name}: not known; expected one of {', '.join(kinds)}, or --peak-tflops and --memory"
            f"{meant(name, kinds)}"
        )
    kind = replace(kinds[name], **given)
    return kind if peak is None else replace(kind, bf16_tflops=peak, fp32_tflops=peak)


def _configured_gpus(run: "RunConfig") -> int | None:
    """The GPUs, or processes, of the configuration, where it says how many."""
    from ditmoe.launcher.processes import known_processes

    parallel = run.parallel
    if parallel.data is not None:
        return parallel.data * parallel.pipe * parallel.tensor
    return known_processes(run.launch.processes, run.launch.device)


def _number_of_gpus(number: int | None) -> int:
    from ditmoe.model.errors import UserError

    if number is None:
        raise UserError("--gpus is missing: the configuration does not say how many processes there are")
    return number
