"""The drawing of an evaluation's images against the bare loop of their sampler, and the moments of features."""

import os
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import evaluation as program
from benchmarks.evaluation import Turn
from benchmarks.suite.figure import Figure, rate
from benchmarks.suite.settings import Settings


def measure(settings: Settings) -> Iterator[Figure]:
    """With one process, and with one for each core."""
    torch.set_num_threads(1)
    model, images = program.small_model(), program.BATCH if settings.small else 2 * program.BATCH
    for count in dict.fromkeys((1, len(os.sched_getaffinity(0)))):
        total = images * count
        yield _compare(
            f"chunks of an evaluation, {count} process{'es' if count > 1 else ''}",
            "images/s",
            partial(program.job_turn, model, total, count, settings.folder),
            partial(program.bare_turn, model, total, count),
            1 if settings.small else settings.rounds_of(4),
            "the bare sampler loop",
        )
    rows = 512 if settings.small else 4096
    yield _compare(
        "moments of 2,048 features",
        "rows/s",
        partial(program.here, partial(program.moments_now, rows), rows),
        partial(program.here, partial(program.moments_before, rows, 512), rows),
        settings.rounds_of(3),
        "a product for every 512 rows",
    )


def _compare(
    name: str, unit: str, ours: Callable[[], Turn], theirs: Callable[[], Turn], rounds: int, against: str
) -> Figure:
    turns = [(ours(), theirs()) for _ in range(rounds)]
    seconds = [[1 / turn.rate for turn in column] for column in zip(*turns, strict=True)]
    return rate(name, unit, 1, *seconds, against=against)
