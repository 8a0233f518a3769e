"""What the evaluations of a run have found: figures for tables and charts, images by class, traces of chains."""

import base64
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np
import torch

from ditmoe.data.storage.arrays import Arrays, read_arrays
from ditmoe.data.storage.files import read_object
from ditmoe.model.errors import UserError
from ditmoe.sampling.evaluation.keeping import CHUNKS_FOLDER, SETTINGS_FILE
from ditmoe.sampling.evaluation.row import FIGURES
from ditmoe.sampling.evaluation.stored import METRICS_FILE
from ditmoe.sampling.service.errors import ServiceError
from ditmoe.sampling.service.images import png_of
from ditmoe.sampling.service.page.run_folders import finite
from ditmoe.sampling.settings.names import CHAIN_PREFIX

EVALUATIONS: Final = "evaluations"
GALLERY_FOLDER: Final = "gallery"
SHEET: Final = re.compile(r"class-(\d{5,10})\.png")
MOST_TRACED: Final = 2000
"""Steps of a chain that are shown."""


def _not_found(message: str, param: str) -> ServiceError:
    return ServiceError(404, message, param=param, reason="not_found")


def evaluations_of(run: Path) -> dict[str, Path]:
    """Name → folder of each evaluation of a run, in the order of the names; links are not followed."""
    try:
        with os.scandir(run / EVALUATIONS) as entries:
            found = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return {}
    folders = {entry.name: Path(entry.path) for entry in sorted(found, key=lambda entry: entry.name)}
    return {name: path for name, path in folders.items() if (path / SETTINGS_FILE).is_file()}


def find_evaluation(run: Path, name: str) -> Path:
    """The folder of an evaluation. ServiceError: the run has none of this name."""
    found = evaluations_of(run).get(name)
    if found is None:
        raise _not_found("the run has no such evaluation", "evaluation")
    return found


class Evaluations:
    """Reads what evaluations say of themselves, again where a file is another. For any number of threads."""

    def __init__(self) -> None:
        """Read nothing yet."""
        self._lock = Lock()
        self._known: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}

    def listed(self, run: Path) -> list[dict[str, Any]]:
        """All of a run, `_summary_of` each; of one that is damaged, its name and the problem."""
        rows = []
        for name, folder in evaluations_of(run).items():
            try:
                rows.append(self._summary(name, folder))
            except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
                rows.append({"id": name, "problem": f"cannot be read: {error}"})
        return rows

    def described(self, run: Path, name: str) -> dict[str, Any]:
        """One with everything that it found. ServiceError: there is none, or it is damaged."""
        folder = find_evaluation(run, name)
        try:
            summary = self._summary(name, folder)
            metrics = read_object(folder / METRICS_FILE) if summary["finished"] else {"results": {}}
            found = {"results": _plain(metrics["results"]), "trained_on": _trained_on(metrics)}
            return {**summary, **found, "sheets": list(sheets(folder))}
        except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServiceError(503, f"the evaluation cannot be read: {error}", reason="damaged") from error

    def _summary(self, name: str, folder: Path) -> dict[str, Any]:
        """`_summary_of`, computed once for each file that it is of, and whether the images are there now."""
        finished = (folder / METRICS_FILE).is_file()
        path = folder / (METRICS_FILE if finished else SETTINGS_FILE)
        stat = path.stat()
        stamp = (stat.st_mtime_ns, stat.st_ino)
        with self._lock:
            known = self._known.get(path)
        if known is None or known[0] != stamp:
            known = (stamp, _summary_of(name, read_object(path), finished))
            with self._lock:
                self._known[path] = known
        return {**known[1], "kept": (folder / CHUNKS_FOLDER).is_dir()}


def _summary_of(name: str, stored: Mapping[str, Any], finished: bool) -> dict[str, Any]:
    """What tables and charts need of an evaluation, from its figures, or its settings where it is under way.

    Its settings; `nfe`; and for each feature network the `figures`, each with its `value`, `floor` and `interval`
    (null where it is not known).
    """
    told = stored["evaluation"] if finished else stored
    sampler = told["sampler"]
    results = stored["results"] if finished else {}
    return {
        "id": name,
        "finished": finished,
        "step": int(told["step"]),
        "which": str(told["which"]),
        "count": int(told["count"]),
        "labels": str(told["labels"]),
        "classes": int(told["num_classes"]),
        "seed": int(sampler["seed"]),
        "sampler": _plain(sampler),
        "chains": str(sampler["sampler"]).startswith(CHAIN_PREFIX),
        "nfe": finite(told.get("nfe")),
        "figures": {network: _figures(result) for network, result in results.items()},
        "reference": next((str(result["real"]["name"]) for result in results.values()), None),
        "warnings": sum(len(result.get("warnings", ())) for result in results.values()),
    }


def _figures(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of a feature network, by the keys of FIGURES."""
    found = {}
    for name, title in FIGURES.items():
        value = finite(result.get(name))
        if value is None:
            continue
        floor = result.get("inception_score_real" if name == "inception_score" else f"{name}_floor")
        found[name] = {"title": title, "value": value, "floor": finite(floor), **_interval(result, name, value)}
    return found


def _interval(result: Mapping[str, Any], name: str, value: float) -> dict[str, Any]:
    """Between which two values a figure lies, and what these are; null where nothing says it."""
    interval = result.get(f"{name}_interval")
    if isinstance(interval, list) and len(interval) == 2 and all(finite(each) is not None for each in interval):
        return {"interval": interval, "interval_is": "95% interval"}
    deviation = finite(result.get(f"{name}_deviation"))
    if deviation is not None:
        return {"interval": [value - deviation, value + deviation], "interval_is": "± one deviation"}
    return {"interval": None, "interval_is": None}


def _trained_on(metrics: Mapping[str, Any]) -> str | None:
    name = metrics.get("evaluation", {}).get("trained_on")
    return None if name is None else str(name)


def _plain(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return finite(value) if isinstance(value, float) else value


def _chunks(folder: Path, first: int, names: list[str]) -> Iterator[tuple[int, Path, Arrays]]:
    """(number of the first image, file, some of its arrays) of each chunk that is there, from image `first` on.

    ServiceError: the images were removed, or a chunk is damaged.
    """
    settings = read_object(folder / SETTINGS_FILE)
    if not (folder / CHUNKS_FOLDER).is_dir():
        raise _not_found("the images of this evaluation are not kept, or not there yet", "evaluation")
    size, count = int(settings["chunk"]), int(settings["count"])
    for chunk in range(max(0, first) // size, -(-count // size)):
        path = folder / CHUNKS_FOLDER / f"{chunk:05d}.npz"
        if not path.is_file():
            continue  # not drawn yet
        try:
            arrays = read_arrays(path, names)
        except UserError as error:
            raise ServiceError(503, f"images cannot be read: {error}", reason="damaged") from error
        yield chunk * size, path, arrays


def sheets(folder: Path) -> dict[int, Path]:
    """Label → picture of the first images of its class, which stays where the images are not kept."""
    found = {}
    try:
        for entry in (folder / GALLERY_FOLDER).iterdir():
            match = SHEET.fullmatch(entry.name)
            if match is not None and entry.is_file() and not entry.is_symlink():
                found[int(match[1])] = entry
    except OSError:
        return {}
    return dict(sorted(found.items()))


def sheet(folder: Path, label: int) -> bytes:
    """The picture of a class. ServiceError: there is none."""
    try:
        return sheets(folder)[label].read_bytes()
    except (KeyError, OSError):
        raise _not_found("the evaluation has no picture of this class", "class") from None


def images(folder: Path, label: int | None, first: int, limit: int) -> dict[str, Any]:
    """Images of an evaluation as PNG, in the order of their numbers.

    Args:
        label: of all of them; None: of any.
        first: the least number.

    Returns:
        `images`, each with its `number`, `label` and `b64_json`, and `next`: `first` of those that follow, or
        null.
    """
    found: list[dict[str, Any]] = []
    following: int | None = None
    for start, path, arrays in _chunks(folder, first, ["labels"]):
        label_N = arrays["labels"]
        wanted_N = np.arange(start, start + len(label_N)) >= first
        if label is not None:
            wanted_N &= label_N == label
        places = np.flatnonzero(wanted_N)
        room = limit - len(found)
        if room and len(places):
            image_NHWC = read_arrays(path, ["images"])["images"]
            for place in places[:room].tolist():
                png = base64.b64encode(png_of(torch.from_numpy(image_NHWC[place]))).decode("ascii")
                found.append({"number": start + place, "label": int(label_N[place]), "b64_json": png})
        if len(places) > room:
            following = start + int(places[room])
            break
    return {"images": found, "next": following}


def traces(folder: Path, first: int, limit: int) -> dict[str, Any]:
    """σ along some chains of an evaluation.

    Args:
        first: number of the first chain.
        limit: chains.

    Returns:
        `samples_per_chain`, `steps_per_sample`, `chains` in all, `steps` that are shown of each, and `traces`:
        `chain`, `label`, `trace` (σ after each step) and `denoised` (step and σ of each state that was denoised).

    Raises:
        ServiceError: it has no chains, or none of these.
    """
    settings = read_object(folder / SETTINGS_FILE)
    sampler = settings["sampler"]
    if not str(sampler["sampler"]).startswith(CHAIN_PREFIX):
        raise _not_found("the evaluation is none of chains", "evaluation")
    samples = int(sampler["dlg"]["samples_per_chain"])
    chains = int(settings["count"]) // samples
    rows: dict[int, tuple[int, float, Any]] = {}
    last = min(chains, first + limit) * samples
    for start, _, arrays in _chunks(folder, first * samples, ["labels", "sigma", "trace"]):
        if start >= last:
            break
        for place, (label, sigma, trace_T) in enumerate(
            zip(arrays["labels"].tolist(), arrays["sigma"].tolist(), arrays["trace"], strict=True)
        ):
            rows[start + place] = (label, sigma, trace_T)
    found: list[dict[str, Any]] = []
    per_sample = 0
    for chain in range(first, min(chains, first + limit)):
        numbers = range(chain * samples, (chain + 1) * samples)
        if any(number not in rows for number in numbers):
            continue
        per_sample = len(rows[numbers[0]][2])
        shown = min(samples, max(1, MOST_TRACED // per_sample))
        trace: list[float | None] = []
        denoised: list[list[float | None]] = []
        for number in numbers[:shown]:
            _, sigma, trace_T = rows[number]
            # The state that was denoised is that of this σ in its stretch.
            place = int(np.abs(np.log(trace_T) - np.log(sigma)).argmin()) if sigma > 0 else per_sample - 1
            denoised.append([len(trace) + place + 1, finite(sigma)])
            trace += [finite(each) for each in trace_T.tolist()]
        found.append({"chain": chain, "label": rows[numbers[0]][0], "trace": trace, "denoised": denoised})
    return {
        "samples_per_chain": samples,
        "steps_per_sample": per_sample,
        "chains": chains,
        "steps": len(found[0]["trace"]) if found else 0,
        "traces": found,
    }
