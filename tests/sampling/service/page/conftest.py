"""A run as training and evaluations leave it: records, previews, figures, chunks and chains."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditmoe.sampling.settings.config import SamplerConfig
from tests.sampling.small_run import write_noise_classifier

CHAINS, SAMPLES, STEPS = 5, 4, 6
"""Of the evaluation of chains; steps of a sample."""
FIDS = {(5, 0): 4.0, (5, 1): 5.0, (10, 0): 2.0, (10, 1): 2.5, (20, 0): 1.5}
"""(NFE, seed) → FID of the evaluations of step 3."""


def write_evaluation(
    run: Path, name: str, sampler: dict[str, Any], fid: float, nfe: float, step: int = 3, count: int = 40
) -> Path:
    """A finished evaluation whose images are of one grey each, that of their number."""
    folder = run / "evaluations" / name
    chunks = folder / "chunks"
    chunks.mkdir(parents=True)
    settings = SamplerConfig.model_validate({"schedule": "karras", **sampler}).plain()
    evaluation = {
        "weights": "w",
        "which": "ema",
        "step": step,
        "sampler": settings,
        "count": count,
        "labels": "balanced",
        "num_classes": 10,
        "chunk": 16,
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    chains = str(settings["sampler"]).startswith("dlg:")
    number_N = np.arange(count)
    label_N = number_N // SAMPLES % 10 if chains else number_N % 10
    image_NHWC = np.broadcast_to(number_N.astype(np.uint8)[:, None, None, None], (count, 8, 8, 1))
    random = np.random.default_rng(0)
    for start in range(0, count, 16):
        rows = slice(start, start + 16)
        arrays = {"images": image_NHWC[rows], "labels": label_N[rows], "first": np.array(start)}
        if chains:
            trace_NT = random.uniform(0.1, 2, (len(number_N[rows]), STEPS)).astype(np.float32)
            arrays |= {"trace": trace_NT, "sigma": trace_NT[:, -1]}
        np.savez(chunks / f"{start // 16:05d}.npz", **arrays)
    result = {
        "network": {"name": "classifier", "dimension": 64, "fingerprint": "f"},
        "real": {"name": "<i>digits</i>", "fingerprint": "r"},
        "drawn_images": count,
        "real_images": 300,
        "fid": fid,
        "fid_interval": [fid - 0.25, fid + 0.25],
        "fid_floor": 0.5,
        "kid": 0.01,
        "kid_deviation": 0.002,
        "kid_floor": 0.0,
        "precision": 0.8,
        "precision_floor": 0.9,
        "recall": 0.7,
        "recall_floor": 0.95,
        "warnings": ["<b>few</b> images"],
    }
    if chains:
        result["chains"] = chain_figures(count // SAMPLES)
    metrics = {
        "format": 1,
        "evaluation": {**evaluation, "id": name, "nfe": nfe},
        "results": {"classifier": result},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def chain_figures(chains: int) -> dict[str, Any]:
    lags = [0, 1, 2, 3]
    correlation = {
        "samples": chains * SAMPLES,
        "effective": 12.5,
        "effective_share": 0.3,
        "split_r_hat": 1.2,
        "lags": lags,
        "autocorrelation": [1.0, 0.5, 0.2, 0.0],
        "of_chains": {"0.1": [1.0, 0.2, -0.1, -0.3], "0.9": [1.0, 0.8, 0.5, 0.2]},
    }
    return {
        "chains": chains,
        "samples_per_chain": SAMPLES,
        "steps_per_sample": STEPS,
        "sigma": {**correlation, "quantiles": {"0.05": 0.13, "0.5": 0.56, "0.95": 0.79}},
        "features": correlation,
        "recall": {"recall_of_chains": 0.9, "recall_of_independent": 0.92},
        "modes": {
            "modes": 5,
            "changes": {"share": 0.3, "expected": 0.4},
            "visited": {"mean": 2.1, "expected": 2.2},
            "visited_histogram": [1, 3, 1, 0, 0],
        },
        "warnings": ["R̂ <em>is</em> large"],
    }


def write_training(run: Path, steps: int = 40) -> None:
    """Records and two previews."""
    records = [
        {
            "step": step,
            "loss": 1 / step,
            "lr": 1e-3,
            "grad_norm": None if step == 2 else 1.0,
            "images_per_second": 9.5,
        }
        for step in range(1, steps + 1)
    ]
    records[-1]["expert_load"] = [[0.4, 0.6]]
    (run / "stats.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (run / "samples").mkdir()
    for step in (10, 40):
        Image.new("L", (40, 20), step).save(run / "samples" / f"preview-step-{step:08d}.png")


@pytest.fixture(scope="session")
def trained(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two runs; `digits` has trained and was evaluated."""
    folder = tmp_path_factory.mktemp("page") / "runs"
    shutil.copytree(runs, folder)
    run = folder / "digits"
    write_noise_classifier(run)
    write_training(run)
    for (nfe, seed), fid in FIDS.items():
        write_evaluation(run, f"euler-{nfe}-{seed}", {"sampler": "euler", "steps": nfe, "seed": seed}, fid, nfe)
    write_evaluation(run, "euler-early", {"sampler": "euler", "steps": 10}, 8.0, 10.0, step=0)
    write_evaluation(run, "heun-10", {"sampler": "heun", "steps": 10, "cfg_scale": 1.5}, 1.8, 19.0)
    dlg = {"samples_per_chain": SAMPLES}
    write_evaluation(
        run, "chains", {"sampler": "dlg:euler", "steps": 2, "dlg": dlg}, 3.0, 7.5, count=CHAINS * SAMPLES
    )
    return folder
