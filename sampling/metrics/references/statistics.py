"""Statistics of real images that stand in a file, in place of the images, and the npz files of others.

The npz files of ADM, EDM and pytorch-fid hold mean and covariance (`mu`, `sigma`; of spatial features `mu_s`,
`sigma_s`), and ADM's some images (`arr_0`).

Shapes: F features.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from ditmoe.data.storage.digests import sha256_of
from ditmoe.data.stream.left_out import LeftOut
from ditmoe.model.errors import UserError
from ditmoe.sampling.metrics.classifier import Classifier
from ditmoe.sampling.metrics.features import FeatureNetwork
from ditmoe.sampling.metrics.moments import Gaussian
from ditmoe.sampling.metrics.networks.resize import BY_THE_FILE
from ditmoe.sampling.metrics.real_statistics import RealStatistics
from ditmoe.sampling.metrics.reference import Form, Images, Reference
from ditmoe.sampling.metrics.references.image_sets import IMAGES_KEY, NpzFile, NpzImages
from ditmoe.sampling.settings.names import FeatureName, StatedNetwork

NPZ_KINDS: Final = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""Kind of feature → its mean and covariance in an npz file."""
MOST_FEATURES: Final = 1 << 14


class ReferenceStatistics(Reference):
    """Statistics in a file."""

    stated: StatedNetwork | None = None
    """What the user says that it is of, where it does not tell itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def where(self) -> str:
        return str(self.path)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file's bytes (first 16 hex digits)."""
        try:
            return sha256_of(self.path)[:16]
        except OSError as error:
            raise UserError(f"{self.path}: could not be read: {error.strerror or error}") from error

    @property
    def parts(self) -> int:
        """Those of the images that stand beside the statistics."""
        return 1 if self.images is None else self.images.parts

    @property
    def images(self) -> Images | None:
        """Some of the real images, for figures that need more than moments."""
        return None

    @property
    def features(self) -> FeatureName:
        """The network that the statistics are of."""
        raise NotImplementedError

    def classifier(self, role: Literal["features", "recogniser"], device: torch.device) -> Classifier | None:
        """A classifier that was trained on the real images; None: the file has it not."""
        return None

    def has_classifier(self, role: Literal["features", "recogniser"]) -> bool:
        """Whether the file has a classifier for this."""
        return False

    def statistics(self, network: FeatureNetwork) -> RealStatistics:
        """What is known in a feature network. UserError when the file is of another, or damaged."""
        raise NotImplementedError

    def check_network(self, network: FeatureNetwork) -> None:
        """UserError when its statistics are of another network, as far as it tells."""

    def check_features(self, features: FeatureName) -> None:
        """UserError when it has statistics in the features of another network."""
        if features != self.features:
            path = " --features-path FILE" if self.features != "classifier" else ""
            raise UserError(
                f"{self.path}: has statistics in the features of {self.features}, and not of {features}; "
                f"give --features {self.features}{path}"
            )


class NpzStatistics(ReferenceStatistics):
    """`mu` and `sigma` of an npz file, as the tools of ADM, EDM and pytorch-fid write them."""

    def __init__(self, path: Path, file: NpzFile, stated: StatedNetwork | None = None) -> None:
        super().__init__(path)
        self._file, self.stated = file, stated
        self._dimensions: dict[str, int] = {}
        for kind, (mean, covariance) in NPZ_KINDS.items():
            if mean not in file.members and covariance not in file.members:
                continue
            for name in (mean, covariance):
                if name not in file.members:
                    raise UserError(f"{path}: has no {name} beside its {mean if name != mean else covariance}")
            shape = file.members[mean].shape
            if len(shape) != 1 or not 0 < shape[0] <= MOST_FEATURES:
                raise UserError(f"{path}: {mean} is {file.members[mean].shown}, expected float64 [F]")
            self._dimensions[kind] = shape[0]
        if "features" not in self._dimensions:
            raise UserError(f"{path}: has no mu and sigma beside {', '.join(NPZ_KINDS['spatial'])}")
        self._images = NpzImages(path) if IMAGES_KEY in file.members else None

    @property
    def features(self) -> FeatureName:
        return "dinov2" if self.stated == "dinov2" else "inception"

    @property
    def images(self) -> Images | None:
        return self._images

    @property
    def form(self) -> Form:
        return Form() if self._images is None else self._images.form

    def facts(self, left_out: LeftOut | None) -> dict[str, Any]:
        return {
            "name": self.path.stem,
            "place": self.where,
            "index": None,
            "images": None,
            "of": None,
            "choice": {},
            "fingerprint": self.fingerprint,
            "left_out": {"samples": 0, "shards": [], "first": []},
            "statistics": "npz",
            # The file does not tell; None: nor did the user.
            "stated_network": self.stated,
        }

    def check_network(self, network: FeatureNetwork) -> None:
        resize = network.description.get("resize")
        resize = "tensorflow" if resize == BY_THE_FILE else resize
        own = network.name if network.name != "inception" else f"inception-{resize}"
        if self.stated not in (None, own):
            raise UserError(
                f"--reference-network {self.stated}: {network.name} {network.fingerprint} is {own}; give "
                "the file of the network that the statistics are of by --features-path, and its --resize"
            )
        expected = {"features": network.dimension, "spatial": network.spatial_dimension}
        for kind, dimension in self._dimensions.items():
            if expected[kind] not in (None, dimension):
                raise UserError(
                    f"{self.path}: {NPZ_KINDS[kind][0]} is of {dimension} features, and {network.name} "
                    f"{network.fingerprint} has {expected[kind]} ({kind}): they are of another network"
                )

    def statistics(self, network: FeatureNetwork) -> RealStatistics:
        self.check_network(network)
        stated = {}
        for kind, dimension in self._dimensions.items():
            if kind == "spatial" and network.spatial_dimension is None:
                continue
            mean, covariance = NPZ_KINDS[kind]
            covariance_FF = self._file.array(covariance, (dimension, dimension))
            scale = max(float(np.abs(covariance_FF).max()), 1e-300)
            if not np.allclose(covariance_FF, covariance_FF.T, rtol=0, atol=1e-5 * scale):
                raise UserError(f"{self.path}: {covariance} is not symmetric, and no covariance")
            stated[kind] = Gaussian(None, self._file.array(mean, (dimension,)), covariance_FF)
        lost = ["floors of Fréchet distances"] + ["precision, recall and KID"] * (self.images is None)
        holds = "moments of all real images" + (" and some images" if self.images else " alone")
        missing = []
        if "spatial" not in self._dimensions:
            lost.append("sFID")
        elif "spatial" not in stated:
            missing.append(f"{network.name} {network.fingerprint}: has no spatial features; left out: sFID")
        missing.insert(0, f"{self.path}: holds {holds}; left out: {', '.join(lost)}")
        if self.stated is None:
            missing.append(
                f"{self.path}: does not name the network that it is of: the figures hold only if that is "
                f"{network.name} {network.fingerprint}, with the same resizing (--reference-network says so)"
            )
        else:
            missing.append(f"{self.path}: does not name its network: that it is of {self.stated} is what you say")
        return RealStatistics({}, None, None, stated, tuple(missing))
