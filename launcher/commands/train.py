"""`ditmoe train`: train, or resume, the run of a configuration."""

from typing import TYPE_CHECKING, Annotated

import typer

from ditmoe.launcher.command_line.arguments import ConfigArgument, overrides_argument

if TYPE_CHECKING:
    from ditmoe.parallel.ranks import Device


def command(
    config: ConfigArgument,
    overrides: Annotated[
        list[str] | None, overrides_argument("Keys to set, such as parallel.expert=4 optim.lr=2e-4.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the full configuration and the memory that the run needs; start nothing."
        ),
    ] = False,
) -> None:
    """Train the run of a configuration on this machine; repeat the command to resume it.

    Ctrl-C or SIGTERM writes a checkpoint and ends the run. Under torchrun and srun it uses their processes; if
    srun starts one process per node, that one starts the others on its node.

    Examples:
        ditmoe train photos
        ditmoe train photos train.batch=128 optim.lr=2e-4
        ditmoe train photos parallel.expert=4 --dry-run
    """
    from ditmoe.data.stream.dataset import open_dataset
    from ditmoe.launcher.configuration.resolve import resolve
    from ditmoe.launcher.configuration.run_config import load_config
    from ditmoe.launcher.loggers.opening import check_loggers
    from ditmoe.launcher.processes import process_count
    from ditmoe.parallel.ranks import this_process

    chosen = overrides or []
    raw = load_config(config, chosen)
    line = None
    if raw.train.precision == "auto":
        from ditmoe.launcher.training.precision import with_precision

        raw, line = with_precision(raw, "cpu" if _computes_on_cpu(raw.launch.device) else "cuda")
    if dry_run:
        from ditmoe.launcher.planning.train_dry_run import dry_run as describe

        typer.echo(describe(raw, str(config), *([] if line is None else [line])))
        return
    dataset = open_dataset(raw.data, raw.seed)
    processes = process_count(raw.launch.processes, raw.launch.device)
    resolved = resolve(raw, dataset.index, processes, origin=str(config))
    check_loggers(resolved.train.loggers)
    process = this_process()
    # Ranks that we started were looked at before; those of torchrun and srun look themselves.
    if resolved.launch.check_memory and (process.starts_ranks or process.meeting is None):
        from ditmoe.launcher.planning.room import check_room, room_here

        room = room_here(on_cpu=_computes_on_cpu(resolved.launch.device))
        ranks_here = processes // process.ranks if process.starts_ranks else process.processes_here
        # A launcher that does not say how many ranks are here has at most one for each GPU.
        check_room(resolved, str(config), min(ranks_here, len(room.gpus) or ranks_here), room)
    if process.starts_ranks:
        dataset.check_files()
        from ditmoe.launcher.configuration.resolve import start_of
        from ditmoe.launcher.training.run_folder import RunFolder
        from ditmoe.parallel.start.begin import check_start

        folder = RunFolder(resolved.run.dir)
        if process.first:
            # Rank 0 does the same under its own lock; here it takes no seconds of starting processes.
            folder.check(resolved)
            check_start(folder.path, start_of(resolved))
        here = processes // process.ranks
        if here > 1:
            from ditmoe.launcher.local.launch import spawn

            # `--`: an override is never taken for an option.
            arguments = ["train", "--", str(config), *chosen]
            raise typer.Exit(spawn(arguments, here, log_dir=folder.ranks, threads=resolved.launch.threads))
    if resolved.launch.threads is not None:
        import torch

        torch.set_num_threads(resolved.launch.threads)
    from ditmoe.launcher.training.program import run_training

    raise typer.Exit(run_training(resolved, line))


def _computes_on_cpu(device: "Device") -> bool:
    if device != "auto":
        return device == "cpu"
    import torch

    return torch.cuda.device_count() == 0
