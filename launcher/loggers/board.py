"""What every place that shows a run's figures does, and the names that figures have there, the same in each."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Outcome = Literal["complete", "stopped", "failed"]

NAMES: Final = {
    "images": "progress/images",
    "epoch": "progress/epoch",
    "loss": "train/loss",
    "balance_loss": "train/balance loss",
    "grad_norm": "train/gradient norm",
    "lr": "train/learning rate",
    "images_per_second": "speed/images per second",
    "step_seconds": "speed/step - s",
    "compute_seconds": "speed/compute - s",
    "data_wait_seconds": "speed/wait for data - s",
    "record_seconds": "speed/records - s",
    "save_seconds": "speed/checkpoints - s",
    "preview_seconds": "speed/previews - s",
    "memory_gib": "memory/peak - GiB",
    "mfu": "speed/MFU - share",
    "expert_load": "expert load - share",
}
"""Key of stats.jsonl → name of the figure, with its unit; other keys go under `other/`.

MLflow takes letters, digits, `_`, `-`, `.`, `/` and spaces alone.
"""


class Board(Protocol):
    """A place that shows figures by step."""

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers by their names."""

    def image(self, name: str, image_HWC: NDArray[np.uint8], step: int) -> None:
        """Show an image, uint8 `[H, W, C]` with 1 or 3 channels."""

    def text(self, name: str, text: str, step: int) -> None:
        """Show plain text, such as the configuration."""

    def close(self, outcome: Outcome) -> str | None:
        """Finish what is there; what is left undone, in words."""


def named(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record of stats.jsonl by the names of their figures."""
    return dict(_named(values))


def _named(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if key == "expert_load" and isinstance(value, list):
            # Share of a layer's tokens that each expert got; all equal at 1/N.
            for layer, load_N in enumerate(value):
                for expert, share in enumerate(load_N):
                    yield f"{NAMES[key]}/block {layer}/expert {expert}", share
        elif key == "sources" and isinstance(value, dict):
            # Images, epochs and skipped samples of each source of the data.
            for name, numbers in value.items():
                yield from ((f"sources/{_plain(name)}/{each}", number) for each, number in numbers.items())
        elif isinstance(value, int | float):
            yield NAMES.get(key, f"other/{_plain(key)}"), value


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_. -]", "_", name)
