"""Small classifiers that an evaluation trains on the real images: a feature network, and an independent judge.

The feature network (`plain`) describes images for FID and precision/recall where no Inception weights are at hand.
The recogniser (`residual`) tells what share of drawn images it takes for the class that was asked for; it has
another architecture, another seed and another split than the feature network, so that neither marks its own work.
Its accuracy on real images that it was not trained on is reported beside.

A classifier is trained once for all who use a cache, so nothing that whoever trains it happens to have is in it:
a CPU trains in one thread, a GPU with deterministic kernels, and the two are kept apart.

Shapes: N images, F features, K classes.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from ditmoe.data.shards.images import to_network_range
from ditmoe.data.storage.parts import DamagedPart
from ditmoe.sampling.metrics.features import Features, fingerprint_of, images_to_tensor, in_batches
from ditmoe.sampling.metrics.reference import Form, ReferenceImages
from ditmoe.sampling.metrics.references.training_images import MAX_SIZE, reduced


@dataclass(frozen=True)
class ClassifierSettings:
    """Everything that a trained classifier depends on, besides the images."""

    architecture: Literal["plain", "residual"]
    seed: int
    dimension: int
    """Features F before the last layer."""
    passes: float = 30
    """Passes over the training images …"""
    most_images: int = 1_500_000
    """… but no more images seen than this."""
    learning_rate: float = 2e-3
    threads: Literal[1] = 1
    """Of a CPU while it trains: sums round otherwise on another number."""
    version: int = 2
    """Raised whenever this file changes what is trained."""


FEATURE_CLASSIFIER: Final = ClassifierSettings("plain", seed=1, dimension=64)
RECOGNISER: Final = ClassifierSettings("residual", seed=2, dimension=96)


def _halvings(size: int) -> int:
    """Halvings that bring `size` to about 4 cells a side."""
    return max(1, round(math.log2(max(size, 8) / 4)))


class _Cells(nn.Module):
    """Means over `cells` × `cells` windows of an image, as adaptive average pooling takes them, by products.

    The pooling of torch adds up its gradients in any order on a GPU.
    """

    def __init__(self, cells: int) -> None:
        super().__init__()
        self._cells = cells

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, cells, cells]."""
        rows, columns = (self._windows(side).to(x_NCHW) for side in x_NCHW.shape[2:])
        return rows @ x_NCHW @ columns.T

    def _windows(self, side: int) -> Tensor:
        """The weight of each of `side` places in each window, `[cells, side]`."""
        windows = torch.zeros(self._cells, side)
        for cell in range(self._cells):
            first, end = cell * side // self._cells, -(-(cell + 1) * side // self._cells)
            windows[cell, first:end] = 1 / (end - first)
        return windows


class Dropout(nn.Module):
    """As torch's, which drops what the process's own generator says; this one takes another."""

    share = 0.2

    def __init__(self) -> None:
        super().__init__()
        self.generator: torch.Generator | None = None
        """None: the device's own."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop some entries while training, and scale the others."""
        if self.generator is None or not self.training:
            return functional.dropout(x, self.share, self.training)
        kept = torch.empty_like(x).bernoulli_(1 - self.share, generator=self.generator)
        return x * kept.div_(1 - self.share)


class PlainClassifier(nn.Module):
    """Pairs of 3×3 convolutions with batch norm, maximum pools between, mean over cells, one hidden layer."""

    def __init__(self, size: int, channels: int, classes: int, dimension: int) -> None:
        super().__init__()
        widths = [min(32 * 2**i, 128) for i in range(_halvings(size) + 1)]
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            for channels_in in (channels, width):
                layers += [
                    nn.Conv2d(channels_in, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
            if i < len(widths) - 1:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            channels = width
        self.body = nn.Sequential(*layers, _Cells(2), nn.Flatten())
        self.hidden = nn.Linear(4 * channels, dimension)
        self.head = nn.Linear(dimension, classes)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Images in −1 … 1 → features [N, F] and class scores [N, K]."""
        features = functional.silu(self.hidden(self.body(x_NCHW)))
        return features, self.head(features)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        changed: Tensor = self.body(x_NCHW)
        return x_NCHW + changed


class ResidualClassifier(nn.Module):
    """Residual blocks with group norm, strided convolutions between, all cells seen by the hidden layer."""

    def __init__(self, size: int, channels: int, classes: int, dimension: int) -> None:
        super().__init__()
        widths = [min(24 * 2**i, 96) for i in range(_halvings(size) + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), _Residual(widths[0])]
        for before, width in pairwise(widths):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), _Residual(width)]
        self.body = nn.Sequential(*layers, nn.GroupNorm(8, widths[-1]), nn.SiLU(), _Cells(4))
        self.hidden = nn.Linear(16 * widths[-1], dimension)
        self.dropout = Dropout()
        self.head = nn.Linear(dimension, classes)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Images in −1 … 1 → features [N, F] and class scores [N, K]."""
        features = functional.silu(self.hidden(self.body(x_NCHW).flatten(1)))
        return features, self.head(self.dropout(features))


class Classifier:
    """A trained classifier: a `FeatureNetwork`, and a judge of labels."""

    name = "classifier"
    spatial_dimension: int | None = None

    def __init__(self, network: nn.Module, facts: Mapping[str, Any], device: torch.device) -> None:
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = device
        self.dimension = int(facts["settings"]["dimension"])
        self.fingerprint = fingerprint_of(network.state_dict())
        self.held_out_accuracy = float(facts["held_out_accuracy"])
        self.held_out_images = int(facts["held_out_images"])
        self.description: Mapping[str, Any] = facts

    def state(self) -> dict[str, Tensor]:
        """The weights, on the CPU."""
        return {name: tensor.cpu().contiguous() for name, tensor in self._network.state_dict().items()}

    @torch.inference_mode()
    def features(self, image_NHWC: NDArray[np.uint8]) -> Features:
        """uint8 [N, H, W, C] → `features` [N, F], float32."""
        features, _ = self._network(self._prepare(image_NHWC))
        return {"features": features.cpu().numpy()}

    def predict(self, image_NHWC: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The likeliest class of each image, int64 [N]."""
        label_N: NDArray[np.int64] = in_batches(self._scores, image_NHWC)["scores"].argmax(1)
        return label_N

    def probabilities(self, image_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The probability of each class for each image, float32 [N, K]."""
        probability_NK: NDArray[np.float32] = in_batches(self._scores, image_NHWC)["probabilities"]
        return probability_NK

    @torch.inference_mode()
    def _scores(self, image_NHWC: NDArray[np.uint8]) -> Features:
        scores_NK = self._network(self._prepare(image_NHWC))[1].float()
        return {"scores": scores_NK.cpu().numpy(), "probabilities": scores_NK.softmax(1).cpu().numpy()}

    def recognise(self, image_NHWC: NDArray[np.uint8], label_N: NDArray[np.int64]) -> float:
        """Share of the images that are taken for the class of their label."""
        return float((self.predict(image_NHWC) == label_N).mean())

    def _prepare(self, image_NHWC: NDArray[np.uint8]) -> Tensor:
        return to_network_range(reduced(images_to_tensor(image_NHWC, self._device, colour=False)))


def classifier_file(settings: ClassifierSettings, real: ReferenceImages, device: torch.device) -> str:
    """Name of the file in a cache that keeps the classifier of these settings for these images."""
    identity = json.dumps([real.fingerprint, asdict(settings), device.type], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return f"classifier-{settings.architecture}-{key}.safetensors"


def build_classifier(settings: ClassifierSettings, form: Form) -> nn.Module:
    """An untrained network of these settings for images of a form, from torch's own generator."""
    make = PlainClassifier if settings.architecture == "plain" else ResidualClassifier
    assert form.image_size is not None and form.channels is not None and form.class_names is not None
    return make(min(form.image_size, MAX_SIZE), form.channels, len(form.class_names), settings.dimension)


def restored(
    state: Mapping[str, Tensor], facts: Mapping[str, Any], form: Form, device: torch.device
) -> Classifier:
    """A classifier from its weights and its facts.

    Args:
        form: of the images that it was trained on, all of it.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: they do not fit together.
    """
    network = build_classifier(ClassifierSettings(**facts["settings"]), form)
    network.load_state_dict(state)
    if fingerprint_of(network.state_dict()) != facts["fingerprint"]:
        raise ValueError("the checksum of its weights is another")
    return Classifier(network, facts, device)


def read_classifier(
    path: Path, real: ReferenceImages, settings: ClassifierSettings, device: torch.device
) -> Classifier:
    """A classifier that was kept. DamagedPart where it cannot be read, or is of other settings."""
    try:
        with safe_open(path, framework="pt") as stored:
            facts = json.loads(stored.metadata()["facts"])
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        if facts["settings"] != asdict(settings):
            raise ValueError("it is of other settings")
        return restored(state, facts, real.form, device)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise DamagedPart(path, error) from error
