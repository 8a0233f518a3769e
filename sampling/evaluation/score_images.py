"""Scores of images that others drew: the figures of an evaluation, without its drawing.

OUT/score.json    which images these are
    features/     what the feature network says of each part of them, until the figures are written
    metrics.json  every figure with what it was computed from
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ditmoe.data.crew.making import Make, by_ranks
from ditmoe.data.shards.index import INDEX_FILE
from ditmoe.data.storage.claims import Claims
from ditmoe.data.storage.files import read_object, replacing
from ditmoe.data.storage.parts import Progress
from ditmoe.data.stream.config import SourceConfig
from ditmoe.data.stream.remembered import index_file
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted, is_address, normal
from ditmoe.sampling.evaluation.job import choices_of_job, request_of, requests_of
from ditmoe.sampling.evaluation.measures import Measures, check_reference, has_recogniser
from ditmoe.sampling.evaluation.results import (
    figure_lines,
    images_left_out,
    scored_result,
    weak_features,
)
from ditmoe.sampling.evaluation.scoring.describing import (
    DescribedImages,
    described_images,
    left_out_of,
    share_recognised,
)
from ditmoe.sampling.evaluation.stages import missing_of
from ditmoe.sampling.evaluation.stored import METRICS_FILE, METRICS_FORMAT, key_for, stored_results
from ditmoe.sampling.jobs.alone import alone_at
from ditmoe.sampling.jobs.workers import Workers
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER, Classifier, ClassifierSettings
from ditmoe.sampling.metrics.features import FeatureNetwork
from ditmoe.sampling.metrics.networks.opening import check_network_options
from ditmoe.sampling.metrics.reference import Images, OnError, Reference, ReferenceImages, open_reference
from ditmoe.sampling.metrics.references.files import open_reference_file
from ditmoe.sampling.metrics.references.image_sets import FolderImages, NpzImages
from ditmoe.sampling.metrics.references.statistics import ReferenceStatistics
from ditmoe.sampling.settings.names import FeatureName, ResizeName, StatedNetwork
from ditmoe.sampling.settings.networks import NetworkChoice

SETTINGS_FILE: Final = "score.json"


@dataclass(frozen=True)
class ScoreJob:
    """Which images are compared with what, in which features."""

    images: Images
    real: Reference
    folder: Path
    """Where the figures are written."""
    cache: Path
    features: FeatureName = "classifier"
    features_path: Path | None = None
    resize: ResizeName | None = None
    more_networks: tuple[NetworkChoice, ...] = ()
    """As of `Job`, as the next one is."""
    neighbour_images: int | None = None
    feature_classifier: ClassifierSettings = FEATURE_CLASSIFIER
    recogniser_classifier: ClassifierSettings = RECOGNISER

    recogniser: bool = False
    """Report the share that an independent classifier takes for the class of its label."""
    warnings: tuple[str, ...] = ()
    """To show with the figures, beside those of the scoring."""

    @property
    def request(self) -> dict[str, Any]:
        """What the figures depend on, besides the images."""
        return request_of(self)


def prepare_score(
    images: str,
    reference: str,
    cache: Path,
    out: Path | None = None,
    *,
    images_index: Path | None = None,
    index: Path | None = None,
    on_error: OnError | None = None,
    features: FeatureName = "classifier",
    features_path: Path | None = None,
    resize: ResizeName | None = None,
    more_networks: tuple[NetworkChoice, ...] = (),
    reference_network: StatedNetwork | None = None,
    neighbour_images: int | None = None,
    recogniser: bool = True,
) -> ScoreJob:
    """Find everything, so that what is missing shows before a process is started.

    Args:
        images: an npz file with `arr_0`, a folder of pictures, or a place of shards.
        reference: a file of statistics, or a place of shards.
        out: folder of the figures; None: `scores/NAME-FINGERPRINT`.
        images_index: folder of the index of the images, where these are shards with an index elsewhere.
        index: the same of the reference.
        reference_network: what statistics in an npz file are said to be of.
        on_error: what to do about images that cannot be used, scored or real; None: stop.
        recogniser: report the share recognised, where the images have labels and a classifier can be had.

    Raises:
        UserError: no such images or reference, or they do not fit together.
    """
    scored = _open_images(images, images_index, on_error or "stop")
    real = open_reference_file(reference, stated=reference_network)
    if real is None:
        config = SourceConfig(path=reference, index=index_file(index), on_error=on_error or "stop")
        real = open_reference(config)
    elif index is not None:
        raise UserError(f"--index: goes with shards, and {real.where} is a file")
    sizes = scored.form.image_size, real.form.image_size
    if None not in sizes and sizes[0] != sizes[1]:
        raise UserError(
            f"{scored.where}: images of {sizes[0]}×{sizes[0]} pixels; "
            f"expected {sizes[1]}×{sizes[1]} as {real.where}"
        )
    if scored.form.channels not in (None, 1, 3):
        raise UserError(f"{scored.where}: channels is {scored.form.channels}, expected 1 (grey) or 3 (RGB)")
    name = re.sub(r"[^\w.-]", "-", Path(images).resolve().stem).lstrip(".-") or "images"
    folder = out or Path("scores") / f"{name[:80]}-{scored.fingerprint[:8]}"
    judged, told = _labels(scored, real) if recogniser else (False, ())
    job = ScoreJob(
        scored,
        real,
        folder,
        cache,
        features=features,
        features_path=features_path,
        resize=resize,
        more_networks=more_networks,
        neighbour_images=neighbour_images,
        recogniser=judged,
        warnings=told,
    )
    check_reference(job)
    for choice in choices_of_job(job):
        network = check_network_options(choice.features, choice.path, choice.resize)
        if network is not None and isinstance(real, ReferenceStatistics):
            real.check_network(network)
    return job


def _labels(images: Images, real: Reference) -> tuple[bool, tuple[str, ...]]:
    """Whether a classifier of the real images can tell how many images are what their labels say; and why not."""
    names = real.form.class_names
    if not has_recogniser(real) or names is None:
        return False, ()
    if isinstance(images, ReferenceImages):
        if tuple(map(normal, images.index.class_names)) == tuple(map(normal, names)):
            return True, ()
        problem = "its classes have other names, or another order,"
    elif images.labels is None:
        return False, ()
    else:
        low, high = int(images.labels.min()), int(images.labels.max())
        if low >= 0 and high < len(names):
            return True, ()
        problem = f"its labels are {low} to {high}, and there are {len(names)} classes"
    return False, (f"{images.where}: {problem} in {real.where}: the share recognised is left out",)


def _open_images(named: str, index: Path | None, on_error: OnError) -> Images:
    """UserError when nothing of that name is there."""
    path = Path(named)
    if index is not None or is_address(named) or named.startswith("pipe:") or (path / INDEX_FILE).is_file():
        return open_reference(
            SourceConfig(path=named, index=index_file(index), on_error=on_error), option="IMAGES"
        )
    if path.is_dir():
        return FolderImages(path, on_error)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected an npz file, a folder of pictures, or shards")
    return NpzImages(path)


def stored_score(job: ScoreJob) -> dict[str, Any] | None:
    """The metrics, when these images were scored so before. UserError when `metrics.json` is damaged."""
    path = job.folder / METRICS_FILE
    if not path.exists() or not _is_of(job):
        return None
    return None if missing_of(job, stored_results(job.folder)) else read_object(path)


def score_images(
    job: ScoreJob,
    workers: Workers | None = None,
    *,
    make: Make | None = None,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int], Progress] = lambda title, total: lambda done: None,
) -> dict[str, Any]:
    """Score the images; every process of the job calls this with the same arguments.

    Parts that are described stay until the figures are written: repeated, the command goes on where it was killed.

    Args:
        make: has parts made by a crew; None: these processes make them.

    Returns:
        The metrics, as in `metrics.json`.

    Raises:
        UserError: an image cannot be used; the folder is of other images, or another process is at it.
    """
    workers = workers or Workers()
    say: Callable[[str], None] = log if workers.first else lambda line: None
    show = progress if workers.first else lambda title, total: lambda done: None
    busy = f"{job.folder}: another process is at these scores"
    with alone_at(Claims(job.folder), "score", workers, busy, lambda: _begin(job)) as check:
        measures = Measures()
        requests, places = requests_of(job), missing_of(job, stored_for(job))
        of_features, recogniser = measures.networks(job, workers, say, show)
        networks = [of_features[place] for place in places]
        described = images_described(job, networks, recogniser)
        made = make or by_ranks(workers.rank, workers.ranks)
        made("described", described.parts, on_progress=show("parts of the images", len(described.parts.names)))
        statistics = measures.real_statistics(job, networks, made, workers.device, show)
        workers.wait()

        def write() -> None:
            check()
            shown = show("figures", 0)
            left_out = left_out_of(job.images, described.lost)
            shared = [*job.warnings]
            if left_out.count:
                shared.append(
                    f"{left_out.count:,} of {counted(job.images.count, 'image')} cannot be used and take no "
                    f"part, such as "
                    f"{left_out.lines[0]}"
                )
            share = {} if recogniser is None else {"recogniser": share_recognised(described, recogniser)}
            results = stored_results(job.folder)
            for place, network, known, descriptions in zip(
                places, networks, statistics, described.of_features, strict=True
            ):
                result = scored_result(
                    requests[place],
                    job.real,
                    network,
                    known,
                    descriptions,
                    workers.device,
                    job.neighbour_images,
                )
                result["warnings"] += images_left_out(result) + shared
                if isinstance(network, Classifier):
                    result["warnings"] += weak_features(network, len(job.real.form.class_names or ()))
                results[key_for(results, requests[place])] = result | share
            metrics = {"format": METRICS_FORMAT, "images": job.images.facts(left_out), "results": results}
            with replacing(job.folder / METRICS_FILE) as file:
                file.write(json.dumps(metrics, indent=1, ensure_ascii=False).encode() + b"\n")
            described.remove()
            shown(0)

        workers.on_first(write)
    return read_object(job.folder / METRICS_FILE)


def images_described(
    job: ScoreJob, networks: Sequence[FeatureNetwork], recogniser: Classifier | None
) -> DescribedImages:
    """What networks say of each part of the images."""
    return described_images(job.images, job.folder / "features", job.real.form.channels, networks, recogniser)


def stored_for(job: ScoreJob) -> dict[str, Any]:
    """The results that the folder has of these images, by their keys."""
    return stored_results(job.folder) if _is_of(job) else {}


def score_table(metrics: dict[str, Any], *keys: str) -> list[str]:
    """The figures of some results, by their keys, as lines for a terminal."""
    results = [metrics["results"][key] for key in keys]
    first = f"{results[0]['drawn_images']:,} images of {metrics['images']['place']}"
    return [first, *(line for result in results for line in figure_lines(result))]


def _is_of(job: ScoreJob) -> bool:
    path = job.folder / SETTINGS_FILE
    return path.exists() and read_object(path).get("images") == job.images.fingerprint


def _begin(job: ScoreJob) -> None:
    """Refuse a folder of other images; write down which these are."""
    path = job.folder / SETTINGS_FILE
    if path.exists() and not _is_of(job):
        raise UserError(f"{job.folder}: holds scores of other images; choose another --out, or remove it")
    settings = {"images": job.images.fingerprint, "place": job.images.where}
    with replacing(path) as file:
        file.write(json.dumps(settings, indent=1, ensure_ascii=False).encode() + b"\n")
