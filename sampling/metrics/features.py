"""What an evaluation needs of a feature network: images in, vectors out, and a name for what it is."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditmoe.model.threads import one_thread

AT_ONCE: Final = 64
"""Images that are described together. It is no setting: what is kept for all must not depend on who computed
it."""

Features = dict[str, NDArray[np.floating]]
"""Per image, always `features` [N, F]; `spatial` [N, S] and `probabilities` [N, P] where the network has them."""


class FeatureNetwork(Protocol):
    """A frozen network whose activations describe an image."""

    name: str
    """A `FeatureName`."""
    dimension: int
    """Number of features F."""
    spatial_dimension: int | None
    """Number of spatial features S; None: it has none."""
    fingerprint: str
    """Of the weights and of how images are prepared: figures are comparable between equal fingerprints only."""
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


def describe(network: FeatureNetwork, image_NHWC: NDArray[np.uint8]) -> Features:
    """`network.features` of any number of images, as `in_batches`."""
    return in_batches(network.features, image_NHWC)


def in_batches(function: Callable[[NDArray[np.uint8]], Features], image_NHWC: NDArray[np.uint8]) -> Features:
    """A function of images, over any number of them; what it gives for each does not depend on the others.

    They pass in batches of one size, the last one filled up: a matrix product of another shape may round
    otherwise.
    """
    parts: list[Features] = []
    with one_thread():
        for first in range(0, len(image_NHWC), AT_ONCE):
            batch_NHWC = image_NHWC[first : first + AT_ONCE]
            missing = AT_ONCE - len(batch_NHWC)
            filled_NHWC = np.concatenate([batch_NHWC, np.repeat(batch_NHWC[-1:], missing, axis=0)])
            found = function(filled_NHWC)
            parts.append({key: value_NF[: len(batch_NHWC)] for key, value_NF in found.items()})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def in_blocks(rows: Iterable[tuple[NDArray[Any], ...]], size: int) -> Iterator[tuple[NDArray[Any], ...]]:
    """Cut a stream of arrays with as many rows each anew, into blocks of `size` rows; the last may have fewer."""
    kept: list[tuple[NDArray[Any], ...]] = []
    count = 0
    for arrays in rows:
        kept.append(arrays)
        count += len(arrays[0])
        if count >= size:
            whole = [np.concatenate(column) for column in zip(*kept, strict=True)]
            for first in range(0, count - size + 1, size):
                yield tuple(column[first : first + size] for column in whole)
            kept, count = [tuple(column[count - count % size :] for column in whole)], count % size
    if count:
        yield tuple(np.concatenate(column) for column in zip(*kept, strict=True))
