"""Evaluations with several seeds as one, and that the row of a table is right, by what does not compute it."""

import json
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import linalg
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ditmoe.data.crew.leader import Crew
from ditmoe.launcher.commands.evaluate import command
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.experts.moe import Experts
from ditmoe.parallel.checkpoint.folder import checkpoint_path
from ditmoe.sampling.evaluation.of_crew import made_by
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, evaluate_run, prepare_job
from ditmoe.sampling.evaluation.results import table
from ditmoe.sampling.evaluation.row import NOTHING, rows_of
from ditmoe.sampling.evaluation.seeds import evaluate_seeds, folder_of, prepare_seeds, seeds_of
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER
from ditmoe.sampling.metrics.features import describe, fingerprint_of
from ditmoe.sampling.metrics.training.classifier import load_classifier
from ditmoe.sampling.settings.config import SamplerConfig
from tests.markers import change_marker
from tests.obedient import Obedient
from tests.sampling.small_run import MODEL, images_of, write_digits, write_run

QUICK = replace(FEATURE_CLASSIFIER, passes=1)
BATCH, SEEN = 16, 4800


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was trained on the digits in `shards`."""
    run, shards = write_run(tmp_path / "run"), write_digits(tmp_path / "shards")

    def trained(facts: dict[str, Any]) -> None:
        facts["images"] = SEEN
        facts["config"] |= {"train": {"batch": BATCH}, "ema": {"decay": 0.99}}
        facts["dataset"] |= {"name": "digits", "shards": [images_of(shards).index.fingerprint]}

    change_marker(checkpoint_path(run, 0), trained)
    return run


@pytest.fixture
def options(run: Path, tmp_path: Path) -> EvaluationOptions:
    sampler = SamplerConfig(sampler="heun", schedule="karras", steps=3, cfg_scale=1.5, seed=4)
    return EvaluationOptions(
        run,
        sampler,
        100,
        "balanced",
        data=tmp_path / "shards",
        batch=50,
        cache=tmp_path / "cache",
        recogniser=False,
    )


@pytest.fixture
def passes() -> Iterator[Counter[str]]:
    """How many images went through networks."""
    rows = Counter[str]()

    def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, DiT):
            rows["images"] += len(arguments[0])

    hook = register_module_forward_pre_hook(count)
    yield rows
    hook.remove()


def test_the_row_says_what_others_find(options: EvaluationOptions, tmp_path: Path, passes: Counter[str]) -> None:
    job = replace(prepare_job(options), feature_classifier=QUICK)
    metrics = evaluate_run(job)
    (row,) = rows_of(metrics)
    network, real = DiT(MODEL), images_of(tmp_path / "shards")
    total = sum(parameter.numel() for parameter in network.parameters())
    experts = [module for module in network.modules() if isinstance(module, Experts)]
    assert MODEL.experts is not None
    idle = sum(sum(p.numel() for p in each.parameters()) for each in experts) // MODEL.experts
    (file,) = (tmp_path / "cache").glob("classifier-plain-*")
    classifier = load_classifier(QUICK, real, tmp_path / "cache", torch.device("cpu"))
    assert row["evaluator"] == f"classifier {fingerprint_of(load_file(file))}"
    with np.load(job.folder / "samples.npz") as samples:
        drawn_NHWC, label_N = samples["arr_0"][..., :1], samples["arr_1"]
    (batch,) = real.read_all(300)
    one, other = (describe(classifier, x)["features"].astype(np.float64) for x in (drawn_NHWC, batch.image_NHWC))
    root = linalg.sqrtm(np.cov(one, rowvar=False) @ np.cov(other, rowvar=False)).real
    fid = np.square(one.mean(0) - other.mean(0)).sum() + np.cov(one, rowvar=False).trace()
    fid += np.cov(other, rowvar=False).trace() - 2 * root.trace()
    expected = {
        "parameters": f"{total:,}",
        "activated": f"{total - (MODEL.experts - MODEL.experts_per_token) * idle:,}",
        "trained on": "digits",
        "steps": "0",
        "images seen": "4,800",
        "epochs": "16",
        "batch": "16",
        "weights": "ema 0.99",
        "sampler": "heun",
        "schedule": "karras",
        "NFE": f"{2 * 3 - 1}",
        "passes": f"{passes['images'] // 100}",
        "guidance": "1.5",
        "guided": "all noise levels",
        "arithmetic": "fp32",
        "seed": "4",
        "N": f"{len(label_N)}",
        "labels": "balanced",
        "reference": f"digits {real.fingerprint}",
        "source": str(tmp_path / "shards"),
        "real images": "300",
        "IS": NOTHING,
        "recognised": NOTHING,
    }
    assert row.items() >= expected.items()
    assert passes["images"] == 100 * 2 * 5 and label_N.tolist() == [number % 10 for number in range(100)]
    assert metrics["results"]["classifier"]["fid"] == pytest.approx(fid, rel=1e-5)
    assert float(row["FID"]) == pytest.approx(fid, rel=1e-3) and row["95% intervals"].startswith("FID ")
    # What nobody knows is not told: what others trained on, and how often they saw it.
    change_marker(checkpoint_path(tmp_path / "run", 0), lambda facts: facts.update(images=0))
    change_marker(checkpoint_path(tmp_path / "run", 0), lambda facts: facts["config"].pop("train"))
    unguided = replace(options, sampler=SamplerConfig(steps=1))
    facts = prepare_job(unguided).facts
    assert facts["images_seen"] is None and facts["epochs"] is None and facts["guidance_interval"] is None


def test_several_seeds_are_a_mean_and_its_spread(options: EvaluationOptions, tmp_path: Path) -> None:
    options = replace(options, sampler=SamplerConfig(steps=2))
    jobs = [replace(job, feature_classifier=QUICK) for job in prepare_seeds(options, (3, 4, 6))]
    found = evaluate_seeds(jobs)
    each = [json.loads((job.folder / "metrics.json").read_text()) for job in jobs]
    alone = replace(
        prepare_job(replace(options, sampler=SamplerConfig(steps=2, seed=4))), feature_classifier=QUICK
    )
    assert alone.folder == jobs[1].folder and evaluate_run(alone) == each[1], "an evaluation as any other"
    result = found["results"]["classifier"]
    for name in ("fid", "kid", "precision", "recall"):
        values = [metrics["results"]["classifier"][name] for metrics in each]
        assert len(set(values)) > 1 or name == "precision"
        assert result[name] == pytest.approx(sum(values) / 3, rel=1e-12)
        assert result["deviations"][name] == pytest.approx(statistics.stdev(values), rel=1e-9)
        assert [seed[name] for seed in result["seeds"]] == values
    assert found["evaluation"]["seeds"] == [3, 4, 6] == [seed["seed"] for seed in result["seeds"]]
    assert found["evaluation"]["evaluations"] == [job.folder.name for job in jobs]
    assert "fid_interval" not in result
    folder = folder_of(jobs)
    assert json.loads((folder / "seeds.json").read_text()) == found
    (row,) = rows_of(found)
    assert row["seed"] == "3, 4, 6" and row["FID"] == f"{result['fid']:.4g} ± {result['deviations']['fid']:.2g}"
    assert row["FID"] in (folder / "row.md").read_text() and r"$\pm$" in (folder / "row.tex").read_text()
    lines = table(found, "classifier")
    assert lines[0].endswith("seeds 3, 4, 6")
    assert f"± {result['deviations']['fid']:.4g} over 3 seeds; floor" in next(x for x in lines if "FID" in x)
    # Other seeds are another mean; a crew makes them too.
    assert folder_of(jobs[:2]) != folder
    crew, told = Obedient(), replace(options, cache=tmp_path / "other")
    fresh = [replace(job, feature_classifier=QUICK) for job in prepare_seeds(replace(told, count=40), (0, 1))]
    led = evaluate_seeds(fresh, partial(made_by, cast(Crew, crew), replace(told, count=40)), 2)
    assert led["evaluation"]["processes"] == 2 and set(crew.stages()) == {"drawn", "described", "real"}


def test_seeds_are_named_as_ranges_and_lists() -> None:
    assert seeds_of("0-2") == (0, 1, 2) and seeds_of("0,5") == (0, 5) and seeds_of("1-2,7") == (1, 2, 7)
    for text in ("", "3", "a-b", "1-", "-2", "2-1", "0,0", "0-2,1", "0-1000", "0-99999999999999999999999", "٣,4"):
        with pytest.raises(UserError, match=r"--seeds .*expected"):
            seeds_of(text)


def test_the_command_shows_the_spread(
    options: EvaluationOptions, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared: dict[str, Any] = {"count": 40, "data": str(tmp_path / "shards"), "steps": 1, "seeds": "0-1"}
    command(run, **shared, cache=tmp_path / "cache", recogniser=False)
    shown = capsys.readouterr().out
    assert "seeds 0, 1" in shown and "over 2 seeds" in shown and "seeds.json" in shown
    command(run, **shared, cache=tmp_path / "cache", recogniser=False)
    assert capsys.readouterr().out == shown
    with pytest.raises(UserError, match="--seeds 0-1 and --watch: expected one of them"):
        command(run, **shared, watch=True)
