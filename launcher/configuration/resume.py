"""What of a configuration may change when a run is resumed."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

MAY_CHANGE: Final = (
    "run",
    "launch",
    "parallel",
    "checkpoint",
    "preview",
    "deepspeed",
    "data.sources",  # where the samples lie; a resume compares their fingerprint with the checkpoint's
    "data.workers",
    "data.cache",
    "model.preset",  # the shape's own keys say what it is
    "train.steps",
    "train.micro_batch",
    "train.log_every",
    "train.checkpoint_every",
    "train.log_samples",
    "train.peak_tflops",
)
"""Keys, with all below them, that may change when a run is resumed. All others decide its loss curve."""

_missing: Final = object()


def changed_keys(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values; None where there is none."""
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name, _missing), now.get(name, _missing)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changed_keys(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", None if old is _missing else old, None if new is _missing else new


def may_change(key: str) -> bool:
    """Whether a key, dotted, may differ from what the run was started with."""
    return any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
