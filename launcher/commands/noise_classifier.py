"""`ditmoe noise-classifier`: the posterior of the noise level, which DLG chains draw σ from."""

from pathlib import Path
from typing import Annotated

import typer

from ditmoe.launcher.command_line.groups import Commands

app = Commands(
    """Train the noise-level classifier that DLG chains need.

    Examples:
        ditmoe noise-classifier train runs/photos
    """
)


@app.callback()
def _group() -> None:
    """Train the noise-level classifier that DLG chains need."""


@app.command("train", short_help="Train it, or resume.")
def train(
    run: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints.", metavar="RUN")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of Adam, at a rate that falls from 1e-3 to 0.")] = 5000,
    batch: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 100,
    levels: Annotated[int, typer.Option(min=2, help="Noise levels, in equal steps of log σ.")] = 1000,
    sigma_min: Annotated[
        float | None, typer.Option(help="Smallest level. [default: that of the denoiser]")
    ] = None,
    sigma_max: Annotated[float | None, typer.Option(help="Largest level. [default: that of the denoiser]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights, levels and noise.")] = 0,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Where the run's shards are now; repeat for each source. [default: where they were]",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images; 0: this one.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda if there is one]")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a classifier that has other settings.")
    ] = False,
) -> None:
    """Train p(σ | x) on the run's own data, in the space in which its network draws; repeat the command to
    resume.

    Examples:
        ditmoe noise-classifier train runs/photos
        ditmoe noise-classifier train runs/demo --steps 1500 --sigma-min 0.05
    """
    import torch

    from ditmoe.data.storage.progress import show_progress
    from ditmoe.launcher.commands.sample import check_device
    from ditmoe.model.errors import UserError
    from ditmoe.parallel.checkpoint.folder import read_info
    from ditmoe.sampling.network.load import find_checkpoint
    from ditmoe.sampling.noise_level.classifier import (
        WEIGHTS_FILE,
        classifier_folder,
        load_noise_classifier,
        narrowed,
        space_of,
    )
    from ditmoe.sampling.noise_level.training import NoiseTraining, train_noise_classifier, training_dataset

    where = torch.device(check_device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    info = read_info(find_checkpoint(run))
    settings = NoiseTraining(steps=steps, batch=batch, seed=seed)
    space = narrowed(space_of(info, levels), sigma_min, sigma_max)
    folder = classifier_folder(info)
    if (folder / WEIGHTS_FILE).exists() and not overwrite:
        classifier = load_noise_classifier(folder, space_of(info))
        if classifier.facts["settings"] != vars(settings) or classifier.space[3:] != space[3:]:
            raise UserError(
                f"{folder}: has a classifier of other settings; expected the same, or --overwrite to replace it"
            )
        facts = dict(classifier.facts)
    else:
        dataset = training_dataset(info, data or (), workers)
        space = space._replace(data=tuple(dataset.facts["fingerprint"]))
        shown = show_progress("steps of the noise-level classifier", steps)
        facts = train_noise_classifier(folder, dataset, space, settings, where, typer.echo, shown)
    figures = facts["calibration"]
    typer.echo(f"{folder}")
    typer.echo(
        f"σ from {space.sigma_min:g} to {space.sigma_max:g} in {space.levels:,} levels; "
        f"on {figures['draws']:,} draws of {facts['calibration_on']}:"
    )
    typer.echo(
        f"  cross-entropy {figures['cross_entropy']:.3f}, entropy {figures['entropy']:.3f} nats "
        f"(guessing: {figures['entropy_of_guessing']:.3f})"
    )
    covered = ", ".join(f"{share} in {found:.1%}" for share, found in figures["covered"].items())
    typer.echo(f"  error of the likeliest level {figures['argmax_error']:.3f} in log σ")
    typer.echo(f"  the true level is within the posterior's central {covered} of the draws")
