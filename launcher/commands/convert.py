"""`ditmoe convert`: weights of others into ours, and ours into theirs."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ditmoe.launcher.command_line.arguments import complete_config, overrides_argument


def command(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .pt or .safetensors file (or its index), a diffusers folder, a name on the hub such as"
            " facebook/DiT-XL-2-256, a checkpoint of ours, or a run (its newest).",
            metavar="SRC",
        ),
    ],
    destination: Annotated[
        Path,
        typer.Argument(help="NAME.pt, NAME.safetensors, or a new folder.", metavar="DST"),
    ],
    overrides: Annotated[
        list[str] | None,
        overrides_argument("Keys of model that the weights do not say, such as model.experts_per_token=2."),
    ] = None,
    to: Annotated[
        Literal["checkpoint", "diffusers"] | None,
        typer.Option(help="What to write if DST is a folder. [default: checkpoint, which `ditmoe sample` takes]"),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="The network expected, such as DiT-XL/2-8E2A; the file is checked against it."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A run's YAML file, a run's folder, or the name of a shipped configuration that describes the"
            " expected network (its `model`, and its `objective` if it has one).",
            metavar="FILE|RUN|NAME",
            autocompletion=complete_config,
        ),
    ] = None,
    objective: Annotated[
        Literal["ddpm", "rectified_flow", "sit"] | None,
        typer.Option(
            help="What the network was trained to predict. Published files do not say it, and a"
            " folder needs it. sit: for SiT's files, whose time runs backwards."
        ),
    ] = None,
    not_sit: Annotated[
        bool,
        typer.Option("--not-sit", help="The weights are a flow with noise at t = 1, like ours, not SiT's."),
    ] = False,
    trust_objective: Annotated[
        bool,
        typer.Option("--trust-objective", help="Use --objective even if the weights contradict it."),
    ] = False,
    weights: Annotated[
        Literal["ema", "weights"] | None,
        typer.Option(help="Take only this set of weights. [default: both if DST can hold both, else the EMA]"),
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="The checkpoint of this step of a run.")] = None,
    vae: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the VAE that decodes what the network draws. [default: the run's, or "
            "that of the pipeline]",
        ),
    ] = None,
    bare: Annotated[
        bool, typer.Option("--bare", help="Write a .pt file that holds only one set of weights.")
    ] = False,
    stock: Annotated[
        bool,
        typer.Option(
            "--stock",
            help="With --to diffusers: write diffusers' own class for a dense network with DiT's time frequencies,"
            " although that class computes others. Its pictures then differ from ours.",
        ),
    ] = False,
    shard_size: Annotated[
        float, typer.Option(min=0.0001, help="Cut .safetensors into files of at most this many GiB.")
    ] = 5.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion.")] = False,
) -> None:
    """Convert weights between published files, diffusers, safetensors and our checkpoints, bit for bit.

    Examples:
        ditmoe convert runs/photos photos.safetensors
        ditmoe convert runs/photos photos-diffusers --to diffusers
        ditmoe convert sit.pt runs/sit --preset DiT-XL/2 --objective sit
        ditmoe convert DiT-XL-2-256x256.pt runs/xl --preset DiT-XL/2 --objective ddpm
    """
    from dataclasses import replace

    from ditmoe.launcher.commands.models import human
    from ditmoe.model.count import count
    from ditmoe.model.errors import UserError
    from ditmoe.sampling.exchange.destination import Destination, check_destination, write
    from ditmoe.sampling.exchange.source import name_of, of_objective, open_source

    kind = check_destination(destination, to, overwrite=overwrite, source=source)
    if bare and kind != ".pt":
        raise UserError(f"--bare: {destination} is not a .pt file")
    if stock and kind != "diffusers":
        raise UserError("--stock: is for --to diffusers alone")
    target = Destination(destination, kind, bare, overwrite, stock, int(shard_size * 2**30))
    expected, configured = _expected(config, overrides or [])
    with open_source(source, preset, expected, weights or ("ema" if target.single else None), step) as found:
        said, key = (objective, "--objective") if objective else (configured, "objective.kind")
        published = of_objective(found.published, said, key, not_sit, trusted=trust_objective)
        if weights is not None:
            published = published.only(weights)
        elif target.single and published.ema is not None:
            published = published.only("ema")
        found = replace(found, published=published)
        written = write(found, target, vae, _progress, lambda line: typer.echo(line, err=True))
    counted = count(published.config)
    sets = " and ".join(name for name in ("ema", "weights") if getattr(published, name) is not None)
    typer.echo(
        f"{written}: {name_of(published.config)}, {human(counted.total)} parameters "
        f"({sets}), {published.objective.kind if published.objective else 'objective unknown'}"
    )


def _progress(done: int) -> None:
    typer.echo(f"{done / 2**20:,.1f} MiB", err=True)


def _configuration_file(path: Path) -> Path:
    """The file that a run's folder, or the name of a shipped configuration, stands for."""
    from ditmoe.launcher.configuration.shipped import find_config

    if (path / "config.yaml").is_file():
        return path / "config.yaml"
    return find_config(path, say=lambda line: typer.echo(line, err=True))


def _expected(path: Path | None, overrides: list[str]) -> tuple[dict[str, Any], str | None]:
    """Fields of `model`, and the kind of `objective`, that a configuration and overrides give."""
    from ditmoe.launcher.configuration.overrides import apply_overrides
    from ditmoe.launcher.configuration.problems import problem_list
    from ditmoe.launcher.configuration.run_config import RunConfig
    from ditmoe.model.errors import UserError
    from ditmoe.model.outside.yaml_reader import read_yaml
    from ditmoe.model.presets import parse_preset

    values, problems = ({}, []) if path is None else read_yaml(_configuration_file(path))
    values, more = apply_overrides(RunConfig, values, overrides)
    others = [each for each in overrides if not each.startswith(("model.", "objective."))]
    problems += more + [f"{each}: expected a key of model or objective" for each in others]
    model, objective = values.get("model") or {}, values.get("objective") or {}
    for name, section in (("model", model), ("objective", objective)):
        if not isinstance(section, dict):
            problems.append(f"{name} is {section!r:.60}; expected a section of keys")
    if problems:
        raise UserError(problem_list(str(path or "KEY=VALUE"), problems))
    if model.get("preset") is not None:
        try:
            model = {**vars(parse_preset(str(model["preset"]))), **model}
        except ValueError as error:
            raise UserError(f"model.preset: {error}") from error
    return {key: value for key, value in model.items() if key != "preset"}, objective.get("kind")
