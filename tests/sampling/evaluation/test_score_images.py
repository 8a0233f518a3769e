"""Images that others drew are scored as an evaluation's own are, whatever they lie in."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from ditmoe.data.crew.leader import Crew
from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.data.shards.index import load_index, write_index
from ditmoe.model.errors import UserError
from ditmoe.sampling.evaluation.make_reference import make_reference, prepare_reference
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, evaluate_run, prepare_job
from ditmoe.sampling.evaluation.score_images import prepare_score, score_images, score_table, stored_score
from ditmoe.sampling.evaluation.scores_of_crew import reference_made_by, scores_made_by
from ditmoe.sampling.evaluation.scoring import describing as module
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER
from ditmoe.sampling.settings.config import SamplerConfig
from tests.forked import DITMOE, run_forked
from tests.obedient import Obedient
from tests.sampling.small_run import images_of, write_digits, write_run

ASIDE = ("request", "not_finite", "recogniser", "chains")
"""What the results of an evaluation have beside those of scores."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shards` of digits, and `digits.safetensors`, which stands for them."""
    home = tmp_path_factory.mktemp("home")
    write_digits(home / "shards")
    job = prepare_reference(str(home / "shards"), home / "digits.safetensors", home / "cache", recogniser=False)
    make_reference(replace(job, feature_classifier=replace(FEATURE_CLASSIFIER, passes=1)))
    return home


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ASIDE}


def test_samples_of_an_evaluation_have_its_figures(home: Path, tmp_path: Path) -> None:
    file, run = home / "digits.safetensors", write_run(tmp_path / "run")
    options = EvaluationOptions(
        run,
        SamplerConfig(steps=2),
        count=90,
        data=file,
        cache=home / "none",
        recogniser=False,
    )
    job = prepare_job(options)
    expected = evaluate_run(job)["results"]["classifier"]
    # Their samples.npz has three equal channels, and the network takes grey.
    score = prepare_score(str(job.folder / "samples.npz"), str(file), home / "none", tmp_path / "scores")
    assert stored_score(score) is None
    metrics = score_images(score)
    assert figures(metrics["results"]["classifier"]) == figures(expected)
    assert metrics["images"]["images"] == 90 and metrics["images"]["fingerprint"] == score.images.fingerprint
    assert stored_score(score) == metrics
    assert not (score.folder / "features").exists()
    assert {path.name[:5] for path in (home / "none").iterdir()} == {"file-"}
    shown = score_table(metrics, "classifier")
    assert shown[0] == f"90 images of {job.folder / 'samples.npz'}" and "against 300 real images of" in shown[1]
    assert any(line.startswith("  FID") for line in shown)


def test_npz_pictures_and_shards_are_the_same_images(home: Path, tmp_path: Path) -> None:
    pack(open_source("digits", seed=0), tmp_path / "shards", PackSettings(count=80, seed=3))
    image_NHWC = np.concatenate([batch.image_NHWC for batch in images_of(tmp_path / "shards").read_all(64)])
    np.savez(tmp_path / "images.npz", arr_0=np.repeat(image_NHWC, 3, axis=3))
    (tmp_path / "pictures").mkdir()
    for number, image_HWC in enumerate(image_NHWC):
        Image.fromarray(image_HWC[:, :, 0]).save(tmp_path / "pictures" / f"{number:06d}.png")
    found = []
    for name in ("shards", "images.npz", "pictures"):
        for reference in ("digits.safetensors", "shards"):
            job = prepare_score(
                str(tmp_path / name), str(home / reference), home / "cache", tmp_path / f"{name}-{reference}"
            )
            # Shards have labels, and real images are there to train the recogniser on.
            assert job.recogniser == (name == "shards" == reference) and job.warnings == ()
            job = replace(job, feature_classifier=replace(FEATURE_CLASSIFIER, passes=1), recogniser=False)
            result = figures(score_images(job)["results"]["classifier"])
            real = result.pop("real")
            assert real.get("made_of", real)["fingerprint"] == images_of(home / "shards").fingerprint
            found.append(result)
    assert found[0]["fid"] > 0 and found[0]["precision"] is not None
    assert all(result == found[0] for result in found)


def test_a_killed_job_goes_on_and_other_images_are_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_NHWC = np.random.default_rng(0).integers(0, 256, (600, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=image_NHWC)
    out = tmp_path / "scores"
    job = prepare_score(str(tmp_path / "x.npz"), str(home / "digits.safetensors"), tmp_path, out)
    assert job.images.parts == 3
    described, original = [], module._describe_part

    def die_at(last: int) -> None:
        def describe_part(images: Any, part: int, *others: Any) -> Any:
            if part == last:
                raise KeyboardInterrupt
            described.append(part)
            return original(images, part, *others)

        monkeypatch.setattr(module, "_describe_part", describe_part)

    die_at(1)
    with pytest.raises(KeyboardInterrupt):
        score_images(job)
    assert described == [0] and stored_score(job) is None
    die_at(3)
    metrics = score_images(job)
    assert described == [0, 1, 2] and stored_score(job) == metrics
    # Other images in the same file, and so under the same name, are other images.
    before = job.images.fingerprint
    np.savez(tmp_path / "x.npz", arr_0=image_NHWC[::-1])
    job = prepare_score(str(tmp_path / "x.npz"), str(home / "digits.safetensors"), tmp_path, out)
    assert job.images.fingerprint != before and stored_score(job) is None
    with pytest.raises(UserError, match="scores: holds scores of other images; choose another --out"):
        score_images(job)
    named = prepare_score(str(tmp_path / "x.npz"), str(home / "digits.safetensors"), tmp_path)
    assert named.folder == Path("scores") / f"x-{job.images.fingerprint[:8]}"
    (out / "metrics.json").write_text("{")
    (out / "score.json").write_text(json.dumps({"images": job.images.fingerprint}))
    with pytest.raises(UserError, match=r"metrics\.json.*delete the file"):
        stored_score(job)


def test_images_that_do_not_fit_are_refused(home: Path, tmp_path: Path) -> None:
    file = str(home / "digits.safetensors")
    colour = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "colour.npz", arr_0=colour)
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "moments.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (tmp_path / "empty").mkdir()
    for images, message in (
        ("large.npz", r"images of 16×16 pixels; expected 8×8 as .*digits\.safetensors"),
        ("moments.npz", "has no arr_0, the images; it has mu, sigma"),
        ("empty", "has no picture"),
        ("none", "no such file or folder; expected an npz file"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_score(str(tmp_path / images), file, tmp_path)
    with pytest.raises(UserError, match=r"colour\.npz: has images in colour; expected grey ones"):
        score_images(prepare_score(str(tmp_path / "colour.npz"), file, tmp_path, tmp_path / "out"))
    with pytest.raises(UserError, match="has no labels to train a classifier on"):
        prepare_score(str(tmp_path / "colour.npz"), str(tmp_path / "colour.npz"), tmp_path)
    with pytest.raises(UserError, match="--index: goes with shards"):
        prepare_score(str(tmp_path / "colour.npz"), file, tmp_path, index=tmp_path)
    shutil.copytree(home / "shards", tmp_path / "tars")
    (tmp_path / "tars" / "index.json").unlink()
    (tmp_path / "tars" / "preview.png").unlink()
    with pytest.raises(UserError, match=r"tars: .*no picture .*and no index\.json of shards"):
        prepare_score(str(tmp_path / "tars"), file, tmp_path)
    apart = prepare_score(str(tmp_path / "tars"), file, tmp_path, images_index=home / "shards")
    assert apart.images.fingerprint == images_of(home / "shards").fingerprint


def test_two_processes_score_with_one_command(home: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (600, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images)
    program = [*DITMOE, "score", str(tmp_path / "x.npz"), "--reference", str(home / "digits.safetensors")]
    program += ["--out", str(tmp_path / "two")]
    done = run_forked(program, tmp_path / "output", processes=2)
    assert done.returncode == 0, done.stderr
    assert "600 images of" in done.stdout and str(tmp_path / "two" / "metrics.json") in done.stdout
    alone = prepare_score(str(tmp_path / "x.npz"), str(home / "digits.safetensors"), tmp_path, tmp_path / "alone")
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert score_images(alone) == two


def test_a_crew_scores_as_one_process_does(
    home: Path, tmp_path: Path, obedient: Obedient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However finely the images are cut."""
    quick = replace(FEATURE_CLASSIFIER, passes=1)
    npz = npz_of(home / "shards", tmp_path / "x.npz")
    arguments = {"images": str(npz), "reference": str(home / "shards"), "cache": home / "cache"}
    alone = replace(prepare_score(**arguments, out=tmp_path / "alone"), feature_classifier=quick)
    expected = score_images(alone)
    for made in (home / "cache").glob("real-*"):
        made.rename(tmp_path / made.name)
    monkeypatch.setattr(module, "DESCRIBED_TOGETHER", 70)
    job = replace(prepare_score(**arguments, out=tmp_path / "led"), feature_classifier=quick)
    monkeypatch.chdir(tmp_path)
    metrics = score_images(job, make=scores_made_by(cast(Crew, obedient), arguments, job))
    assert metrics == expected and not (job.folder / "features").exists()
    assert obedient.stages() == {"described": 5, "real": job.real.parts}
    for images in (job.images, images_of(home / "shards")):
        for of in (1, 3, images.parts_of(70), None):
            read = [images.read(part, 13, of=of) for part in range(of or images.parts)]
            numbers = [number for batches in read for batch in batches for number in batch.number_N.tolist()]
            assert numbers == list(range(300))


def npz_of(shards: Path, path: Path) -> Path:
    np.savez(path, arr_0=np.concatenate([batch.image_NHWC for batch in images_of(shards).read_all(64)]))
    return path


def test_a_crew_makes_the_file_that_one_process_makes(home: Path, tmp_path: Path, obedient: Obedient) -> None:
    quick = replace(FEATURE_CLASSIFIER, passes=1)
    arguments = {"shards": str(home / "shards"), "out": tmp_path / "led.safetensors", "cache": tmp_path / "cache"}
    job = replace(prepare_reference(**arguments, recogniser=False), feature_classifier=quick)
    make_reference(job, make=reference_made_by(cast(Crew, obedient), {**arguments, "recogniser": False}, job))
    assert obedient.stages() == {"real": job.real.parts}
    assert job.out.read_bytes() == (home / "digits.safetensors").read_bytes()


def test_bad_pictures_are_named_and_hold_up_no_other(home: Path, tmp_path: Path) -> None:
    (real,) = images_of(home / "shards").read_all(300)
    for name in ("good", "all"):
        (tmp_path / name).mkdir()
        for number in range(60):
            if name == "all" or number not in (0, 7, 59):
                Image.fromarray(real.image_NHWC[number, :, :, 0]).save(tmp_path / name / f"{number:02d}.png")
    (tmp_path / "all" / "00.png").write_bytes(b"no picture")
    (tmp_path / "all" / "07.png").write_bytes((tmp_path / "all" / "08.png").read_bytes()[:60])
    Image.fromarray(real.image_NHWC[59, :4, :4, 0]).save(tmp_path / "all" / "59.png")
    arguments: dict[str, Any] = {"reference": str(home / "digits.safetensors"), "cache": home / "cache"}
    with pytest.raises(UserError, match=r"all/00\.png: "):
        prepare_score(str(tmp_path / "all"), **arguments, out=tmp_path / "stopped")
    (tmp_path / "all" / "00.png").rename(tmp_path / "00.png")
    with pytest.raises(UserError, match=r"all/07\.png: .*; --on-error skip leaves out"):
        score_images(prepare_score(str(tmp_path / "all"), **arguments, out=tmp_path / "stopped"))
    (tmp_path / "00.png").rename(tmp_path / "all" / "00.png")
    skipping = prepare_score(str(tmp_path / "all"), **arguments, out=tmp_path / "skipped", on_error="skip")
    metrics = score_images(skipping)
    expected = score_images(prepare_score(str(tmp_path / "good"), **arguments, out=tmp_path / "whole"))
    found, whole = (each["results"]["classifier"] for each in (metrics, expected))
    assert found["drawn_images"] == 57
    (told,) = set(found.pop("warnings")) - set(whole.pop("warnings"))
    assert re.match(r"3 of 60 images cannot be used and take no part, such as .*all/00\.png: ", told)
    assert found == whole
    images = metrics["images"]
    assert (images["images"], images["of"], images["left_out"]["samples"]) == (57, 60, 3)
    assert "59.png: a picture of shape [4, 4, 1], expected [8, 8, 1] as 01.png" in images["left_out"]["first"][2]
    assert not (tmp_path / "skipped" / "features").exists()
    for path in (tmp_path / "all").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of its 60 pictures can be used"):
        prepare_score(str(tmp_path / "all"), **arguments, on_error="skip")


def test_images_with_labels_are_recognised(home: Path, tmp_path: Path) -> None:
    quick: dict[str, Any] = {
        "feature_classifier": replace(FEATURE_CLASSIFIER, passes=1),
        "recogniser_classifier": replace(RECOGNISER, passes=1),
    }
    file, cache = tmp_path / "digits.safetensors", tmp_path / "cache"
    make_reference(replace(prepare_reference(str(home / "shards"), file, cache), **quick))
    options = EvaluationOptions(
        write_run(tmp_path / "run"), SamplerConfig(steps=2), count=90, data=file, cache=cache
    )
    evaluation = prepare_job(options)
    expected = evaluate_run(evaluation)["results"]["classifier"]["recogniser"]
    samples = evaluation.folder / "samples.npz"
    # The npz of an evaluation has the classes that were asked for.
    job = prepare_score(str(samples), str(file), cache, tmp_path / "npz")
    assert job.recogniser and score_images(job)["results"]["classifier"]["recogniser"] == expected
    assert any(line.startswith("  recognised") for line in score_table(stored_score(job) or {}, "classifier"))
    unasked = prepare_score(str(samples), str(file), cache, tmp_path / "none", recogniser=False)
    assert "recogniser" not in score_images(unasked)["results"]["classifier"]
    # Real digits are recognised better, and shards say which they are.
    shards = prepare_score(str(home / "shards"), str(home / "shards"), cache, tmp_path / "shards-scores")
    real = score_images(replace(shards, **quick))["results"]["classifier"]["recogniser"]
    assert real["accuracy"] > expected["accuracy"] and len(real["by_class"]) == 10
    assert real["fingerprint"] == expected["fingerprint"]
    # Labels that cannot be those classes are told, and left out.
    with np.load(samples) as stored:
        images, label_N = stored["arr_0"], stored["arr_1"]
    for wrong, why in (
        (label_N + 1, r"its labels are 1 to 10, and there are 10 classes"),
        (label_N - 1, "are -1 to"),
    ):
        np.savez(tmp_path / "wrong.npz", arr_0=images, arr_1=wrong)
        wrong_job = prepare_score(str(tmp_path / "wrong.npz"), str(file), cache, tmp_path / why[:20])
        assert not wrong_job.recogniser
        result = score_images(wrong_job)["results"]["classifier"]
        assert "recogniser" not in result and re.search(why, "\n".join(result["warnings"]))
    for odd in (label_N[:-1], label_N.astype(float)):
        np.savez(tmp_path / "odd.npz", arr_0=images, arr_1=odd)
        assert not prepare_score(str(tmp_path / "odd.npz"), str(file), cache).recogniser
    index = load_index(home / "shards")
    shutil.copytree(home / "shards", tmp_path / "renamed")
    names = (*index.class_names[:-1], "other")
    write_index(tmp_path / "renamed", index.model_copy(update={"class_names": names}))
    (told,) = prepare_score(str(tmp_path / "renamed"), str(file), cache).warnings
    assert "its classes have other names, or another order" in told
