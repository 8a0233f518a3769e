"""What stands in the file that a user names as a reference: statistics or images. Pickles are never opened."""

from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from ditmoe.data.crew.making import ALONE, Make
from ditmoe.data.storage.files import open_regular
from ditmoe.data.storage.parts import Progress
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import is_address
from ditmoe.sampling.metrics.features import FeatureNetwork
from ditmoe.sampling.metrics.real_statistics import CPU, RealStatistics, real_statistics
from ditmoe.sampling.metrics.reference import Images, Reference
from ditmoe.sampling.metrics.references.image_sets import IMAGES_KEY, NpzFile, NpzImages
from ditmoe.sampling.metrics.references.own import SUFFIX, OwnStatistics
from ditmoe.sampling.metrics.references.statistics import NPZ_KINDS, NpzStatistics, ReferenceStatistics
from ditmoe.sampling.settings.names import StatedNetwork

PICKLE_SUFFIXES: Final = (".pkl", ".pickle")
FILE_SUFFIXES: Final = (SUFFIX, ".npz", *PICKLE_SUFFIXES)


def open_reference_file(
    named: str | Path | None, option: str = "--reference", *, stated: StatedNetwork | None = None
) -> Reference | None:
    """Statistics or images in the file that is named; None: no file is named, but shards, or nothing.

    Args:
        stated: what statistics in an npz file are of, as the user says.

    Raises:
        UserError: the file is missing, damaged, a pickle, or of no known form; something is said of another file.
    """
    found = _opened(named, option, stated)
    if stated is not None and not isinstance(found, NpzStatistics):
        raise UserError(f"--reference-network {stated}: goes with an npz file of mu and sigma, given by {option}")
    return found


def _opened(named: str | Path | None, option: str, stated: StatedNetwork | None) -> Reference | None:
    if named is None:
        return None
    suffix = Path(str(named)).suffix.lower()
    if is_address(named) or str(named).startswith("pipe:"):
        if suffix in FILE_SUFFIXES:
            raise UserError(f"{option} {named}: a file elsewhere; fetch it first, and name the file here")
        return None
    path = Path(named)
    if path.is_dir() or not (path.exists() or suffix in FILE_SUFFIXES):
        return None
    try:
        with open_regular(path) as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error.strerror or error}") from error
    # Safetensors begin with the length of what begins with a brace: any eight bytes, those of a pickle or zip too.
    ours = start[8:] == b"{"
    if suffix in PICKLE_SUFFIXES or (start[:1] == b"\x80" and not ours):
        raise UserError(
            f"{path}: a pickle, which is a program that reading it would run: it is never opened. Convert it "
            "where you trust its publisher; of EDM2's statistics: python -c \"import numpy, pickle; "
            "numpy.savez('fid.npz', **pickle.load(open('FILE.pkl', 'rb'))['fid'])\""
        )
    if ours or not start.startswith(b"PK"):
        return OwnStatistics(path)
    npz = NpzFile(path)
    if any(name in npz.members for names in NPZ_KINDS.values() for name in names):
        return NpzStatistics(path, npz, stated)
    if IMAGES_KEY in npz.members:
        return NpzImages(path)
    raise UserError(f"{path}: has {npz.names}; expected mu and sigma, or images under {IMAGES_KEY}")


def reference_statistics(
    real: Reference,
    network: FeatureNetwork,
    cache: Path,
    *,
    make: Make = ALONE,
    device: torch.device = CPU,
    on_progress: Progress = lambda done: None,
) -> RealStatistics:
    """What is known of the real images in a network: from the file, or computed as `real_statistics`."""
    images = real.images if isinstance(real, ReferenceStatistics) else real
    computed = None
    if isinstance(images, Images):
        computed = real_statistics(images, network, cache, make=make, device=device, on_progress=on_progress)
    if not isinstance(real, ReferenceStatistics):
        assert computed is not None
        return computed
    stated = real.statistics(network)
    if computed is None:
        return replace(stated, folder=cache / f"file-{real.fingerprint}-{network.fingerprint}")
    return replace(
        stated,
        features_NF=computed.features_NF,
        splits=computed.splits,
        folder=computed.folder,
        numbers_N=computed.numbers_N,
    )
