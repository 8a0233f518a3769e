"""The noise-level classifiers of runs, by which chains choose their levels."""

from pathlib import Path
from threading import Lock

import torch

from ditmoe.model.errors import UserError
from ditmoe.sampling.chains.images import check_chains, find_posterior
from ditmoe.sampling.noise_level.classifier import FACTS_FILE, WEIGHTS_FILE, NoiseClassifier, classifier_folder
from ditmoe.sampling.service.errors import ServiceError
from ditmoe.sampling.service.listing import Listed
from ditmoe.sampling.settings.config import SamplerConfig

Stamp = tuple[tuple[int, int], ...]


class Posteriors:
    """Each is read when it is first asked for, and again when its files are others. For any number of threads."""

    def __init__(self, device: torch.device) -> None:
        """Read nothing yet."""
        self._device = device
        self._lock = Lock()
        self._read: dict[Path, tuple[Stamp, NoiseClassifier]] = {}

    def find(self, listed: Listed, config: SamplerConfig) -> NoiseClassifier | None:
        """What a sampler's chains ask; None: it walks in none.

        Raises:
            ServiceError: the run has no classifier, or it does not fit the chains.
        """
        if not config.chains:
            return None
        try:
            classifier = self._of(listed)
            check_chains(config.dlg, classifier, len(listed.class_names))
        except (UserError, OSError) as error:
            raise ServiceError(400, f"sampler: {config.sampler}: {error}", param="sampler") from error
        return classifier

    def _of(self, listed: Listed) -> NoiseClassifier:
        folder = classifier_folder(listed.info)
        files = [folder / name for name in (WEIGHTS_FILE, FACTS_FILE)]
        if not all(file.exists() for file in files):
            return find_posterior(listed.info, self._device)  # which says what is missing
        stats = [file.stat() for file in files]
        stamp = tuple((stat.st_mtime_ns, stat.st_ino) for stat in stats)
        with self._lock:
            stored = self._read.get(folder)
        if stored is None or stored[0] != stamp:
            stored = stamp, find_posterior(listed.info, self._device)
            with self._lock:
                self._read[folder] = stored
        return stored[1]
