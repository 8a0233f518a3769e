"""Evaluations with the same settings and several seeds, as one: means of their figures, and how far these spread.

RUN/evaluations/<id>/              of each seed, as `ditmoe evaluate` makes it
RUN/evaluations/seeds-<…>/         seeds.json, row.md, row.tex
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ditmoe.data.crew.making import Make
from ditmoe.data.storage.files import make_folder, replacing
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted
from ditmoe.model.settings import LARGEST_SEED
from ditmoe.sampling.evaluation.job import Job, requests_of
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, evaluate_jobs, prepare_jobs
from ditmoe.sampling.evaluation.row import FIGURES, write_rows
from ditmoe.sampling.evaluation.stored import METRICS_FORMAT, keys_of

SUMMARY_FILE: Final = "seeds.json"
MOST_SEEDS: Final = 100
_OF_EACH: Final = ("nfe", "network_passes")
"""What an evaluation counts, and may differ between seeds."""


def seeds_of(text: str) -> tuple[int, ...]:
    """The seeds that `0-2`, `0,5` or `0-2,7` names. UserError where that is none, or names one alone or twice."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not (first.isascii() and first.isdecimal()) or (dash and not (last.isascii() and last.isdecimal())):
            raise UserError(f"--seeds {text}: {part!r} is neither a seed nor a range; expected some as 0-2 or 0,5")
        ends = int(first), int(last or first)
        if ends[1] > LARGEST_SEED or ends[1] - ends[0] >= MOST_SEEDS:
            raise UserError(f"--seeds {text}: expected {MOST_SEEDS} seeds at most, of {LARGEST_SEED} at most")
        seeds += range(ends[0], ends[1] + 1)
    if not 2 <= len(set(seeds)) == len(seeds) <= MOST_SEEDS:
        raise UserError(f"--seeds {text}: {counted(len(seeds), 'seed')}; expected 2 to {MOST_SEEDS}, each once")
    return tuple(seeds)


def prepare_seeds(options: EvaluationOptions, seeds: Sequence[int]) -> list[Job]:
    """A job for each seed. UserError as `prepare_jobs`."""
    return prepare_jobs(options, [options.sampler.model_copy(update={"seed": seed}) for seed in seeds])


def folder_of(jobs: Sequence[Job]) -> Path:
    """`RUN/evaluations/seeds-…`: of the settings, the seeds, and what they are scored with."""
    depends = [[job.evaluation.fingerprint for job in jobs], requests_of(jobs[0])]
    fingerprint = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:8]
    name = jobs[0].evaluation.id.rpartition("-seed-")[0]
    return jobs[0].folder.parent / f"seeds-{len(jobs)}-{name}-{fingerprint}"


def evaluate_seeds(
    jobs: Sequence[Job], make_of: Callable[[Job], Make] | None = None, processes: int | None = None
) -> dict[str, Any]:
    """Do what is missing of the jobs, and write their means; as one of the processes of the jobs, or a leader.

    Args:
        make_of: as of `evaluate_jobs`, and so is `processes`.

    Returns:
        `summary`, as in `seeds.json`.
    """
    found: dict[str, Any] = {}
    of_seeds: list[dict[str, Any]] = []

    def on_finished(place: int, metrics: dict[str, Any], seconds: float | None) -> None:
        of_seeds.append(metrics)
        if len(of_seeds) < len(jobs):
            return
        found.update(summary(jobs, of_seeds))
        folder = folder_of(jobs)
        make_folder(folder)
        write_rows(folder, found)
        with replacing(folder / SUMMARY_FILE) as file:
            file.write(json.dumps(found, indent=1, ensure_ascii=False).encode() + b"\n")

    evaluate_jobs(jobs, on_finished, make_of=make_of, processes=processes)
    return found


def summary(jobs: Sequence[Job], of_seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of several seeds as those of one, in the form of `metrics.json`.

    Each figure is the mean over seeds. `deviations` has its standard deviation over seeds (n − 1 in the
    denominator), and `seeds` its values; intervals, which are of one seed, are left out. Null where one seed has
    none. Keys are those of the first seed.
    """
    seeds = [job.evaluation.sampler.seed for job in jobs]
    evaluations = [metrics["evaluation"] for metrics in of_seeds]
    evaluation = dict(evaluations[0]) | {"seeds": seeds, "evaluations": [each["id"] for each in evaluations]}
    evaluation |= {name: _mean([each.get(name) for each in evaluations]) for name in _OF_EACH}
    keys = [keys_of(metrics["results"], requests_of(job)) for job, metrics in zip(jobs, of_seeds, strict=True)]
    results = {}
    for place, key in enumerate(keys[0]):
        same = [metrics["results"][own[place]] for metrics, own in zip(of_seeds, keys, strict=True)]
        results[key] = _mean_result(same, seeds)
    return {"format": METRICS_FORMAT, "evaluation": evaluation, "results": results}


def _mean_result(same: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    first = same[0]
    ratios = [f"{name}_ratio" for name in FIGURES if f"{name}_ratio" in first]
    names = [name for name in FIGURES if name in first]
    dropped = {f"{name}_interval" for name in FIGURES} | {"intervals", "chains", "not_finite"}
    result = {name: value for name, value in first.items() if name not in dropped}
    result |= {name: _mean([each[name] for each in same]) for name in (*names, *ratios)}
    result["deviations"] = {name: _deviation([each[name] for each in same]) for name in names}
    result["seeds"] = [{"seed": s, **{n: each[n] for n in names}} for s, each in zip(seeds, same, strict=True)]
    if "recogniser" in first:
        shares = [each["recogniser"]["accuracy"] for each in same]
        of_all = {name: value for name, value in first["recogniser"].items() if name != "by_class"}
        result["recogniser"] = {**of_all, "accuracy": _mean(shares), "deviation": _deviation(shares)}
    result["drawn_images"] = min(each["drawn_images"] for each in same)
    result["warnings"] = [*dict.fromkeys(line for each in same for line in each["warnings"])]
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _deviation(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) == len(values) else None
