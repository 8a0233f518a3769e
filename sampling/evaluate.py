"""The evaluation job: N images of one network, drawn in resumable chunks by any number of processes, and scored.

An evaluation is (weights, sampler settings, N images, seed, label sampling) and its folder is named by them:

    evaluations/<id>/evaluation.json   these settings, and the chunk size
                     chunks/00003.npz  images and labels, each written once
                     samples.npz       arr_0 uint8 [N, H, W, 3], arr_1 labels [N]
                     metrics.json      every figure with its settings
                     gallery/          index.html and a sheet of each class

`Job` is one use of it; `run_job` is called by each of the processes. All randomness is by (seed, image number).
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.files import make_folder, replacing
from ditmoe.data.sharing import Progress, try_lock
from ditmoe.model.errors import UserError
from ditmoe.model.randomness import generator
from ditmoe.sampling.chunks import ChunkStore, DrawChunk
from ditmoe.sampling.classifier import FEATURE_CLASSIFIER, RECOGNISER, ClassifierSettings
from ditmoe.sampling.config import SamplerConfig
from ditmoe.sampling.measures import Measures
from ditmoe.sampling.real import RealImages
from ditmoe.sampling.results import write_results
from ditmoe.sampling.samplers import planned_nfe
from ditmoe.sampling.scores import ChunkDescriptions, describe_with
from ditmoe.sampling.workers import Workers

LARGEST_DEFAULT_CHUNK: Final = 256
METRICS_FILE: Final = "metrics.json"
SAMPLES_FILE: Final = "samples.npz"
_LOCK_FILE: Final = "lock"

LabelSampling = Literal["random", "balanced"]
FeatureName = Literal["classifier", "inception"]


@dataclass(frozen=True)
class Evaluation:
    """What the images of an evaluation depend on."""

    weights: str
    """Fingerprint of the weights."""
    which: Literal["ema", "weights"]
    step: int
    """Training step of the weights."""
    sampler: SamplerConfig
    """Resolved: its sampler and schedule are named."""
    count: int
    """Images N."""
    labels: LabelSampling
    """`random`: drawn for each image by (seed, number); `balanced`: the classes in turn."""
    num_classes: int
    vae: str | None = None
    """Checksum of the VAE that decodes them; None: they are drawn in pixels."""
    noise_classifier: str | None = None
    """Fingerprint of the noise-level classifier that chains ask; None: they are no chains."""

    def __post_init__(self) -> None:
        assert self.sampler.sampler is not None and self.sampler.schedule is not None and self.count > 0
        assert self.sampler.chains == (self.noise_classifier is not None)

    @property
    def fingerprint(self) -> str:
        """Of everything here (first 16 hex digits of SHA-256)."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def id(self) -> str:
        """Name of the folder: step, sampler, steps or tolerance, guidance, labels, N, seed, fingerprint."""
        sampler = self.sampler
        length = f"{sampler.tolerance:g}" if sampler.integrator == "rk45" else f"{sampler.steps}"
        name = sampler.sampler.replace(":", "-") if sampler.sampler else ""
        return (
            f"step-{self.step:08d}-{self.which}-{name}-{length}-cfg-{sampler.cfg_scale:g}"
            f"-{self.labels}-{self.count}-seed-{sampler.seed}-{self.fingerprint[:8]}"
        )

    def plain(self) -> dict[str, Any]:
        """These settings as plain data."""
        return {
            "weights": self.weights,
            "which": self.which,
            "step": self.step,
            "sampler": self.sampler.plain(),
            "count": self.count,
            "labels": self.labels,
            "num_classes": self.num_classes,
            **({} if self.vae is None else {"vae": self.vae}),
            **({} if self.noise_classifier is None else {"noise_classifier": self.noise_classifier}),
        }

    def labels_of(self, numbers: list[int]) -> NDArray[np.int64]:
        """The classes of the images with these numbers, int64 [len(numbers)]; samples of a chain share one."""
        units = [number // self.sampler.images_per_unit for number in numbers]
        if self.labels == "balanced":
            return np.array([unit % self.num_classes for unit in units], dtype=np.int64)
        seed = self.sampler.seed
        drawn = {
            unit: generator(seed, "evaluate/label", unit).integers(self.num_classes)
            for unit in dict.fromkeys(units)
        }
        return np.array([drawn[unit] for unit in units], dtype=np.int64)


@dataclass(frozen=True)
class Job:
    """One use of an evaluation: where it lies, and what it is scored with."""

    evaluation: Evaluation
    folder: Path
    """`RUN/evaluations/<id>`."""
    real: RealImages
    cache: Path
    """Folder of trained classifiers and statistics of real images, shared by runs."""
    features: FeatureName = "classifier"
    features_path: Path | None = None
    """The Inception file."""
    recogniser: bool = True
    """Report the share of images that an independent classifier recognises."""
    chunk: int | None = None
    """Images of a chunk; None: as the evaluation was started, or `default_chunk`."""
    batch: int = 64
    """Images through a network at once."""
    vae: Path | None = None
    """Where the VAE lies; None: they are drawn in pixels."""
    checkpoint: Path | None = None
    """Where the weights lie; None when they are not drawn from a checkpoint."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More to record beside the figures: the run, its data, versions."""
    warnings: tuple[str, ...] = ()
    """To show with the figures, beside those of the scoring."""
    feature_classifier: ClassifierSettings = FEATURE_CLASSIFIER
    recogniser_classifier: ClassifierSettings = RECOGNISER

    def __post_init__(self) -> None:
        samples = self.evaluation.sampler.images_per_unit
        if self.chunk is not None and self.chunk % samples:
            raise UserError(
                f"--chunk {self.chunk}: chains have {samples} samples each, which are drawn as one; expected a "
                f"multiple of {samples}"
            )
        if self.real.index.num_classes != self.evaluation.num_classes:
            raise UserError(
                f"{self.real.folder}: has {self.real.index.num_classes} classes; "
                f"expected the network's {self.evaluation.num_classes}"
            )

    @property
    def request(self) -> dict[str, Any]:
        """What the scores depend on, besides the images: a stored result of an equal request is the result."""
        file = None
        if self.features == "inception" and self.features_path is not None and self.features_path.is_file():
            with self.features_path.open("rb") as stored:
                file = hashlib.file_digest(stored, "sha256").hexdigest()[:16]
        classifier = self.feature_classifier if self.features == "classifier" else None
        return {
            "real": self.real.fingerprint,
            "features": self.features,
            "features_file": file,
            "classifier": vars(classifier) if classifier is not None else None,
            "recogniser": vars(self.recogniser_classifier) if self.recogniser else None,
        }


def stored_result(job: Job) -> dict[str, Any] | None:
    """The job's metrics, when it was finished before.

    Raises:
        UserError: `metrics.json` is damaged.
    """
    path = job.folder / METRICS_FILE
    if not path.exists() or not (job.folder / SAMPLES_FILE).exists():
        return None
    metrics = _read_json(path)
    result = metrics.get("results", {}).get(job.features)
    return metrics if result is not None and result.get("request") == job.request else None


def run_job(
    job: Job,
    draw: DrawChunk,
    workers: Workers | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int], Progress] = lambda title, total: lambda done: None,
    measures: Measures | None = None,
) -> dict[str, Any]:
    """Do what is missing of a job; every process of the job calls this with the same arguments.

    Args:
        draw: draws the images of a chunk from their numbers and labels.
        workers: this process among those of the job; alone when left out.
        log: takes lines to show (first process).
        progress: (title, total) → a function that is told the number done (first process).
        measures: kept from one job to the next that is scored alike; anew when left out.

    Returns:
        The metrics, as in `metrics.json`.

    Raises:
        UserError: another job holds the folder; a file is damaged or of other settings; the disk is full.
    """
    workers = workers or Workers()
    say: Callable[[str], None] = log if workers.first else lambda line: None
    show = progress if workers.first else lambda title, total: lambda done: None
    make_folder(job.folder)
    lock = try_lock(job.folder / _LOCK_FILE)
    held = lock.__enter__() if workers.first else True
    try:
        workers.on_first(lambda: _begin(job, held, workers.ranks))
        return _run(job, draw, workers, say, show, measures or Measures())
    finally:
        if workers.first:
            lock.__exit__(None, None, None)


def default_chunk(count: int, batch: int, ranks: int, images_per_unit: int = 1) -> int:
    """Images of a chunk: whole batches, up to about 256, at least four chunks for each process if possible.

    Of chains, which have many images each, one batch, or less where there is too little for all processes.
    """
    if images_per_unit > 1:
        chains = -(-count // images_per_unit)
        return images_per_unit * min(batch, -(-chains // ranks))
    batches = max(1, min(LARGEST_DEFAULT_CHUNK // batch, count // (4 * ranks * batch)))
    return batches * batch


def _begin(job: Job, held: bool, ranks: int) -> None:
    """Refuse a folder that another job holds, or that was started in other chunks; write down the settings."""
    if not held:
        raise UserError(f"{job.folder}: another process is at this evaluation; wait for it, or stop it")
    path = job.folder / "evaluation.json"
    stored = _read_json(path) if path.exists() else None
    if stored is None:
        wanted = {
            **job.evaluation.plain(),
            "chunk": job.chunk
            or default_chunk(job.evaluation.count, job.batch, ranks, job.evaluation.sampler.images_per_unit),
        }
        with replacing(path) as file:
            file.write(json.dumps(wanted, indent=1).encode() + b"\n")
        return
    if {key: value for key, value in stored.items() if key != "chunk"} != job.evaluation.plain():
        raise UserError(f"{path}: was written with other settings; expected those of {job.evaluation.id}")
    if job.chunk not in (None, stored["chunk"]):
        raise UserError(
            f"--chunk {job.chunk}: this evaluation was started with chunks of {stored['chunk']} images; "
            f"leave --chunk out, or delete {job.folder}"
        )


def _run(
    job: Job,
    draw: DrawChunk,
    workers: Workers,
    log: Callable[[str], None],
    progress: Callable[[str, int], Progress],
    measures: Measures,
) -> dict[str, Any]:
    evaluation = job.evaluation
    size = int(_read_json(job.folder / "evaluation.json")["chunk"])
    store = ChunkStore(job.folder / "chunks", evaluation.count, size, evaluation.fingerprint)

    # The first process trains or loads the networks before it draws: a missing file shows at once, and the others
    # draw meanwhile.
    if workers.first:
        measures.networks(job, workers, log)
    started, before = time.monotonic(), len(store.pending())
    store.draw_pending(
        draw,
        evaluation.labels_of,
        rank=workers.rank,
        ranks=workers.ranks,
        on_progress=progress("chunks drawn", store.chunks),
    )
    seconds = time.monotonic() - started
    # `chains` has the states of chains in chunks that are not there yet.
    workers.on_first(lambda: shutil.rmtree(job.folder / "chains", ignore_errors=True))
    if before:
        log(f"{before} of {store.chunks} chunks of {size} images were drawn in {seconds:.1f} s")

    network, recogniser = measures.networks(job, workers, log)
    descriptions = ChunkDescriptions(store, network.fingerprint)
    descriptions.make(
        describe_with(network, job.batch),
        rank=workers.rank,
        ranks=workers.ranks,
        on_progress=progress("chunks described", store.chunks),
    )
    judged = None
    if recogniser is not None:
        judge = recogniser
        judged = ChunkDescriptions(store, recogniser.fingerprint)
        judged.make(
            lambda image_NHWC: {"predicted": judge.predict(image_NHWC)}, rank=workers.rank, ranks=workers.ranks
        )
    statistics = measures.real_statistics(job, network, workers, progress)
    # The results remove the descriptions: a process that still looked for them would make them all again.
    workers.wait()
    nfe = store.nfe()
    if nfe is None:  # whoever drew did not count
        nfe = planned_nfe(evaluation.sampler)
    workers.on_first(
        lambda: write_results(
            job.folder,
            {
                "id": evaluation.id,
                **evaluation.plain(),
                "nfe": nfe,
                # Guidance takes two for each evaluation.
                "network_passes": None if nfe is None else nfe * (1 if evaluation.sampler.cfg_scale == 1 else 2),
                "vae": evaluation.vae,
                "batch": job.batch,
                "chunk": size,
                "processes": workers.ranks,
                "checkpoint": str(job.checkpoint) if job.checkpoint is not None else None,
                **job.facts,
            },
            job.request,
            store,
            job.real,
            network,
            statistics,
            descriptions,
            recogniser,
            judged,
            job.warnings,
            evaluation.sampler.images_per_unit if evaluation.sampler.chains else None,
        )
    )
    return _read_json(job.folder / METRICS_FILE)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: could not be read ({error}); delete the file, it is made anew") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, expected an object; delete the file")
    return values
