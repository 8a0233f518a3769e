"""What evaluations are scored with: requests choose by names, and files come from whoever starts the service."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import is_address, is_fit_to_print
from ditmoe.sampling.evaluation.of_run import EvaluationOptions
from ditmoe.sampling.metrics.references.files import FILE_SUFFIXES, PICKLE_SUFFIXES, open_reference_file
from ditmoe.sampling.network.load import shared_folder
from ditmoe.sampling.service.errors import ServiceError
from ditmoe.sampling.service.listing import Listed
from ditmoe.sampling.service.requests import EvaluationJob, options_of
from ditmoe.sampling.settings.names import FeatureName
from ditmoe.sampling.settings.networks import FROM_FILES, NetworkChoice, arguments_of

FOLDER: Final = "references"
"""Of the folder of runs: files of statistics, each by its name."""
LONGEST_NAME: Final = 255


@dataclass(frozen=True)
class Evaluators:
    """The files of a service, and who does its evaluations."""

    files: Mapping[FeatureName, Path] = field(default_factory=dict)
    """Of the feature networks that come from one."""
    references: Mapping[str, str] = field(default_factory=dict)
    """Name → file of statistics, or shards."""
    folder: Path | None = None
    """Where there are more files of statistics; it may come later."""
    processes: int = 1
    """Of this machine, which share an evaluation."""
    crew: Path | None = None
    """Where workers of other machines join."""
    listen: str | None = None
    """The address, or interface, at which they do."""

    def __post_init__(self) -> None:
        """UserError: a file is not there, or is no reference."""
        for features, path in self.files.items():
            if not path.is_file():
                raise UserError(f"--{features} {path}: no such file")
        for name, place in self.references.items():
            if open_reference_file(place) is None and not (
                is_address(place) or place.startswith("pipe:") or Path(place).exists()
            ):
                raise UserError(f"--reference {name}={place}: no such file, and no folder of shards")

    def described(self) -> dict[str, list[str]]:
        """What requests may name."""
        return {"features": ["classifier", *self.files], "references": list(self._by_name())}

    def check(self, request: EvaluationJob) -> None:
        """ServiceError: what it names is not there."""
        for name in request.networks:
            if name in FROM_FILES and name not in self.files:
                raise ServiceError(
                    400,
                    f"features: the service was started without --{name} FILE; /v1/evaluators lists what there is",
                    param="features",
                )
        if request.reference is not None and request.reference not in self._by_name():
            raise ServiceError(
                400,
                f"reference: none is called {request.reference!r}; /v1/evaluators lists what there is",
                param="reference",
            )

    def options(self, request: EvaluationJob, listed: Listed) -> EvaluationOptions:
        """The evaluation that is asked for. ServiceError as `check`."""
        self.check(request)
        choices = [
            NetworkChoice(name, self.files.get(name), request.resize if name == "inception" else None)
            for name in request.networks
        ]
        return EvaluationOptions(
            listed.checkpoint,
            request.sampler_config(),
            count=request.count,
            labels=request.labels,
            weights=request.weights,
            data=None if request.reference is None else self._by_name()[request.reference],
            on_error=request.on_error,
            features=choices[0].features,
            features_path=choices[0].path,
            resize=choices[0].resize,
            more_networks=tuple(choices[1:]),
            reference_network=request.reference_network,
            neighbour_images=request.neighbour_images,
            recogniser=request.recogniser,
            keep=request.keep,
            shared_weights=shared_folder(listed.checkpoint),
        )

    def arguments(self, options: EvaluationOptions) -> list[str]:
        """The command that does it."""
        given: dict[str, Any] = {
            "count": options.count,
            "labels": options.labels,
            "weights": options.weights,
            "reference": options.data,
            "on-error": options.on_error,
            "reference-network": options.reference_network,
            "neighbour-images": options.neighbour_images,
            "keep": options.keep,
            "shared-weights": options.shared_weights,
            "processes": self.processes,
            "crew": self.crew,
            "listen": self.listen,
        }
        first = NetworkChoice(options.features, options.features_path, options.resize)
        arguments = [f"--{name}={value}" for name, value in given.items() if value is not None]
        arguments.append("--recogniser" if options.recogniser else "--no-recogniser")
        arguments += arguments_of([first, *options.more_networks])
        return ["evaluate", *options_of(options.sampler), *arguments, "--", str(options.source)]

    def _by_name(self) -> dict[str, str]:
        """Name → place of all references; one that was given at the start hides a file of its name."""
        found: dict[str, str] = {}
        if self.folder is not None and self.folder.is_dir():
            with os.scandir(self.folder) as entries:
                files = [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")]
            found = {
                name: str(self.folder / name)
                for name in sorted(files)
                if name.endswith(FILE_SUFFIXES) and not name.endswith(PICKLE_SUFFIXES)
            }
        return {**found, **self.references}


def named_references(given: Sequence[str]) -> dict[str, str]:
    """Name → place, from options NAME=PLACE. UserError: one is none, or a name comes twice."""
    found: dict[str, str] = {}
    for text in given:
        name, separator, place = text.partition("=")
        if not separator or not place or not name or len(name) > LONGEST_NAME or not is_fit_to_print(name):
            raise UserError(f"--reference {text}: expected NAME=FILE, or NAME=SHARDS")
        if name in found:
            raise UserError(f"--reference {text}: {name} is {found[name]} already; expected a name for each")
        found[name] = place
    return found
