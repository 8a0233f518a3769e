"""A model to sample from, read from a published or exported file instead of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ditmoe.data.encoding.vae import VaeFacts, load_vae, read_facts
from ditmoe.model.canonical import load_canonical
from ditmoe.model.config import ModelConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.weights.objective import with_objective
from ditmoe.model.weights.positions import check_position_embedding
from ditmoe.parallel.start.source import Objective
from ditmoe.sampling.exchange.source import open_source
from ditmoe.sampling.network.load import LoadedModel, Precision, Weights


def load_file(
    path: Path,
    which: Weights | None,
    preset: str | None,
    model: Mapping[str, Any] | None,
    objective: Objective | None,
    device: str,
    precision: Precision,
    vae: Path | None,
) -> LoadedModel:
    """Read a model from a file, or a folder of diffusers, that `ditmoe convert` reads.

    Args:
        which: the set wanted; None: the EMA if there is one.
        preset: the network, where the weights do not say all of it.
        model: fields of its configuration, where neither says them.
        objective: what it was trained to predict, where the file does not say it.
        vae: of a network of latents; None: the one beside it in a pipeline, or it draws pixels.

    Raises:
        UserError: it cannot be read, does not say what it was trained to predict, or its VAE does not fit.
    """
    with open_source(path, preset, model) as source:
        published = with_objective(source.published, objective, "objective")
        if published.objective is None:
            raise UserError(f"objective: {path} does not say it; expected ddpm, rectified_flow or sit")
        config = published.config
        averaged = published.ema is not None and which != "weights"
        state = published.state(which)
        check_position_embedding(state, config, published.origin, averaged=averaged)
        network = DiT(config)
        load_canonical(network, {name: state[name] for name in state if name != "pos_embed"}, str(path))
    network.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    names = published.class_names or [str(label) for label in range(config.num_classes or 0)]
    beside = vae or source.vae
    facts = None if beside is None else _decoder(beside, config, path)
    return LoadedModel(
        network=network.eval().requires_grad_(False),
        model_config=config,
        objective_config=published.objective,
        class_names=tuple(names),
        info=None,
        fingerprint=f"{path}-{'ema' if averaged else 'weights'}",
        vae=None if facts is None else load_vae(facts, device),
    )


def _decoder(vae: Path, config: ModelConfig, path: Path) -> VaeFacts:
    """The VAE that makes pixels of what the network draws."""
    facts = read_facts(vae)
    if facts.latent_channels != config.channels:
        raise UserError(
            f"{facts.path}: decodes latents of {facts.latent_channels} channels, and the network of {path} draws"
            f" {config.channels}"
        )
    return facts
