"""An evaluation that is killed while it trains its classifiers, again and again, has lost and changed nothing."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from ditmoe.sampling.evaluation.of_run import evaluate_run, prepare_job
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER
from ditmoe.sampling.metrics.training import state
from tests.sampling.evaluation.leading import options_of
from tests.sampling.small_run import write_digits, write_run

FORK: Final = multiprocessing.get_context("fork")
PAUSE: Final = 0.3
"""Before a kill, from the first state that a process writes on: at most, s."""
KILLS: Final = 12
SECONDS: Final = 120.0
"""That a process may take until it trains, or to its end, however slow the machine is."""


def evaluate(run: Path, shards: Path, cache: Path) -> None:
    """What the child processes do: as `ditmoe evaluate`, but states of trainings are kept at every step."""
    torch.set_num_threads(2)  # so that both are trained at once
    state.KEEP_SECONDS, state.KEEP_SHARE = 0.0, 0  # type: ignore[misc]
    sys.stdout = sys.stderr = (run.parent / "output.txt").open("a")
    job = replace(
        prepare_job(options_of(run, shards, cache, 0)),
        feature_classifier=replace(FEATURE_CLASSIFIER, passes=16),
        recogniser_classifier=replace(RECOGNISER, passes=4),
    )
    evaluate_run(job)


def start(*arguments: Path) -> Any:
    process = FORK.Process(target=evaluate, args=arguments)
    process.start()
    return process


def states(cache: Path) -> dict[str, int]:
    """States of trainings, with the times of their last change."""
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("classifier-*.training")}


def trains(process: Any, cache: Path, before: dict[str, int]) -> bool:
    """Whether a process gets as far as to keep a state of a training; False: it ended before."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if not process.is_alive():
            return False
        try:
            if states(cache).items() - before.items():
                return True
        except FileNotFoundError:
            pass  # it was replaced while it was looked at
        time.sleep(0.005)
    raise AssertionError("the evaluation trains nothing")


def results(run: Path, cache: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    (folder,) = (run / "evaluations").glob("step-*")
    found = json.loads((folder / "metrics.json").read_text())["results"]
    return found, {path.name: path.read_bytes() for path in cache.glob("classifier-*")}


@pytest.mark.slow
def test_killed_trainings_end_with_the_weights_and_figures_of_an_undisturbed_one(tmp_path: Path) -> None:
    shards, chance = write_digits(tmp_path / "shards"), random.Random(7)
    whole, cut = ((write_run(tmp_path / name), tmp_path / f"cache-{name}") for name in ("whole", "cut"))
    undisturbed = start(whole[0], shards, whole[1])
    undisturbed.join(SECONDS)
    assert undisturbed.exitcode == 0
    kills, seen = 0, set()
    while True:
        before = states(cut[1])
        process = start(cut[0], shards, cut[1])
        if kills < KILLS and trains(process, cut[1], before):
            time.sleep(chance.uniform(0, PAUSE))
            seen |= set(states(cut[1]))
            os.kill(process.pid, signal.SIGKILL)
            process.join(SECONDS)
            kills += process.exitcode == -signal.SIGKILL
            continue
        process.join(SECONDS)
        if process.exitcode == 0:
            break
    print(f"{kills} kills; killed in {', '.join(sorted(seen))}")
    assert kills >= 3 and seen
    (figures, files), (figures_cut, files_cut) = results(*whole), results(*cut)
    assert len(files) == 2 and files_cut == files
    assert figures_cut == figures
