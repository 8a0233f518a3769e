"""What of a configuration may change when a run is resumed."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

FREE: Final = (
    "run",
    "launch",
    "parallel",
    "checkpoint",
    "preview",
    "deepspeed",
    "data.sources",  # where the samples lie; a resume compares their fingerprint with the checkpoint's
    "data.workers",
    "data.cache",
    "data.vae",  # its checksum is compared with that of the VAE which encoded the data
    "model.preset",  # the shape's own keys say what it is
    "train.steps",
    "train.start_from",  # a resume goes on from the run's own checkpoint, which says where it all began
    "train.start_weights",
    "train.start_objective",
    "train.micro_batch",
    "train.log_every",
    "train.loggers",
    "train.profile",
    "train.checkpoint_every",
    "train.log_samples",
    "train.peak_tflops",
    "train.emulated_bf16",
)
"""Keys, with all below them, that may change when a run is resumed, and do not change its loss curve."""

FROM_THEN_ON: Final = (
    "optim",
    "ema",
    "model.label_dropout",
    "model.balance",
    "model.balance_weight",
    "model.balance_group",
    "train.compile",
    "train.skip_steps",
    "train.tf32",
)
"""Keys, with all below them, that may change when a run is resumed, and change its loss curve from there on."""

_missing: Final = object()


class Change(NamedTuple):
    """A key that differs from what the run was last started with."""

    key: str
    """Dotted."""
    before: Any
    """None where there was none."""
    now: Any


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[Change]:
    """The keys whose values differ."""
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name, _missing), now.get(name, _missing)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changed_keys(old, new, f"{prefix}{name}.")
        elif old != new:
            yield Change(f"{prefix}{name}", None if old is _missing else old, None if new is _missing else new)


def may_change(key: str) -> bool:
    """Whether a key, dotted, may differ from what the run was started with."""
    return any(key == free or key.startswith(f"{free}.") for free in (*FREE, *FROM_THEN_ON))
