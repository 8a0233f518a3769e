"""Evaluations against a file in place of the real images."""

import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditmoe.launcher.commands.evaluate import command
from ditmoe.launcher.commands.scoring.reference import make
from ditmoe.model.errors import UserError
from ditmoe.sampling.evaluation.make_reference import make_reference, prepare_reference
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, evaluate_run, prepare_job
from ditmoe.sampling.evaluation.results import table
from ditmoe.sampling.evaluation.run_job import stored_result
from ditmoe.sampling.evaluation.stored import key_of
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER
from ditmoe.sampling.metrics.features import Features
from ditmoe.sampling.metrics.networks import opening
from ditmoe.sampling.settings.config import SamplerConfig
from tests.sampling.small_run import images_of, write_digits, write_run

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
    assert [path.name[:5] for path in (tmp_path / "elsewhere").iterdir()] == ["file-"]
    # Without a recogniser in the file that is said, and nothing else changes.
    other = tmp_path / "plain.safetensors"
    make_reference(replace(made, real=of_images.real, out=other, recogniser=False))
    job = replace(prepare_job(options_for(run, other, tmp_path / "elsewhere")), folder=tmp_path / "third")
    metrics = evaluate_run(job)
    found = metrics["results"]["classifier"]
    assert "recogniser" not in found and found["fid"] == expected["fid"]
    assert f"{other}: has no recogniser: the share recognised is left out" in found["warnings"]
    page = (job.folder / "gallery" / "index.html").read_text()
    assert "a file of statistics without the images" in page and "nearest to drawn images can be shown" in page


class Pixels:
    """A feature network of 16 means of pixels, which says that it is Inception."""

    name = "inception"
    dimension = 16
    spatial_dimension: int | None = 5
    fingerprint = "0123456789abcdef"
    description: dict[str, Any] = {}  # as the protocol has it

    def features(self, image_NHWC: np.ndarray) -> Features:
        x_NHW = image_NHWC.mean(3) / 255
        cell_NF = x_NHW.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
        return {"features": np.sqrt(cell_NF), "spatial": cell_NF[:, :5]}


def test_an_evaluation_against_a_file_of_adm_has_the_figures_of_its_images(
    run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "load_inception", lambda path, device, resize: Pixels())
    weights, file = tmp_path / "inception.pth", tmp_path / "VIRTUAL_digits.npz"
    weights.write_bytes(b"weights")
    images = np.concatenate([batch.image_NHWC for batch in images_of(shards).read_all(64)])
    feature_NF, spatial_NF = Pixels().features(images).values()
    np.savez(
        file,
        mu=feature_NF.mean(0),
        sigma=np.cov(feature_NF, rowvar=False),
        mu_s=spatial_NF.mean(0),
        sigma_s=np.cov(spatial_NF, rowvar=False),
        arr_0=np.repeat(images, 3, axis=3),
    )
    found = []
    for reference in (shards, file):
        options = replace(
            options_for(run, reference, tmp_path / "cache"), features="inception", features_path=weights
        )
        if reference == file:
            shutil.rmtree(shards)
        job = replace(prepare_job(options), folder=tmp_path / reference.name[:3], **QUICK)
        metrics = evaluate_run(job)
        found.append(metrics["results"]["inception"])
    of_images, of_file = found
    for name in ("fid", "sfid", "precision", "recall", "kid", "precision_floor", "recall_floor"):
        assert of_file[name] == pytest.approx(of_images[name], rel=1e-9, abs=1e-12), name
    assert of_file["fid_floor"] is None and of_images["fid_floor"] > 0
    assert of_file["drawn_images"] == 90 and of_file["real_images"] is None and "recogniser" not in of_file
    told = "\n".join(table(metrics, "inception"))
    for line in (
        "against statistics of VIRTUAL_digits, in 16 features",
        "no floor",
        "left out: floors of Fréchet distances",
        "does not name the network that it is of",
        "has no recogniser: the share recognised is left out",
    ):
        assert told.count(line) >= 1, line
    page = (job.folder / "gallery" / "index.html").read_text()
    assert 'class-00000.png"' in page and "VIRTUAL_digits" in page
    assert "without the images" not in page and 'id="near"' in page  # the file has some


def test_figures_in_another_resize_stand_beside_the_first(
    run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path, device: Any, resize: str | None) -> Pixels:
        network = Pixels()
        network.fingerprint = f"{zlib.crc32(f'{path.read_bytes()!r} {resize}'.encode()):016x}"
        network.description = {"resize": resize}
        return network

    monkeypatch.setattr(opening, "load_inception", load)
    a, b = tmp_path / "a.pth", tmp_path / "b.pth"
    a.write_bytes(b"weights"), b.write_bytes(b"others")
    plain = replace(options_for(run, shards, tmp_path / "cache"), features="inception", recogniser=False)
    found: dict[str, Any] = {}
    for path, resize in ((a, None), (a, "tensorflow"), (b, None)):
        job = prepare_job(replace(plain, features_path=path, resize=resize))
        assert stored_result(job) is None
        metrics = evaluate_run(job)
        key = key_of(metrics["results"], job.request)
        assert key is not None and key not in found
        found[key] = metrics["results"][key]
        assert metrics["results"] == found and stored_result(job) == metrics
        assert table(metrics, key)[1].endswith(found[key]["network"]["fingerprint"])
    assert next(iter(found)) == "inception" and len({one["network"]["fingerprint"] for one in found.values()}) == 3
    rows = (job.folder / "row.md").read_text().splitlines()
    assert len(rows) == 2 + 3 and sum("resize tensorflow" in row for row in rows) == 1


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
