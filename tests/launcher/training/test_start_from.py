"""`train.start_from` by the command: what the log, the run folder and its checkpoints say of it."""

import json
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ditmoe.launcher.commands import train
from ditmoe.launcher.commands.checkpoint import _description
from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.initialise import initialise
from ditmoe.parallel.checkpoint.folder import (
    checkpoint_path,
    newest_checkpoint,
    read_info,
    write_weights_checkpoint,
)
from tests.forked import DITMOE, packed_digits, run_forked

CONFIG = """
run: {{dir: {run}}}
launch: {{processes: 1, device: cpu, threads: 1}}
model: {{depth: 1, hidden: 16, heads: 2, patch: 4, experts: 4, experts_per_token: 2}}
data: {{sources: [{{path: {shards}}}], workers: 0}}
train: {{steps: 1, batch: 4, precision: fp32, log_every: 1, checkpoint_every: 1, start_from: {source}}}
"""


def train_app() -> typer.Typer:
    app = typer.Typer()
    app.command()(train.command)
    return app


@pytest.mark.timeout(240)
def test_a_run_starts_from_weights_once(tmp_path: Path) -> None:
    """It says what is fresh, where the rest is from, and that a resume ignores the key."""
    shards = packed_digits(tmp_path / "data")
    size = json.loads((shards / "index.json").read_text())["image_size"]
    model = ModelConfig(
        depth=1,
        hidden=16,
        heads=2,
        patch=4,
        experts=1,
        experts_per_token=1,
        image_size=size,
        channels=1,
        num_classes=3,
    )
    network = DiT(model)
    initialise(network, seed=1)
    source, run, file = tmp_path / "weights", tmp_path / "run", tmp_path / "tiny.yaml"
    write_weights_checkpoint(source, model, ObjectiveConfig(), canonical_state(network), None)
    file.write_text(CONFIG.format(run=run, shards=shards, source=source))

    refused = run_forked([*DITMOE, "train", str(file), "model.hidden=32"], tmp_path / "output")
    assert refused.returncode == 2 and not run.exists()
    assert "model.hidden = 32, found hidden = 16" in refused.stderr
    assert "Traceback" not in refused.stderr

    plan = CliRunner().invoke(train_app(), [str(file), "--dry-run"])
    assert f"# started from the ema of weights of {source}: 31 of 33 tensors are copied" in plan.output

    done = run_forked([*DITMOE, "train", str(file)], tmp_path / "output")
    assert done.returncode == 0, done.stderr
    log = (run / "log.txt").read_text()
    assert f"started from the ema of weights of {source}: " in log
    assert "started fresh: y_embedder.embedding_table.weight (all but the null class)" in log
    assert "started fresh: blocks.0.moe.gate.weight (0.0001 of its usual size)" in log
    (entry,) = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    path = newest_checkpoint(run)
    assert path is not None
    facts = read_info(path).started_from
    assert facts == entry["started_from"]
    assert facts is not None and facts["path"] == str(source) and facts["set"] == "ema"
    assert facts["fingerprint"] == read_info(source).fingerprint
    assert f"started from  {source}" in _description(read_info(path))

    shutil.copytree(source, run / "checkpoints" / "step-00000009")
    again = run_forked(
        [*DITMOE, "train", str(file), "train.steps=2", "train.start_from=nothing"], tmp_path / "output"
    )
    assert again.returncode == 0, again.stderr
    assert (
        "train.start_from = nothing is ignored: the run goes on from a checkpoint of its own"
        in (run / "log.txt").read_text()
    )
    later = read_info(checkpoint_path(run, 2))
    assert later.started_from == facts and later.step == 2
    # Weights alone in the run's folder are passed over, and it is said.
    assert "skipped a checkpoint: " in (run / "log.txt").read_text()
    assert "step-00000009: holds weights and ema without exp_avg" in (run / "log.txt").read_text()
