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

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.crew.making import Make, by_ranks
from ditmoe.data.crew.tasks import AnyParts
from ditmoe.data.shards.index import INDEX_FILE
from ditmoe.data.storage.arrays import Arrays
from ditmoe.data.storage.claims import Claims
from ditmoe.data.storage.files import read_object, replacing
from ditmoe.data.storage.parts import Progress
from ditmoe.data.stream.config import SourceConfig
from ditmoe.data.stream.remembered import index_file
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import is_address
from ditmoe.sampling.evaluation.job import choices_of_job, request_of, requests_of
from ditmoe.sampling.evaluation.measures import Measures, check_reference
from ditmoe.sampling.evaluation.results import figure_lines, images_left_out, scored_result, weak_features
from ditmoe.sampling.evaluation.stages import missing_of
from ditmoe.sampling.evaluation.stored import METRICS_FILE, METRICS_FORMAT, key_for, stored_results
from ditmoe.sampling.jobs.alone import alone_at
from ditmoe.sampling.jobs.workers import Workers
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER, Classifier, ClassifierSettings
from ditmoe.sampling.metrics.descriptions import ChunkDescriptions, described_alike, remove_alike
from ditmoe.sampling.metrics.features import AT_ONCE, FeatureNetwork, Features, describe, in_blocks
from ditmoe.sampling.metrics.networks.opening import check_network_options
from ditmoe.sampling.metrics.reference import Images, OnError, Reference, open_reference
from ditmoe.sampling.metrics.references.files import open_reference_file
from ditmoe.sampling.metrics.references.image_sets import FolderImages, NpzImages
from ditmoe.sampling.metrics.references.statistics import ReferenceStatistics
from ditmoe.sampling.settings.names import FeatureName, ResizeName, StatedNetwork
from ditmoe.sampling.settings.networks import NetworkChoice

SETTINGS_FILE: Final = "score.json"
DESCRIBED_TOGETHER: Final = 4096
"""Images of a part, at most: so many of their features are in memory at once."""


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

    @property
    def recogniser(self) -> bool:
        """They have no classes that somebody asked for."""
        return False

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
) -> ScoreJob:
    """Find everything, so that what is missing shows before a process is started.

    Args:
        images: an npz file with `arr_0`, a folder of pictures, or a place of shards.
        reference: a file of statistics, or a place of shards.
        out: folder of the figures; None: `scores/NAME-FINGERPRINT`.
        images_index: folder of the index of the images, where these are shards with an index elsewhere.
        index: the same of the reference.
        reference_network: what statistics in an npz file are said to be of.
        on_error: what to do about real images that cannot be used; None: stop.

    Raises:
        UserError: no such images or reference, or they do not fit together.
    """
    scored = _open_images(images, images_index)
    real = open_reference_file(reference, stated=reference_network)
    if real is None:
        config = SourceConfig(path=reference, index=index_file(index), on_error=on_error or "stop")
        real = open_reference(config)
    elif index is not None or on_error is not None:
        raise UserError(f"{'--index' if index else '--on-error'}: goes with shards, and {real.where} is a file")
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
    )
    check_reference(job)
    for choice in choices_of_job(job):
        network = check_network_options(choice.features, choice.path, choice.resize)
        if network is not None and isinstance(real, ReferenceStatistics):
            real.check_network(network)
    return job


def _open_images(named: str, index: Path | None) -> Images:
    """UserError when nothing of that name is there."""
    path = Path(named)
    if index is not None or is_address(named) or named.startswith("pipe:") or (path / INDEX_FILE).is_file():
        return open_reference(SourceConfig(path=named, index=index_file(index)), option="IMAGES")
    if path.is_dir():
        return FolderImages(path)
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

    Args:
        make: has parts made by a crew; None: these processes make them.

    Parts that are described stay until the figures are written: repeated, the command goes on where it was killed.

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
        networks = [measures.networks(job, workers, say).of_features[place] for place in places]
        described, parts = described_images(job, networks)
        made = make or by_ranks(workers.rank, workers.ranks)
        made("described", parts, on_progress=show("parts of the images", len(parts.names)))
        statistics = measures.real_statistics(job, networks, made, workers.device, show)
        workers.wait()

        def write() -> None:
            check()
            results = stored_results(job.folder)
            for place, network, known, descriptions in zip(places, networks, statistics, described, strict=True):
                result = scored_result(
                    requests[place],
                    job.real,
                    network,
                    known,
                    descriptions,
                    workers.device,
                    job.neighbour_images,
                )
                result["warnings"] += images_left_out(result)
                if isinstance(network, Classifier):
                    result["warnings"] += weak_features(network, len(job.real.form.class_names or ()))
                results[key_for(results, requests[place])] = result
            metrics = {"format": METRICS_FORMAT, "images": _facts(job.images), "results": results}
            with replacing(job.folder / METRICS_FILE) as file:
                file.write(json.dumps(metrics, indent=1, ensure_ascii=False).encode() + b"\n")
            remove_alike(described)

        workers.on_first(write)
    return read_object(job.folder / METRICS_FILE)


def described_images(
    job: ScoreJob, networks: Sequence[FeatureNetwork]
) -> tuple[list[ChunkDescriptions], AnyParts]:
    """What each network says of each part of the images; and the parts that make it, in one pass over these."""
    parts = max(job.images.parts, job.images.parts_of(DESCRIBED_TOGETHER))

    def described_by(network: FeatureNetwork) -> ChunkDescriptions:
        return ChunkDescriptions(
            job.folder / "features" / f"{job.images.fingerprint}-{network.fingerprint}-{parts}",
            [f"part-{part:05d}.npz" for part in range(parts)],
            lambda part: _describe_part(job, part, parts, [network])[0],
        )

    each = [described_by(network) for network in networks]
    alike = described_alike(
        each,
        lambda part, places: _describe_part(job, part, parts, [networks[place] for place in places]),
    )
    return each, alike


def stored_for(job: ScoreJob) -> dict[str, Any]:
    """The results that the folder has of these images, by their keys."""
    return stored_results(job.folder) if _is_of(job) else {}


def score_table(metrics: dict[str, Any], *keys: str) -> list[str]:
    """The figures of some results, by their keys, as lines for a terminal."""
    results = [metrics["results"][key] for key in keys]
    first = f"{results[0]['drawn_images']:,} images of {metrics['images']['place']}"
    return [first, *(line for result in results for line in figure_lines(result))]


def _facts(images: Images) -> dict[str, Any]:
    return images.facts(images.new_left_out())


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


def _describe_part(job: ScoreJob, part: int, parts: int, networks: Sequence[FeatureNetwork]) -> list[Arrays]:
    """What each network says of the images of a part, which are read once."""
    found: list[list[Features]] = [[] for _ in networks]
    blocks = ((batch.image_NHWC,) for batch in job.images.read(part, AT_ONCE, of=parts))
    for (image_NHWC,) in in_blocks(blocks, AT_ONCE):
        for described, network in zip(found, networks, strict=True):
            # A classifier takes the channels that it was trained on; Inception takes grey and RGB.
            channels = job.real.form.channels if isinstance(network, Classifier) else None
            described.append(describe(network, _of_channels(image_NHWC, channels, job.images)))
    return [
        {key: np.concatenate([some[key] for some in described]) for key in described[0]} if described else {}
        for described in found
    ]


def _of_channels(image_NHWC: NDArray[np.uint8], channels: int | None, images: Images) -> NDArray[np.uint8]:
    """Grey images as three equal channels, or the other way. UserError where colour would be lost."""
    if channels in (None, image_NHWC.shape[3]):
        return image_NHWC
    if channels == 3:
        return np.repeat(image_NHWC, 3, axis=3)
    if (image_NHWC != image_NHWC[..., :1]).any():
        raise UserError(f"{images.where}: has images in colour; expected grey ones, as the real images are")
    return np.ascontiguousarray(image_NHWC[..., :1])
