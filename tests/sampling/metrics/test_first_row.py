"""The first row of a table, as docs/evaluate.md says it step by step, with stand-ins for the published files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ditmoe.launcher.cli import app
from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.weights.published import PublishedWeights, save_published
from tests.sampling.metrics.networks.test_inception import Scripted

MODEL = ModelConfig(
    depth=1,
    hidden=16,
    heads=2,
    patch=2,
    experts=2,
    experts_per_token=1,
    image_size=8,
    channels=4,
    num_classes=5,
    learn_sigma=True,
)


def ditmoe(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.slow
def test_the_first_row_step_by_step(tmp_path: Path, make_vae: Callable[..., Path]) -> None:
    # 1. The four files.
    torch.manual_seed(0)
    network = DiT(MODEL)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    state = canonical_state(network)
    weights, vae = tmp_path / "dit_moe.pt", make_vae(tmp_path / "sd-vae")
    save_published(PublishedWeights(MODEL, state, None, ObjectiveConfig(kind="ddpm")), weights)
    inception, reference = tmp_path / "inception-2015-12-05.pt", tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    torch.jit.script(Scripted()).save(inception)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    moments: dict[str, Any] = {}
    for names, size in ((("mu", "sigma"), 2048), (("mu_s", "sigma_s"), 2023)):
        factor = random.normal(size=(30, size))
        moments |= dict(zip(names, (factor.mean(0), np.cov(factor, rowvar=False)), strict=True))
    np.savez(reference, arr_0=images, **moments)
    # 2. A checkpoint.
    run = tmp_path / "runs" / "s2"
    run.parent.mkdir()
    ditmoe("convert", weights, run, "--objective", "ddpm")
    # 3. and 4. A few images, and the row.
    shared = ["--vae", vae, "--cfg-scale", 1.5, "--cfg-channels", 3, "--no-recogniser", "--features", "inception"]
    shared += ["--features-path", inception, "--reference", reference, "--cache", tmp_path / "cache"]
    shared += ["--reference-network", "inception-tensorflow"]
    shown = ditmoe("evaluate", run, "--count", 12, "--steps", 3, *shared)
    for line in (
        "guidance 1.5",
        "of VIRTUAL_imagenet256_labeled",
        "  FID",
        "  Inception Score",
    ):
        assert line in shown, line
    assert "has no spatial features; left out: sFID" in shown and "too few for 2048 features" in shown
    assert "is of inception-tensorflow is what you say" in shown and "no floor" in shown
    (folder,) = (run / "evaluations").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["evaluation"]["network_passes"] == 2 * 3 and metrics["evaluation"]["images_seen"] is None
    assert metrics["results"]["inception"]["precision"] is not None
    row = (folder / "row.md").read_text()
    assert "1.5 on 3 channels" in row and "inception" in row and (folder / "row.tex").exists()
    # 5. What ADM's evaluator takes is scored alike, and the command shows what is stored.
    again = ditmoe("evaluate", run, "--count", 12, "--steps", 3, *shared)
    assert shown.endswith(again) and "drawn in" not in again
    out = tmp_path / "scores"
    ditmoe("score", folder / "samples.npz", *shared[6:], "--out", out)
    scored = json.loads((out / "metrics.json").read_text())["results"]["inception"]
    assert scored["fid"] == metrics["results"]["inception"]["fid"]
    assert scored["inception_score"] == metrics["results"]["inception"]["inception_score"]
