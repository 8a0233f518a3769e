"""What an evaluation tells of its chains: figures and a picture, from its chunks and their features."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ditmoe.sampling.diagnostics.figures import ChainSeries, chain_figures
from ditmoe.sampling.diagnostics.picture import write_chain_picture
from ditmoe.sampling.jobs.chunks import ChunkStore
from ditmoe.sampling.metrics.descriptions import ChunkDescriptions

CHAINS_FILE: Final = "chains.png"
IMAGES: Final = 10_000
"""Drawn and real images that are looked at, at most."""
SHOWN_CHAINS: Final = 12
"""Chains whose images are read for the picture."""


def chain_results(
    path: Path,
    store: ChunkStore,
    descriptions: ChunkDescriptions,
    samples: int,
    real_features_NF: NDArray[np.floating],
) -> dict[str, Any]:
    """Figures of the whole chains among the first 10,000 images, and a picture of them.

    A chain is whole when all of its samples are there and finite.

    Args:
        path: PNG to write.
        samples: those of a chain.
        real_features_NF: of real images, in the network of the descriptions.

    Returns:
        `chain_figures`; where not one chain is whole, a warning alone.
    """
    chains = min(store.count, max(samples, IMAGES)) // samples
    if chains == 0:
        return {"warnings": [f"{store.count} images are less than one chain of {samples}: chains have no figures"]}
    sigma, trace, features, label, number = [], [], [], [], []
    for chunk in range(-(-chains * samples // store.size)):
        drawn = store.read(chunk)
        if not len(drawn.number_N):
            continue
        assert drawn.sigma_N is not None and drawn.trace_NT is not None
        sigma.append(drawn.sigma_N)
        trace.append(drawn.trace_NT)
        features.append(descriptions.read(chunk)["features"])
        label.append(drawn.label_N)
        number.append(drawn.number_N)
    chain_N = np.concatenate(number or [np.empty(0, dtype=np.int64)]) // samples
    there = np.bincount(chain_N, minlength=chains)[:chains]
    whole = np.flatnonzero(there == samples)
    lost = f"{chains - len(whole):,} of {chains:,} chains have samples that are not finite"
    if not len(whole):
        return {"warnings": [f"{lost}: chains have no figures"]}
    rows = np.isin(chain_N, whole)
    shape = (len(whole), samples)
    series = ChainSeries(
        np.log(np.concatenate(trace)[rows].astype(np.float64)).reshape(len(whole), -1),
        np.concatenate(sigma)[rows].astype(np.float64).reshape(shape),
        np.concatenate(features)[rows].reshape(*shape, -1),
        np.concatenate(label)[rows].reshape(shape)[:, 0],
    )
    figures = chain_figures(series, real_features_NF[:IMAGES])
    if len(whole) < chains:
        figures["warnings"].append(f"{lost}: the figures of chains leave them out")
    shown = whole[:SHOWN_CHAINS]
    image_NHWC = _images(store, {chain * samples + place for chain in shown.tolist() for place in range(samples)})
    write_chain_picture(path, series, figures, image_NHWC.reshape(len(shown), samples, *image_NHWC.shape[1:]))
    return figures


def _images(store: ChunkStore, numbers: set[int]) -> NDArray[np.uint8]:
    """The images with these numbers, in their order."""
    found = []
    for chunk in sorted({number // store.size for number in numbers}):
        drawn = store.read(chunk)
        found.append(drawn.image_NHWC[np.isin(drawn.number_N, sorted(numbers))])
    return np.concatenate(found)
