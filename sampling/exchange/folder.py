"""A pipeline of diffusers as a folder: stock where diffusers' own classes compute the same, else with ours.

model_index.json    the classes
transformer/        the network; the description of ours is in the header of its weights
scheduler/          that of the network's objective
vae/                a copy, where the network draws latents
README.md           the model card
"""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from ditmoe.data.encoding.vae import CONFIG_FILE, WEIGHTS_FILE, VaeFacts
from ditmoe.model.errors import UserError
from ditmoe.model.weights.diffusers import (
    DIFFUSERS_WEIGHTS,
    OUR_CLASS,
    PIPELINE_FILE,
    SCHEDULER_FILE,
    STOCK_CLASSES,
    STOCK_CLASSES_OF_LABELS,
    TRANSFORMER,
)
from ditmoe.model.weights.diffusers_out import our_config, stock_config, stock_problem, to_ours, to_stock
from ditmoe.model.weights.files import write_safetensors
from ditmoe.model.weights.published import PublishedWeights
from ditmoe.sampling.exchange.card import CARD

PIPELINE_MODULE: Final = "ditmoe.sampling.pipeline"
OUR_PIPELINE: Final = "DitmoePipeline"
STOCK_PIPELINE: Final = "DiTPipeline"
_SCHEDULERS: Final[dict[str, dict[str, Any]]] = {
    "ddpm": {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "trained_betas": None,
    },
    "rectified_flow": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 1.0,
    },
}


def is_stock(published: PublishedWeights, vae: VaeFacts | None, stock: bool = False) -> tuple[bool, bool]:
    """Whether the network, and whether the pipeline, are of diffusers' own classes.

    Args:
        stock: the user wants diffusers' network in spite of its frequencies of time.

    Raises:
        UserError: `stock`, and the network can be no such.
    """
    config, objective = published.config, published.objective
    problem = stock_problem(config)
    plain = problem is None or (stock and stock_problem(_with_their_frequencies(published)) is None)
    if stock and not plain:
        raise UserError(f"--stock: {published.origin} cannot be a {STOCK_CLASSES[0]}: {problem}")
    assert config.num_classes is not None
    pipeline = (
        plain
        and objective is not None
        and objective.kind == "ddpm"
        and vae is not None
        and vae.shift == 0
        and config.num_classes <= STOCK_CLASSES_OF_LABELS
    )
    return plain, pipeline


def departures(published: PublishedWeights, stock: bool) -> list[str]:
    """What is to be said of a dense network that stock diffusers would compute with other frequencies of time."""
    problem = stock_problem(published.config)
    if problem is None or stock_problem(_with_their_frequencies(published)) is not None:
        return []
    origin = published.origin
    if stock:
        return [f"{origin}: {problem}; stock diffusers draws with them, and its pictures depart from ours"]
    return [
        f"{origin}: {problem}; so the network is of a class of ours, which {PIPELINE_MODULE} has. --stock writes"
        " it for diffusers alone, with pictures that depart from these"
    ]


def _with_their_frequencies(published: PublishedWeights) -> Any:
    return published.config.model_copy(update={"timestep_frequencies": "diffusers"})


def loading_lines(name: str, published: PublishedWeights, vae: VaeFacts | None, stock: bool) -> list[str]:
    """Python that loads the folder and draws."""
    pipeline, module = (STOCK_PIPELINE, "diffusers")
    if not is_stock(published, vae, stock)[1]:
        pipeline, module = OUR_PIPELINE, PIPELINE_MODULE
    return [
        f"from {module} import {pipeline}",
        "",
        f'pipeline = {pipeline}.from_pretrained("{name}")',
        "images = pipeline(class_labels=[0], num_inference_steps=50).images",
    ]


def write_pipeline(
    folder: Path,
    published: PublishedWeights,
    vae: VaeFacts | None,
    card: str,
    shard_bytes: int,
    *,
    stock: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a pipeline with one set of weights into an empty folder.

    Args:
        vae: decodes what the network draws; None: it draws pixels, or nobody said which.
        stock: diffusers' class in spite of its other frequencies of time.

    Raises:
        UserError: the weights do not say what they predict, the VAE has other channels, or the disk refuses.
    """
    config, objective = published.config, published.objective
    if objective is None:
        raise UserError(f"--objective: {published.origin} does not say it; give ddpm, rectified_flow or sit")
    if vae is not None and vae.latent_channels != config.channels:
        raise UserError(
            f"{vae.path}: decodes latents of {vae.latent_channels} channels, and the network draws"
            f" {config.channels}"
        )
    plain, stock_pipeline = is_stock(published, vae, stock)
    written_by = {"_diffusers_version": version("diffusers")}
    names = published.class_names
    index: dict[str, Any] = {
        "_class_name": STOCK_PIPELINE if stock_pipeline else OUR_PIPELINE,
        **written_by,
        "id2label": {str(label): name for label, name in enumerate(names)} if names else None,
        "scheduler": ["diffusers", _SCHEDULERS[objective.kind]["_class_name"]],
        "transformer": ["diffusers", STOCK_CLASSES[0]] if plain else [PIPELINE_MODULE, OUR_CLASS],
        "vae": [None, None] if vae is None else ["diffusers", "AutoencoderKL"],
    }
    state = published.state()
    which = "ema" if published.ema is not None else "weights"
    network = stock_config(config) if plain else our_config(config, objective, names)
    tensors = to_stock(state, config) if plain else to_ours(state, config)
    weights = folder / TRANSFORMER / DIFFUSERS_WEIGHTS
    description = published.description("ema" if which == "ema" else "weights").text()
    write_safetensors(weights, tensors, description, shard_bytes, progress=progress)
    _write_json(folder / TRANSFORMER / CONFIG_FILE, {**network, **written_by})
    _write_json(folder / SCHEDULER_FILE, {**_SCHEDULERS[objective.kind], **written_by})
    if vae is not None:
        (folder / "vae").mkdir()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(vae.path / name, folder / "vae" / name)
    (folder / CARD).write_text(card, encoding="utf-8")
    _write_json(folder / PIPELINE_FILE, index)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
