"""What an evaluation tells of its chains: figures and a picture, from its chunks and their features."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ditmoe.sampling.diagnostics.figures import ChainSeries, chain_figures
from ditmoe.sampling.diagnostics.picture import write_chain_picture
from ditmoe.sampling.jobs.chunks import ChunkStore
from ditmoe.sampling.metrics.scores import NEIGHBOUR_IMAGES, ChunkDescriptions

CHAINS_FILE: Final = "chains.png"
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

    Args:
        path: PNG to write.
        samples: those of a chain.
        real_features_NF: of real images, in the network of the descriptions.

    Returns:
        `chain_figures`; where not one chain is whole, a warning alone.
    """
    chains = min(store.count, max(samples, NEIGHBOUR_IMAGES)) // samples
    if chains == 0:
        return {"warnings": [f"{store.count} images are not one whole chain of {samples}: nothing is told of it"]}
    whole = chains * samples
    sigma, trace, features, label = [], [], [], []
    images: list[NDArray[np.uint8]] = []
    for chunk in range(-(-whole // store.size)):
        drawn = store.read(chunk)
        assert drawn.sigma_N is not None and drawn.trace_NT is not None
        if chunk * store.size < SHOWN_CHAINS * samples:
            images.append(drawn.image_NHWC)
        sigma.append(drawn.sigma_N)
        trace.append(drawn.trace_NT)
        features.append(descriptions.read(chunk)["features"])
        label.append(drawn.label_N)
    series = ChainSeries(
        np.log(np.concatenate(trace)[:whole].astype(np.float64)).reshape(chains, -1),
        np.concatenate(sigma)[:whole].astype(np.float64).reshape(chains, samples),
        np.concatenate(features)[:whole].reshape(chains, samples, -1),
        np.concatenate(label)[:whole].reshape(chains, samples)[:, 0],
    )
    figures = chain_figures(series, real_features_NF)
    shown = min(chains, SHOWN_CHAINS)
    image_NHWC = np.concatenate(images)[: shown * samples]
    write_chain_picture(path, series, figures, image_NHWC.reshape(shown, samples, *image_NHWC.shape[1:]))
    return figures
