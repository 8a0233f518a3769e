"""The evaluation job: resumable, shared by processes, scored; with a draw function in place of a network."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.data.shards.index import load_index, write_index
from ditmoe.data.shards.writer import ShardLimits
from ditmoe.data.storage.claims import Claims
from ditmoe.data.stream.config import SourceConfig
from ditmoe.model.errors import UserError
from ditmoe.sampling.evaluation import keeping
from ditmoe.sampling.evaluation.job import Evaluation, Job
from ditmoe.sampling.evaluation.keeping import drop_images_of_finished
from ditmoe.sampling.evaluation.results import table
from ditmoe.sampling.evaluation.run_job import default_chunk, run_job, stored_result
from ditmoe.sampling.jobs.chunks import DrawnImages
from ditmoe.sampling.jobs.workers import CPU, Workers
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER
from ditmoe.sampling.metrics.features import describe
from ditmoe.sampling.metrics.reference import ReferenceImages, open_reference
from ditmoe.sampling.metrics.training.classifier import load_classifier
from ditmoe.sampling.settings.config import SamplerConfig
from tests.forked import run_forked
from tests.sampling.small_run import images_of

NAMES = ("zero", "<b>one</b>", "../two", *map(str, range(3, 10)))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "shards"
    pack(open_source("digits", seed=0), folder, PackSettings(limits=ShardLimits(samples=300)))
    write_index(folder, load_index(folder).model_copy(update={"class_names": NAMES}))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def make_job(folder: Path, shards: Path, cache: Path, count: int = 200, **changes: Any) -> Job:
    evaluation = Evaluation(
        weights="0123456789abcdef",
        which="ema",
        step=1200,
        sampler=SamplerConfig(sampler="heun", schedule="karras", steps=20, cfg_scale=1.5, seed=3),
        count=count,
        labels=changes.pop("labels", "random"),
        num_classes=10,
    )
    return Job(
        evaluation=evaluation,
        folder=folder / "evaluations" / evaluation.id,
        real=images_of(shards),
        cache=cache,
        chunk=changes.pop("chunk", 32),
        feature_classifier=replace(FEATURE_CLASSIFIER, passes=3),
        recogniser_classifier=replace(RECOGNISER, passes=3),
        **changes,
    )


class Copyist:
    """A perfect network: image i is the i-th real digit of its class. May die in the middle."""

    def __init__(self, shards: Path, dies_after: int | None = None, noise: int = 0) -> None:
        batches = list(images_of(shards).read_all(500))
        self.images = np.concatenate([batch.image_NHWC for batch in batches])
        labels = np.concatenate([batch.label_N for batch in batches])
        self.of_class = [np.flatnonzero(labels == label) for label in range(10)]
        self.drawn: list[int] = []
        self.dies_after = dies_after
        self.noise = noise

    def __call__(self, numbers: list[int], label_N: np.ndarray) -> DrawnImages:
        if self.dies_after is not None and len(self.drawn) >= self.dies_after:
            raise KeyboardInterrupt
        self.drawn += numbers
        rows = [
            self.of_class[label][i % len(self.of_class[label])] for i, label in zip(numbers, label_N, strict=True)
        ]
        noise = np.random.default_rng(numbers[0]).integers(0, self.noise + 1, (len(rows), 8, 8, 1))
        return DrawnImages(np.clip(self.images[rows] + noise, 0, 255).astype(np.uint8))


def test_a_killed_job_goes_on_and_a_finished_one_is_read(tmp_path: Path, shards: Path, cache: Path) -> None:
    job = make_job(tmp_path, shards, cache)
    first = Copyist(shards, dies_after=90)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, first)
    assert stored_result(job) is None
    second = Copyist(shards)
    lines: list[str] = []
    metrics = run_job(job, second, log=lines.append)
    assert sorted(first.drawn + second.drawn) == list(range(200))
    assert stored_result(job) == metrics

    result = metrics["results"]["classifier"]
    assert result["drawn_images"] == 200 and result["real_images"] == 1797
    assert result["fid_floor_images_per_half"] == 898
    assert 0 < result["fid_floor"] < result["fid"]
    assert 0 <= result["fid_error"] < 1e-6
    assert result["precision"] == 1.0  # every image is a real one
    assert result["neighbour_images_drawn"] == 200 and result["neighbour_images_real"] == 1797
    assert 0.5 < result["precision_floor"] < 1 and 0.5 < result["recall_floor"] < 1
    assert result["precision_ratio"] == 1 / result["precision_floor"]
    assert result["fid_ratio"] == result["fid"] / result["fid_floor"]
    assert result["kid_subsets"] == 100 and result["kid_subset_images"] == 100
    assert abs(result["kid_floor"]) < result["kid_floor_deviation"]
    assert result["recogniser"]["accuracy"] > 0.8  # three passes only
    assert result["recogniser"]["held_out_images"] == 359
    assert result["network"]["fingerprint"] != result["recogniser"]["fingerprint"]
    evaluation = metrics["evaluation"]
    assert evaluation["nfe"] == 39 and evaluation["network_passes"] == 78 and evaluation["vae"] is None
    assert evaluation["sampler"]["seed"] == 3 and evaluation["sampler"]["precision"] == "fp32"
    assert result["real"] == {
        "name": "digits",
        "place": str(shards),
        "index": None,
        "images": 1797,
        "of": 1797,
        "choice": {},
        "fingerprint": job.real.fingerprint,
        "left_out": {"samples": 0, "shards": [], "first": []},
    }
    assert result["not_finite"] == {"images": 0, "first": []}
    assert not list((job.folder / "features").rglob("*.npz"))
    shown = "\n".join(table(metrics, "classifier"))
    assert "floor" in shown and "39 NFE" in shown and "held-out" in shown

    with np.load(job.folder / "samples.npz", allow_pickle=False) as samples:
        assert samples.files == ["arr_0", "arr_1"]
        assert samples["arr_0"].shape == (200, 8, 8, 3) and samples["arr_0"].dtype == np.uint8
        assert samples["arr_1"].tolist() == job.evaluation.labels_of(list(range(200))).tolist()
        labels = samples["arr_1"]
        expected = Copyist(shards)(list(range(200)), labels).image_NHWC
        np.testing.assert_array_equal(samples["arr_0"][..., :1], expected)

    expected_labels = np.concatenate([batch.label_N for batch in job.real.read_all(500)])
    page = (job.folder / "gallery" / "index.html").read_text()
    assert "&lt;b&gt;one&lt;/b&gt;" in page and "<b>one" not in page
    assert sorted(p.name for p in (job.folder / "gallery").iterdir())[:2] == ["class-00000.png", "class-00001.png"]
    for name in ("class-00003.png", "real-00003.png"):
        with Image.open(job.folder / "gallery" / name) as sheet:
            assert sheet.mode == "LA" and sheet.width == 6 * 50 - 2
    # Each image is a real one: it is found again, and told to be as near as a copy is.
    near = json.loads((job.folder / "gallery" / "neighbours.json").read_text())["drawn"]
    assert len(near) == 20 and [each["class"] for each in near] == [label for label in range(10) for _ in range(2)]
    for each in near:
        first = each["nearest"][0]
        assert (
            first["distance"] < 1e-3 < first["its_own_nearest"]
            and first["distance"] <= each["nearest"][1]["distance"]
        )
        assert expected_labels[first["real"]] == each["class"]
    assert "20 of 20 are nearer than half of it: they may be copies" in page and "times the floor" in page
    assert list(job.cache.rglob("gallery-*.npz"))  # once for all evaluations


def test_real_images_that_lie_elsewhere_are_shown_from_few_shards(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, log = tmp_path / "cache", tmp_path / "fetched"
    quick = {"recogniser": False, "count": 40}

    def gallery_of(name: str, real: ReferenceImages) -> tuple[Path, list[str]]:
        for kept in cache.rglob("gallery-*.npz"):
            kept.unlink()
        log.write_text("")
        job = replace(make_job(tmp_path / name, shards, cache, **quick), real=real)
        run_job(job, Copyist(shards))
        return job.folder / "gallery", [line for line in log.read_text().split() if line.endswith(".tar")]

    here, _ = gallery_of("here", images_of(shards))
    away = open_reference(SourceConfig(path=f"pipe:echo {{}} >> {log}; cat {shards}/{{}}"))
    there, fetched = gallery_of("there", away)
    pictures = {path.name: path.read_bytes() for path in here.iterdir()}
    assert {path.name: path.read_bytes() for path in there.iterdir()} == pictures
    assert "neighbours.json" in pictures and "real-00003.png" in pictures
    assert 1 < len(fetched) == len(set(fetched))

    size = max(entry.bytes for entry in load_index(shards).shards)
    monkeypatch.setattr("ditmoe.sampling.evaluation.gallery.real.MOST_FETCHED", 3 * size)
    some, fetched = gallery_of("some", away)
    near = json.loads((some / "neighbours.json").read_text())["drawn"]
    assert len(fetched) <= 3 and 0 < len(near) < 20
    page = (some / "index.html").read_text()
    assert f"the nearest ones are shown for {len(near)} of 20 drawn images" in page and 'id="near"' in page
    monkeypatch.setattr("ditmoe.sampling.evaluation.gallery.real.MOST_FETCHED", 1)
    none, fetched = gallery_of("none", away)
    assert not fetched and not (none / "neighbours.json").exists()
    assert "too little for any" in (none / "index.html").read_text()


def test_results_are_written_when_no_process_looks_for_descriptions_any_more(
    tmp_path: Path, shards: Path, cache: Path
) -> None:
    job = make_job(tmp_path, shards, cache, recogniser=False)
    seen = []

    def all_well(well: bool) -> bool:
        seen.append(((job.folder / "features").exists(), (job.folder / "metrics.json").exists()))
        return well

    run_job(job, Copyist(shards), Workers(ranks=2, _all_well=all_well))
    # At the start, when all is drawn, when all is described, and when all is written.
    assert seen == [(False, False), (False, False), (True, False), (False, True)]


def test_neighbours_are_looked_for_among_as_many_real_images_as_are_asked_for(
    tmp_path: Path, shards: Path, cache: Path
) -> None:
    job = make_job(tmp_path, shards, cache, recogniser=False, neighbour_images=400)
    result = run_job(job, Copyist(shards))["results"]["classifier"]
    assert result["neighbour_images_real"] == 400 and result["neighbour_floor_images_per_half"] == 200
    assert result["neighbour_images_drawn"] == 200 and result["precision"] < 1
    assert stored_result(replace(job, neighbour_images=None)) is None


def test_worse_images_score_worse(tmp_path: Path, shards: Path, cache: Path) -> None:
    figures = []
    for noise in (0, 255):
        job = make_job(tmp_path / str(noise), shards, cache, count=120, labels="balanced", recogniser=False)
        result = run_job(job, Copyist(shards, noise=noise))["results"]["classifier"]
        assert "recogniser" not in result
        figures.append((result["fid"], result["kid"]))
    assert figures[1][0] > 2 * figures[0][0] and figures[1][1] > 2 * figures[0][1]


def test_too_few_images_give_a_warning_and_nulls(tmp_path: Path, shards: Path, cache: Path) -> None:
    job = make_job(tmp_path, shards, cache, count=1, recogniser=False)
    result = run_job(job, Copyist(shards))["results"]["classifier"]
    assert result["fid"] is None and result["precision"] is None
    assert result["kid"] is None and result["fid_ratio"] is None
    assert [warning.split()[0] for warning in result["warnings"]] == ["fid", "kid", "precision"]
    assert "–" in "\n".join(table(stored_result(job) or {}, "classifier"))
    job = make_job(tmp_path, shards, cache, count=40, recogniser=False)
    warnings = run_job(job, Copyist(shards))["results"]["classifier"]["warnings"]
    assert warnings == ["40 drawn images are too few for 64 features: the covariance is singular, fid is biased"]


def test_other_chunks_and_other_holders_are_refused(tmp_path: Path, shards: Path, cache: Path) -> None:
    job = make_job(tmp_path, shards, cache, recogniser=False)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, Copyist(shards, dies_after=32))
    with pytest.raises(UserError, match=r"--chunk 50: .* chunks of 32 images"):
        run_job(replace(job, chunk=50), Copyist(shards))
    with (
        Claims(job.folder).taken("evaluation") as claim,
        pytest.raises(UserError, match=rf"another process is at this evaluation \(process {os.getpid()} on"),
    ):
        assert claim is not None
        run_job(job, Copyist(shards))
    run_job(replace(job, chunk=None), Copyist(shards))
    # Another request to the same images scores anew and draws nothing.
    more = replace(job, recogniser=True)
    assert stored_result(job) is not None and stored_result(more) is None
    again = Copyist(shards)
    assert "recogniser" in run_job(more, again)["results"]["classifier"]
    assert again.drawn == []


def test_the_folder_names_the_settings(tmp_path: Path, shards: Path, cache: Path) -> None:
    a = make_job(tmp_path, shards, cache).evaluation
    assert a.id.startswith("step-00001200-ema-heun-20-cfg-1.5-random-200-seed-3-")
    assert a.id == make_job(tmp_path, shards, cache).evaluation.id
    others = [
        replace(a, weights="f" * 16),
        replace(a, sampler=a.sampler.model_copy(update={"ddim_eta": 0.5})),
        replace(a, labels="balanced"),
    ]
    assert len({a.id, *(other.id for other in others)}) == 4


def test_labels_are_by_seed_and_number(tmp_path: Path, shards: Path, cache: Path) -> None:
    evaluation = make_job(tmp_path, shards, cache).evaluation
    whole = evaluation.labels_of(list(range(2000)))
    assert evaluation.labels_of([700, 3]).tolist() == [whole[700], whole[3]]
    assert np.bincount(whole, minlength=10).min() > 150
    balanced = replace(evaluation, labels="balanced")
    assert balanced.labels_of([0, 9, 10, 25]).tolist() == [0, 9, 0, 5]


def test_default_chunks_are_whole_batches_enough_for_all() -> None:
    assert default_chunk(50_000, 64, 8) == 256
    assert default_chunk(1000, 64, 2) == 64
    assert default_chunk(10, 64, 2) == 64
    assert default_chunk(50_000, 500, 1) == 500


def test_batches_and_chunks_are_not_in_the_figures(tmp_path: Path, shards: Path, cache: Path) -> None:
    results = []
    for chunk, batch, threads in ((32, 64, 1), (7, 5, 2), (200, 13, 3)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            job = make_job(tmp_path / str(chunk), shards, cache, chunk=chunk, batch=batch)
            results.append(run_job(job, Copyist(shards))["results"])
        finally:
            torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_evaluate import Copyist, make_job
from ditmoe.sampling.evaluation.run_job import run_job
from ditmoe.sampling.jobs.workers import join_workers
out, shards, cache = map(Path, sys.argv[2:])
workers = join_workers()
assert workers.ranks == 2
copyist = Copyist(shards)
run_job(make_job(out, shards, cache, chunk=8), copyist, workers)
(out / f"drawn-{workers.rank}").write_text(" ".join(map(str, copyist.drawn)))
workers.leave()
"""


def test_two_processes_score_as_one(tmp_path: Path, shards: Path, cache: Path) -> None:
    alone = run_job(make_job(tmp_path / "alone", shards, cache, chunk=8), Copyist(shards))
    program, out = tmp_path / "program.py", tmp_path / "two"
    program.write_text(PROGRAM)
    out.mkdir()
    # With statistics of their own: those that two processes make are those of one, to the last bit.
    (tmp_path / "cache").mkdir()
    for classifier in cache.glob("classifier-*"):
        shutil.copy(classifier, tmp_path / "cache")
    arguments = [str(path) for path in (program, Path(__file__).parent, out, shards, tmp_path / "cache")]
    done = run_forked(arguments, tmp_path / "output", processes=2, seconds=120)
    assert done.returncode == 0, done.stderr
    drawn = [(out / f"drawn-{rank}").read_text().split() for rank in range(2)]
    assert all(drawn) and sorted(map(int, drawn[0] + drawn[1])) == list(range(200))
    job = make_job(out, shards, cache)
    two = json.loads((job.folder / "metrics.json").read_text())
    assert two["results"] == alone["results"]


def test_images_that_are_not_finite_take_no_part_and_are_counted(
    tmp_path: Path, shards: Path, cache: Path
) -> None:
    class Overflowing(Copyist):
        """A network some of whose images are lost."""

        def __init__(self, lost: set[int]) -> None:
            super().__init__(shards)
            self.lost = lost

        def __call__(self, numbers: list[int], label_N: np.ndarray) -> DrawnImages:
            finite_N = np.array([number not in self.lost for number in numbers])
            return super().__call__(numbers, label_N)._replace(finite_N=finite_N)

    # A whole chunk of two, and one of another.
    job = make_job(tmp_path, shards, cache, count=300, chunk=2, recogniser=False)
    metrics = run_job(job, Overflowing({4, 5, 100}))
    result = metrics["results"]["classifier"]
    assert result["drawn_images"] == 297 and result["not_finite"] == {"images": 3, "first": [4, 5, 100]}
    assert "3 of 300 images are not finite and take no part, such as image 4: guidance" in "".join(
        result["warnings"]
    )
    with np.load(job.folder / "samples.npz", allow_pickle=False) as samples:
        labels = job.evaluation.labels_of([n for n in range(300) if n not in (4, 5, 100)])
        assert samples["arr_1"].tolist() == labels.tolist() and len(samples["arr_0"]) == 297
    assert stored_result(job) == metrics
    with pytest.raises(UserError, match=r"4 of 300 images are not finite, such as image 4; expected 3 at most"):
        run_job(make_job(tmp_path / "b", shards, cache, count=300, chunk=100), Overflowing({4, 5, 100, 200}))
    with pytest.raises(UserError, match=r"100 of 300 images are not finite, such as image 0"):
        run_job(make_job(tmp_path / "c", shards, cache, count=300, chunk=100), Overflowing(set(range(300))))


def test_real_images_that_cannot_be_used_are_named_in_the_metrics(
    tmp_path: Path, shards: Path, cache: Path
) -> None:
    copy = shutil.copytree(shards, tmp_path / "shards")
    tar = sorted(copy.glob("*.tar"))[0]
    tar.write_bytes(tar.read_bytes().replace(b"\x89PNG", b"\x00PNG", 1))
    skipping = open_reference(SourceConfig(path=str(copy), on_error="skip"))
    job = replace(make_job(tmp_path, shards, tmp_path / "cache", recogniser=False), real=skipping)
    result = run_job(job, Copyist(shards))["results"]["classifier"]
    assert result["real_images"] == result["real"]["images"] == 1796 and result["real"]["of"] == 1797
    left_out = result["real"]["left_out"]
    assert (
        left_out["samples"] == 1
        and "sample" in left_out["first"][0]
        and "not a readable PNG" in left_out["first"][0]
    )
    assert "1 real images cannot be used and take no part, such as" in "".join(result["warnings"])
    assert result["network"]["held_out_images"] + result["network"]["trained_on"] == 1796


@pytest.mark.parametrize("damage", ["{", "[]", '{"results": []}', '{"results": {"classifier": 3}}', "[" * 100_000])
def test_damaged_metrics_are_one_message(tmp_path: Path, shards: Path, cache: Path, damage: str) -> None:
    job = make_job(tmp_path / "run", shards, cache)
    job.folder.mkdir(parents=True)
    (job.folder / "samples.npz").touch()
    (job.folder / "metrics.json").write_text(damage)
    with pytest.raises(UserError, match=r"metrics\.json.*delete the file"):
        stored_result(job)


def folder_holds(folder: Path) -> set[str]:
    names = {path.name for path in folder.iterdir()}
    return names & {"chunks", "samples.npz", "statistics-classifier.npz"}


@pytest.mark.parametrize(
    ("keep", "left"), [("npz", {"samples.npz"}), ("statistics", {"statistics-classifier.npz"})]
)
def test_images_are_removed_when_all_is_scored(
    tmp_path: Path, shards: Path, cache: Path, keep: Any, left: set[str]
) -> None:
    whole = run_job(make_job(tmp_path / "whole", shards, cache, recogniser=False), Copyist(shards))
    job = make_job(tmp_path / "less", shards, cache, recogniser=False, keep=keep)
    with pytest.raises(KeyboardInterrupt):  # resumed as ever while it is not scored
        run_job(job, Copyist(shards, dies_after=90))
    assert folder_holds(job.folder) == {"chunks"}
    metrics = run_job(job, Copyist(shards))
    assert metrics == whole and stored_result(job) == metrics and folder_holds(job.folder) == left
    assert (job.folder / "gallery" / "index.html").exists()
    if keep == "statistics":
        images = Copyist(shards)(list(range(200)), job.evaluation.labels_of(list(range(200)))).image_NHWC
        network = load_classifier(job.feature_classifier, images_of(shards), cache, CPU)
        features_NF = describe(network, images)["features"].astype(np.float64)
        with np.load(job.folder / "statistics-classifier.npz", allow_pickle=False) as stored:
            assert int(stored["count"]) == 200
            np.testing.assert_allclose(stored["mu"], features_NF.mean(0), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(stored["sigma"], np.cov(features_NF.T), rtol=1e-8, atol=1e-9)
    # Other figures, the same ones with their file lost, and more of the same kept.
    copyist = Copyist(shards)
    with pytest.raises(UserError, match=rf"chunks were removed after it was scored \(--keep {keep}\)"):
        run_job(replace(job, recogniser=True), copyist)
    assert copyist.drawn == [] and folder_holds(job.folder) == left
    drop_images_of_finished(job.folder, "chunks")
    assert stored_result(replace(job, keep="chunks")) == metrics and folder_holds(job.folder) == left


@pytest.mark.parametrize("dies_at", ["before the note", "after the note", "in the chunks", "before the samples"])
def test_killed_while_images_are_removed(
    tmp_path: Path, shards: Path, cache: Path, dies_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, shards, cache, recogniser=False)
    metrics = run_job(job, Copyist(shards))
    job = replace(job, keep="statistics")
    (job.folder / "statistics-classifier.npz").touch()

    def die(*arguments: object, **_: object) -> None:
        if dies_at == "in the chunks":
            for path in sorted((job.folder / "chunks").iterdir())[:3]:
                path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if dies_at == "before the note":
            patched.setattr(keeping, "replacing", die)
        elif dies_at == "before the samples":
            patched.setattr(Path, "unlink", die)
        else:
            patched.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            drop_images_of_finished(job.folder, "statistics")
    assert stored_result(job) == metrics and "samples.npz" in folder_holds(job.folder)
    copyist, other = Copyist(shards), replace(job, recogniser=True, keep="chunks")
    if dies_at == "before the note":  # nothing is gone
        assert "recogniser" in run_job(other, copyist)["results"]["classifier"]
        assert copyist.drawn == []
    else:  # what is left of the chunks is no interrupted job
        with pytest.raises(UserError, match="chunks were removed"):
            run_job(other, copyist)
        assert copyist.drawn == []
        drop_images_of_finished(job.folder, "chunks")  # whatever is asked for now, what was begun is finished
        assert folder_holds(job.folder) == {"statistics-classifier.npz"}
        assert stored_result(job) == metrics


def test_images_stay_while_another_process_scores_them(tmp_path: Path, shards: Path, cache: Path) -> None:
    job = make_job(tmp_path, shards, cache, recogniser=False)
    run_job(job, Copyist(shards))
    with Claims(job.folder).taken("evaluation") as claim:
        assert claim is not None
        drop_images_of_finished(job.folder, "npz")
        assert folder_holds(job.folder) == {"chunks", "samples.npz"}
    drop_images_of_finished(job.folder, "npz")
    assert folder_holds(job.folder) == {"samples.npz"}
    drop_images_of_finished(job.folder, "statistics")  # of which there are none
    assert folder_holds(job.folder) == {"samples.npz"}
