"""`ditmoe convert`: published weights, safetensors and checkpoints of ours, each into any other."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from ditmoe.model.config import ModelConfig, ObjectiveConfig
    from ditmoe.model.weights.published import PublishedWeights


def command(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .pt or .safetensors file (or index), a checkpoint of ours, or a run (its newest).",
            metavar="SRC",
        ),
    ],
    destination: Annotated[
        Path,
        typer.Argument(help="NAME.pt, NAME.safetensors, or a new folder for a checkpoint of ours.", metavar="DST"),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Keys of model that the weights do not say, such as model.experts_per_token=2.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="The network expected, such as DiT-XL/2-8E2A; the file is checked against it."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A run's YAML file: its `model`, and its `objective` if it has one, are expected."),
    ] = None,
    objective: Annotated[
        Literal["ddpm", "rectified_flow", "sit"] | None,
        typer.Option(
            help="What it was trained to predict; needed for a checkpoint, published files do not say it. sit:"
            " SiT's files, whose time is turned round."
        ),
    ] = None,
    not_sit: Annotated[
        bool,
        typer.Option("--not-sit", help="Dense rectified flow in which t = 1 is noise, as ours, and not SiT's."),
    ] = False,
    weights: Annotated[
        Literal["ema", "weights"] | None,
        typer.Option(help="Take this set alone. Default: both where the destination holds both, else the EMA."),
    ] = None,
    bare: Annotated[
        bool, typer.Option("--bare", help="A .pt file that is nothing but one set of weights.")
    ] = False,
    shard_size: Annotated[
        float, typer.Option(min=0.001, help="Cut .safetensors into files of at most this many GiB.")
    ] = 5.0,
) -> None:
    """Convert weights between published .pt files, safetensors and checkpoints of ours, bit for bit."""
    from ditmoe.launcher.commands.models import human
    from ditmoe.model.count import count
    from ditmoe.model.errors import UserError
    from ditmoe.model.weights.published import save_published

    kind = _destination_kind(destination)
    if bare and kind != ".pt":
        raise UserError(f"--bare: {destination} is not a .pt file")
    single = bare or kind == ".safetensors"
    expected, configured = _expected(config, overrides or [])
    published = _read(source, preset, expected, weights or ("ema" if single else None))
    published = _with_objective(published, objective or configured, not_sit)
    if weights is not None:
        published = published.only(weights)
    elif single and published.ema is not None:
        published = published.only("ema")
    if kind == "checkpoint":
        _write_checkpoint(destination, published)
        written = destination
    else:
        written = save_published(published, destination, bare=bare, shard_bytes=int(shard_size * 2**30))[-1]
    counted = count(published.config)
    sets = " and ".join(name for name in ("ema", "weights") if getattr(published, name) is not None)
    typer.echo(
        f"{written}: {published.config.preset or 'a network of its own shape'}, {human(counted.total)} parameters "
        f"({sets}), {published.objective.kind if published.objective else 'objective unknown'}"
    )


def _expected(path: Path | None, overrides: list[str]) -> tuple[dict[str, Any], str | None]:
    """Fields of `model`, and the kind of `objective`, that a configuration and overrides give."""
    from ditmoe.launcher.configuration.overrides import apply_overrides
    from ditmoe.launcher.configuration.problems import problem_list
    from ditmoe.launcher.configuration.run_config import RunConfig
    from ditmoe.model.errors import UserError
    from ditmoe.model.outside.yaml_reader import read_yaml
    from ditmoe.model.presets import parse_preset

    values, problems = ({}, []) if path is None else read_yaml(path)
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


def _with_objective(published: "PublishedWeights", kind: str | None, not_sit: bool) -> "PublishedWeights":
    """The weights with what they were trained to predict, as our networks predict it."""
    from dataclasses import replace

    from ditmoe.model.config import ObjectiveConfig
    from ditmoe.model.errors import UserError
    from ditmoe.model.weights.sit import could_be_sit, from_sit

    said, origin = published.objective, published.origin
    if said is not None:
        if kind not in (None, said.kind):
            raise UserError(f"--objective: {kind} given, but {origin} says {said.kind}")
        return published
    if kind == "sit":
        if not_sit:
            raise UserError("--not-sit: given with --objective sit; expected one of them")
        states = [
            None if state is None else from_sit(state, published.config, origin)
            for state in (published.ema, published.weights)
        ]
        flow = ObjectiveConfig(kind="rectified_flow")
        return replace(published, ema=states[0], weights=states[1], objective=flow)
    if kind == "rectified_flow" and could_be_sit(published.config) and not not_sit:
        raise UserError(
            f"--objective: rectified_flow given, and {origin} has dense weights, which may be SiT's: their time"
            " runs the other way, and nothing in a file tells; give --objective sit if they are, or --not-sit"
        )
    if kind not in (None, "ddpm", "rectified_flow"):
        raise UserError(f"objective.kind = {kind!r:.60}: expected ddpm or rectified_flow")
    return (
        published if kind is None else replace(published, objective=ObjectiveConfig.model_validate({"kind": kind}))
    )


def _destination_kind(path: Path) -> Literal[".pt", ".safetensors", "checkpoint"]:
    """What a destination's name asks for; nothing is overwritten."""
    from ditmoe.model.errors import UserError
    from ditmoe.model.weights.files import INDEX_SUFFIX, PT_SUFFIXES, SAFETENSORS

    taken = [path]
    if path.suffix == SAFETENSORS:
        taken.append(path.with_name(path.stem + INDEX_SUFFIX))
    for existing in taken:
        if os.path.lexists(existing):
            raise UserError(f"{existing}: exists already; remove it or choose another name")
    if path.suffix == SAFETENSORS:
        return ".safetensors"
    if path.suffix in PT_SUFFIXES:
        return ".pt"
    if path.suffix[1:].isalpha():
        raise UserError(f"{path}: ends with {path.suffix!r}, expected .pt, {SAFETENSORS}, or a folder's name")
    return "checkpoint"


def _read(
    source: Path, preset: str | None, expected: dict[str, Any], wanted: Literal["ema", "weights"] | None
) -> "PublishedWeights":
    """The weights of a source of any kind."""
    from ditmoe.model.errors import UserError
    from ditmoe.model.weights.published import read_published
    from ditmoe.parallel.checkpoint.folder import newest_checkpoint
    from ditmoe.parallel.checkpoint.marker import MARKER

    if source.is_dir():
        if (source / MARKER).is_file():
            return _read_checkpoint(source, preset, expected, wanted)
        if (source / "checkpoints").is_dir():
            newest = newest_checkpoint(source)
            if newest is None:
                raise UserError(f"{source}: the run has no complete checkpoint")
            return _read_checkpoint(newest, preset, expected, wanted)
    return read_published(source, preset, config=expected)


def _read_checkpoint(
    path: Path, preset: str | None, expected: dict[str, Any], wanted: Literal["ema", "weights"] | None
) -> "PublishedWeights":
    """The weights of a checkpoint of ours, with the position embedding that published files have."""
    from ditmoe.model.errors import UserError
    from ditmoe.model.layers import position_embedding
    from ditmoe.model.presets import parse_preset
    from ditmoe.model.weights.published import PublishedWeights
    from ditmoe.parallel.checkpoint.folder import read_info, read_weights

    info = read_info(path)
    config = _complete(info.model, info.dataset)
    wanted_fields = {"the configuration": expected}
    if preset is not None:
        try:
            wanted_fields[preset] = vars(parse_preset(preset))
        except ValueError as error:
            raise UserError(f"--preset: {error}") from error
    problems = [
        f"{key} = {getattr(config, key, None)} in the checkpoint, {value} in {origin}"
        for origin, fields in wanted_fields.items()
        for key, value in fields.items()
        if value is not None and getattr(config, key, None) != value
    ]
    if problems:
        raise UserError(f"{path}: another network than expected: {'; '.join(problems)}")
    assert config.image_size is not None
    embedding = position_embedding(config.hidden, config.image_size // config.patch)
    sets = {
        part: {"pos_embed": embedding, **read_weights(path, part)}
        for part in ("ema", "weights")
        if wanted in (None, part) and part in info.parts
    }
    if not sets:
        raise UserError(f"{path}: has no set {wanted!r}, only {', '.join(info.parts)}")
    return PublishedWeights(
        config,
        sets.get("ema"),
        sets.get("weights"),
        info.objective,
        info.dataset.get("class_names"),
        str(path),
    )


def _complete(config: "ModelConfig", dataset: dict[str, Any]) -> "ModelConfig":
    """What the network's configuration leaves to the data is in the checkpoint's facts of the data."""
    left_out = ("image_size", "channels", "num_classes")
    return config.model_copy(
        update={key: dataset[key] for key in left_out if getattr(config, key) is None and key in dataset}
    )


def _write_checkpoint(path: Path, published: "PublishedWeights") -> None:
    """Write a checkpoint of ours. With one set of weights, that set is both what is trained and its average."""
    from torch.distributed.checkpoint.api import CheckpointException

    from ditmoe.model.errors import UserError
    from ditmoe.model.weights.positions import check_position_embedding
    from ditmoe.parallel.checkpoint.folder import write_weights_checkpoint

    objective = _required_objective(published)
    for which in ("ema", "weights"):
        state = getattr(published, which)
        if state is not None:
            note = check_position_embedding(state, published.config, published.origin, averaged=which == "ema")
            if note is not None:
                typer.echo(note, err=True)
    weights = published.state("weights") if published.weights is not None else published.state("ema")
    try:
        write_weights_checkpoint(path, published.config, objective, weights, published.ema, published.class_names)
    except (OSError, CheckpointException) as error:
        text = str(error).strip().splitlines()[-1]
        raise UserError(f"{path}: could not be written ({text})") from error


def _required_objective(published: "PublishedWeights") -> "ObjectiveConfig":
    from ditmoe.model.errors import UserError

    if published.objective is None:
        raise UserError(f"--objective: {published.origin} does not say it; give ddpm, rectified_flow or sit")
    return published.objective
