"""The runs that a service draws from, by name: names of requests are looked up here, and never become paths."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import CheckpointInfo, checkpoints, read_info
from ditmoe.parallel.checkpoint.marker import MARKER
from ditmoe.sampling.batching.models import parameters_of
from ditmoe.sampling.network.load import find_decoder
from ditmoe.sampling.service.errors import ServiceError


@dataclass(frozen=True)
class Listed:
    """A checkpoint of a run."""

    run: str
    checkpoint: Path
    info: CheckpointInfo
    class_names: tuple[str, ...]

    def label_of(self, given: int | str, param: str) -> int:
        """The label of a class's number or name. ServiceError: there is none."""
        count = len(self.class_names)
        if isinstance(given, int):
            if 0 <= given < count:
                return given
        elif given in self.class_names:
            return self.class_names.index(given)
        elif given.isascii() and given.isdigit() and len(given) < 10 and int(given) < count:
            return int(given)
        raise ServiceError(
            400,
            f"{param}: {given!r} is no class of {self.run}; expected a number below {count}, or a name as "
            "/v1/models lists them",
            param=param,
        )


class Listing:
    """The runs of a folder, or one run. For any number of threads."""

    def __init__(self, folder: Path) -> None:
        """Take a folder of runs, or a run. UserError: it is neither a folder nor a link to one."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; expected a folder of runs, or a run")
        self._folder = folder.resolve()
        self._lock = Lock()
        self._infos: dict[Path, tuple[tuple[int, int], CheckpointInfo]] = {}

    def runs(self) -> Mapping[str, Path]:
        """Name → folder of each run that has a folder of checkpoints, in the order of the names."""
        if (self._folder / "checkpoints").is_dir():
            return {self._folder.name: self._folder}
        found = {}
        with os.scandir(self._folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if not entry.name.startswith(".") and (self._folder / entry.name / "checkpoints").is_dir():
                    found[entry.name] = self._folder / entry.name
        return found

    def find(self, name: str | None, step: int | None) -> Listed:
        """A checkpoint of a run: of a step, or the newest.

        Args:
            name: of the run; None where there is only one.

        Raises:
            ServiceError: 404, there is none; 503, it cannot be read.
        """
        runs = self.runs()
        if name is None:
            if len(runs) != 1:
                raise ServiceError(
                    400, "model: expected the name of a run, as /v1/models lists them", param="model"
                )
            name = next(iter(runs))
        if name not in runs:
            raise ServiceError(
                404, f"model: no run is called {name!r}; /v1/models lists them", param="model", reason="not_found"
            )
        by_step = {int(path.name.removeprefix("step-")): path for path in checkpoints(runs[name])}
        if not by_step:
            raise ServiceError(404, f"model: {name} has no checkpoint yet", param="model", reason="not_found")
        step = max(by_step) if step is None else step
        if step not in by_step:
            raise ServiceError(
                404,
                f"step: {name} has no checkpoint of step {step}; expected one of {', '.join(map(str, by_step))}",
                param="step",
                reason="not_found",
            )
        return self._listed(name, by_step[step])

    def _listed(self, name: str, checkpoint: Path) -> Listed:
        try:
            info = self._info(checkpoint)
            classes = info.config["model"].get("num_classes") or info.dataset["num_classes"]
            names = info.dataset.get("class_names") or range(classes)
            return Listed(name, checkpoint, info, tuple(str(each) for each in names))
        except (UserError, OSError, KeyError) as error:
            raise ServiceError(
                503, f"model: {name}: its checkpoint cannot be read: {error}", param="model", reason="model"
            ) from error

    def _info(self, checkpoint: Path) -> CheckpointInfo:
        """What a checkpoint says of itself, read again when its marker is another."""
        stat = (checkpoint / MARKER).stat()
        stamp = (stat.st_mtime_ns, stat.st_ino)
        with self._lock:
            stored = self._infos.get(checkpoint)
        if stored is not None and stored[0] == stamp:
            return stored[1]
        info = read_info(checkpoint)
        with self._lock:
            self._infos[checkpoint] = (stamp, info)
        return info

    def described(self) -> list[dict[str, object]]:
        """All runs with a checkpoint that can be read, as `/v1/models` has them."""
        described: list[dict[str, object]] = []
        for name, folder in self.runs().items():
            steps = [int(path.name.removeprefix("step-")) for path in checkpoints(folder)]
            if not steps:
                continue
            try:
                listed = self.find(name, None)
                config = listed.info.config["model"]
                latents = find_decoder(listed.info, None) is not None
            except (ServiceError, UserError) as error:
                described.append({"id": name, "object": "model", "owned_by": "ditmoe", "problem": str(error)})
                continue
            described.append(
                {
                    "id": name,
                    "object": "model",
                    "created": int((listed.checkpoint / MARKER).stat().st_mtime),
                    "owned_by": "ditmoe",
                    "step": listed.info.step,
                    "steps": steps,
                    "parameters": parameters_of(listed.info),
                    "image_size": config.get("image_size") or listed.info.dataset.get("image_size"),
                    "latents": latents,
                    "objective": listed.info.objective.kind,
                    "classes": list(listed.class_names),
                }
            )
        return described
