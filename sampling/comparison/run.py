"""A comparison on a run: every cell as an ordinary evaluation, and the folder that shows them side by side.

RUN/evaluations/<id>/                          of each cell, as `ditmoe evaluate` makes it
RUN/evaluations/grid-<name>-<fingerprint>/     grid.json, table.md, fid-nfe.png
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ditmoe.data.crew.making import Make
from ditmoe.data.storage.files import make_folder, read_settings, replacing
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted
from ditmoe.parallel.checkpoint.folder import read_info
from ditmoe.sampling.comparison.cells import PLAIN, Cell, ComparisonConfig, cells_of
from ditmoe.sampling.comparison.picture import write_picture
from ditmoe.sampling.comparison.results import HOW_JUDGED, Row, curves_of, markdown, mean_row, row_of
from ditmoe.sampling.comparison.verdicts import verdicts
from ditmoe.sampling.evaluation.job import Job
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, evaluate_jobs, prepare_jobs
from ditmoe.sampling.evaluation.run_job import stored_result
from ditmoe.sampling.evaluation.stored import key_of
from ditmoe.sampling.network.load import find_checkpoint

ROWS_FILE: Final = "grid.json"
TABLE_FILE: Final = "table.md"
PICTURE_FILE: Final = "fid-nfe.png"
FORMAT: Final = 1


@dataclass(frozen=True)
class Comparison:
    """A comparison that nothing stands in the way of."""

    name: str
    config: ComparisonConfig
    cells: tuple[Cell, ...]
    left_out: tuple[str, ...]
    """A line for each cell that cannot be."""
    jobs: tuple[Job, ...]
    """For each cell one of each seed."""
    options: EvaluationOptions
    """Of all jobs, but for the sampler."""

    @property
    def folder(self) -> Path:
        """`RUN/evaluations/grid-<name>-<fingerprint>`: of its settings, evaluations and scoring."""
        job = self.jobs[0]
        images = [job.evaluation.fingerprint for job in self.jobs]
        depends = [self.config.model_dump(mode="json"), images, job.request]
        fingerprint = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:8]
        return job.folder.parent / f"grid-{self.name}-{fingerprint}"

    @property
    def finished(self) -> bool:
        """Whether every evaluation is stored. UserError where one of them is damaged."""
        return all([stored_result(job) is not None for job in self.jobs])


def prepare_comparison(options: EvaluationOptions, config: ComparisonConfig, name: str) -> Comparison:
    """Work out the cells, and find everything that their jobs need.

    Args:
        options: where the run, its weights and the real images are; the comparison decides on what is drawn.
        name: of the comparison.

    Raises:
        UserError: as `prepare_job`; no cell is possible.
    """
    checkpoint = find_checkpoint(options.source, options.step)
    cells, left_out = cells_of(config, read_info(checkpoint).objective)
    if not cells:
        raise UserError(f"{name}: no evaluation is possible:\n" + "\n".join(f"  {line}" for line in left_out))
    options = replace(options, source=checkpoint, step=None, count=config.count, labels=config.labels)
    samplers = [cell.config.model_copy(update={"seed": seed}) for cell in cells for seed in config.seeds]
    jobs = prepare_jobs(options, samplers)
    return Comparison(name, config, tuple(cells), tuple(left_out), tuple(jobs), options)


def run_comparison(
    comparison: Comparison, make_of: Callable[[Job], Make] | None = None, processes: int | None = None
) -> str:
    """Do what is missing, as one of the processes that were started for it, alone, or as the leader of a crew.

    Args:
        make_of: has a job's parts made by a crew; None: these processes make them.
        processes: of the crew, as far as they are known.

    Returns:
        The tables, in Markdown.
    """
    cells, jobs = comparison.cells, comparison.jobs
    seconds_of = _stored_seconds(comparison.folder / ROWS_FILE)
    rows: list[Row] = []
    of_seeds: list[Row] = []  # of the cell that is at work

    def on_finished(place: int, metrics: dict[str, Any], seconds: float | None) -> None:
        job, cell = jobs[place], cells[place // comparison.config.repeats]
        if seconds is not None:
            seconds_of[job.evaluation.id] = seconds
        known = seconds_of.get(job.evaluation.id)
        key = key_of(metrics["results"], job.request)
        assert key is not None
        of_seeds.append(row_of(cell, job.evaluation.id, metrics, key, known))
        fid, nfe = of_seeds[-1]["fid"], of_seeds[-1]["nfe"]
        if len(of_seeds) == comparison.config.repeats:
            rows.append(mean_row(of_seeds))
            of_seeds.clear()
            _write_rows(comparison, rows, seconds_of)
        found = "no FID" if fid is None else f"FID {fid:.4g}"
        seed = "" if comparison.config.repeats == 1 else f", seed {job.evaluation.sampler.seed}"
        left = len(jobs) - place - 1
        print(f"{cell.name}{seed}: {found} at {nfe:.4g} NFE; {left} of {len(jobs)} left", flush=True)

    found = evaluate_jobs(jobs, on_finished, make_of=make_of, processes=processes)
    warnings = dict.fromkeys(
        warning
        for metrics, job in zip(found, jobs, strict=True)
        for warning in metrics["results"][key_of(metrics["results"], job.request)]["warnings"]
    )
    if not rows:  # another process is the first
        return ""
    page = markdown(_title(comparison), rows, comparison.left_out, list(warnings))
    with replacing(comparison.folder / TABLE_FILE) as file:
        file.write(page.encode())
    write_picture(comparison.folder / PICTURE_FILE, _title(comparison), rows)
    return page


def _title(comparison: Comparison) -> str:
    evaluation = comparison.jobs[0].evaluation
    config = comparison.config
    return (
        f"{comparison.name}: {evaluation.which} of step {evaluation.step:,}, {counted(config.count, 'image')}, "
        f"guidance {config.cfg_scale:g}, {config.labels} labels, "
        + (f"seed {config.seed}" if config.repeats == 1 else f"seeds {config.seeds[0]} to {config.seeds[-1]}")
    )


def _write_rows(comparison: Comparison, rows: list[Row], seconds_of: dict[str, float]) -> None:
    """What is known so far; the seconds are known to this file alone, and kept for a start that goes on."""
    make_folder(comparison.folder)
    evaluation = comparison.jobs[0].evaluation
    values = {
        "format": FORMAT,
        "name": comparison.name,
        "weights": evaluation.weights,
        "step": evaluation.step,
        "settings": comparison.config.model_dump(mode="json"),
        "features": comparison.jobs[0].features,
        "complete": len(rows) == len(comparison.cells),
        "rows": rows,
        "left_out": list(comparison.left_out),
        "how_judged": HOW_JUDGED,
        "seconds": seconds_of,
        "verdicts": [verdict.plain() for verdict in verdicts(curves_of(rows), PLAIN)],
    }
    with replacing(comparison.folder / ROWS_FILE) as file:
        file.write(json.dumps(values, indent=1, ensure_ascii=False).encode() + b"\n")


def _stored_seconds(path: Path) -> dict[str, float]:
    """Evaluation → seconds, as an earlier start measured them."""
    seconds: dict[str, float] = (read_settings(path) or {}).get("seconds", {})
    return seconds
