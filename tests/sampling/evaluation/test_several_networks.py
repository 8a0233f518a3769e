"""Several feature networks in one pass over the images: each image is read once, and each figure has its bits."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from ditmoe.data.crew.leader import Crew
from ditmoe.launcher.commands.evaluate import command
from ditmoe.model.errors import UserError
from ditmoe.sampling.evaluation.of_crew import made_by
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, evaluate_run, prepare_job
from ditmoe.sampling.evaluation.run_job import stored_result
from ditmoe.sampling.evaluation.score_images import prepare_score, score_images, stored_score
from ditmoe.sampling.evaluation.scores_of_crew import scores_made_by
from ditmoe.sampling.jobs.chunks import Chunk, ChunkStore
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER
from ditmoe.sampling.metrics.features import Features
from ditmoe.sampling.metrics.networks import opening
from ditmoe.sampling.metrics.reference import ReferenceImages
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.networks import NetworkChoice, arguments_of, choices_of
from tests.obedient import Obedient
from tests.sampling.small_run import write_digits, write_run

QUICK: dict[str, Any] = {
    "feature_classifier": replace(FEATURE_CLASSIFIER, passes=1),
    "recogniser_classifier": replace(RECOGNISER, passes=1),
}


class Cells:
    """A feature network of 16 means of pixels, raised to a power."""

    description: dict[str, Any] = {}

    def __init__(self, name: str, fingerprint: str, power: float) -> None:
        self.name, self.fingerprint, self.power = name, fingerprint * 16, power
        self.dimension = 16
        self.spatial_dimension: int | None = None
        self.dies_after: int | None = None

    def features(self, image_NHWC: np.ndarray) -> Features:
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after < 0:
                raise KeyboardInterrupt
        cell_NF = (image_NHWC.mean(3) / 255).reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
        return {"features": cell_NF**self.power}


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Cells]:
    """What stands in for those from files."""
    found = {"inception": Cells("inception", "1", 0.5), "dinov2": Cells("dinov2", "2", 1.5)}
    monkeypatch.setattr(opening, "load_inception", lambda path, device, resize: found["inception"])
    monkeypatch.setattr(opening, "load_dinov2", lambda path, device: found["dinov2"])
    return found


@pytest.fixture
def options(tmp_path: Path, networks: dict[str, Cells]) -> EvaluationOptions:
    for name in networks:
        (tmp_path / f"{name}.pt").write_bytes(name.encode())
    return EvaluationOptions(
        write_run(tmp_path / "run"),
        SamplerConfig(steps=2, seed=1),
        count=90,
        batch=32,
        chunk=30,
        data=write_digits(tmp_path / "shards"),
        cache=tmp_path / "cache",
        recogniser=False,
    )


def asked(options: EvaluationOptions, folder: Path, *names: str, **changes: Any) -> Any:
    """The job in these networks, with a cache of its own."""
    choices = [
        NetworkChoice(name, None if name == "classifier" else folder.parent / f"{name}.pt")  # type: ignore[arg-type]
        for name in names
    ]
    first = {"features": choices[0].features, "features_path": choices[0].path}
    chosen = replace(options, **first, more_networks=tuple(choices[1:]), cache=folder / "cache", **changes)
    return replace(prepare_job(chosen), folder=folder / "evaluation", **QUICK)


def test_one_pass_has_the_figures_of_single_ones_and_reads_each_image_once(
    options: EvaluationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("inception", "dinov2", "classifier")
    expected = {
        name: evaluate_run(asked(options, tmp_path / name, name, recogniser=True))["results"][name]
        for name in names
    }
    together = asked(options, tmp_path / "together", *names, recogniser=True)
    read, parts = Counter[int](), Counter[int]()
    original, of_parts = ChunkStore.read, ReferenceImages.read

    def counted(store: ChunkStore, chunk: int) -> Chunk:
        read[chunk] += 1
        return original(store, chunk)

    def counted_part(real: ReferenceImages, part: int, *arguments: Any) -> Any:
        parts[part] += 1
        return of_parts(real, part, *arguments)

    monkeypatch.setattr(ChunkStore, "read", counted)
    # The classifiers read the images to be trained on them, and are there already.
    (tmp_path / "together" / "cache").mkdir(parents=True)
    for file in (tmp_path / "classifier" / "cache").glob("classifier-*"):
        file.rename(tmp_path / "together" / "cache" / file.name)
    monkeypatch.setattr(ReferenceImages, "read", counted_part)
    metrics = evaluate_run(together)
    assert metrics["results"] == expected and [*metrics["results"]] == [*names]
    assert stored_result(together) == metrics
    assert set(parts.values()) == {1}
    # Once for the networks; the results read the shape, samples.npz and the gallery, as in a single pass.
    in_all = Counter(read)
    read.clear()
    evaluate_run(asked(options, tmp_path / "again", "inception"))
    assert in_all == read
    assert not (together.folder / "features").exists()
    assert len((together.folder / "row.md").read_text().splitlines()) == 2 + 3
    # What is kept of the real images is what single passes keep.
    for name in ("inception", "dinov2"):
        (alone,) = (tmp_path / name / "cache").glob("real-*")
        for file in alone.glob("part-*.npz"):
            assert (tmp_path / "together" / "cache" / alone.name / file.name).read_bytes() == file.read_bytes()


def test_a_killed_pass_goes_on_and_what_is_there_is_not_described_again(
    options: EvaluationOptions, networks: dict[str, Cells], tmp_path: Path
) -> None:
    expected = evaluate_run(asked(options, tmp_path / "whole", "inception", "dinov2"))["results"]
    job = asked(options, tmp_path / "killed", "inception", "dinov2")
    networks["dinov2"].dies_after = 1
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(job)
    assert stored_result(job) is None
    described = {path.name: len(list(path.glob("*.npz"))) for path in (job.folder / "features").iterdir()}
    assert described["1" * 16] == described["2" * 16] == 1
    networks["dinov2"].dies_after = None
    networks["inception"].dies_after = 2 + 5  # two chunks; the real images have 300 in batches of 64
    assert evaluate_run(job)["results"] == expected
    # A network that is asked for later describes the images alone.
    networks["inception"].dies_after = 0
    alone = asked(options, tmp_path / "later", "dinov2")
    evaluate_run(alone)
    both = asked(options, tmp_path / "later", "dinov2", "classifier")
    networks["dinov2"].dies_after = 0
    assert stored_result(alone) is not None and stored_result(both) is None
    metrics = evaluate_run(both)
    assert [*metrics["results"]] == ["dinov2", "classifier"] and metrics["results"]["dinov2"] == expected["dinov2"]


def test_images_of_others_are_scored_in_several_networks_too(
    options: EvaluationOptions, networks: dict[str, Cells], tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images)
    choices = choices_of("inception,dinov2", [f"{name}={tmp_path / name}.pt" for name in networks])
    found = []
    for name, some in (("both", choices), ("first", choices[:1]), ("second", choices[1:])):
        job = prepare_score(
            str(tmp_path / "x.npz"),
            str(options.data),
            tmp_path / "cache",
            tmp_path / name,
            features=some[0].features,
            features_path=some[0].path,
            more_networks=some[1:],
        )
        assert stored_score(job) is None
        found.append(score_images(job)["results"])
        assert stored_score(job) is not None and not (job.folder / "features").exists()
    assert found[0] == found[1] | found[2] and len(found[0]) == 2


def test_a_crew_makes_the_same_pass(
    options: EvaluationOptions, networks: dict[str, Cells], tmp_path: Path
) -> None:
    expected = evaluate_run(asked(options, tmp_path / "alone", "inception", "dinov2"))["results"]
    choices = choices_of("inception,dinov2", [f"{name}={tmp_path / name}.pt" for name in networks])
    told = replace(options, features=choices[0].features, features_path=choices[0].path, more_networks=choices[1:])
    job, crew = prepare_job(told), Obedient()
    assert evaluate_run(job, made_by(cast(Crew, crew), told, job), 2)["results"] == expected
    assert crew.stages() == {"drawn": 3, "described": 3, "real": job.real.parts}
    images = np.random.default_rng(0).integers(0, 256, (90, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images)
    found = []
    for name in ("alone", "crew"):
        arguments: dict[str, Any] = {
            "images": str(tmp_path / "x.npz"),
            "reference": str(options.data),
            "cache": tmp_path / f"cache-{name}",
            "out": tmp_path / f"scores-{name}",
            "features": choices[0].features,
            "features_path": choices[0].path,
            "more_networks": choices[1:],
        }
        scores, made = prepare_score(**arguments), Obedient()
        by = scores_made_by(cast(Crew, made), arguments, scores) if name == "crew" else None
        found.append(score_images(scores, make=by)["results"])
    assert found[0] == found[1] and set(made.stages()) == {"described", "real"}


def test_options_name_networks_and_their_files() -> None:
    path, other = Path("a=b/inception.pt"), Path("dino.safetensors")
    assert choices_of("classifier") == (NetworkChoice(),)
    assert choices_of("inception", path, "tensorflow") == (NetworkChoice("inception", path, "tensorflow"),)
    several = choices_of("dinov2,inception,classifier", [f"inception={path}", f"dinov2={other}"], "pytorch-fid")
    assert several == (
        NetworkChoice("dinov2", other),
        NetworkChoice("inception", path, "pytorch-fid"),
        NetworkChoice(),
    )
    assert choices_of("classifier,dinov2", [other])[1] == NetworkChoice("dinov2", other)
    told = arguments_of(several)
    assert told == [
        *("--features", "dinov2,inception,classifier", "--features-path", f"dinov2={other}"),
        *("--features-path", f"inception={path}", "--resize", "pytorch-fid"),
    ]
    for arguments, message in (
        (("inception,",), "is no feature network; expected one of classifier, inception, dinov2"),
        (("vgg",), "vgg is no feature network"),
        (("dinov2,dinov2",), "dinov2 is given twice"),
        (("inception,dinov2", [other]), "the file of inception or of dinov2? Expected NAME=FILE for each"),
        (("classifier", [other]), "expected only with --features inception or dinov2"),
        (("inception", [f"dinov2={other}"]), "expected only with --features dinov2"),
        (("inception", [path, path]), "a second file of inception"),
        (("dinov2", [other], "tensorflow"), "--resize tensorflow: expected only with --features inception"),
    ):
        with pytest.raises(UserError) as raised:
            choices_of(*arguments)  # type: ignore[arg-type]
        assert message in str(raised.value)


def test_the_command_shows_all_of_them(
    options: EvaluationOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str], networks: dict[str, Cells]
) -> None:
    paths = [Path(f"{name}={tmp_path / name}.pt") for name in networks]
    shared: dict[str, Any] = {"count": 90, "data": str(options.data), "cache": options.cache, "recogniser": False}
    command(options.source, **shared, steps=2, features="inception,dinov2", features_path=paths, batch=32)
    shown = capsys.readouterr().out
    assert shown.count("  FID") == 2 and "of inception 1111" in shown and "of dinov2 2222" in shown
