"""The feature networks that come from a file which the user gives, by name."""

from pathlib import Path

import torch

from ditmoe.model.errors import UserError
from ditmoe.sampling.metrics.features import FeatureNetwork
from ditmoe.sampling.metrics.networks.dinov2 import load_dinov2
from ditmoe.sampling.metrics.networks.inception import load_inception
from ditmoe.sampling.settings.names import FeatureName, ResizeName
from ditmoe.sampling.settings.networks import FROM_FILES


def open_network(
    features: FeatureName, path: Path | None, device: torch.device, resize: ResizeName | None = None
) -> FeatureNetwork:
    """The network of one of FROM_FILES.

    Args:
        path: of its file.
        resize: of Inception; None: that of its file.

    Raises:
        UserError: no file is given, or it is missing, damaged or of another network.
    """
    assert features in FROM_FILES, features
    if features == "dinov2":
        return load_dinov2(path, device)
    return load_inception(path, device, resize)


def check_network_options(
    features: FeatureName, path: Path | None, resize: ResizeName | None = None
) -> FeatureNetwork | None:
    """Refuse what does not fit a network before anything starts, by opening it.

    Returns:
        The network on the CPU, where it is one of FROM_FILES.

    Raises:
        UserError: as `open_network`; or an option goes with another network.
    """
    if path is not None and features not in FROM_FILES:
        names = " or ".join(FROM_FILES)
        raise UserError(f"--features-path {path}: expected only with --features {names}")
    if resize is not None and features != "inception":
        raise UserError(f"--resize {resize}: expected only with --features inception")
    return open_network(features, path, torch.device("cpu"), resize) if features in FROM_FILES else None
