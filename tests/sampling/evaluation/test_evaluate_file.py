"""Evaluations against a file in place of the real images."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ditmoe.launcher.commands.evaluate import command
from ditmoe.launcher.commands.reference import make
from ditmoe.model.errors import UserError
from ditmoe.sampling.evaluation.make_reference import make_reference, prepare_reference
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, evaluate_run, prepare_job
from ditmoe.sampling.evaluation.results import table
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER
from ditmoe.sampling.settings.config import SamplerConfig
from tests.sampling.small_run import write_digits, write_run

QUICK = {
    "feature_classifier": replace(FEATURE_CLASSIFIER, passes=1),
    "recogniser_classifier": replace(RECOGNISER, passes=1),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_digits(tmp_path / "shards")


def options_for(run: Path, reference: Path, cache: Path) -> EvaluationOptions:
    sampler = SamplerConfig(steps=2, seed=1)
    return EvaluationOptions(run, sampler, count=90, batch=32, data=reference, cache=cache)


def test_a_file_stands_for_the_images(run: Path, shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "digits.safetensors"
    of_images = replace(prepare_job(options_for(run, shards, tmp_path / "cache")), **QUICK)
    expected = evaluate_run(of_images)["results"]["classifier"]
    made = replace(prepare_reference(str(shards), file, tmp_path / "cache"), **QUICK)
    make_reference(made)
    # On a machine with neither the images nor a cache.
    shutil.rmtree(shards)
    job = replace(prepare_job(options_for(run, file, tmp_path / "elsewhere")), folder=tmp_path / "again")
    metrics = evaluate_run(job)
    found = metrics["results"]["classifier"]
    assert found["request"]["real"] == job.real.fingerprint != expected["request"]["real"]
    assert found["real"]["made_of"]["fingerprint"] == expected["real"]["fingerprint"]
    aside = ("request", "real")
    assert {k: v for k, v in found.items() if k not in aside} == {
        k: v for k, v in expected.items() if k not in aside
    }
    assert found["fid_floor"] is not None and found["recogniser"]["accuracy"] >= 0
    assert "against 300 real images of digits, in 64 features" in table(metrics, "classifier")[1]
    assert not (tmp_path / "elsewhere").exists()
    # Without a recogniser in the file that is said, and nothing else changes.
    other = tmp_path / "plain.safetensors"
    make_reference(replace(made, real=of_images.real, out=other, recogniser=False))
    job = replace(prepare_job(options_for(run, other, tmp_path / "elsewhere")), folder=tmp_path / "third")
    metrics = evaluate_run(job)
    found = metrics["results"]["classifier"]
    assert "recogniser" not in found and found["fid"] == expected["fid"]
    assert f"{other}: has no recogniser: the share recognised is left out" in found["warnings"]


def test_files_that_do_not_fit_are_refused_before_anything_is_drawn(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    moments, images = tmp_path / "adm.npz", tmp_path / "images.npz"
    np.savez(moments, mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(images, arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    for path, message in (
        (moments, r"features of inception, and not of classifier; give --features inception --features-path FILE"),
        (images, "has no labels to train a classifier on"),
        (tmp_path / "none.npz", "could not be read: No such file"),
        (tmp_path / "fid.pkl", "could not be read: No such file"),
    ):
        with pytest.raises(UserError, match=message):
            command(run, data=str(path))
    with pytest.raises(UserError, match=r"--on-error skip: goes with shards, and .*adm\.npz is a file"):
        prepare_job(replace(options_for(run, moments, tmp_path), on_error="skip"))
    np.savez(images, arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="image_size is 16, expected 8"):
        command(run, data=str(images), features="inception")
    assert not (run / "evaluations").exists()
    with pytest.raises(UserError, match=r"shards: exists already|expected a name that ends in"):
        make(str(shards), shards)
    assert not (tmp_path / "cache").exists()
