"""An evaluation of a run folder: from the options of the command to the job, and through it."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe.data.crew.making import Make
from ditmoe.data.encoding.vae import VaeFacts
from ditmoe.data.storage.digests import cache_folder
from ditmoe.data.storage.progress import show_progress
from ditmoe.model.compiling.tools import check_tools
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import normal
from ditmoe.parallel.checkpoint.folder import CheckpointInfo, read_info
from ditmoe.parallel.expert_group import ExpertGroup, NetworkOfGroup
from ditmoe.sampling.chains.images import StateFile, classifier_fingerprint, find_posterior
from ditmoe.sampling.drawing.generate import Generated, generate
from ditmoe.sampling.drawing.together import generate_together
from ditmoe.sampling.evaluation.job import Evaluation, Job, LabelSampling, facts_of
from ditmoe.sampling.evaluation.keeping import Keep, drop_images_of_finished
from ditmoe.sampling.evaluation.measures import Measures, check_reference
from ditmoe.sampling.evaluation.run_job import run_job, stored_result
from ditmoe.sampling.integrators.few_steps import noise_warnings
from ditmoe.sampling.jobs.chunks import DrawChunk, DrawnImages
from ditmoe.sampling.jobs.workers import join_workers
from ditmoe.sampling.metrics.networks.opening import check_network_options
from ditmoe.sampling.metrics.reference import OnError, Reference, reference_of_run
from ditmoe.sampling.metrics.references.files import open_reference_file
from ditmoe.sampling.metrics.references.statistics import ReferenceStatistics
from ditmoe.sampling.network.denoiser import check_guidance
from ditmoe.sampling.network.load import (
    LoadedModel,
    Precision,
    Weights,
    complete_config,
    find_checkpoint,
    find_decoder,
    home_of,
    load_model,
    shared_folder,
)
from ditmoe.sampling.network.of_group import check_dealt
from ditmoe.sampling.noise_level.classifier import NoiseClassifier
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import FeatureName, ResizeName, StatedNetwork
from ditmoe.sampling.settings.networks import NetworkChoice


@dataclass(frozen=True)
class EvaluationOptions:
    """What the user chose."""

    source: Path
    """A run folder, or one of its checkpoints."""
    sampler: SamplerConfig
    count: int = 50_000
    labels: LabelSampling = "random"
    weights: Weights = "ema"
    step: int | None = None
    data: str | Path | None = None
    """Where the real images lie, as a source's `path`, or a file of statistics; None: where the run's lay."""
    index: Path | None = None
    """Folder of their index; None: it is with them."""
    on_error: OnError | None = None
    """What to do about images that cannot be used; None: what the run did."""
    features: FeatureName = "classifier"
    features_path: Path | None = None
    resize: ResizeName | None = None
    more_networks: tuple[NetworkChoice, ...] = ()
    """Further feature networks, in the same pass over the images."""
    reference_network: StatedNetwork | None = None
    """What statistics in an npz file are said to be of."""
    neighbour_images: int | None = None
    recogniser: bool = True
    batch: int = 64
    chunk: int | None = None
    keep: Keep = "chunks"
    """What is left of the images when all is scored."""
    cache: Path | None = None
    vae: Path | None = None
    """Where the VAE of a network of latents lies now; None: where it lay when its data was encoded."""
    expert_parallel: int = 1
    """Ranks that share out the network's experts, and draw together."""
    shared_weights: Path | None = None
    """Folder of the weights that the processes of a machine share; None: the run's, where there are several."""


def default_cache() -> Path:
    """Where classifiers and statistics of real images are kept: `$XDG_CACHE_HOME/ditmoe`, or `~/.cache/ditmoe`."""
    return cache_folder()


def prepare_job(options: EvaluationOptions) -> Job:
    """Find everything that the job needs, so that what is missing shows before a process is started.

    Raises:
        UserError: no checkpoint, no real images or no feature weights, or they do not fit together.
    """
    return prepare_jobs(options, [options.sampler])[0]


def prepare_jobs(options: EvaluationOptions, samplers: Sequence[SamplerConfig]) -> list[Job]:
    """A job for each of some samplers, in place of the one in the options; they share all else.

    Raises:
        UserError: as `prepare_job`.
    """
    path = find_checkpoint(options.source, options.step)
    info = read_info(path)
    if options.weights not in info.parts:
        raise UserError(f"{path}: has no {options.weights}; it has {', '.join(info.parts)}")
    decoder = find_decoder(info, options.vae)
    real = _reference(info, options)
    num_classes = _check_fit(info, real, decoder)
    for choice in (
        NetworkChoice(options.features, options.features_path, options.resize),
        *options.more_networks,
    ):
        network = check_network_options(choice.features, choice.path, choice.resize)
        if network is not None and isinstance(real, ReferenceStatistics):
            real.check_features(choice.features)
            real.check_network(network)
    resolved = [sampler.resolved(info.objective) for sampler in samplers]
    for sampler in resolved:
        check_guidance(complete_config(info.model, info), sampler)
    check_dealt(info.model, options.expert_parallel)
    if any(sampler.compile for sampler in resolved):
        check_tools("cuda" if torch.cuda.is_available() else "cpu", "--compile")
    posterior = classifier_fingerprint(info, resolved)
    evaluations = [
        Evaluation(
            weights=f"{info.fingerprint}-{options.weights}",
            which=options.weights,
            step=info.step,
            sampler=sampler,
            count=options.count,
            labels=options.labels,
            num_classes=num_classes,
            vae=None if decoder is None else decoder.sha256,
            noise_classifier=posterior if sampler.chains else None,
        )
        for sampler in resolved
    ]
    learned = tuple(info.dataset.get("class_names") or ())
    jobs = [
        Job(
            evaluation=evaluation,
            folder=home_of(path) / "evaluations" / evaluation.id,
            real=real,
            cache=options.cache or default_cache(),
            features=options.features,
            features_path=options.features_path,
            resize=options.resize,
            more_networks=options.more_networks,
            neighbour_images=options.neighbour_images,
            recogniser=options.recogniser,
            chunk=options.chunk,
            batch=options.batch,
            keep=options.keep,
            vae=None if decoder is None else decoder.path,
            checkpoint=path,
            expert_parallel=options.expert_parallel,
            shared_weights=options.shared_weights,
            facts=facts_of(info, real, evaluation),
            learned_names=learned if len(learned) == num_classes else (),
            warnings=(*_other_classes(info, real), *noise_warnings(evaluation.sampler)),
        )
        for evaluation in evaluations
    ]
    told = check_reference(jobs[0])
    return [replace(job, warnings=(*told, *job.warnings)) for job in jobs]


def evaluate_run(job: Job, make: Make | None = None, processes: int | None = None) -> dict[str, Any]:
    """Do the job as one of the processes that were started for it, alone, or as the leader of a crew.

    Args:
        make: has parts made by a crew; None: these processes make them.
        processes: of the crew, as far as they are known.

    Returns:
        The metrics, as in `metrics.json`.
    """
    return evaluate_jobs([job], make_of=None if make is None else lambda job: make, processes=processes)[0]


OnFinished = Callable[[int, dict[str, Any], float | None], None]
"""(place of the job, its metrics, seconds that it took; None where a part or all of it was there before)."""


def evaluate_jobs(
    jobs: Sequence[Job],
    on_finished: OnFinished = lambda place, metrics, seconds: None,
    *,
    make_of: Callable[[Job], Make] | None = None,
    processes: int | None = None,
) -> list[dict[str, Any]]:
    """Do jobs of one checkpoint that are scored alike, one after another, by the same processes.

    What is stored is not done again. The network, and what it takes to score, are loaded once.

    Args:
        on_finished: called by the first process after each job, while the others wait; UserError ends them all.
        make_of: has a job's parts made by a crew; None: these processes make them.
        processes: of the crew, as far as they are known.

    Returns:
        The metrics of each.
    """
    workers = join_workers(str(jobs[0].folder), jobs[0].expert_parallel)
    device = torch.cuda.get_device_name(workers.device) if workers.device.type == "cuda" else "cpu"
    model, measures, found = (
        ModelOfJob(workers.device, several=workers.ranks > 1, group=workers.group),
        Measures(),
        [],
    )
    try:
        if len(jobs) > 1 and workers.first and any(stored_result(job) is None for job in jobs):
            measures.networks(jobs[0], workers, _say, show_progress)  # so that the first job's time is its own
        for place, job in enumerate(jobs):
            job.facts["device"] = device
            metrics, seconds = stored_result(job), None
            if not workers.everywhere(metrics is not None):
                fresh, started = not (job.folder / "chunks").exists(), time.monotonic()
                metrics = run_job(
                    job,
                    drawer(job, model),
                    workers,
                    log=_say,
                    progress=show_progress,
                    measures=measures,
                    make=None if make_of is None else make_of(job),
                    processes=processes,
                )
                seconds = time.monotonic() - started if fresh else None
            assert metrics is not None
            workers.on_first(partial(drop_images_of_finished, job.folder, job.keep))
            workers.on_first(partial(on_finished, place, metrics, seconds))
            found.append(metrics)
        return found
    finally:
        workers.leave()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class ModelOfJob:
    """The network and the noise-level classifier of a checkpoint, each loaded when it is first asked for."""

    def __init__(self, device: torch.device, *, several: bool = False, group: ExpertGroup | None = None) -> None:
        """Load nothing yet.

        Args:
            several: other processes of the machine may draw with the same network, and share its weights.
            group: the ranks that the experts are dealt to; None: this process has all.
        """
        self._device = device
        self._group = group
        self._several = several
        self._model: LoadedModel | None = None
        self._precision: Precision = "fp32"
        self._posterior: NoiseClassifier | None = None

    def network(self, job: Job) -> LoadedModel:
        """What the job's images are drawn with."""
        evaluation, precision = job.evaluation, job.evaluation.sampler.precision
        if self._model is None or self._precision != precision:
            assert job.checkpoint is not None
            self._model = None  # the weights of one precision are held at a time
            shared = job.shared_weights
            if shared is None and self._several:
                shared = shared_folder(job.checkpoint)
            self._model = load_model(
                job.checkpoint,
                which=evaluation.which,
                device=self._device,
                precision=precision,
                vae=job.vae,
                shared=shared,
                group=self._group,
            )
            self._precision = precision
        assert self._model.fingerprint == evaluation.weights, (self._model.fingerprint, evaluation.weights)
        return self._model

    def posterior(self, job: Job) -> NoiseClassifier | None:
        """What the job's chains choose their levels with; None: it has none."""
        if not job.evaluation.sampler.chains:
            return None
        if self._posterior is None:
            info = self.network(job).info
            assert info is not None
            self._posterior = find_posterior(info, self._device)
        return self._posterior


def drawer(job: Job, model: ModelOfJob) -> DrawChunk:
    """Draws chunks with the run's network, which is loaded with the first; ranks of a group call it at once."""
    evaluation = job.evaluation

    def draw(numbers: list[int], label_N: NDArray[np.int64]) -> DrawnImages:
        state_file = StateFile(job.folder / "chains" / f"{numbers[0]:08d}.safetensors", evaluation.fingerprint)
        network = model.network(job)
        images = (generate_together if isinstance(network.network, NetworkOfGroup) else generate)(
            network,
            torch.from_numpy(label_N),
            numbers,
            evaluation.sampler,
            job.batch,
            posterior=model.posterior(job),
            state_file=state_file,
        )
        return drawn_images(images)

    return draw


def drawn_images(images: Generated) -> DrawnImages:
    """Images as a chunk keeps them."""
    image_NHWC, nfe_N = images.image_NHWC.numpy(), images.nfe_N.numpy()
    finite_N = None if images.finite_N is None else images.finite_N.numpy()
    if images.chains is None:
        return DrawnImages(image_NHWC, nfe_N, finite_N=finite_N)
    return DrawnImages(image_NHWC, nfe_N, images.chains.sigma_N.numpy(), images.chains.trace_NT.numpy(), finite_N)


def _reference(info: CheckpointInfo, options: EvaluationOptions) -> Reference:
    """What drawn images are compared with. UserError as `prepare_job`."""
    file = open_reference_file(options.data, stated=options.reference_network)
    if file is None:
        return reference_of_run(info, options.data, options.index, options.on_error)
    for name, value in (("--index", options.index), ("--on-error", options.on_error)):
        if value is not None:
            raise UserError(f"{name} {value}: goes with shards, and {file.where} is a file")
    return file


def _check_fit(info: CheckpointInfo, real: Reference, decoder: VaeFacts | None) -> int:
    """The number of classes; the images that the network draws must be of the form of the real ones."""
    expected: dict[str, Any] = {
        name: info.config["model"].get(name) or info.dataset.get(name)
        for name in ("image_size", "channels", "num_classes")
    }
    if decoder is not None:
        expected |= {"image_size": expected["image_size"] * decoder.reduction, "channels": decoder.pixel_channels}
    form = real.form
    found = {
        "image_size": form.image_size,
        "channels": form.channels,
        "num_classes": None if form.class_names is None else len(form.class_names),
    }
    problems = [
        f"{name} is {found[name]}, expected {value}"
        for name, value in expected.items()
        if found[name] not in (None, value)
    ]
    channels = form.channels or expected["channels"]
    if channels not in (1, 3):
        problems.append(f"channels is {channels}, and only 1 (grey) or 3 (RGB) make pictures to score")
    if problems:
        latents = decoder is None and expected["channels"] not in (1, 3)
        raise UserError(
            f"{real.where}: not what the network of {info.path} draws: {'; '.join(problems)}"
            + ("; if it draws latents, give their VAE with --vae" if latents else "")
        )
    return int(expected["num_classes"])


def _other_classes(info: CheckpointInfo, real: Reference) -> tuple[str, ...]:
    """A warning where the classes of the real images have other names than those that the network learned."""
    learned = info.dataset.get("class_names") or []
    for label, (expected, found) in enumerate(zip(learned, real.form.class_names or (), strict=False)):
        if normal(expected) != normal(found):
            return (
                f"class {label} is {found} in {real.where} and {expected} in the network's training: "
                "what is recognised, and figures by class, mean something only if the classes are the same",
            )
    return ()
