"""The evaluation job: N images of one network, drawn in resumable chunks by any number of processes, and scored.

An evaluation is (weights, sampler settings, N images, seed, label sampling) and its folder is named by them:

    evaluations/<id>/evaluation.json   these settings, and the chunk size
                     chunks/00003.npz  images and labels, each written once
                     samples.npz       arr_0 uint8 [N, H, W, 3], arr_1 labels [N]
                     metrics.json      every figure with its settings
                     gallery/          index.html and a sheet of each class

`keeping.py` says what of it goes when all is scored.

`Job` (`job.py`) is one use of it; each process calls `run_job`. All randomness is by (seed, image number).
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from ditmoe.data.crew.making import Make, by_ranks
from ditmoe.data.storage.claims import Claims
from ditmoe.data.storage.files import read_object, replacing
from ditmoe.data.storage.parts import Progress
from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted
from ditmoe.sampling.evaluation.job import Job, requests_of
from ditmoe.sampling.evaluation.keeping import (
    KEPT_KEY,
    SAMPLES_FILE,
    SETTINGS_FILE,
    check_kept,
    drop_images,
    kept,
    statistics_file,
    write_drawn_statistics,
)
from ditmoe.sampling.evaluation.measures import Measures
from ditmoe.sampling.evaluation.results import Measured, write_results
from ditmoe.sampling.evaluation.stages import chunk_store, described_of, missing_of
from ditmoe.sampling.evaluation.stored import METRICS_FILE, key_for, stored_results
from ditmoe.sampling.integrators.samplers import planned_nfe, planned_passes
from ditmoe.sampling.jobs.alone import alone_at
from ditmoe.sampling.jobs.chunks import DrawChunk
from ditmoe.sampling.jobs.together import draw_pending_together
from ditmoe.sampling.jobs.workers import Workers
from ditmoe.sampling.settings.config import SamplerConfig

LARGEST_DEFAULT_CHUNK: Final = 256


def stored_result(job: Job) -> dict[str, Any] | None:
    """The job's metrics, when it was finished before, in all of its feature networks.

    Raises:
        UserError: `metrics.json` is damaged.
    """
    path = job.folder / METRICS_FILE
    if not path.exists() or not ((job.folder / SAMPLES_FILE).exists() or kept(job.folder) == "statistics"):
        return None
    return None if missing_of(job, stored_results(job.folder)) else read_object(path)


def run_job(
    job: Job,
    draw: DrawChunk,
    workers: Workers | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int], Progress] = lambda title, total: lambda done: None,
    measures: Measures | None = None,
    make: Make | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Do what is missing of a job; every process of the job calls this with the same arguments.

    Args:
        draw: draws the images of a chunk from their numbers and labels.
        workers: this process among those of the job; alone when left out.
        log: takes lines to show (first process).
        progress: (title, total) → a function that is told the number done (first process).
        measures: kept from one job to the next that is scored alike; anew when left out.
        make: has parts made; None: these processes make them.
        processes: of the crew, as far as they are known; None: `workers` are all.

    Returns:
        The metrics, as in `metrics.json`.

    Raises:
        UserError: another job holds the folder; a file is damaged or of other settings; the disk is full.
    """
    workers = workers or Workers()
    say: Callable[[str], None] = log if workers.first else lambda line: None
    show = progress if workers.first else lambda title, total: lambda done: None
    busy = f"{job.folder}: another process is at this evaluation"
    claims = Claims(job.folder)
    with alone_at(claims, "evaluation", workers, busy, lambda: _begin(job, processes or workers.ranks)) as check:
        made = make or by_ranks(workers.rank, workers.ranks)
        return _run(job, draw, workers, say, show, measures or Measures(), check, made, processes or workers.ranks)


def default_chunk(count: int, batch: int, ranks: int, images_per_unit: int = 1) -> int:
    """Images of a chunk: whole batches, up to about 256, at least four chunks for each process if possible.

    Of chains, which have many images each, one batch, or less where there is too little for all processes.
    """
    if images_per_unit > 1:
        chains = -(-count // images_per_unit)
        return images_per_unit * min(batch, -(-chains // ranks))
    batches = max(1, min(LARGEST_DEFAULT_CHUNK // batch, count // (4 * ranks * batch)))
    return batches * batch


def _begin(job: Job, ranks: int) -> None:
    """Refuse a folder that was started in other chunks; write down the settings."""
    path = job.folder / SETTINGS_FILE
    stored = read_object(path) if path.exists() else None
    if stored is None:
        wanted = {
            **job.evaluation.plain(),
            "chunk": job.chunk
            or default_chunk(
                job.evaluation.count,
                job.batch * job.expert_parallel,  # a batch for each rank that draws with others
                max(1, ranks // job.expert_parallel),
                job.evaluation.sampler.images_per_unit,
            ),
        }
        with replacing(path) as file:
            file.write(json.dumps(wanted, indent=1).encode() + b"\n")
        return
    if {key: value for key, value in stored.items() if key not in ("chunk", KEPT_KEY)} != job.evaluation.plain():
        raise UserError(f"{path}: was written with other settings; expected those of {job.evaluation.id}")
    if job.chunk not in (None, stored["chunk"]):
        raise UserError(
            f"--chunk {job.chunk}: this evaluation was started with chunks of {stored['chunk']} images; "
            f"leave --chunk out, or delete {job.folder}"
        )
    check_kept(job.folder)


def _run(
    job: Job,
    draw: DrawChunk,
    workers: Workers,
    log: Callable[[str], None],
    progress: Callable[[str, int], Progress],
    measures: Measures,
    check: Callable[[], None],
    make: Make,
    processes: int,
) -> dict[str, Any]:
    evaluation = job.evaluation
    store = chunk_store(job, draw)
    size = store.size

    # The first process trains or loads the networks before it draws: a missing file shows at once, and the others
    # draw meanwhile.
    if workers.first:
        measures.networks(job, workers, log, progress)
    started, before = time.monotonic(), len(store.pending())
    shown = progress("chunks drawn", store.chunks)
    if workers.group is None:
        make("drawn", store.parts, on_progress=shown)
    else:
        draw_pending_together(store, workers.group, shown)
    seconds = time.monotonic() - started
    if workers.group is not None:
        store = replace(store, draw=None)  # one rank cannot draw a damaged chunk anew
    # `chains` has the states of chains in chunks that are not there yet.
    workers.on_first(lambda: shutil.rmtree(job.folder / "chains", ignore_errors=True))
    if before:
        log(
            f"{before} of {counted(store.chunks, 'chunk')} of {counted(size, 'image')} were drawn in "
            f"{seconds:.1f} s"
        )

    networks = measures.networks(job, workers, log, progress)
    places = missing_of(job, stored_results(job.folder))
    described = described_of(store, networks, places)
    make("described", described.parts, on_progress=progress("chunks described", store.chunks))
    asked = [networks.of_features[place] for place in places]
    statistics = measures.real_statistics(job, asked, make, workers.device, progress)
    requests = requests_of(job)
    measured = [
        Measured(requests[place], network, known, descriptions)
        for place, network, known, descriptions in zip(
            places, asked, statistics, described.of_features, strict=True
        )
    ]
    # The results remove the descriptions: a process that still looked for them would make them all again.
    workers.wait()

    def write() -> None:
        check()
        shown = progress("figures", 0)
        nfe = store.nfe()
        if nfe is None:  # whoever drew did not count
            nfe = planned_nfe(evaluation.sampler)
        if job.keep == "statistics":
            results = stored_results(job.folder)
            for each in measured:
                moments = job.folder / statistics_file(key_for(results, each.request))
                write_drawn_statistics(moments, each.descriptions, each.statistics, workers.device)
        write_results(
            job.folder,
            {
                "id": evaluation.id,
                **evaluation.plain(),
                "nfe": nfe,
                **_passes_of(evaluation.sampler, nfe, job.facts.get("objective")),
                "vae": evaluation.vae,
                "batch": job.batch,
                "chunk": size,
                "processes": processes,
                "checkpoint": str(job.checkpoint) if job.checkpoint is not None else None,
                **job.facts,
            },
            store,
            job.real,
            job.class_names,
            measured,
            networks.recogniser,
            described.judged,
            job.warnings,
            evaluation.sampler.images_per_unit if evaluation.sampler.chains else None,
            workers.device,
            job.neighbour_images,
            samples=job.keep != "statistics",
        )
        described.remove()
        drop_images(job.folder, job.keep)
        shown(0)

    workers.on_first(write)
    return read_object(job.folder / METRICS_FILE)


def _passes_of(sampler: SamplerConfig, nfe: float | None, objective: Any) -> dict[str, float | None]:
    """Passes through the network per image: guidance takes two for each evaluation, and some may be foretold."""
    if not sampler.paced:
        return {"network_passes": None if nfe is None else nfe * (1 if sampler.cfg_scale == 1 else 2)}
    passes = planned_passes(sampler, ObjectiveConfig.model_validate(objective))
    assert passes is not None
    return {"network_passes": passes.full, "cached_passes": passes.cached}
