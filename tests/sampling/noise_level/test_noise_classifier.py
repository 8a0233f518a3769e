"""The noise-level classifier: that it learns, goes on where it stopped, and serves its own space alone."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.launcher.commands.noise_classifier import app
from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import CheckpointInfo, checkpoint_path, read_info, write_weights_checkpoint
from ditmoe.sampling.metrics.training.state import TrainingState
from ditmoe.sampling.network.denoiser import DdpmDenoiser
from ditmoe.sampling.noise_level import classifier as noise_classifier
from ditmoe.sampling.noise_level import training as noise_training
from ditmoe.sampling.noise_level.calibration import Predictions, calibration_figures
from ditmoe.sampling.noise_level.classifier import (
    NoiseNetwork,
    classifier_folder,
    load_noise_classifier,
    narrowed,
    space_of,
)
from ditmoe.sampling.noise_level.levels import log_uniform_levels
from ditmoe.sampling.noise_level.training import NoiseTraining, train_noise_classifier, training_dataset
from tests.markers import change_marker

MODEL = ModelConfig(depth=1, hidden=16, heads=2, patch=4, experts=0, image_size=8, channels=1, num_classes=10)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "shards"
    pack(open_source("digits", count=None, seed=0), folder, PackSettings(count=400))
    return folder


@pytest.fixture
def info(tmp_path: Path) -> CheckpointInfo:
    """A run of published weights, which does not say what it was trained on."""
    path = checkpoint_path(tmp_path / "run", 0)
    write_weights_checkpoint(path, MODEL, ObjectiveConfig(), canonical_state(DiT(MODEL)), None)
    return read_info(path)


def of_run(info: CheckpointInfo, shards: Path) -> CheckpointInfo:
    """The same as training would have written it, with its data."""
    data = {"sources": [{"path": str(shards)}]}
    facts = training_dataset(info, [str(shards)], 0).facts
    return replace(info, config=info.config | {"data": data, "seed": 0}, dataset=info.dataset | facts)


def train(info: CheckpointInfo, shards: Path, folder: Path, settings: NoiseTraining) -> dict:
    dataset = training_dataset(info, [str(shards)], 0)
    space = space_of(info, 100)._replace(data=tuple(dataset.facts["fingerprint"]))
    return train_noise_classifier(folder, dataset, space, settings, CPU)


def test_it_learns_and_is_calibrated(info, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(noise_training, "CALIBRATION_DRAWS", 1000)
    monkeypatch.setattr(noise_classifier, "WIDTHS", (16, 32, 64, 64))
    facts = train(info, shards, tmp_path / "a", NoiseTraining(steps=250))
    figures = facts["calibration"]
    assert facts["calibration_on"] == "held-out images" and figures["draws"] >= 1000
    assert figures["entropy_of_guessing"] == pytest.approx(math.log(100))
    assert figures["cross_entropy"] < 0.7 * math.log(100)
    assert figures["entropy"] == pytest.approx(figures["cross_entropy"], abs=0.3)
    assert figures["covered"]["90%"] == pytest.approx(0.9, abs=0.08)
    assert sum(row["draws"] for row in figures["by_sigma"]) == figures["draws"]

    classifier = load_noise_classifier(tmp_path / "a", space_of(info))
    assert json.loads((tmp_path / "a/classifier.json").read_text())["calibration"] == figures
    assert classifier.facts["calibration"] == figures
    with Image.open(tmp_path / "a/calibration.png") as picture:
        assert picture.size[0] > 600 and len(picture.convert("RGB").getcolors(1 << 20)) > 4
    # As a posterior: images of one level are taken for that level, to about its width.
    level_N = classifier.level_N
    assert len(level_N) == 100 and level_N[0] == 0.002 and level_N[-1] == 80
    x = (
        torch.zeros(200, 1, 8, 8)
        - 0.5
        + 10 * torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    )
    log_BN = classifier(x, torch.zeros(200, dtype=torch.int64))
    torch.testing.assert_close(log_BN.exp().sum(1), torch.ones(200, dtype=torch.float64))
    median = level_N[log_BN.argmax(1)].median().item()
    assert 7 < median < 14


def test_it_goes_on_where_it_stopped(info, shards, tmp_path, monkeypatch):
    """Whatever it had kept last, and on any number of threads: all files are those of an undisturbed training."""
    settings = NoiseTraining(steps=12, batch=20)
    monkeypatch.setattr("ditmoe.sampling.metrics.training.shards.SHARD_ROWS", 5)
    monkeypatch.setattr(noise_training, "TELL_EVERY", 5)
    monkeypatch.setattr(noise_training, "CALIBRATION_DRAWS", 50)
    train(info, shards, tmp_path / "whole", settings)
    monkeypatch.setattr("ditmoe.sampling.metrics.training.state.KEEP_SECONDS", 0.0)
    monkeypatch.setattr("ditmoe.sampling.metrics.training.state.KEEP_SHARE", 0)
    seen = []

    def killed(self, step, more):
        keep(self, step, more)
        seen.append(step)
        if step in (3, 7, 12):
            raise KeyboardInterrupt

    keep = TrainingState.keep
    monkeypatch.setattr(TrainingState, "keep", killed)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with pytest.raises(KeyboardInterrupt):
                train(info, shards, tmp_path / "cut", settings)
            assert not (tmp_path / "cut/classifier.safetensors").exists()
        train(info, shards, tmp_path / "cut", settings)
    finally:
        torch.set_num_threads(before)
    assert seen == list(range(1, 13)) and not (tmp_path / "cut/training.safetensors").exists()
    for name in ("classifier.safetensors", "classifier.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_space_is_refused(info, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(noise_training, "CALIBRATION_DRAWS", 20)
    folder = tmp_path / "run/noise-classifier"
    with pytest.raises(UserError, match=r"no noise-level classifier.*ditmoe noise-classifier train .*run"):
        load_noise_classifier(folder, space_of(info))
    train(info, shards, folder, NoiseTraining(steps=1, batch=20))
    space = space_of(info)
    load_noise_classifier(folder, space._replace(sigma_min=0.001, sigma_max=100.0))
    for change, message in [
        ({"shape": (4, 32, 32)}, r"shape \[1, 8, 8\], expected \[4, 32, 32\]"),
        ({"objective": "ddpm"}, "objective rectified_flow, expected ddpm"),
        ({"data": ("f" * 64,)}, "data .*, expected that of the run, ffff"),
        ({"sigma_min": 0.01}, "σ from 0.002 to 80, expected within the denoiser's range, 0.01 to 80"),
        ({"sigma_max": 50.0}, "expected within .* 0.002 to 50"),
    ]:
        with pytest.raises(UserError, match=message):
            load_noise_classifier(folder, space._replace(**change))
    path = folder / "classifier.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="unreadable noise-level classifier"):
        load_noise_classifier(folder, space)


def test_the_data_must_be_that_of_the_run(info, shards, tmp_path):
    with pytest.raises(UserError, match="does not say what it was trained on"):
        training_dataset(info)
    run = of_run(info, shards)
    assert training_dataset(run, workers=0).facts["fingerprint"] == run.dataset["fingerprint"]
    other = tmp_path / "other"
    pack(open_source("digits", count=None, seed=1), other, PackSettings(count=300))
    with pytest.raises(UserError, match=r"other data than .* was trained on"):
        training_dataset(run, [str(other)])


def test_a_checkpoint_starts_no_command(info, shards, tmp_path):
    run = of_run(info, shards)
    command = f"pipe:touch {tmp_path}/OWNED; cat {shards}/{{}}"
    write_weights_checkpoint(tmp_path / "copied", MODEL, ObjectiveConfig(), canonical_state(DiT(MODEL)), None)

    def tamper(facts):
        facts["config"]["data"] = {"sources": [{"path": command}]}
        facts["dataset"] |= run.dataset

    change_marker(tmp_path / "copied", tamper)
    result = CliRunner().invoke(app, ["train", str(tmp_path / "copied"), "--steps", "1", "--workers", "0"])
    assert isinstance(result.exception, UserError)
    assert "a command, which is never started on a checkpoint's word; name the source with --data" in str(
        result.exception
    )
    assert not (tmp_path / "OWNED").exists()
    # The user's own word is another thing.
    assert training_dataset(read_info(tmp_path / "copied"), [command], 0).facts["fingerprint"]
    assert (tmp_path / "OWNED").exists()


def test_space(info):
    space = space_of(info)
    assert space.shape == (1, 8, 8) and (space.sigma_min, space.sigma_max, space.levels) == (0.002, 80.0, 1000)
    ddpm = space_of(replace(info, config=info.config | {"objective": {"kind": "ddpm"}}))
    denoiser = DdpmDenoiser(lambda x, t, label: x, 10)
    assert (ddpm.sigma_min, ddpm.sigma_max) == (denoiser.sigma_min, denoiser.sigma_max)
    assert narrowed(space, 0.01, None)[3:5] == (0.01, 80.0)
    for low, high in ((0.001, None), (None, 90.0), (3.0, 2.0)):
        with pytest.raises(UserError, match=r"expected a range within the denoiser's, 0\.002 to 80"):
            narrowed(space, low, high)


@pytest.mark.parametrize("size", [2, 4, 7, 8, 28, 32, 64, 100])
@pytest.mark.parametrize("channels", [1, 4])
def test_the_network_takes_any_size(size, channels):
    network = NoiseNetwork(channels, size, 30)
    assert network(torch.randn(3, channels, size, size)).shape == (3, 30)
    if size == 32:  # the published one: 4×4 cells of 256 channels
        assert network.head.in_features == 4096 and sum(type(m) is torch.nn.AvgPool2d for m in network.body) == 3


def test_figures_of_a_posterior_that_is_known():
    """Levels drawn from the posterior itself are calibrated; those of a posterior too sure of itself are not."""
    generator = torch.Generator().manual_seed(0)
    level_N = log_uniform_levels(0.01, 10.0, 60)
    score_BN = -((torch.arange(60.0) - torch.randint(60, (5000, 1), generator=generator)) ** 2) / 40
    log_BN = score_BN.double().log_softmax(1)
    level_B = log_BN.exp().multinomial(1, generator=generator)[:, 0]
    good = calibration_figures(Predictions(log_BN, level_B), level_N)
    assert good["cross_entropy"] == pytest.approx(good["entropy"], abs=0.03)
    assert good["covered"]["50%"] == pytest.approx(0.5, abs=0.04)
    assert good["covered"]["90%"] == pytest.approx(0.9, abs=0.03)
    sure = calibration_figures(Predictions((9 * log_BN).log_softmax(1), level_B), level_N)
    assert sure["cross_entropy"] > sure["entropy"] + 1 and sure["covered"]["90%"] < 0.6


def test_command(info, shards, monkeypatch):
    monkeypatch.setattr(noise_training, "CALIBRATION_DRAWS", 50)
    run = info.path.parent.parent
    arguments = ["train", str(run), "--data", str(shards), "--steps", "3", "--batch", "20", "--workers", "0"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "σ from 0.002 to 80 in 1,000 levels" in first.output and "step 3 of 3" in first.output
    assert (classifier_folder(info) / "classifier.safetensors").is_file()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0 and "step 3" not in again.output and "cross-entropy" in again.output
    other = CliRunner().invoke(app, [*arguments, "--seed", "1"])
    assert isinstance(other.exception, UserError) and "other settings" in str(other.exception)
    assert CliRunner().invoke(app, [*arguments, "--seed", "1", "--overwrite"]).exit_code == 0
