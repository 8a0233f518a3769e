"""A trained model, read from a run folder or one of its checkpoints."""

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor, nn

from ditmoe.data.encoding.vae import Vae, VaeFacts, find_vae, load_vae, read_facts
from ditmoe.data.shards.index import LatentFacts
from ditmoe.model.canonical import canonical_items, canonical_shapes, canonical_state, check_canonical
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UnwritableError, UserError
from ditmoe.model.layers import position_embedding
from ditmoe.model.outside.yaml_reader import read_yaml
from ditmoe.model.settings import check_path
from ditmoe.parallel.checkpoint.folder import (
    CheckpointInfo,
    checkpoint_path,
    checkpoints,
    load_weights,
    newest_checkpoint,
    read_info,
)
from ditmoe.parallel.checkpoint.marker import MARKER
from ditmoe.parallel.expert_group import ExpertGroup
from ditmoe.sampling.network.of_group import network_of_group
from ditmoe.sampling.network.shared_weights import SHARED_WEIGHTS, share_weights

CONFIG: Final = "config.yaml"
"""Of a run: its configuration, in its folder."""
Weights = Literal["ema", "weights"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class LoadedModel:
    """A network and what it takes to sample from it."""

    network: nn.Module
    """(x_BCHW, timestep_B, label_B) → prediction; a `DiT`, or a `NetworkOfGroup` for one."""
    model_config: ModelConfig
    """Complete: input size, channels and classes are known."""
    objective_config: ObjectiveConfig
    class_names: tuple[str, ...]
    """Name of each class, in the order of the labels."""
    info: CheckpointInfo | None
    """The checkpoint it was read from; None for a network that never was in one."""
    fingerprint: str
    """Stands for the checkpoint and the choice of weights: with one VAE, one fingerprint is the same images."""
    vae: Vae | None = None
    """Decodes what the network draws; None: it draws pixels."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image in pixels."""
        size, channels = self.model_config.image_size, self.model_config.channels
        assert size is not None and channels is not None
        if self.vae is not None:
            size, channels = size * self.vae.facts.reduction, self.vae.facts.pixel_channels
        return channels, size, size

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


def shared_folder(checkpoint: Path) -> Path:
    """Where processes share a checkpoint's weights, unless they are told another folder."""
    return home_of(checkpoint) / SHARED_WEIGHTS


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def load_model(
    source: Path,
    which: Weights = "ema",
    step: int | None = None,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    vae: Path | None = None,
    shared: Path | None = None,
    group: ExpertGroup | None = None,
    log: Callable[[str], None] = _to_stderr,
) -> LoadedModel:
    """Read a model for sampling.

    Args:
        source: a run folder, or the folder of one checkpoint.
        which: the moving average, or the trained weights themselves.
        step: the checkpoint of a run; None: the newest complete one.
        device: where the network goes, in evaluation mode.
        precision: of its weights, which are held in it alone and read into their place.
        vae: where the VAE of its latents lies now; None: where it lay when they were encoded.
        shared: folder of weights that the processes of a machine share, as long as any of them has the network;
            None: this process holds its own. On a GPU it says nothing: the weights go there from the checkpoint.
        group: ranks that the routed experts are dealt to, all of which call this; `device` is theirs. They share
            nothing else.
        log: told where that folder cannot be written, and the process holds its own in spite of it.

    Raises:
        UserError: no checkpoint is there, it is damaged, or its weights do not fit its configuration; its VAE is
            not there, or another than encoded the data.
    """
    path = find_checkpoint(source, step)
    info = read_info(path)
    decoder = find_decoder(info, vae)
    try:
        model_config, objective_config = complete_config(info.model, info), info.objective
    except (KeyError, ValueError) as error:
        raise UserError(f"{path / MARKER}: its configuration does not describe a model: {error}") from error
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network: nn.Module | None = None
    if group is not None:
        network = network_of_group(path, which, model_config, dtype, group)
    elif shared is not None and torch.device(device).type == "cpu":
        try:
            network = _sharing_network(path, which, model_config, dtype, shared)
        except UnwritableError as error:
            log(f"{error}; this process holds weights of its own")
    if network is None:
        network = _own_network(path, which, model_config, dtype, device)
    assert model_config.num_classes is not None
    names = info.dataset.get("class_names") or range(model_config.num_classes)
    return LoadedModel(
        network=network.eval().requires_grad_(False),
        model_config=model_config,
        objective_config=objective_config,
        class_names=tuple(str(name) for name in names),
        info=info,
        fingerprint=f"{info.fingerprint}-{which}",
        vae=None if decoder is None else load_vae(decoder, device),
    )


def _own_network(
    path: Path, which: Weights, config: ModelConfig, dtype: torch.dtype, device: str | torch.device
) -> DiT:
    """A network with weights that this process alone holds."""
    found: list[DiT] = []

    def allocate(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
        """Only now: the files bound how large a network their marker can ask for."""
        network = _empty_network(config, device, dtype)
        memory = canonical_state(network)
        own = {name: tuple(tensor.shape) for name, tensor in memory.items()}
        check_canonical(shapes, own, origin=f"{path} ({which})")
        found.append(network)
        return memory

    load_weights(path, which, allocate)
    return found[0]


def _sharing_network(path: Path, which: Weights, config: ModelConfig, dtype: torch.dtype, folder: Path) -> DiT:
    """A network with weights that the processes of this machine share; UnwritableError where that cannot be."""
    with torch.device("meta"):
        network = DiT(config).to(dtype)

    def fill(memory: Mapping[str, Tensor]) -> None:
        def take(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
            check_canonical(shapes, canonical_shapes(config), origin=f"{path} ({which})")
            return dict(canonical_items(iter(memory.items())))

        load_weights(path, which, take)

    share_weights(network, f"{read_info(path).fingerprint}-{which}", folder, fill)
    network.pos_embed = _position_embedding(config).to(dtype)
    return network


def _position_embedding(config: ModelConfig) -> Tensor:
    assert config.image_size is not None
    return position_embedding(config.hidden, config.image_size // config.patch)


def _empty_network(config: ModelConfig, device: str | torch.device, dtype: torch.dtype) -> DiT:
    """A network whose weights have memory of this type there, with nothing in it but the position embedding."""
    with torch.device("meta"):
        network = DiT(config).to(dtype)
    network.to_empty(device=device)
    assert [name for name, _ in network.named_buffers()] == ["pos_embed"]
    network.pos_embed.copy_(_position_embedding(config))
    return network


def find_decoder(info: CheckpointInfo, vae: Path | None) -> VaeFacts | None:
    """The VAE that makes pixels of what a checkpoint's network draws; None: it draws pixels.

    Args:
        vae: where it lies now; None: where the run's `data.vae` says, or else where it lay when the data was
            encoded. A checkpoint of published weights knows of none, and takes any that fits.

    Raises:
        UserError: it is not there, is another than encoded the data, or has other channels than the network.
    """
    stored = info.dataset.get("latents")
    vae = vae or moved_vae(info)
    if stored is None and vae is None:
        return None
    if stored is not None:
        option = f"--vae FOLDER, or for all commands by data.vae in {home_of(info.path) / CONFIG}"
        facts = find_vae(LatentFacts.model_validate(stored), vae, option)
    else:
        assert vae is not None
        facts = read_facts(vae)
    channels = info.config["model"].get("channels") or info.dataset.get("channels")
    if channels != facts.latent_channels:
        raise UserError(
            f"{facts.path}: decodes latents of {facts.latent_channels} channels, and the network of {info.path} "
            f"draws {channels}" + ("; expected --vae left out where it draws pixels" if stored is None else "")
        )
    return facts


def moved_vae(info: CheckpointInfo) -> Path | None:
    """Where the VAE of a run's latents lies now, by `data.vae`: of its config.yaml, or of the checkpoint itself.

    Raises:
        UserError: it is no path, or config.yaml cannot be read.
    """
    file = home_of(info.path) / CONFIG
    values, origin = (read_yaml(file)[0], file) if file.is_file() else (info.config, info.path / MARKER)
    section = values.get("data")
    found = section.get("vae") if isinstance(section, dict) else None
    if found is None:
        return None
    try:
        if not isinstance(found, str):
            raise ValueError("expected a path")
        check_path(found)
    except ValueError as error:
        raise UserError(f"{origin}: data.vae = {repr(found)[:100]}: {error}") from None
    return Path(found)


def complete_config(config: ModelConfig, info: CheckpointInfo) -> ModelConfig:
    """The configuration, with what it left to the data taken from there. KeyError where that has it not."""
    missing = [name for name in ("image_size", "channels", "num_classes") if getattr(config, name) is None]
    return ModelConfig.model_validate(config.model_dump() | {name: info.dataset[name] for name in missing})
