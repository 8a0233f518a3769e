"""`ditmoe evaluate`: draw images from a run's network and score them against real ones."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ditmoe.launcher.command_line.arguments import GridOption
from ditmoe.launcher.commands.drawing import (
    CacheOption,
    Drawing,
    ExpertParallelOption,
    FeaturesOption,
    FeaturesPathOption,
    IndexOption,
    NeighbourImagesOption,
    OnErrorOption,
    ReferenceNetworkOption,
    ResizeOption,
    SharedWeightsOption,
    StepOption,
    VaeOption,
    WeightsOption,
    draws_images,
)
from ditmoe.launcher.commands.evaluate_grid import evaluate_grid, refuse_options
from ditmoe.launcher.commands.evaluate_watch import evaluate_watch
from ditmoe.launcher.commands.scoring.evaluate_seeds import evaluate_with_seeds
from ditmoe.launcher.commands.shared_options import Sharing, shares_work
from ditmoe.model.errors import UserError
from ditmoe.sampling.settings.networks import arguments_of, choices_of


@shares_work()
@draws_images()
def command(
    run: Annotated[Path, typer.Argument(help="The run's folder, or one of its checkpoints.", metavar="RUN")],
    *,
    count: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 50_000,
    sharing: Sharing,
    grid: GridOption = None,
    drawing: Drawing,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="0-2", help="Evaluate with each of these seeds, and show how far the figures spread."
        ),
    ] = None,
    labels: Annotated[
        Literal["random", "balanced"],
        typer.Option(help="Give images random classes, or each class in turn (FID then reads a little lower)."),
    ] = "random",
    weights: WeightsOption = "ema",
    step: StepOption = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--reference",
            "--data",
            metavar="FILE|SHARDS",
            help="What to compare with: a file of statistics, or shards of real images. [default: the run's]",
        ),
    ] = None,
    index: IndexOption = None,
    on_error: OnErrorOption = None,
    features: FeaturesOption = "classifier",
    features_path: FeaturesPathOption = None,
    resize: ResizeOption = None,
    reference_network: ReferenceNetworkOption = None,
    neighbour_images: NeighbourImagesOption = None,
    recogniser: Annotated[
        bool, typer.Option(help="Also report the share that an independent classifier recognises.")
    ] = True,
    vae: VaeOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Images through a network at once.")] = 64,
    chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Images that are drawn and kept as one file. [default: up to 256]"),
    ] = None,
    keep: Annotated[
        Literal["chunks", "npz", "statistics"],
        typer.Option(
            help="What to keep of the images after scoring: chunks and samples.npz, that file, or moments only."
        ),
    ] = "chunks",
    cache: CacheOption = None,
    shared_weights: SharedWeightsOption = None,
    expert_parallel: ExpertParallelOption = 1,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Score each new checkpoint while the run trains; ends when the run is complete."
        ),
    ] = False,
    every: Annotated[
        int, typer.Option(min=1, help="With --watch: score only every N-th checkpoint, and the last.")
    ] = 1,
    patience: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="MINUTES",
            help="With --watch: give up if the run shows no sign of life for this long. [default: wait forever]",
        ),
    ] = None,
    context: typer.Context = None,  # type: ignore[assignment]  # None: called from Python
) -> None:
    """Draw images and score them: FID beside its floor, precision, recall, and the share recognised.

    Repeat the command to resume it, or to show its result once it has finished. Under torchrun and srun it
    uses their processes. With --grid it compares samplers, each in its own evaluation.

    Examples:
        ditmoe evaluate runs/photos --count 50000 --processes 8
        ditmoe evaluate runs/photos --watch --count 5000 --steps 50
        ditmoe evaluate runs/photos --grid dmcmc
        ditmoe evaluate runs/photos --features inception --features-path inception.pth --reference VIRTUAL.npz
    """
    from ditmoe.launcher.local.signs import signs_of_work
    from ditmoe.parallel.ranks import this_process
    from ditmoe.sampling.evaluation.job import requests_of
    from ditmoe.sampling.evaluation.keeping import SAMPLES_FILE, drop_images_of_finished, statistics_file
    from ditmoe.sampling.evaluation.of_run import EvaluationOptions, evaluate_run, prepare_job
    from ditmoe.sampling.evaluation.results import table
    from ditmoe.sampling.evaluation.run_job import stored_result
    from ditmoe.sampling.evaluation.stored import keys_of
    from ditmoe.sampling.integrators.advice import sampler_warnings
    from ditmoe.sampling.settings.config import SamplerConfig

    if not watch and (every != 1 or patience is not None):
        raise UserError(
            f"{'--every' if every != 1 else '--patience'}: goes with --watch; expected both, or neither"
        )
    if watch and (grid is not None or step is not None):
        other = f"--grid {grid}" if grid is not None else f"--step {step}"
        raise UserError(f"--watch and {other}: expected one of them; a watch scores all checkpoints alike")
    if watch and keep == "statistics":
        raise UserError("--watch and --keep statistics: a watch shows images; expected --keep npz or chunks")
    if seeds is not None and (watch or (context is not None and _is_given(context, "seed"))):
        raise UserError(f"--seeds {seeds} and {'--watch' if watch else '--seed'}: expected one of them")
    if grid is not None and context is not None:
        refuse_options(grid, (name for name in context.params if _is_given(context, name)))
    for option, given in (("--grid", grid), ("--watch", watch or None), ("--seeds", seeds)):
        if expert_parallel > 1 and given is not None:
            raise UserError(f"--expert-parallel {expert_parallel}: expected without {option}")
    choices = choices_of(features, features_path, resize)
    options = EvaluationOptions(
        source=run,
        sampler=SamplerConfig() if grid is not None else drawing.config(),
        count=count,
        labels=labels,
        weights=weights,
        step=step,
        data=data,
        index=index,
        on_error=on_error,
        features=choices[0].features,
        features_path=choices[0].path,
        resize=choices[0].resize,
        more_networks=choices[1:],
        reference_network=reference_network,
        neighbour_images=neighbour_images,
        recogniser=recogniser,
        batch=batch,
        chunk=chunk,
        keep=keep,
        cache=cache,
        vae=vae,
        shared_weights=shared_weights,
        expert_parallel=expert_parallel,
    )
    # What processes that this one starts are told again, beside what is drawn.
    shared = ["--weights", weights, *arguments_of(choices), "--batch", str(batch)]
    shared += ["--recogniser" if recogniser else "--no-recogniser", "--keep", keep]
    shared += [] if expert_parallel == 1 else ["--expert-parallel", str(expert_parallel)]
    for option, value in (
        ("--reference", data),
        ("--index", index),
        ("--on-error", on_error),
        ("--reference-network", reference_network),
        ("--neighbour-images", neighbour_images),
        ("--chunk", chunk),
        ("--cache", cache),
        ("--vae", vae),
        ("--shared-weights", shared_weights),
    ):
        shared += [option, str(value)] if value is not None else []
    if grid is not None:
        evaluate_grid(options, grid, sharing)
        return
    drawn = [*drawing.arguments(), "--count", str(count), "--labels", labels]
    if seeds is not None:
        unseeded = [each for each in drawn if not each.startswith("--seed=")]
        evaluate_with_seeds(options, seeds, sharing, [*unseeded, *shared])
        return
    if watch:
        evaluate_watch(options, sharing, [*drawn, *shared], every, patience)
        return
    job = prepare_job(options)
    metrics, process = stored_result(job), this_process()
    if metrics is not None and process.first:
        drop_images_of_finished(job.folder, keep)
    if metrics is None:
        from ditmoe.data.storage.files import make_folder
        from ditmoe.sampling.evaluation.of_crew import made_by

        if process.starts_ranks and process.first:
            for warning in sampler_warnings(job.evaluation.sampler):
                typer.echo(f"warning: {warning}", err=True)  # at once, not when hours are spent
        make_folder(job.folder)
        # Ranks are told the checkpoint: training may write a newer one before they look.
        again = ["evaluate", *drawn, *shared, "--", str(job.checkpoint)]
        with (
            sharing.led(job.folder / "ranks", again=again, together=expert_parallel) as crew,
            signs_of_work(job.folder, job.cache),
        ):
            if crew is None:
                metrics = evaluate_run(job)
            else:
                metrics = evaluate_run(job, made_by(crew, options, job), max(crew.size, 1))
    if process.first:
        keys = keys_of(metrics["results"], requests_of(job))
        for line in table(metrics, *keys):
            typer.echo(line)
        typer.echo(f"  metrics  {job.folder / 'metrics.json'}")
        samples = job.folder / SAMPLES_FILE
        moments = ", ".join(str(job.folder / statistics_file(key)) for key in keys)
        typer.echo(f"  samples  {samples}" if samples.exists() else f"  moments  {moments}")
        typer.echo(f"  gallery  {job.folder / 'gallery' / 'index.html'}")


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
