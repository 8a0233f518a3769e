"""`ditmoe data synthesize`: draw a dataset from a run's network."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ditmoe.launcher.commands.drawing import (
    Drawing,
    IndexOption,
    OnErrorOption,
    StepOption,
    VaeOption,
    WeightsOption,
    draws_images,
)
from ditmoe.launcher.commands.shared_options import PER_CORE, Sharing, shares_work
from ditmoe.model.outside.text import counted


@shares_work(PER_CORE)
@draws_images()
def command(
    out: Annotated[
        Path, typer.Argument(help="Folder to write shards, index.json and preview.png to.", metavar="OUT")
    ],
    *,
    source: Annotated[
        Path, typer.Option("--from", help="A run's folder, or one of its checkpoints.", metavar="RUN|CHECKPOINT")
    ],
    count: Annotated[int, typer.Option(min=1, help="Images to draw; they cycle through the classes.")],
    classes: Annotated[
        str | None, typer.Option(help="Classes by number or name, separated by commas: 3,7. [default: all]")
    ] = None,
    score: Annotated[
        Literal["classifier", "features", "none"],
        typer.Option(
            help="Score of an image: classifier, the probability of its class; features, minus the distance to "
            "the mean real image of its class; or none."
        ),
    ] = "classifier",
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Shards of the real images that scores are computed from. [default: the run's]"
        ),
    ] = None,
    index: IndexOption = None,
    on_error: OnErrorOption = None,
    features: Annotated[
        Literal["classifier", "inception", "dinov2"],
        typer.Option(help="With --score features: a network trained on the real images, Inception-v3 or DINOv2."),
    ] = "classifier",
    features_path: Annotated[
        Path | None, typer.Option(help="File of Inception-v3 or DINOv2; see docs/evaluate.md.")
    ] = None,
    sharing: Sharing,
    drawing: Drawing,
    weights: WeightsOption = "ema",
    step: StepOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Images through a network at once.")] = 64,
    format: Annotated[
        Literal["png", "jpg", "npy"],
        typer.Option(help="png and npy keep every pixel; jpg (quality 95) is smaller."),
    ] = "png",
    shard_samples: Annotated[int, typer.Option(min=1, help="Images in a shard.")] = 1000,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of trained classifiers and means of real images. [default: ~/.cache/ditmoe]"),
    ] = None,
    vae: VaeOption = None,
    name: Annotated[str | None, typer.Option(help="The dataset's name. [default: after the run]")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a dataset that is already in OUT, or a part of one.")
    ] = False,
) -> None:
    """Draw images from a run's network into shards with provenance, labels and quality scores.

    Repeat the command to resume it. Workers on other machines can join through --crew. Under torchrun and srun
    it uses their processes.

    Examples:
        ditmoe data synthesize shards/drawn --from runs/photos --count 50000
        ditmoe data synthesize shards/cats --from runs/photos --count 5000 --classes cat --score none
    """
    import sys

    from ditmoe.data.storage.progress import show_progress
    from ditmoe.launcher.commands.pictures.choice import choose_classes
    from ditmoe.model.errors import UserError
    from ditmoe.model.outside.text import is_fit_to_print
    from ditmoe.parallel.checkpoint.folder import read_info
    from ditmoe.parallel.ranks import this_process
    from ditmoe.sampling.evaluation.of_run import default_cache
    from ditmoe.sampling.integrators.advice import sampler_warnings
    from ditmoe.sampling.metrics.quality import ScoreSettings
    from ditmoe.sampling.network.load import find_checkpoint
    from ditmoe.sampling.synthesis.make import drawer, finished, synthesize
    from ditmoe.sampling.synthesis.plan import SynthesisOptions, class_names_of, prepare_synthesis

    if name is not None and not (name.strip() and is_fit_to_print(name)):
        raise UserError(f"--name is {name!a}, expected at least one character, and none that cannot be printed")
    checkpoint = find_checkpoint(source, step)
    names = class_names_of(read_info(checkpoint))
    options = SynthesisOptions(
        source=checkpoint,
        out=out,
        sampler=drawing.config(),
        count=count,
        classes=None if classes is None else tuple(choose_classes(classes, names)),
        weights=weights,
        batch=batch,
        format=format,
        shard_samples=shard_samples,
        score=ScoreSettings(score, features, features_path),
        reference=reference,
        index=index,
        on_error=on_error,
        cache=cache or default_cache(),
        vae=vae,
        name=name,
        overwrite=overwrite,
    )
    synthesis = prepare_synthesis(options)
    made, process = finished(synthesis), this_process()
    if made is None:
        if process.first and process.starts_ranks:
            for warning in sampler_warnings(synthesis.sampler):
                typer.echo(f"warning: {warning}", err=True)
        from ditmoe.launcher.local.signs import signs_of_work
        from ditmoe.sampling.jobs.workers import join_workers
        from ditmoe.sampling.synthesis.of_crew import made_by

        again = _with_checkpoint(checkpoint) if step is None else None
        with sharing.led(per_core=True, again=again) as crew, signs_of_work(out, options.cache):
            workers = join_workers(str(checkpoint))
            try:
                made = synthesize(
                    synthesis,
                    drawer(synthesis, workers.device, several=workers.ranks > 1),
                    workers,
                    make=None if crew is None else made_by(crew, synthesis),
                    log=lambda line: print(line, file=sys.stderr, flush=True),
                    progress=show_progress,
                )
            finally:
                workers.leave()
    if process.first:
        typer.echo(
            f"synthesised {counted(made.total, 'image')} "
            f"of {made.image_size}×{made.image_size}×{made.channels} "
            f"in {counted(len(set(synthesis.plan['classes'])), 'class', 'classes')}: "
            f"{counted(len(made.shards), 'shard')}, {made.total_bytes / 2**20:,.1f} MiB"
        )
        if made.total < count:
            typer.echo(
                f"{count - made.total:,} of {counted(count, 'image')} are not finite and left out", err=True
            )
        for line in _scores(out):
            typer.echo(line)
        typer.echo(f"  dataset  {out}")
        typer.echo(f"  preview  {out / 'preview.png'}")


def _with_checkpoint(checkpoint: Path) -> list[str]:
    """The words of this command, with the checkpoint named: training may write a newer one before ranks look."""
    import sys

    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    return [*words[:end], f"--from={checkpoint}", *words[end:]]


def _scores(out: Path) -> list[str]:
    """The spread of the scores, as a line; none without scores."""
    import numpy as np

    from ditmoe.data.shards.index import load_index
    from ditmoe.data.shards.sample_table import read_table

    table = read_table(out, load_index(out))
    if table is None or table.score_N is None:
        return []
    low, middle, high = np.quantile(table.score_N, [0.1, 0.5, 0.9])
    return [f"  scores   median {middle:.4g}; the middle 80% from {low:.4g} to {high:.4g}"]
