"""What a run's folder tells while it trains: its curves and its previews."""

import json
import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Final

from ditmoe.data.storage.files import open_regular
from ditmoe.sampling.service.errors import ServiceError

STATS: Final = "stats.jsonl"
SAMPLES: Final = "samples"
PREVIEW: Final = re.compile(r"preview-step-(\d{1,12})\.png")
CURVES: Final = (
    "loss",
    "balance_loss",
    "grad_norm",
    "lr",
    "images_per_second",
    "step_seconds",
    "data_wait_seconds",
    "memory_gib",
)
"""Keys of a record that are drawn over the steps."""
MOST_POINTS: Final = 600
"""Of a curve; of more records every k-th is told."""


@dataclass
class _Records:
    """What was read of a file so far."""

    inode: int
    offset: int = 0
    step: list[int] = field(default_factory=list)
    values: list[tuple[float | None, ...]] = field(default_factory=list)
    """By the order of CURVES."""
    expert_load: list[list[float]] | None = None
    """Of the newest record: the share of tokens of each block's experts."""

    def add(self, line: bytes) -> None:
        """Take a line; a step that is not beyond the last one was trained again."""
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return  # of a disk that was full
        while self.step and self.step[-1] >= step:
            self.step.pop()
            self.values.pop()
        self.step.append(step)
        self.values.append(tuple(finite(record.get(name)) for name in CURVES))
        load = record.get("expert_load")
        if isinstance(load, list) and all(isinstance(each, list) for each in load):
            self.expert_load = [[finite(share) or 0.0 for share in each] for each in load]


def finite(value: object) -> float | None:
    """A number that JSON can hold, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


class RunFolders:
    """Reads files that grow, each byte once. For any number of threads."""

    def __init__(self) -> None:
        """Read nothing yet."""
        self._lock = Lock()
        self._records: dict[Path, _Records] = {}

    def curves(self, run: Path) -> dict[str, Any]:
        """`step` and the values of each key that the run has recorded, null where a number is not finite.

        Returns:
            `records` of which every `every`-th is told, `step`, `values` by key, `expert_load` of the newest
            record, and `age`, seconds since it was written; without records `age` is null.
        """
        with self._lock:
            records, age = self._read(run / STATS)
            every = max(1, -(-len(records.step) // MOST_POINTS))
            chosen = list(range(len(records.step)))[::-1][::every][::-1]  # the newest is among them
            columns = {name: [records.values[row][place] for row in chosen] for place, name in enumerate(CURVES)}
            return {
                "records": len(records.step),
                "every": every,
                "step": [records.step[row] for row in chosen],
                "values": {name: each for name, each in columns.items() if any(v is not None for v in each)},
                "expert_load": records.expert_load,
                "age": age,
            }

    def newest(self, run: Path) -> dict[str, Any] | None:
        """Step, loss and age of the newest record; None: there is none."""
        with self._lock:
            records, age = self._read(run / STATS)
            if not records.step:
                return None
            return {"step": records.step[-1], "loss": records.values[-1][CURVES.index("loss")], "age": age}

    def _read(self, path: Path) -> tuple[_Records, float | None]:
        """All records of a file, of which only what is new is read."""
        try:
            with open_regular(path) as file:
                stat = os.fstat(file.fileno())
                records = self._records.get(path)
                if records is None or records.inode != stat.st_ino or stat.st_size < records.offset:
                    records = self._records[path] = _Records(stat.st_ino)
                file.seek(records.offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # somebody is writing it
                    records.offset += len(line)
                    records.add(line)
        except OSError:
            return _Records(0), None
        return records, max(0.0, time.time() - stat.st_mtime) if records.step else None


def previews(run: Path) -> dict[int, Path]:
    """Step → picture that the run drew of itself at that step, in their order."""
    found = {}
    try:
        for entry in (run / SAMPLES).iterdir():
            match = PREVIEW.fullmatch(entry.name)
            if match is not None and entry.is_file() and not entry.is_symlink():
                found[int(match[1])] = entry
    except OSError:
        return {}
    return dict(sorted(found.items()))


def preview(run: Path, step: int) -> bytes:
    """The picture of a step. ServiceError: there is none."""
    try:
        return previews(run)[step].read_bytes()
    except (KeyError, OSError):
        raise ServiceError(404, "the run has no preview of this step", param="step", reason="not_found") from None
