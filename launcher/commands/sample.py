"""`ditmoe sample`: images drawn from a run's network, as a picture, as files, or as they come out of the noise."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditmoe.launcher.commands.drawing import (
    Drawing,
    ExpertParallelOption,
    StepOption,
    VaeOption,
    WeightsOption,
    draws_images,
)

if TYPE_CHECKING:
    from ditmoe.sampling.drawing.generate import Generated
    from ditmoe.sampling.settings.config import SamplerConfig


@draws_images(few_steps=True)
def command(
    run: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints.", metavar="RUN")],
    *,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Classes by number or name, separated by commas: 3,7. [default: all, or 16 spread over them]"
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Number of images; they cycle through the classes. [default: 8 of each class]"),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="RANGES",
            help="Instead of --count and --seed: draw every class with each seed, 0-63 or 1,5,9-12.",
        ),
    ] = None,
    drawing: Drawing,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images drawn at once. [default: 64, or all if they are fewer]")
    ] = None,
    step: StepOption = None,
    weights: WeightsOption = "ema",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda if there is one]")
    ] = None,
    vae: VaeOption = None,
    expert_parallel: ExpertParallelOption = 1,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|FOLDER/",
            help="A picture of all images (png, jpg, webp), an animation (gif, apng, mp4), an array (npz, npy) "
            "or a folder with a file for each. [default: a picture under RUN/samples, named by the settings]",
        ),
    ] = None,
    format: Annotated[  # as the option is called
        str | None, typer.Option(help="Format of the files in a folder. [default: png; webp with --animate]")
    ] = None,
    columns: Annotated[
        int | None, typer.Option(min=1, help="Images in a row. [default: a column for each class, or 8]")
    ] = None,
    labels: Annotated[
        bool | None,
        typer.Option(
            "--labels/--no-labels", help="Class and seed under each image, or no text. [default: classes on top]"
        ),
    ] = None,
    animate: Annotated[
        bool, typer.Option("--animate", help="Show how the images come out of the noise, step by step.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="Length of an animation.")] = 4.0,
    fps: Annotated[
        float, typer.Option(min=0.1, max=60, help="Frames of an animation per second, at most.")
    ] = 12.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite files that exist.")] = False,
) -> None:
    """Draw images from a run's network: one picture, a file for each image, or an animation of the denoising.

    With --expert-parallel E it starts E processes, or uses those of torchrun or srun.

    Examples:
        ditmoe sample runs/photos
        ditmoe sample runs/photos --classes cat,dog --cfg-scale 1.5 --seed 3
        ditmoe sample runs/demo --classes 3,7 --seeds 0-7 --labels --out threes-and-sevens.png
        ditmoe sample runs/demo --classes 3 --seeds 0-63 --out imgs/
        ditmoe sample runs/demo --seeds 0-3 --out denoising.gif
    """
    import time

    import torch

    from ditmoe.launcher.commands.pictures.choice import choose_classes, choose_seeds
    from ditmoe.launcher.commands.pictures.naming import picture_name
    from ditmoe.launcher.commands.pictures.output import Drawn, Looks, file_names, write_images
    from ditmoe.launcher.commands.pictures.progress import DrawingProgress
    from ditmoe.model.compiling.blocks import compiled_blocks
    from ditmoe.model.errors import UserError
    from ditmoe.parallel.checkpoint.folder import read_info
    from ditmoe.parallel.ranks import this_process
    from ditmoe.sampling.drawing.files import check_free, find_target
    from ditmoe.sampling.drawing.generate import check_finite, generate
    from ditmoe.sampling.drawing.together import generate_together
    from ditmoe.sampling.integrators.advice import sampler_warnings
    from ditmoe.sampling.integrators.samplers import planned_passes
    from ditmoe.sampling.jobs.workers import join_workers
    from ditmoe.sampling.network.load import find_checkpoint, home_of, load_model
    from ditmoe.sampling.network.of_group import check_dealt
    from ditmoe.sampling.python.choices import image_numbers

    config = drawing.config()
    chosen_seeds = None if seeds is None else choose_seeds(seeds)
    target = None if out is None else find_target(str(out), moves=animate, extension=format)
    if target is None and format is not None:
        raise UserError(f"--format {format}: goes with --out FOLDER/, whose files it is of")
    if expert_parallel > 1 and this_process().starts_ranks:
        from ditmoe.launcher.local.launch import spawn

        if device is not None:
            raise UserError(
                f"--device {device}: expected without --expert-parallel, whose processes have one each"
            )
        check_dealt(read_info(find_checkpoint(run, step)).model, expert_parallel)
        given: dict[str, object] = {
            "--classes": classes,
            "--count": count,
            "--seeds": seeds,
            "--batch": batch,
            "--vae": vae,
        }
        given |= {"--out": out, "--format": format, "--columns": columns, "--seconds": seconds, "--fps": fps}
        arguments = ["sample", *drawing.arguments(), "--weights", weights, f"--expert-parallel={expert_parallel}"]
        arguments += [f"{option}={value}" for option, value in given.items() if value is not None]
        arguments += ["--animate"] * animate + ["--overwrite"] * overwrite
        arguments += [] if labels is None else ["--labels" if labels else "--no-labels"]
        # The checkpoint is named: training may write a newer one before the processes look.
        raise typer.Exit(spawn([*arguments, "--", str(find_checkpoint(run, step))], expert_parallel))
    group = None
    if expert_parallel > 1:
        workers = join_workers(str(find_checkpoint(run, step)), expert_parallel)
        if workers.ranks != expert_parallel and workers.first:
            raise UserError(
                f"--expert-parallel {expert_parallel}: there are {workers.ranks} processes (WORLD_SIZE), and one "
                f"picture is drawn; expected {expert_parallel}"
            )
        group, device = workers.group, str(workers.device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(run, weights, step, check_device(device), config.precision, vae, group=group)
    if model.image_shape[0] not in (1, 3):
        raise UserError(
            f"{run}: the network draws {model.image_shape[0]} channels, and only 1 (grey) or 3 (RGB) make a "
            "picture; if they are latents, give their VAE with --vae"
        )
    config = config.for_a_look(model.objective_config)
    moves = animate or (target is not None and target.moves)
    check_possible(config, seeds=seeds, count=count)
    for warning in sampler_warnings(config):
        typer.echo(f"warning: {warning}", err=True)
    chosen = choose_classes(classes, model.class_names)
    usual = count is None
    # Chains whose length nobody told are as long as the images want; of several seeds each gives one image.
    short = config.chains and not any(setting.startswith("samples") for setting in drawing.values["dlg"])
    of_seed = 1 if short else config.images_per_unit
    if chosen_seeds is not None:
        usual, count = True, len(chosen) * len(chosen_seeds) * of_seed
    count = 8 * len(chosen) if count is None else count
    if short:
        rows = 1 if chosen_seeds is not None else -(-count // len(chosen))
        dlg = config.dlg.model_copy(update={"samples_per_chain": min(rows, config.dlg.samples_per_chain)})
        config = config.model_copy(update={"dlg": dlg})
    label_of = [chosen[image % len(chosen)] for image in range(count)]
    if chosen_seeds is None:
        seed_of = [config.seed] * count
        numbers = image_numbers(count, len(chosen), config.images_per_unit)
    else:
        # Image 0 of each seed, whatever its class: what `--seed` with `--count 1` draws; of chains all of chain 0.
        rows_of_seeds = [(seed, number) for seed in chosen_seeds for number in range(of_seed)]
        seed_of = [seed for seed, _ in rows_of_seeds for _ in chosen]
        numbers = [number for _, number in rows_of_seeds for _ in chosen]
    if target is None:
        assert model.info is not None
        name = picture_name(
            *(model.info.step, weights, chosen if classes else None, None if usual else count, config),
            *(chosen_seeds, "webp" if moves else "png"),
        )
        # Equal settings have an equal name, and it is said where a picture of before is replaced.
        target = find_target(str(home_of(model.info.path) / "samples" / name), moves=moves)
        overwrite = overwrite or target.path.exists()
    names = file_names(target, model.class_names, label_of, seed_of, numbers)
    check_free(names, overwrite=overwrite)
    replaced = sum(path.exists() for path in names)

    start = time.perf_counter()
    # A batch of the size that is asked for is filled up, so that an image has the same bits beside any others.
    rows = min(batch or 64, count) if chosen_seeds is None or batch is None else batch
    planned = None if config.chains else planned_passes(config, model.objective_config)
    shown = DrawingProgress(count, rows, None if planned is None else planned.full)
    images = (generate if group is None else generate_together)(
        model,
        torch.tensor(label_of),
        numbers,
        config,
        rows,
        shown.drawn,
        seeds=None if chosen_seeds is None else seed_of,
        frames=max(2, round(seconds * fps)) if moves else None,
        on_evaluation=None if config.chains else shown.evaluated,
    )
    if group is not None:
        workers.leave()
        if not group.first:
            return
    took = time.perf_counter() - start
    if config.compile:
        took -= compiled_blocks(with_gradients=False).seconds
    check_finite(images.finite_N, numbers)
    looks = Looks(columns, labels, seconds, fps, len(chosen), chosen_seeds)
    write_images(
        target,
        names,
        Drawn(model, weights, config, images, label_of, seed_of, numbers),
        looks,
        overwrite=overwrite,
    )
    typer.echo(f"{target.path}" + (f" ({replaced} replaced)" if replaced else ""))
    typer.echo(told(images, config, took / count))


def check_possible(config: "SamplerConfig", *, seeds: str | None, count: int | None) -> None:
    """UserError where options contradict each other."""
    from ditmoe.model.errors import UserError

    if seeds is None:
        return
    if count is not None:
        raise UserError(f"--seeds {seeds} with --count {count}: each class is drawn with each seed; expected one")
    if config.seed:
        raise UserError(f"--seeds {seeds} with --seed {config.seed}: expected one of them")


def told(images: "Generated", config: "SamplerConfig", seconds: float) -> str:
    """How many images were drawn, how, and in which time each."""
    steps = f"{config.steps} steps, " if config.integrator != "rk45" else ""
    counts = [f"{images.network_evaluations:g} network evaluations"] * (images.network_evaluations != images.nfe)
    counts += [f"{images.cached_evaluations:g} extrapolated"] * (images.cached_evaluations > 0)
    evaluations = f" ({', '.join(counts)})" if counts else ""
    count = len(images.image_NHWC)
    return (
        f"{count} image{'s' if count != 1 else ''}, {config.sampler}, {steps}NFE {images.nfe:g} per image"
        f"{evaluations}, {seconds:.3g} s per image"
    )


def check_device(name: str) -> str:
    """The device's name, if this machine has it.

    Raises:
        UserError: it has not.
    """
    import torch

    from ditmoe.model.errors import UserError

    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({reason}); expected cpu, cuda or cuda:N") from None
    return name
