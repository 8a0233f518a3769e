"""A small evaluation as a program: `python -m tests.sampling.evaluation.leading RUN SHARDS CACHE SEED [CREW]`.

With a crew it leads it, with one worker of its own, and takes a worker for stopped after seconds.
"""

import sys
from dataclasses import replace
from pathlib import Path

from ditmoe.data.crew.leader import lead_crew
from ditmoe.launcher.local.crew_workers import own_address
from ditmoe.sampling.evaluation.job import Job
from ditmoe.sampling.evaluation.of_crew import made_by
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, evaluate_run, prepare_job
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER
from ditmoe.sampling.settings.config import SamplerConfig

STALLED = 5.0


def options_of(run: Path, shards: Path, cache: Path, seed: int) -> EvaluationOptions:
    """Twelve chunks, each in many steps."""
    sampler = SamplerConfig(steps=60, seed=seed)
    return EvaluationOptions(run, sampler, count=96, batch=8, chunk=8, data=shards, cache=cache)


def quick_job(options: EvaluationOptions) -> Job:
    """The classifiers learn next to nothing, which is the same whoever computes it."""
    return replace(
        prepare_job(options),
        feature_classifier=replace(FEATURE_CLASSIFIER, passes=1),
        recogniser_classifier=replace(RECOGNISER, passes=0.2),
    )


def main(run: str, shards: str, cache: str, seed: str, crew: str | None = None) -> None:
    options = options_of(Path(run), Path(shards), Path(cache), int(seed))
    job = quick_job(options)
    if crew is None:
        evaluate_run(job)
        return
    own = [{"OMP_NUM_THREADS": "1"}]
    with lead_crew(Path(crew), own, host=own_address(), stalled_seconds=STALLED) as workers:
        evaluate_run(job, made_by(workers, options, job), 3)


if __name__ == "__main__":
    main(*sys.argv[1:])
