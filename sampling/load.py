"""A trained model, read from a run folder or one of its checkpoints."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ditmoe.model.canonical import load_canonical
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint import (
    MARKER,
    CheckpointInfo,
    checkpoint_path,
    checkpoints,
    newest_checkpoint,
    read_info,
    read_weights,
)

Weights = Literal["ema", "weights"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class LoadedModel:
    """A network and what it takes to sample from it."""

    network: nn.Module
    """(x_BCHW, timestep_B, label_B) → prediction; a `DiT`."""
    model_config: ModelConfig
    """Complete: input size, channels and classes are known."""
    objective_config: ObjectiveConfig
    class_names: tuple[str, ...]
    """Name of each class, in the order of the labels."""
    info: CheckpointInfo | None
    """The checkpoint it was read from; None for a network that never was in one."""
    fingerprint: str
    """Stands for the checkpoint and the choice of weights: one fingerprint, the same images."""

    def network_in(self, precision: Precision) -> nn.Module:
        """The network for sampling: itself, or a copy in bfloat16 that is made once where it is in fp32."""
        if precision == "fp32" or next(self.network.parameters()).dtype == torch.bfloat16:
            return self.network
        return self._in_bfloat16

    @cached_property
    def _in_bfloat16(self) -> nn.Module:
        return copy.deepcopy(self.network).to(torch.bfloat16)


def find_checkpoint(source: Path, step: int | None = None) -> Path:
    """The checkpoint that a run folder (its newest, or that of `step`) or a checkpoint folder stands for.

    Raises:
        UserError: there is none.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; expected a run folder or a checkpoint")
    if (source / MARKER).is_file():
        if step is not None:
            raise UserError(f"{source}: is one checkpoint, and step {step} was asked for; expected a run folder")
        return source
    if step is None:
        newest = newest_checkpoint(source)
        if newest is None:
            raise UserError(f"{source}: no complete checkpoint found; expected a run folder or a checkpoint")
        return newest
    complete = checkpoints(source)
    path = checkpoint_path(source, step)
    if path not in complete:
        found = ", ".join(str(int(there.name.removeprefix("step-"))) for there in complete) or "none"
        raise UserError(f"{source}: no complete checkpoint of step {step}; found steps: {found}")
    return path


def home_of(checkpoint: Path) -> Path:
    """The folder that what is made of a checkpoint goes to: its run's, or its own where it stands alone."""
    resolved = checkpoint.resolve()
    home = resolved.parent.parent if resolved.parent.name == "checkpoints" else resolved
    here = Path.cwd()
    return home.relative_to(here) if home.is_relative_to(here) else home


def load_model(
    source: Path,
    which: Weights = "ema",
    step: int | None = None,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
) -> LoadedModel:
    """Read a model for sampling.

    Args:
        source: a run folder, or the folder of one checkpoint.
        which: the moving average, or the trained weights themselves.
        step: the checkpoint of a run; None: the newest complete one.
        device: where the network goes, in evaluation mode.
        precision: of its weights; bf16 saves the memory of the fp32 ones where only bf16 is sampled.

    Raises:
        UserError: no checkpoint is there, it is damaged, or its weights do not fit its configuration.
    """
    path = find_checkpoint(source, step)
    info = read_info(path)
    try:
        model_config, objective_config = _complete(info.model, info), info.objective
    except (KeyError, ValueError) as error:
        raise UserError(f"{path / MARKER}: its configuration does not describe a model: {error}") from error
    network = DiT(model_config)
    load_canonical(network, read_weights(path, which), origin=f"{path} ({which})")
    assert model_config.num_classes is not None
    names = info.dataset.get("class_names") or range(model_config.num_classes)
    return LoadedModel(
        network=network.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        .eval()
        .requires_grad_(False),
        model_config=model_config,
        objective_config=objective_config,
        class_names=tuple(str(name) for name in names),
        info=info,
        fingerprint=f"{info.fingerprint}-{which}",
    )


def _complete(config: ModelConfig, info: CheckpointInfo) -> ModelConfig:
    """The configuration, with what it left to the data taken from there. KeyError where that has it not."""
    missing = [name for name in ("image_size", "channels", "num_classes") if getattr(config, name) is None]
    return ModelConfig.model_validate(config.model_dump() | {name: info.dataset[name] for name in missing})
