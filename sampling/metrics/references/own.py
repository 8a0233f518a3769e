"""Our own file of statistics, which stands for the images that it was made of: safetensors.

It holds moments of two halves and the rest, features for precision, recall and KID, sums of the Inception
Score, and the classifiers trained on the images; as JSON what is known of them.

Shapes: N images, F features.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ditmoe.data.making.class_names import MAX_CLASSES
from ditmoe.data.storage.files import new_file
from ditmoe.data.stream.left_out import LeftOut
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import is_fit_to_print
from ditmoe.model.settings import message_of
from ditmoe.sampling.metrics.classifier import Classifier, restored
from ditmoe.sampling.metrics.features import FeatureNetwork
from ditmoe.sampling.metrics.inception_score import SplitSums
from ditmoe.sampling.metrics.moments import Moments
from ditmoe.sampling.metrics.real_statistics import HALVES, KINDS, RealStatistics
from ditmoe.sampling.metrics.reference import Form, Images
from ditmoe.sampling.metrics.references.statistics import MOST_FEATURES, ReferenceStatistics
from ditmoe.sampling.settings.names import FeatureName

SUFFIX: Final = ".safetensors"
FORMAT: Final = 1
_META: Final = "ditmoe_reference"
_NEIGHBOURS: Final = "neighbours"
_SPLITS: Final = "inception_score/"


class _Network(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: FeatureName
    dimension: int = Field(ge=1, le=MOST_FEATURES)
    fingerprint: str = Field(pattern="^[0-9a-f]{16}$")
    description: dict[str, Any]


class _ClassifierSettings(BaseModel):
    """Limits on what a classifier is built from; the rest is as it was when it was trained."""

    model_config = ConfigDict(extra="allow")
    architecture: Literal["plain", "residual"]
    dimension: int = Field(ge=1, le=MOST_FEATURES)


class _ClassifierFacts(BaseModel):
    model_config = ConfigDict(extra="allow")
    settings: _ClassifierSettings
    fingerprint: str = Field(pattern="^[0-9a-f]{16}$")
    held_out_accuracy: float = Field(ge=0, le=1)
    held_out_images: int = Field(ge=0)


class _Meta(BaseModel):
    """What stands beside the arrays."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1]
    image_size: int = Field(ge=1, le=1 << 14)
    channels: Literal[1, 3]
    class_names: tuple[str, ...] | None = Field(max_length=MAX_CLASSES)
    network: _Network
    counts: dict[str, Annotated[int, Field(ge=0, le=1 << 40)]]
    """`kind/half` → images."""
    classifiers: dict[Literal["features", "recogniser"], _ClassifierFacts]
    real: dict[str, Any]
    """`facts` of the images."""

    @field_validator("class_names")
    @classmethod
    def _check_names(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        odd = [name for name in names or () if not is_fit_to_print(name)]
        if odd:
            raise ValueError(f"the class name {odd[0]!a} cannot be printed")
        return names

    @field_validator("real")
    @classmethod
    def _check_real(cls, real: dict[str, Any]) -> dict[str, Any]:
        left_out = real.get("left_out")
        if (
            not isinstance(left_out, dict)
            or not isinstance(left_out.get("samples"), int)
            or not isinstance(left_out.get("first"), list)
            or not all(isinstance(line, str) for line in left_out["first"])
            or (left_out["samples"] and not left_out["first"])
        ):
            raise ValueError("left_out is not what was passed over")
        texts = [real.get("name"), *left_out["first"]]
        if not all(isinstance(text, str) and is_fit_to_print(text) for text in texts):
            raise ValueError("name or left_out is no text that can be printed")
        return real


class OwnStatistics(ReferenceStatistics):
    """A file that `write_reference` wrote."""

    def __init__(self, path: Path) -> None:
        """Read what stands beside the arrays. UserError when it is no such file."""
        super().__init__(path)
        try:
            with safe_open(path, framework="pt") as stored:
                text = (stored.metadata() or {}).get(_META)
            if text is None:
                raise ValueError("safetensors of something else")
            self._meta = _Meta.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{path}: no statistics that this version reads: {place}: {message_of(first)}"
            ) from error
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: no readable file of statistics ({error}); expected one of `ditmoe reference make`, or "
                "an npz with mu and sigma"
            ) from error

    @property
    def form(self) -> Form:
        return Form(self._meta.image_size, self._meta.channels, self._meta.class_names)

    @property
    def features(self) -> FeatureName:
        return self._meta.network.name

    def facts(self, left_out: LeftOut | None) -> dict[str, Any]:
        made_of = {key: self._meta.real.get(key) for key in ("place", "fingerprint")}
        own = {"place": self.where, "fingerprint": self.fingerprint, "statistics": "ditmoe", "made_of": made_of}
        return {**self._meta.real, **own}

    def classifier(self, role: Literal["features", "recogniser"], device: torch.device) -> Classifier | None:
        facts = self._meta.classifiers.get(role)
        if facts is None:
            return None
        prefix = f"{role}/"
        state = {key.removeprefix(prefix): value for key, value in self._tensors(prefix).items()}
        try:
            # Before anything is built: a tensor is no larger than its file, and what JSON claims may be.
            expected = (len(self._meta.class_names or ()), facts.settings.dimension)
            found = tuple(state["head.weight"].shape)
            if found != expected:
                raise ValueError(f"its last layer is {list(found)}, expected {list(expected)}")
            return restored(state, facts.model_dump(), self.form, device)
        except (ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
            raise UserError(f"{self.path}: its classifier is damaged: {str(error).splitlines()[0]}") from error

    def has_classifier(self, role: Literal["features", "recogniser"]) -> bool:
        return role in self._meta.classifiers

    def check_network(self, network: FeatureNetwork) -> None:
        own = self._meta.network
        if (own.name, own.fingerprint) != (network.name, network.fingerprint):
            raise UserError(
                f"{self.path}: has statistics in features of {own.name} {own.fingerprint}, and not of "
                f"{network.name} {network.fingerprint}: give the file that it was made with by --features-path"
            )

    def statistics(self, network: FeatureNetwork) -> RealStatistics:
        self.check_network(network)
        tensors = {key: value.numpy() for key, value in self._tensors("moments/").items()}
        moments: dict[str, dict[str, Moments]] = {}
        for kind in KINDS:
            for half in HALVES:
                key = f"{kind}/{half}"
                if key not in self._meta.counts:
                    continue
                mean_F = tensors.get(f"moments/{key}/mean")
                scatter_FF = tensors.get(f"moments/{key}/scatter")
                if (
                    mean_F is None
                    or scatter_FF is None
                    or mean_F.ndim != 1
                    or scatter_FF.shape != (len(mean_F), len(mean_F))
                    or (kind == "features" and len(mean_F) != network.dimension)
                    or not all(a.dtype == np.float64 and np.isfinite(a).all() for a in (mean_F, scatter_FF))
                ):
                    raise UserError(f"{self.path}: its moments {key} are damaged")
                moments.setdefault(kind, {})[half] = Moments(self._meta.counts[key], mean_F, scatter_FF)
        if "features" not in moments or any(set(halves) != set(HALVES) for halves in moments.values()):
            raise UserError(
                f"{self.path}: has moments of {', '.join(self._meta.counts)} and not all that belong to it"
            )
        features_NF = self._tensors(_NEIGHBOURS)[_NEIGHBOURS].numpy()
        if (
            features_NF.ndim != 2
            or features_NF.shape[1] != network.dimension
            or not np.isfinite(features_NF).all()
        ):
            raise UserError(f"{self.path}: its features are damaged")
        return RealStatistics(moments, features_NF, None, splits=self._splits())

    def _splits(self) -> SplitSums | None:
        """The sums of the Inception Score; None: the file has none."""
        found = {key.removeprefix(_SPLITS): value.numpy() for key, value in self._tensors(_SPLITS).items()}
        if not found:
            return None
        kinds = {name: (value.ndim, value.dtype.name) for name, value in found.items()}
        expected = {"count_S": (1, "int64"), "probability_SP": (2, "float64"), "negentropy_S": (1, "float64")}
        well = kinds == expected and len({len(value) for value in found.values()}) == 1
        if not well or not all(np.isfinite(value).all() for value in found.values()):
            raise UserError(f"{self.path}: its sums of the Inception Score are damaged")
        return SplitSums(**found)

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        try:
            with safe_open(self.path, framework="pt") as stored:
                return {key: stored.get_tensor(key) for key in stored.keys() if key.startswith(prefix)}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: could not be read: {error}") from error


def write_reference(
    path: Path,
    real: Images,
    network: FeatureNetwork,
    statistics: RealStatistics,
    recogniser: Classifier | None = None,
) -> None:
    """Write statistics of images as one file, which stands for them from then on.

    Raises:
        UserError: there is something of that name, or the file system refuses.
    """
    tensors: dict[str, Tensor] = {}
    counts = {}
    for kind, halves in statistics.moments.items():
        for half, moments in halves.items():
            counts[f"{kind}/{half}"] = moments.count
            tensors[f"moments/{kind}/{half}/mean"] = torch.from_numpy(moments.mean_F)
            tensors[f"moments/{kind}/{half}/scatter"] = torch.from_numpy(np.ascontiguousarray(moments.scatter_FF))
    assert statistics.features_NF is not None
    tensors[_NEIGHBOURS] = torch.from_numpy(np.ascontiguousarray(statistics.features_NF))
    if statistics.splits is not None:
        tensors |= {f"{_SPLITS}{name}": torch.from_numpy(value) for name, value in vars(statistics.splits).items()}
    classifiers: dict[str, Mapping[str, Any]] = {}
    for role, classifier in (("features", network), ("recogniser", recogniser)):
        if isinstance(classifier, Classifier):
            classifiers[role] = classifier.description
            tensors |= {f"{role}/{key}": value for key, value in classifier.state().items()}
    meta = {
        "format": FORMAT,
        **real.form._asdict(),
        "network": {
            "name": network.name,
            "dimension": network.dimension,
            "fingerprint": network.fingerprint,
            "description": dict(network.description),
        },
        "counts": counts,
        "classifiers": classifiers,
        "real": real.facts(statistics.left_out),
    }
    with new_file(path) as file:
        file.write(save(tensors, metadata={_META: json.dumps(meta, ensure_ascii=False)}))
