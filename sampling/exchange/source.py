"""Weights that come in: a file, a folder of diffusers, a name on the hub, a checkpoint of ours, or a run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ditmoe.data.encoding.vae import CONFIG_FILE, WEIGHTS_FILE
from ditmoe.model.config import ModelConfig
from ditmoe.model.errors import UserError
from ditmoe.model.presets import parse_preset
from ditmoe.model.weights.diffusers import PIPELINE_FILE
from ditmoe.model.weights.objective import with_objective
from ditmoe.model.weights.published import PublishedWeights, read_published
from ditmoe.model.weights.sit import could_be_sit
from ditmoe.parallel.checkpoint.export import open_weights
from ditmoe.parallel.checkpoint.folder import CheckpointInfo, read_info
from ditmoe.parallel.checkpoint.marker import MARKER
from ditmoe.sampling.exchange.hub import local_folder
from ditmoe.sampling.network.load import complete_config, find_checkpoint

Set = Literal["ema", "weights"]


@dataclass(frozen=True)
class Source:
    """Weights, and what is known of where they are from."""

    published: PublishedWeights
    info: CheckpointInfo | None = None
    """Of a checkpoint of ours."""
    vae: Path | None = None
    """A VAE that lies beside them, in a pipeline of diffusers."""


@contextmanager
def open_source(
    path: Path,
    preset: str | None = None,
    expected: Mapping[str, Any] | None = None,
    which: Set | None = None,
    step: int | None = None,
) -> Iterator[Source]:
    """Weights of any kind; those of a checkpoint of ours are read as they are asked for, within the body.

    Args:
        path: a local path goes before a name on the hub.
        preset: the network expected.
        expected: fields of its configuration.
        which: a checkpoint's set; None: all that it has.
        step: the checkpoint of a run; None: its newest.

    Raises:
        UserError: nothing is there, it cannot be read, or it is another network.
    """
    path = local_folder(path)
    if path.is_dir() and ((path / MARKER).is_file() or (path / "checkpoints").is_dir()):
        with _open_checkpoint(find_checkpoint(path, step), preset, expected or {}, which) as source:
            yield source
        return
    if step is not None:
        raise UserError(f"--step {step}: {path} is no run; expected it left out")
    published = read_published(path, preset, config=expected or {})
    vae = path / "vae" if path.is_dir() and (path / PIPELINE_FILE).is_file() else None
    if vae is not None and not ((vae / CONFIG_FILE).is_file() and (vae / WEIGHTS_FILE).is_file()):
        vae = None
    yield Source(published, None, vae)


@contextmanager
def _open_checkpoint(
    path: Path, preset: str | None, expected: Mapping[str, Any], which: Set | None
) -> Iterator[Source]:
    info = read_info(path)
    config = complete_config(info.model, info)
    wanted_fields: dict[str, Mapping[str, Any]] = {"the configuration": expected}
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
    known: tuple[Set, Set] = ("ema", "weights")
    sets = [part for part in known if which in (None, part) and part in info.parts]
    if not sets:
        raise UserError(f"{path}: has no set {which!r}, only {', '.join(info.parts)}")
    with open_weights(info, sets) as states:
        held = dict(zip(sets, states, strict=True))
        names = info.dataset.get("class_names")
        published = PublishedWeights(
            config, held.get("ema"), held.get("weights"), info.objective, list(names) if names else None, str(path)
        )
        yield Source(published, info)


def of_objective(
    published: PublishedWeights, kind: str | None, key: str, not_sit: bool, *, trusted: bool = False
) -> PublishedWeights:
    """The weights with what they were trained to predict, as our networks predict it.

    Args:
        kind: ddpm, rectified_flow or sit, as the user says it.
        key: where it is said, for messages.
        not_sit: the user says that t = 1 is noise.
        trusted: what the user says is not compared with how the weights answer to noise.

    Raises:
        UserError: it is another than the file says, may be SiT's, or the weights contradict it.
    """
    origin = published.origin
    if published.objective is None:
        if kind == "sit" and not_sit:
            raise UserError(f"--not-sit: given with {key} sit; expected one of them")
        if kind == "rectified_flow" and could_be_sit(published.config) and not not_sit:
            raise UserError(
                f"{key}: rectified_flow given, and {origin} has dense weights, which may be SiT's: their"
                " time runs the other way, and nothing in a file tells; give --objective sit if they are, or"
                " --not-sit"
            )
    return with_objective(published, kind, key, trusted=trusted)


def name_of(config: ModelConfig) -> str:
    """A network's preset, or what it is without one."""
    return config.published_name or "a network of its own shape"
