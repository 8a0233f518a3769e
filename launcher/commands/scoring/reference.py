"""`ditmoe reference`: what drawn images are compared with, as a file that can be passed on."""

from pathlib import Path
from typing import Annotated

import typer

from ditmoe.launcher.commands.drawing import (
    CacheOption,
    FeaturesOption,
    FeaturesPathOption,
    IndexOption,
    OnErrorOption,
    ResizeOption,
)

app = typer.Typer(no_args_is_help=True, help="Make a file of statistics that stands for real images.")


@app.callback()
def _group() -> None:
    """Make a file of statistics that stands for real images."""


@app.command("make")
def make(
    shards: Annotated[str, typer.Argument(help="Where shards with the real images lie.", metavar="SHARDS")],
    out: Annotated[Path, typer.Argument(help="The new file, NAME.safetensors.", metavar="OUT")],
    run: Annotated[
        Path | None,
        typer.Option(help="Choose among its images as this run, or checkpoint, did. [default: all images]"),
    ] = None,
    index: IndexOption = None,
    on_error: OnErrorOption = None,
    features: FeaturesOption = "classifier",
    features_path: FeaturesPathOption = None,
    resize: ResizeOption = None,
    recogniser: Annotated[
        bool, typer.Option(help="Put in an independent classifier, for the share recognised.")
    ] = True,
    cache: CacheOption = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of a machine that share the work. [default: one per GPU, or 1]"),
    ] = None,
) -> None:
    """Compute statistics of real images once, and write them as a file for `--reference`.

    Repeating the command after it was killed goes on where it was. Under torchrun and srun it joins their
    processes.

    Example: ditmoe reference make data/photos photos.safetensors --processes 8
    """
    import torch

    from ditmoe.data.storage.files import make_folder
    from ditmoe.data.storage.progress import show_progress
    from ditmoe.launcher.local.launch import spawn
    from ditmoe.launcher.local.signs import signs_of_work
    from ditmoe.parallel.ranks import this_process
    from ditmoe.sampling.evaluation.make_reference import make_reference, prepare_reference
    from ditmoe.sampling.evaluation.of_run import default_cache
    from ditmoe.sampling.jobs.workers import join_workers

    cache = cache or default_cache()
    job = prepare_reference(
        shards,
        out,
        cache,
        index=index,
        run=run,
        on_error=on_error,
        features=features,
        features_path=features_path,
        resize=resize,
        recogniser=recogniser,
    )
    process = this_process()
    processes = (processes or torch.cuda.device_count() or 1) if process.starts_ranks else 1
    if processes > 1:
        arguments = ["reference", "make", "--features", features, "--cache", str(cache)]
        arguments += ["--recogniser" if recogniser else "--no-recogniser"]
        for option, value in (
            ("--run", run),
            ("--index", index),
            ("--on-error", on_error),
            ("--features-path", features_path),
            ("--resize", resize),
        ):
            arguments += [option, str(value)] if value is not None else []
        make_folder(cache / "ranks")
        raise typer.Exit(spawn([*arguments, "--", shards, str(out)], processes, log_dir=cache / "ranks"))
    workers = join_workers(str(out))
    try:
        with signs_of_work(cache):
            make_reference(job, workers, log=lambda line: typer.echo(line, err=True), progress=show_progress)
    finally:
        workers.leave()
    if process.first:
        typer.echo(f"{job.real.count:,} images of {job.real.index.name}, in features of {features}")
        typer.echo(f"  reference  {out}")
