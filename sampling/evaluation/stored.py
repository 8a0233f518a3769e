"""The results in a `metrics.json`, kept apart by all that they depend on besides the images: their `request`.

Each has a key. The first one of a feature network has that network's name; another one of the same network
(another resize, file, reference or number of neighbours) has a part of its request's fingerprint behind it.
Whoever looks for a result asks by the request.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ditmoe.data.storage.files import read_object
from ditmoe.model.errors import UserError

METRICS_FILE: Final = "metrics.json"
METRICS_FORMAT: Final = 1

Request = Mapping[str, Any]
Results = Mapping[str, Mapping[str, Any]]


def stored_results(folder: Path) -> dict[str, Any]:
    """The results in `metrics.json`, by their keys; none where there is no file. UserError when it is damaged."""
    path = folder / METRICS_FILE
    if not path.exists():
        return {}
    results = read_object(path).get("results")
    if not isinstance(results, dict) or not all(isinstance(result, dict) for result in results.values()):
        raise UserError(f"{path}: its key `results` is damaged; delete the file, it is made anew")
    return results


def answers(result: Mapping[str, Any], request: Request) -> bool:
    """Whether a result is what is asked for. The share recognised may be there unasked."""
    stored = result.get("request")
    if not isinstance(stored, dict):
        return False
    if request["recogniser"] is None:
        stored = {**stored, "recogniser": None}
    return stored == request


def key_of(results: Results, request: Request) -> str | None:
    """The key of the result that is asked for; None: it is not there."""
    return next((key for key, result in results.items() if answers(result, request)), None)


def keys_of(results: Results, requests: Sequence[Request]) -> list[str]:
    """The keys of results that are all there."""
    keys = [key_of(results, request) for request in requests]
    found = [key for key in keys if key is not None]
    assert len(found) == len(keys), keys
    return found


def key_for(results: Results, request: Request) -> str:
    """The key under which the result of a request is written: its own, or a new one.

    It takes the place of a result that lacks nothing but the share recognised.
    """
    without = {**request, "recogniser": None}
    for key, result in results.items():
        stored = result.get("request")
        if isinstance(stored, dict) and {**stored, "recogniser": None} == without:
            return key
    name = str(request["features"])
    if name not in results:
        return name
    return f"{name}-{hashlib.sha256(json.dumps(without, sort_keys=True).encode()).hexdigest()[:8]}"
