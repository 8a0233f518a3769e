"""A run of digits without any training: a small network of random weights, and a classifier that knows nothing."""

from pathlib import Path

import torch

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.data.stream.config import SourceConfig
from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.parallel.checkpoint.folder import checkpoint_path, read_info, write_weights_checkpoint
from ditmoe.sampling.metrics.reference import ReferenceImages, open_reference
from ditmoe.sampling.noise_level.classifier import (
    NoiseNetwork,
    classifier_folder,
    narrowed,
    save_noise_classifier,
    space_of,
)
from tests.markers import change_marker

MODEL = ModelConfig(
    depth=1, hidden=16, heads=2, patch=4, experts=2, experts_per_token=1, image_size=8, channels=1, num_classes=10
)


def write_digits(folder: Path) -> Path:
    """300 digits as shards."""
    pack(open_source("digits", count=None, seed=0), folder, PackSettings(count=300))
    return folder


def images_of(folder: Path) -> ReferenceImages:
    """All images of a folder."""
    return open_reference(SourceConfig(path=str(folder)))


def write_run(path: Path) -> Path:
    """A run with one checkpoint, of step 0."""
    write_checkpoint(path, 0)
    return path


def write_photos(path: Path) -> Path:
    """A run of three classes with names."""
    model = MODEL.model_copy(update={"num_classes": 3})
    torch.manual_seed(1)
    network = DiT(model)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    names = ["cat", "dog", "garden spider"]
    state = canonical_state(network)
    write_weights_checkpoint(checkpoint_path(path, 0), model, ObjectiveConfig(), state, None, names)
    return path


def write_checkpoint(run: Path, step: int) -> Path:
    """A checkpoint of a step, with weights of its own."""
    torch.manual_seed(step)
    network = DiT(MODEL)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    path = checkpoint_path(run, step)
    write_weights_checkpoint(path, MODEL, ObjectiveConfig(), canonical_state(network), None)
    change_marker(path, lambda facts: facts.update(step=step))
    return path


def write_noise_classifier(run: Path, sigma_max: float = 20.0) -> None:
    """The run's classifier of 30 levels from σ = 0.05 on."""
    info = read_info(checkpoint_path(run, 0))
    classifier_folder(info).mkdir()
    space = narrowed(space_of(info, 30), 0.05, sigma_max)
    save_noise_classifier(classifier_folder(info), NoiseNetwork(1, 8, 30), space, {})
