"""Markers of checkpoints, changed as by somebody who also writes the right checksum."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ditmoe.parallel.checkpoint.marker import CHECKSUM, MARKER, marker_text


def change_marker(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the facts of a checkpoint's marker in place."""
    file = checkpoint / MARKER
    facts = json.loads(file.read_text())
    facts.pop(CHECKSUM, None)
    change(facts)
    file.write_text(marker_text(facts))
