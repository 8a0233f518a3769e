"""`ditmoe sample`: a picture of images drawn from a run's network."""

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
    from collections.abc import Callable

    from ditmoe.sampling.settings.config import SamplerConfig

MOST_DEFAULT_CLASSES = 16
LONGEST_LIST = 60
"""Characters of a file's name that may list classes, or settings of chains."""


@draws_images(steps=50)
def command(
    run: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints.", metavar="RUN")],
    *,
    classes: Annotated[
        str | None,
        typer.Option(help="Numbers or names, with commas between: 3,7. [default: all, or 16 spread over them]"),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Images; they take the classes in turn. [default: 8 of each class]")
    ] = None,
    drawing: Drawing,
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 64,
    step: StepOption = None,
    weights: WeightsOption = "ema",
    device: Annotated[str | None, typer.Option(help="[default: cuda if there is one, else cpu]")] = None,
    vae: VaeOption = None,
    expert_parallel: ExpertParallelOption = 1,
    out: Annotated[
        Path | None, typer.Option(help="PNG to write. [default: under RUN/samples, named by the settings]")
    ] = None,
) -> None:
    """Draw images from a run's network into one picture, a column per class.

    With --expert-parallel it starts so many processes, or joins those of torchrun or srun.
    """
    import time

    import torch

    from ditmoe.model.errors import UserError
    from ditmoe.parallel.checkpoint.folder import read_info
    from ditmoe.parallel.ranks import this_process
    from ditmoe.sampling.drawing.generate import check_finite, generate
    from ditmoe.sampling.drawing.picture import image_grid, save_picture
    from ditmoe.sampling.drawing.together import generate_together
    from ditmoe.sampling.integrators.few_steps import noise_warnings
    from ditmoe.sampling.jobs.workers import join_workers
    from ditmoe.sampling.network.load import find_checkpoint, home_of, load_model
    from ditmoe.sampling.network.of_group import check_dealt

    config = drawing.config()
    if expert_parallel > 1 and this_process().starts_ranks:
        from ditmoe.launcher.local.launch import spawn

        if device is not None:
            raise UserError(
                f"--device {device}: expected without --expert-parallel, whose processes have one each"
            )
        check_dealt(read_info(find_checkpoint(run, step)).model, expert_parallel)
        arguments = ["sample", *drawing.arguments(), "--batch", str(batch), "--weights", weights]
        arguments += ["--expert-parallel", str(expert_parallel)]
        for option, value in (("--classes", classes), ("--count", count), ("--vae", vae), ("--out", out)):
            arguments += [f"{option}={value}"] if value is not None else []
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
    config = config.resolved(model.objective_config)
    for warning in noise_warnings(config):
        typer.echo(f"warning: {warning}", err=True)
    chosen = choose_classes(classes, model.class_names)
    count = 8 * len(chosen) if count is None else count
    if config.chains and not any(setting.startswith("samples") for setting in drawing.values["dlg"]):
        rows = -(-count // len(chosen))
        dlg = config.dlg.model_copy(update={"samples_per_chain": min(rows, config.dlg.samples_per_chain)})
        config = config.model_copy(update={"dlg": dlg})
    labels = torch.tensor([chosen[image % len(chosen)] for image in range(count)])
    numbers = image_numbers(count, len(chosen), config.images_per_unit)

    start = time.perf_counter()
    images = (generate if group is None else generate_together)(
        model, labels, numbers, config, min(batch, count), progress_on_terminal(count)
    )
    if group is not None:
        workers.leave()
        if not group.first:
            return
    seconds = time.perf_counter() - start
    check_finite(images.finite_N, numbers)

    columns = min(len(chosen), count) if len(chosen) > 1 else min(count, 8)
    captions = [model.class_names[label] for label in chosen[:columns]] if len(chosen) > 1 else []
    picture = image_grid(images.image_NHWC.numpy(), columns, captions)
    assert model.info is not None
    if out is None:
        usual = count == 8 * len(chosen)
        name = picture_name(
            model.info.step, weights, chosen if classes else None, None if usual else count, config
        )
        out = home_of(model.info.path) / "samples" / name
    save_picture(picture, out)
    typer.echo(f"{out}")
    typer.echo(
        f"{count} images, {config.sampler}, "
        + (f"{config.steps} steps, " if config.integrator != "rk45" else "")
        + f"NFE {images.nfe:g} per image"
        + (
            f" ({images.network_evaluations:g} network evaluations)"
            if images.network_evaluations != images.nfe
            else ""
        )
        + f", {seconds / count:.3g} s per image"
    )


def choose_classes(text: str | None, names: tuple[str, ...]) -> list[int]:
    """The labels that `--classes` stands for.

    A part that is a class's name is that class before it is a number. A name may have commas in it: the longest
    name that the next parts make is taken.

    Raises:
        UserError: a part is neither; names all such parts.
    """
    from ditmoe.model.errors import UserError
    from ditmoe.model.outside.text import normal

    if text is None:
        total = len(names)
        shown = min(total, MOST_DEFAULT_CLASSES)
        return [place * total // shown for place in range(shown)]
    chosen, wrong = [], []
    label_of = {normal(name): label for label, name in reversed(list(enumerate(names)))}
    longest = max(name.count(",") for name in names) + 1
    parts = text.split(",")
    while parts:
        for length in range(min(longest, len(parts)), 0, -1):
            part = normal(",".join(parts[:length]).strip())
            if part in label_of:
                break
        del parts[:length]
        if part in label_of:
            chosen.append(label_of[part])
        elif part.isascii() and part.isdigit() and int(part) < len(names):
            chosen.append(int(part))
        else:
            wrong.append(part)
    if wrong:
        listed = ", ".join(names[:MOST_DEFAULT_CLASSES]) + (", …" if len(names) > MOST_DEFAULT_CLASSES else "")
        raise UserError(
            f"--classes: {', '.join(map(repr, wrong))} found; expected numbers from 0 to {len(names) - 1}, "
            f"or names: {listed}"
        )
    return chosen


def image_numbers(count: int, classes: int, images_per_unit: int) -> list[int]:
    """The numbers of images that take the classes in turn: 0, 1, … for independent ones.

    Of chains, the samples of one stand below each other in the column of its class: row r of column c is sample
    r mod S of chain (r div S)·classes + c.
    """
    numbers = []
    for place in range(count):
        row, column = divmod(place, classes)
        block, sample = divmod(row, images_per_unit)
        numbers.append((block * classes + column) * images_per_unit + sample)
    return numbers


def picture_name(
    step: int, weights: str, classes: list[int] | None, count: int | None, config: "SamplerConfig"
) -> str:
    """A file name that states how the picture came about; `classes` and `count` where they were asked for."""
    parts = [f"step-{step:08d}", *sampler_words(config)]
    parts.append(f"cfg{config.cfg_scale:g}")
    if config.cfg_channels is not None and config.cfg_scale != 1:
        parts.append(f"on{config.cfg_channels}channels")
    parts.append(f"seed{config.seed}")
    if weights != "ema":
        parts.append(weights)
    if config.precision != "fp32":
        parts.append(config.precision)
    if classes is not None:
        parts.append(f"classes-{_shortened('-'.join(map(str, classes)), str(len(classes)))}")
    if count is not None:
        parts.append(f"{count}images")
    return "_".join(parts) + ".png"


def _shortened(text: str, stead: str) -> str:
    """A part of a file's name, or where it is long, what stands for it with a hash."""
    import hashlib

    if len(text) <= LONGEST_LIST:
        return text
    return f"{stead}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def sampler_words(config: "SamplerConfig") -> list[str]:
    """The sampler, its steps, and those of its settings that depart from their defaults."""
    from ditmoe.sampling.settings.config import SamplerConfig, default_schedule

    assert config.sampler is not None
    words: list[str] = [config.sampler.replace(":", "-")]
    if config.integrator == "rk45":
        words.append(f"tolerance{config.tolerance:g}")
    else:
        words.append(f"{config.steps}steps")
        if config.schedule != default_schedule(config.integrator):
            words.append(f"schedule-{config.schedule}")
    if config.integrator == "ddim" and config.ddim_eta:
        words.append(f"eta{config.ddim_eta:g}")
    if config.integrator == "kar2":
        for key in ("churn", "churn_min", "churn_max", "churn_noise"):
            value = getattr(config, key)
            if value != SamplerConfig.model_fields[key].default:
                words.append(f"{key.replace('_', '-')}{value:g}")
    if config.corrector_steps:
        words.append(f"{config.corrector_steps}corrections-snr{config.corrector_snr:g}")
    if config.tweedie:
        words.append("tweedie")
    if config.chains:
        fields = type(config.dlg).model_fields
        chosen = {key: value for key, value in config.dlg if key != "preset" and value != fields[key].default}
        chain_words = "_".join(f"{key.replace('_', '-')}-{value}" for key, value in chosen.items())
        words += [_shortened(chain_words, "dlg")] if chain_words else []
    return words


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


def progress_on_terminal(count: int) -> "Callable[[int], None] | None":
    """A progress bar where standard error is a terminal; otherwise nothing."""
    import sys

    from tqdm import tqdm

    if not sys.stderr.isatty():
        return None
    bar = tqdm(total=count, unit="image", dynamic_ncols=True)

    def advance(drawn: int) -> None:
        bar.update(drawn - bar.n)
        if drawn == count:
            bar.close()

    return advance
