"""What a finished evaluation keeps of its images: the chunks, one file of them, or their statistics alone.

What is kept is written down before anything is removed, so that no later command takes the rest of the chunks for
an interrupted job and draws the others anew.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch

from ditmoe.data.storage.claims import Claims
from ditmoe.data.storage.files import read_object, replacing
from ditmoe.model.errors import UserError
from ditmoe.sampling.metrics.descriptions import ChunkDescriptions
from ditmoe.sampling.metrics.moments import Moments
from ditmoe.sampling.metrics.real_statistics import CPU, RealStatistics

Keep = Literal["chunks", "npz", "statistics"]
KEEPS: Final[tuple[Keep, ...]] = get_args(Keep)
"""From the most that is kept to the least."""
KEPT_KEY: Final = "kept"
"""In `evaluation.json`, once something is gone."""
SETTINGS_FILE: Final = "evaluation.json"
SAMPLES_FILE: Final = "samples.npz"
CHUNKS_FOLDER: Final = "chunks"


def statistics_file(key: str) -> str:
    """Name of the file with the moments of the drawn images that belongs to the result of a key."""
    return f"statistics-{key}.npz"


def kept(folder: Path) -> Keep:
    """What an evaluation has kept so far. UserError when its settings are damaged."""
    path = folder / SETTINGS_FILE
    stored = read_object(path).get(KEPT_KEY, KEEPS[0]) if path.exists() else KEEPS[0]
    if stored not in KEEPS:
        raise UserError(f"{path}: {KEPT_KEY} is {stored!r}, expected one of {', '.join(KEEPS)}")
    keep: Keep = stored
    return keep


def check_kept(folder: Path) -> None:
    """UserError where images that would have to be scored, or drawn on, are gone."""
    now = kept(folder)
    if now == "chunks":
        return
    left = {
        "npz": f"`ditmoe score {folder / SAMPLES_FILE} --reference …` scores the images that are left",
        "statistics": "what is left is metrics.json, the gallery and the statistics of its features",
    }[now]
    raise UserError(
        f"{folder}: its chunks were removed after it was scored (--keep {now}), and it was not scored like this: "
        f"{left}; delete the folder to draw them anew, or score with the settings in metrics.json"
    )


def drop_images(folder: Path, keep: Keep) -> None:
    """Remove what a finished evaluation need not keep; what is gone stays gone. Repeated where it was interrupted.

    The caller holds the evaluation. UserError when the settings cannot be written.
    """
    keep = max(keep, kept(folder), key=KEEPS.index)
    if keep == "chunks":
        return
    path = folder / SETTINGS_FILE
    stored = read_object(path)
    if stored.get(KEPT_KEY) != keep:
        with replacing(path) as file:
            file.write(json.dumps({**stored, KEPT_KEY: keep}, indent=1).encode() + b"\n")
    try:
        if (folder / CHUNKS_FOLDER).exists():
            shutil.rmtree(folder / CHUNKS_FOLDER)
        if keep == "statistics":
            (folder / SAMPLES_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: could not be removed: {error.strerror or error}") from error


def drop_images_of_finished(folder: Path, keep: Keep) -> None:
    """`drop_images` of an evaluation that was scored before, unless another process is at it.

    Where it left no statistics, `samples.npz` stays: only scoring makes them.
    """
    if keep == "statistics" and not any(folder.glob(statistics_file("*"))):
        keep = "npz"
    if keep == "chunks" and kept(folder) == "chunks":
        return
    with Claims(folder).taken("evaluation") as claim:
        if claim is not None:
            drop_images(folder, keep)


def write_drawn_statistics(
    path: Path, descriptions: ChunkDescriptions, real: RealStatistics, device: torch.device = CPU
) -> None:
    """Means and covariances of the drawn images, under the names that files of the ADM protocol have.

    `mu` and `sigma` of the features, `mu_s` and `sigma_s` of the spatial ones where the real images have them,
    float64; and `count`. UserError when it cannot be written.

    Args:
        device: where moments are computed.
    """
    arrays: dict[str, Any] = {}
    for kind, suffix in (("features", ""), ("spatial", "_s")):
        if kind not in real.kinds:
            continue
        rows = (each[kind] for each in descriptions.read_all())
        moments = Moments.of_stream(rows, real.whole(kind).dimension, device)
        arrays["count"] = np.array(moments.count)
        if moments.count > 1:
            arrays |= {f"mu{suffix}": moments.mean_F, f"sigma{suffix}": moments.covariance_FF}
    with replacing(path) as file:
        np.savez(file, **arrays)
