"""`ditmoe reference`: what drawn images are compared with, as a file that can be passed on."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ditmoe.launcher.command_line.groups import Commands
from ditmoe.launcher.commands.drawing import (
    CacheOption,
    FeaturesOption,
    FeaturesPathOption,
    IndexOption,
    OnErrorOption,
    ResizeOption,
)
from ditmoe.launcher.commands.shared_options import Sharing, shares_work
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted
from ditmoe.sampling.settings.networks import choices_of

app = Commands(
    """Make a file of statistics that takes the place of real images.

    Examples:
        ditmoe reference make shards/photos photos.safetensors
    """
)


@app.callback()
def _group() -> None:
    """Make a file of statistics that stands for real images."""


@app.command("make", short_help="Make the file from shards of images.")
@shares_work()
def make(
    shards: Annotated[str, typer.Argument(help="Shards with the real images.", metavar="SHARDS")],
    out: Annotated[Path, typer.Argument(help="The new file, NAME.safetensors.", metavar="OUT")],
    *,
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
        bool, typer.Option(help="Include an independent classifier, for the share recognised.")
    ] = True,
    cache: CacheOption = None,
    sharing: Sharing,
) -> None:
    """Compute statistics of real images once, and write them as a file for `--reference`.

    Repeat the command to resume it. Under torchrun and srun it uses their processes.

    Examples:
        ditmoe reference make shards/photos photos.safetensors --processes 8
        ditmoe reference make shards/photos photos.safetensors --run runs/photos
    """
    from ditmoe.data.storage.progress import show_progress
    from ditmoe.launcher.local.signs import signs_of_work
    from ditmoe.parallel.ranks import this_process
    from ditmoe.sampling.evaluation.make_reference import make_reference, prepare_reference
    from ditmoe.sampling.evaluation.of_run import default_cache
    from ditmoe.sampling.evaluation.scores_of_crew import reference_made_by
    from ditmoe.sampling.jobs.workers import join_workers

    cache = cache or default_cache()
    choices = choices_of(features, features_path, resize)
    if len(choices) > 1:
        raise UserError(f"--features {features}: a file has statistics in one network; expected one name")
    choice = choices[0]
    arguments: dict[str, Any] = {
        "shards": shards,
        "out": out,
        "cache": cache,
        "index": index,
        "run": run,
        "on_error": on_error,
        "features": choice.features,
        "features_path": choice.path,
        "resize": choice.resize,
        "recogniser": recogniser,
    }
    job = prepare_reference(**arguments)
    with sharing.led(cache / "ranks") as crew, signs_of_work(cache):
        workers = join_workers(str(out))
        try:
            make_reference(
                job,
                workers,
                make=None if crew is None else reference_made_by(crew, arguments, job),
                log=lambda line: typer.echo(line, err=True),
                progress=show_progress,
            )
        finally:
            workers.leave()
    if this_process().first:
        typer.echo(f"{counted(job.real.count, 'image')} of {job.real.index.name}, in features of {features}")
        typer.echo(f"  reference  {out}")
