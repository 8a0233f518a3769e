"""`ditmoe score`: the figures of an evaluation for images that others drew."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ditmoe.launcher.commands.drawing import (
    CacheOption,
    FeaturesOption,
    FeaturesPathOption,
    IndexOption,
    NeighbourImagesOption,
    ReferenceNetworkOption,
    ResizeOption,
)
from ditmoe.launcher.commands.shared_options import Sharing, shares_work
from ditmoe.sampling.settings.networks import choices_of


@shares_work()
def command(
    images: Annotated[
        str,
        typer.Argument(help="An npz file with arr_0, a folder of pictures, or shards.", metavar="IMAGES"),
    ],
    *,
    reference: Annotated[
        str,
        typer.Option(
            metavar="FILE|SHARDS", help="What to compare with: a file of statistics, or shards of real images."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the figures. [default: scores/NAME-FINGERPRINT]"),
    ] = None,
    images_index: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder of the images' index.json, if it is not with the shards."),
    ] = None,
    index: IndexOption = None,
    on_error: Annotated[
        Literal["stop", "skip"] | None,
        typer.Option(help="If an image, scored or real, cannot be used: stop, or leave it out. [default: stop]"),
    ] = None,
    features: FeaturesOption = "classifier",
    features_path: FeaturesPathOption = None,
    resize: ResizeOption = None,
    reference_network: ReferenceNetworkOption = None,
    neighbour_images: NeighbourImagesOption = None,
    recogniser: Annotated[
        bool,
        typer.Option(help="Also report the share that an independent classifier recognises, if there are labels."),
    ] = True,
    cache: CacheOption = None,
    sharing: Sharing,
) -> None:
    """Score images that other programs drew, against real images or their statistics.

    Repeat the command to resume it, or to show its result once it has finished. Under torchrun and srun it
    uses their processes.

    Examples:
        ditmoe score samples.npz --reference photos.safetensors --processes 8
        ditmoe score drawn/ --reference shards/photos --on-error skip
    """
    from ditmoe.data.storage.progress import show_progress
    from ditmoe.launcher.local.signs import signs_of_work
    from ditmoe.parallel.ranks import this_process
    from ditmoe.sampling.evaluation.job import requests_of
    from ditmoe.sampling.evaluation.of_run import default_cache
    from ditmoe.sampling.evaluation.score_images import prepare_score, score_images, score_table, stored_score
    from ditmoe.sampling.evaluation.scores_of_crew import scores_made_by
    from ditmoe.sampling.evaluation.stored import keys_of
    from ditmoe.sampling.jobs.workers import join_workers

    cache = cache or default_cache()
    choices = choices_of(features, features_path, resize)
    arguments: dict[str, Any] = {
        "images": images,
        "reference": reference,
        "cache": cache,
        "out": out,
        "images_index": images_index,
        "index": index,
        "on_error": on_error,
        "features": choices[0].features,
        "features_path": choices[0].path,
        "resize": choices[0].resize,
        "more_networks": choices[1:],
        "reference_network": reference_network,
        "neighbour_images": neighbour_images,
        "recogniser": recogniser,
    }
    job = prepare_score(**arguments)
    metrics, process = stored_score(job), this_process()
    if metrics is None:
        with sharing.led(job.folder / "ranks") as crew, signs_of_work(job.folder, cache):
            workers = join_workers(str(job.folder))
            try:
                metrics = score_images(
                    job,
                    workers,
                    make=None if crew is None else scores_made_by(crew, arguments, job),
                    log=lambda line: typer.echo(line, err=True),
                    progress=show_progress,
                )
            finally:
                workers.leave()
    if process.first:
        for line in score_table(metrics, *keys_of(metrics["results"], requests_of(job))):
            typer.echo(line)
        typer.echo(f"  metrics  {job.folder / 'metrics.json'}")
