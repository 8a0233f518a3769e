"""An evaluation of a run folder, from the options to the metrics, with a small network of random weights."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.launcher import cli
from ditmoe.launcher.commands.evaluate import command
from ditmoe.launcher.training.best import evaluated
from ditmoe.launcher.training.evaluations import stored_evaluations
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import checkpoint_path, read_info
from ditmoe.parallel.checkpoint.marker import MARKER
from ditmoe.sampling.evaluation.job import Job
from ditmoe.sampling.evaluation.measures import Measures
from ditmoe.sampling.evaluation.of_run import (
    EvaluationOptions,
    ModelOfJob,
    default_cache,
    drawer,
    evaluate_run,
    prepare_job,
    prepare_jobs,
)
from ditmoe.sampling.evaluation.results import table
from ditmoe.sampling.evaluation.run_job import stored_result
from ditmoe.sampling.evaluation.stored import key_of
from ditmoe.sampling.integrators.samplers import planned_nfe
from ditmoe.sampling.jobs.chunks import ChunkStore
from ditmoe.sampling.jobs.workers import Workers
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER
from ditmoe.sampling.metrics.reference import ReferenceImages
from ditmoe.sampling.metrics.training.classifier import Trainings
from ditmoe.sampling.network.load import LoadedModel
from ditmoe.sampling.noise_level.classifier import (
    classifier_folder,
)
from ditmoe.sampling.settings.config import SamplerConfig
from tests.markers import change_marker
from tests.sampling.small_run import images_of, write_digits, write_noise_classifier, write_run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "shards")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def options_for(run: Path, shards: Path | None) -> EvaluationOptions:
    return EvaluationOptions(
        source=run,
        sampler=SamplerConfig(steps=2, seed=1),
        count=20,
        batch=8,
        data=shards,
        recogniser=False,
        cache=run / "cache",
    )


def test_evaluations_are_those_that_each_image_took(run: Path, shards: Path) -> None:
    options = replace(options_for(run, shards), sampler=SamplerConfig(sampler="rk45", tolerance=0.008, seed=1))
    job = prepare_job(options)
    assert "-rk45-0.008-cfg-1-" in job.folder.name
    numbers = list(range(8))
    drawn = drawer(job, ModelOfJob(torch.device("cpu")))(numbers, job.evaluation.labels_of(numbers))
    assert drawn.nfe_N is not None and (drawn.nfe_N % 6 == 2).all()
    assert len(set(drawn.nfe_N.tolist())) > 1  # each its own
    assert planned_nfe(job.evaluation.sampler) is None


def test_a_run_is_evaluated_once(run: Path, shards: Path) -> None:
    job = replace(prepare_job(options_for(run, shards)), feature_classifier=replace(FEATURE_CLASSIFIER, passes=1))
    assert job.folder.parent == run / "evaluations"
    metrics = evaluate_run(job)
    assert metrics == stored_result(job)
    # What keeping the best checkpoints by this figure goes by.
    found = evaluated(run / "evaluations", "fid", [checkpoint_path(run, 0)])
    assert found == {0: metrics["results"]["classifier"]["fid"]}
    assert metrics["evaluation"]["sampler"]["sampler"] == "euler"  # of a rectified flow
    assert metrics["evaluation"]["objective"] == {"kind": "rectified_flow"}
    assert metrics["evaluation"]["nfe"] == 2
    assert metrics["evaluation"]["device"] == (
        "cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    )
    with np.load(job.folder / "samples.npz") as samples:
        first = samples["arr_0"]
    # The same images, drawn in another batch and chunk.
    other = replace(job, folder=run / "again", batch=20, chunk=20)
    evaluate_run(other)
    with np.load(other.folder / "samples.npz") as samples:
        # Another batch shape changes an image by rounding of 1e-4 at most: seldom by a step of 1/255.
        assert np.abs(samples["arr_0"].astype(int) - first.astype(int)).max() <= 1


CHAINS = SamplerConfig.model_validate(
    {"sampler": "dlg:kar1", "steps": 2, "seed": 1, "dlg": {"skip": 2, "samples_per_chain": 5, "initial_steps": 2}}
)


def test_chains_are_evaluated_with_the_classifier_of_the_run(run: Path, shards: Path) -> None:
    options = replace(options_for(run, shards), sampler=CHAINS, count=18, batch=2)
    with pytest.raises(UserError, match=r"there is no noise-level classifier.*ditmoe noise-classifier train"):
        prepare_job(options)
    write_noise_classifier(run)
    with pytest.raises(UserError, match="--chunk 8: chains have 5 samples each"):
        prepare_job(replace(options, chunk=8))
    job = replace(prepare_job(options), feature_classifier=replace(FEATURE_CLASSIFIER, passes=1))
    assert "-dlg-heun-2-cfg-1-" in job.folder.name
    metrics = evaluate_run(job)
    assert metrics == stored_result(job)
    evaluation = metrics["evaluation"]
    # Three and, of the last chain, 3 of 5 samples: four starts of 3 + 20, stretches of 2, finishing in 3
    # and with Tweedie's formula.
    assert evaluation["nfe"] == (4 * 23 + 18 * 6) / 18
    assert evaluation["chunk"] == 10 and not (job.folder / "chains").exists()
    store = ChunkStore(job.folder / "chunks", 18, 10, job.evaluation.fingerprint)
    for chunk in range(2):
        kept = store.read(chunk)
        assert kept.sigma_N is not None and kept.trace_NT is not None
        later = np.flatnonzero(np.arange(len(kept.sigma_N)) % 5)  # of which the state before the stretch is known
        smallest = np.minimum(kept.trace_NT[later].min(1), kept.trace_NT[later - 1, -1])
        assert np.array_equal(kept.sigma_N[later], smallest) and kept.trace_NT.shape[1] == 2
        assert len(set(kept.label_N[:5].tolist())) == 1
    told = metrics["results"]["classifier"]["chains"]
    assert (told["chains"], told["samples_per_chain"], told["steps_per_sample"]) == (3, 5, 2)
    gallery = job.folder / "gallery"
    with Image.open(gallery / "chains.png") as picture:
        assert picture.width > 1000
    assert 'src="chains.png"' in (gallery / "index.html").read_text(encoding="utf-8")
    lines = table(metrics, "classifier")
    assert any("3 chains of 5 samples, 2 steps from one to the next" in line for line in lines)
    # With another classifier they are other images.
    shutil.rmtree(classifier_folder(read_info(checkpoint_path(run, 0))))
    write_noise_classifier(run, sigma_max=10.0)
    assert prepare_job(options).folder != job.folder


def test_what_does_not_fit_is_told_before_anything_starts(run: Path, shards: Path, tmp_path: Path) -> None:
    options = options_for(run, shards)
    with pytest.raises(UserError, match="give the folder of real images with --reference"):
        prepare_job(replace(options, data=None))
    with pytest.raises(UserError, match="expected only with --features inception"):
        prepare_job(replace(options, features_path=tmp_path / "x.pt"))
    with pytest.raises(UserError, match=r"x\.pt: no such file"):
        prepare_job(replace(options, features="inception", features_path=tmp_path / "x.pt"))
    with pytest.raises(UserError, match="no such folder"):
        prepare_job(replace(options, source=tmp_path / "nowhere"))
    pack(open_source("shapes", count=20, classes=3, image_size=16, seed=0), tmp_path / "shapes", PackSettings())
    with pytest.raises(
        UserError, match="image_size is 16, expected 8; channels is 3, expected 1; num_classes is 3, expected 10"
    ):
        prepare_job(replace(options, data=tmp_path / "shapes"))


def test_classes_of_other_names_are_warned_of_and_other_channels_refused(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    checkpoint = checkpoint_path(run, 0)
    change_marker(checkpoint, lambda facts: facts["dataset"].update(class_names=[*map(str, range(9)), "ten"]))
    job = replace(prepare_job(options_for(run, shards)), feature_classifier=replace(FEATURE_CLASSIFIER, passes=1))
    warnings = evaluate_run(job)["results"]["classifier"]["warnings"]
    assert f"class 9 is 9 in {shards} and ten in the network's training" in warnings[-2]
    assert "held-out real images only: its FID says little" in warnings[-1]  # after one pass

    def of_three_classes(facts: dict[str, Any]) -> None:
        facts["dataset"].update(class_names=["0", "1", "2"])
        facts["config"]["model"].update(channels=4, num_classes=3)

    change_marker(checkpoint, of_three_classes)
    np.savez(tmp_path / "x.npz", images=np.zeros((9, 8, 8, 4), np.uint8), labels=np.arange(9) % 3)
    pack(open_source(str(tmp_path / "x.npz"), seed=0), tmp_path / "four", PackSettings(format="npy"))
    with pytest.raises(UserError, match=r"channels is 4, and only 1 \(grey\) or 3 \(RGB\)"):
        prepare_job(options_for(run, tmp_path / "four"))


def test_the_weights_of_one_precision_are_held(run: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadedModel, "_in_bfloat16", property(lambda self: pytest.fail("a copy is made")))
    jobs = prepare_jobs(
        options_for(run, shards),
        [SamplerConfig(steps=2, precision=precision) for precision in ("bf16", "fp32")],
    )
    model = ModelOfJob(torch.device("cpu"))
    for job, dtype in zip(jobs, (torch.bfloat16, torch.float32), strict=True):
        assert {parameter.dtype for parameter in model.network(job).network.parameters()} == {dtype}
        assert model.network(job) is model.network(job)


def test_folders_that_cannot_be_made_are_one_message(run: Path, shards: Path, tmp_path: Path) -> None:
    (run / "evaluations").touch()
    options = options_for(run, shards)
    with pytest.raises(UserError, match=r"evaluations/.*: could not be made: Not a directory"):
        evaluate_run(prepare_job(options))
    with pytest.raises(UserError, match=r"evaluations/.*: could not be made"):
        command(run, count=20, processes=2, data=shards, cache=tmp_path / "cache")
    (run / "evaluations").unlink()
    with pytest.raises(UserError, match=r"evaluations/cache.*: could not be made: Not a directory"):
        evaluate_run(
            prepare_job(
                replace(options, cache=run / "checkpoints" / "step-00000000" / MARKER / "evaluations/cache")
            )
        )


def test_results_name_the_real_images_that_they_are_of(run: Path, shards: Path, tmp_path: Path) -> None:
    job = replace(prepare_job(options_for(run, shards)), feature_classifier=replace(FEATURE_CLASSIFIER, passes=1))
    evaluate_run(job)
    metrics = json.loads((job.folder / "metrics.json").read_text())
    metrics["results"]["inception"] = {"real": {"name": "others"}}
    (job.folder / "metrics.json").write_text(json.dumps(metrics))
    pack(open_source("digits", seed=0), tmp_path / "more", PackSettings(count=400, seed=1))
    more = replace(job, real=images_of(tmp_path / "more"))
    results = evaluate_run(more)["results"]
    assert results["inception"]["real"]["name"] == "others"
    # Figures against other images stand beside those that are there, and each is found by what it is of.
    assert results["classifier"] == metrics["results"]["classifier"]
    key = key_of(results, more.request)
    assert key is not None and key.startswith("classifier-") and results[key]["real"]["images"] == 400
    assert stored_result(job) == stored_result(more)
    # With fewer real images to look among it is a third result, and with the share recognised the same one.
    fewer = replace(job, neighbour_images=100)
    results = evaluate_run(fewer)["results"]
    assert len(results) == 4 and results[key_of(results, fewer.request) or ""]["neighbour_images_real"] == 100
    judged = replace(job, recogniser=True, recogniser_classifier=replace(RECOGNISER, passes=1))
    assert stored_result(judged) is None
    results = evaluate_run(judged)["results"]
    assert len(results) == 4 and "recogniser" in results["classifier"] and stored_result(job) is not None
    results.pop("inception")
    (job.folder / "metrics.json").write_text(json.dumps({**metrics, "results": results}))
    stored = list(stored_evaluations(run / "evaluations"))
    assert len({one.settings for one in stored}) == len(stored) == 3
    assert {one.features for one in stored} == {"classifier"}


def test_cache_follows_the_convention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "ditmoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "ditmoe"


def test_a_copied_run_starts_no_command_and_shows_no_secret(run: Path, shards: Path, tmp_path: Path) -> None:
    options = options_for(run, None)
    for path, reason in (
        (f"pipe:touch {tmp_path}/OWNED; cat {shards}/{{}}", "pipe:touch …: a command, which is never started"),
        ("https://user:secret@host/x?token=secret", "https://…@host/x.…: an address with a password"),
        ("simplecache::sftp://host/x", "simplecache::…, which is not opened"),
    ):

        def remember(facts: dict[str, Any], path: str = path) -> None:
            facts["config"]["data"] = {"sources": [{"path": path}]}

        change_marker(checkpoint_path(run, 0), remember)
        with pytest.raises(UserError, match=reason) as raised:
            prepare_job(options)
        assert "secret" not in str(raised.value) and str(tmp_path / "OWNED") not in str(raised.value)
    assert not (tmp_path / "OWNED").exists()


def test_the_real_images_are_decoded_once_for_all_classifiers(
    run: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are those that each trains by itself: trained on the same images in the same order."""
    passes: list[int] = []
    read_all = ReferenceImages.read_all

    def counted(images: ReferenceImages, batch: int, *more: Any) -> Any:
        passes.append(batch)
        return read_all(images, batch, *more)

    job = replace(
        prepare_job(replace(options_for(run, shards), recogniser=True)),
        feature_classifier=replace(FEATURE_CLASSIFIER, passes=0.2),
        recogniser_classifier=replace(RECOGNISER, passes=0.2),
    )
    assert isinstance(job.real, ReferenceImages)
    apart = [
        Trainings(job.real, [settings], run / "apart", torch.device("cpu")).result(settings)[1]["fingerprint"]
        for settings in (job.feature_classifier, job.recogniser_classifier)
    ]
    monkeypatch.setattr(ReferenceImages, "read_all", counted)
    (features,), recogniser = Measures().networks(job, Workers(), lambda line: None)
    assert len(passes) == 1
    assert recogniser is not None and [features.fingerprint, recogniser.fingerprint] == apart
    # One that is kept is not read for again; nor is another's images kept for it.
    for kept in job.cache.glob("classifier-residual-*"):
        kept.unlink()
    Measures().networks(job, Workers(), lambda line: None)
    assert len(passes) == 2
    Measures().networks(job, Workers(), lambda line: None)
    assert len(passes) == 2


def test_figures_do_not_tell_how_many_threads_there_were(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the command: classifiers, images in several shards of a batch, statistics, what it prints."""
    quick = {"feature_classifier": replace(FEATURE_CLASSIFIER, passes=1)}
    quick |= {"recogniser_classifier": replace(RECOGNISER, passes=0.2)}
    monkeypatch.setattr("ditmoe.sampling.evaluation.of_run.Job", partial(Job, **quick))
    monkeypatch.setattr("ditmoe.sampling.drawing.generate.SHARD_TOKENS", 8)
    before, printed, found = torch.get_num_threads(), [], []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            run = write_run(tmp_path / f"run-{threads}")
            options = ["--count=60", "--batch=8", "--steps=3", f"--reference={shards}", f"--cache={run / 'cache'}"]
            result = CliRunner().invoke(cli.app, ["evaluate", str(run), *options])
            assert result.exit_code == 0, result.output
            assert torch.get_num_threads() == threads
            printed.append(result.stdout.replace(str(run), "RUN"))
            (folder,) = (run / "evaluations").glob("step-*")
            with np.load(folder / "samples.npz") as samples:
                images = samples["arr_0"].tobytes()
            found.append((images, json.loads((folder / "metrics.json").read_text())["results"]))
    finally:
        torch.set_num_threads(before)
    assert "FID" in printed[0] and "recognised" in printed[0]
    assert printed[0] == printed[1] == printed[2]
    assert found[0] == found[1] == found[2]
