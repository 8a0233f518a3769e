"""What `ditmoe evaluate` has left in a run's folder: figures that can be compared, and marks of the best."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ditmoe.data.storage.files import open_regular, replacing
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import read_info

LOWER_IS_BETTER: Final = ("loss", "fid", "sfid", "kid")
"""Of the rest of `checkpoint.best_metric` higher is better."""


@dataclass(frozen=True)
class StoredEvaluation:
    """The figures of one checkpoint in the features of one network."""

    id: str
    """Name of its folder."""
    written: float
    """When, seconds since 1970."""
    weights: str
    """Fingerprint of the checkpoint."""
    step: int
    images: int | None
    """Images that the run had seen."""
    features: str
    settings: str
    """What two evaluations must have in common to be compared, as JSON."""
    figures: Mapping[str, Any]

    @property
    def settings_name(self) -> str:
        """A name of the settings, fit for a file: sampler, steps, guidance, labels, N, seed, and a fingerprint."""
        _, _, rest = self.id.split("-", 2)
        fingerprint = hashlib.sha256(self.settings.encode()).hexdigest()[:8]
        return f"{rest.rpartition('-')[0]}-{self.features}-{fingerprint}"

    def figure(self, metric: str) -> float | None:
        """A figure by its name; None where there is no such number."""
        value = self.figures.get(metric)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def stored_evaluations(evaluations: Path) -> Iterator[StoredEvaluation]:
    """Each evaluation of a run that is finished. What cannot be read as one is passed over: it may end no run."""
    for file in sorted(evaluations.glob("*/metrics.json")):
        try:
            with open_regular(file) as stored:
                content = json.loads(stored.read())
            evaluation, written = content["evaluation"], file.stat().st_mtime
            for _, result in sorted(content["results"].items()):
                features = str(result["network"]["name"])  # of a network there may be several results
                yield StoredEvaluation(
                    id=file.parent.name,
                    written=written,
                    weights=str(evaluation["weights"]).removesuffix(f"-{evaluation['which']}"),
                    step=int(evaluation["step"]),
                    images=evaluation.get("images_seen"),
                    features=features,
                    settings=_settings(evaluation, features, result),
                    figures=dict(result),
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue


def _settings(evaluation: dict[str, Any], features: str, result: dict[str, Any]) -> str:
    shared = {key: evaluation[key] for key in ("which", "sampler", "count", "labels")}
    measured = [features, result["network"]["fingerprint"], result["real"]["fingerprint"]]
    among = (result.get("request") or {}).get("neighbour_images")
    measured += [] if among is None else [among]
    return json.dumps([shared, measured], sort_keys=True)


def fingerprints(paths: Sequence[Path]) -> dict[str, int]:
    """Of checkpoints: fingerprint → step. Damaged ones are left out: no evaluation can be of them."""
    found = {}
    for path in paths:
        try:
            info = read_info(path)
        except UserError:
            continue
        found[info.fingerprint] = info.step
    return found


def best_of(found: Sequence[StoredEvaluation], metric: str) -> StoredEvaluation | None:
    """The best by a figure; of equally good ones the later step. None where none has it."""
    sign = 1 if metric in LOWER_IS_BETTER else -1
    judged = [(sign * figure, -one.step, one) for one in found if (figure := one.figure(metric)) is not None]
    return min(judged, key=lambda each: each[:2])[2] if judged else None


def mark_best(evaluations: Path, best: StoredEvaluation, metric: str) -> Path:
    """Mark a checkpoint as the best of those with its evaluation's settings: the run keeps it from then on.

    Returns:
        The mark, which replaces the one before; who deletes it lets retention decide again.
    """
    path = evaluations / f"best-{best.settings_name}.json"
    content = {
        "metric": metric,
        "figure": best.figure(metric),
        "step": best.step,
        "weights": best.weights,
        "evaluation": best.id,
        "features": best.features,
    }
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
    return path


def marked(evaluations: Path, paths: Sequence[Path]) -> list[int]:
    """Of these checkpoints, the steps of those that are marked. A mark that cannot be read is none."""
    weights = set()
    for file in sorted(evaluations.glob("best-*.json")):
        try:
            with open_regular(file) as stored:
                weights.add(str(json.loads(stored.read())["weights"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    if not weights:
        return []
    return [step for fingerprint, step in fingerprints(paths).items() if fingerprint in weights]
