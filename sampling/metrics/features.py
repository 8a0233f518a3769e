"""What an evaluation needs of a feature network: images in, vectors out, and a name for what it is."""

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Features = dict[str, NDArray[np.floating]]
"""Per image, always `features` [N, F]; `spatial` [N, S] and `probabilities` [N, P] where the network has them."""


class FeatureNetwork(Protocol):
    """A frozen network whose activations describe an image."""

    name: str
    """`classifier` or `inception`."""
    dimension: int
    """Number of features F."""
    fingerprint: str
    """Of the weights: figures are comparable between equal fingerprints only."""
    description: Mapping[str, Any]
    """What is recorded beside each figure: the file or the training settings, and how images are prepared."""

    def features(self, image_NHWC: NDArray[np.uint8]) -> Features:
        """Describe uint8 images of any size, with 1 or 3 channels."""
        ...


def fingerprint_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, shapes and values of a state dict (first 16 hex digits)."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def images_to_tensor(image_NHWC: NDArray[np.uint8], device: torch.device, *, colour: bool) -> Tensor:
    """uint8 [N, H, W, C] → uint8 [N, C, H, W] on `device`; with `colour`, one channel is repeated to three."""
    x_NCHW = torch.from_numpy(np.ascontiguousarray(image_NHWC)).to(device).permute(0, 3, 1, 2)
    if colour and x_NCHW.shape[1] == 1:
        x_NCHW = x_NCHW.expand(-1, 3, -1, -1)
    return x_NCHW.contiguous()


def in_batches(network: FeatureNetwork, image_NHWC: NDArray[np.uint8], batch: int) -> Features:
    """`network.features` over `batch` images at a time."""
    parts = [network.features(image_NHWC[i : i + batch]) for i in range(0, len(image_NHWC), batch)]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
