"""Statistics of real images made once, as a file that stands for them in evaluations elsewhere."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ditmoe.data.crew.making import Make, by_ranks
from ditmoe.data.storage.parts import Progress
from ditmoe.data.stream.config import SourceConfig
from ditmoe.data.stream.remembered import index_file
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import read_info
from ditmoe.sampling.evaluation.measures import Measures
from ditmoe.sampling.jobs.workers import Workers
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER, ClassifierSettings
from ditmoe.sampling.metrics.networks.opening import check_network_options
from ditmoe.sampling.metrics.reference import OnError, ReferenceImages, open_reference, reference_of_run
from ditmoe.sampling.metrics.references.own import SUFFIX, write_reference
from ditmoe.sampling.network.load import find_checkpoint
from ditmoe.sampling.settings.names import FeatureName, ResizeName
from ditmoe.sampling.settings.networks import NetworkChoice


@dataclass(frozen=True)
class ReferenceJob:
    """Which images, in which features, and the file."""

    real: ReferenceImages
    out: Path
    cache: Path
    features: FeatureName = "classifier"
    features_path: Path | None = None
    resize: ResizeName | None = None
    more_networks: tuple[NetworkChoice, ...] = ()
    """None: a file is of one network."""
    neighbour_images: int | None = None
    """As of `Job`; the file has the features of all that are kept."""
    recogniser: bool = True
    """Give the file an independent classifier, for the share recognised."""
    feature_classifier: ClassifierSettings = FEATURE_CLASSIFIER
    recogniser_classifier: ClassifierSettings = RECOGNISER


def prepare_reference(
    shards: str,
    out: Path,
    cache: Path,
    *,
    index: Path | None = None,
    run: Path | None = None,
    on_error: OnError | None = None,
    features: FeatureName = "classifier",
    features_path: Path | None = None,
    resize: ResizeName | None = None,
    recogniser: bool = True,
) -> ReferenceJob:
    """Find everything that the file is made of, so that what is missing shows before a process is started.

    Args:
        shards: place of the images, as a source's `path`.
        run: a run folder or checkpoint, whose choice among its images is taken; None: all images.

    Raises:
        UserError: no images, no feature weights, or something has the file's name.
    """
    if out.suffix != SUFFIX:
        raise UserError(f"{out}: expected a name that ends in {SUFFIX}")
    if os.path.lexists(out):
        raise UserError(f"{out}: exists already; remove it or choose another name")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder; expected that of the new file")
    check_network_options(features, features_path, resize)
    if run is not None:
        real = reference_of_run(read_info(find_checkpoint(run)), shards, index, on_error, "SHARDS")
    else:
        config = SourceConfig(path=shards, index=index_file(index), on_error=on_error or "stop")
        real = open_reference(config, option="SHARDS")
    if real.index.channels not in (1, 3):
        raise UserError(f"{real.where}: channels is {real.index.channels}, expected 1 (grey) or 3 (RGB)")
    return ReferenceJob(
        real,
        out,
        cache,
        features=features,
        features_path=features_path,
        resize=resize,
        recogniser=recogniser,
    )


def make_reference(
    job: ReferenceJob,
    workers: Workers | None = None,
    *,
    make: Make | None = None,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int], Progress] = lambda title, total: lambda done: None,
) -> None:
    """Write the file; every process of the job calls this with the same arguments.

    Args:
        make: has parts made by a crew; None: these processes make them.

    What is computed of the images is kept in the cache: repeated, the command goes on where it was killed.

    Raises:
        UserError: an image is damaged, or something has the file's name.
    """
    workers = workers or Workers()
    show = progress if workers.first else lambda title, total: lambda done: None
    say: Callable[[str], None] = log if workers.first else lambda line: None
    measures = Measures()
    (network,), recogniser = measures.networks(job, workers, say, show)
    made = make or by_ranks(workers.rank, workers.ranks)
    (statistics,) = measures.real_statistics(job, [network], made, workers.device, show)
    shown = show("floors and file of the reference", 0)
    workers.on_first(lambda: write_reference(job.out, job.real, network, statistics, recogniser))
    shown(0)
