"""What extrapolated steps, guidance at some noise levels and compiled blocks cost and save: FID beside time.

    python benchmarks/sampling_pace.py runs/demo --reference shards/digits --text pace.md

Of a trained run, each way of drawing is scored (`ditmoe evaluate`, the run's own feature classifier), and drawn
for the clock. For the clock all ways take turns, round after round, each in batches of one size on one thread; a
time is the median of its rounds, and a ratio that of the ratios to the first way in the same round, with the least
and the greatest. Evaluations go into the run's folder as always, so a second start repeats the timing alone.
"""

import argparse
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any, Final

import torch

from ditmoe.sampling.drawing.generate import generate
from ditmoe.sampling.evaluation.job import requests_of
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, evaluate_run, prepare_job
from ditmoe.sampling.evaluation.stored import key_of
from ditmoe.sampling.network.load import load_model
from ditmoe.sampling.settings.config import SamplerConfig

Settings = dict[str, Any]

EULER: Final[Settings] = {"sampler": "euler"}
SOLVER: Final[Settings] = {"sampler": "dpm-solver++"}
GUIDED: Final[Settings] = {"sampler": "euler", "steps": 24, "cfg_scale": 2.0}
WAYS: Final[dict[str, Settings]] = {
    "euler, 48 steps": EULER | {"steps": 48},
    "every 2nd step, order 0": EULER | {"steps": 48, "cache_interval": 2, "cache_order": 0},
    "every 2nd step, order 1": EULER | {"steps": 48, "cache_interval": 2},
    "every 3rd step, order 1": EULER | {"steps": 48, "cache_interval": 3},
    "every 4th step, order 1": EULER | {"steps": 48, "cache_interval": 4},
    "euler, 24 steps": EULER | {"steps": 24},
    "euler, 24 steps, compiled": EULER | {"steps": 24, "compile": True},
    "euler, 12 steps": EULER | {"steps": 12},
    "dpm-solver++, 12 steps": SOLVER | {"steps": 12},
    "dpm-solver++, 24 steps, every 2nd": SOLVER | {"steps": 24, "cache_interval": 2},
    "guided by 2, euler, 24 steps": GUIDED,
    "guided at 0.3 < σ ≤ 5": GUIDED | {"cfg_sigma_min": 0.3, "cfg_sigma_max": 5.0},
    "guided at σ ≤ 2": GUIDED | {"cfg_sigma_max": 2.0},
    "guided at 0.3 < σ ≤ 5, every 2nd step": GUIDED
    | {"cfg_sigma_min": 0.3, "cfg_sigma_max": 5.0, "cache_interval": 2},
}


def seconds_of(
    run: Path, images: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, tuple[float, float]]]:
    """Seconds of an image in each round, and its passes, full and extrapolated, of each way."""
    model = load_model(run)
    configs = {name: SamplerConfig.model_validate(way) for name, way in WAYS.items()}
    passes = {}
    for name, config in configs.items():  # each has run once before the clock, and been compiled
        drawn = generate(model, None, range(images), config, images)
        passes[name] = (drawn.network_evaluations, drawn.cached_evaluations)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds):
        for name in list(WAYS) if turn % 2 == 0 else list(WAYS)[::-1]:
            begun = time.perf_counter()
            generate(model, None, range(images), configs[name], images)
            found[name].append((time.perf_counter() - begun) / images)
    return found, passes


def fid_of(run: Path, reference: Path, way: Settings, count: int) -> float:
    """FID in the features of the run's own classifier."""
    job = prepare_job(
        EvaluationOptions(
            source=run,
            sampler=SamplerConfig.model_validate(way),
            count=count,
            labels="balanced",
            data=str(reference),
            recogniser=False,
        )
    )
    metrics = evaluate_run(job)
    key = key_of(metrics["results"], requests_of(job)[0])
    assert key is not None
    return float(metrics["results"][key]["fid"])


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--reference", type=Path, required=True, help="shards of real images")
    parser.add_argument("--count", type=int, default=1000, help="images for FID")
    parser.add_argument("--images", type=int, default=32, help="images for the clock, in one batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--text", type=Path, help="also write the table there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds, passes = seconds_of(options.run, options.images, options.rounds)
    fids = {name: fid_of(options.run, options.reference, way, options.count) for name, way in WAYS.items()}
    lines = [
        f"<!-- {date.today()}; {platform.machine()}, one thread; Python {platform.python_version()}, torch "
        f"{torch.__version__}; FID of {options.count:,} images in the features of the run's classifier; times:",
        f"medians of {options.rounds} interleaved rounds of {options.images} images on a shared machine, ratios",
        "within rounds.",
        "",
        f"python benchmarks/sampling_pace.py {options.run.name} --reference {options.reference.name}"
        f" --count {options.count} -->",
        "",
        "| drawn by | full passes | extrapolated | FID | ms per image | time beside the first |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    first = seconds[next(iter(WAYS))]
    for name in WAYS:
        ratios = [here / there for here, there in zip(seconds[name], first, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        full, cached = passes[name]
        lines.append(
            f"| {name} | {full:g} | {cached:g} | {fids[name]:.3g} | {1000 * statistics.median(seconds[name]):.3g}"
            f" | {spread} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.text is not None:
        options.text.write_text(text)


if __name__ == "__main__":
    main()
