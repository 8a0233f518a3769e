"""Synthesised datasets: every byte follows from the plan, whoever draws it and whoever is killed on the way."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import count
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ditmoe.data.crew.leader import Crew
from ditmoe.data.making.ownership import CLAIM, write_record
from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.data.making.verify import verify
from ditmoe.data.places.reader import Shard
from ditmoe.data.shards.decode import decode_image
from ditmoe.data.shards.index import load_index
from ditmoe.data.shards.sample_table import read_table
from ditmoe.data.storage import parts as parts_module
from ditmoe.data.storage.claims import Claims
from ditmoe.launcher.commands.data.group import app
from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import checkpoint_path, read_info, write_weights_checkpoint
from ditmoe.sampling.drawing import generate as generate_module
from ditmoe.sampling.drawing.generate import generate
from ditmoe.sampling.jobs.chunks import DrawnImages
from ditmoe.sampling.jobs.workers import CPU, Workers
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER
from ditmoe.sampling.metrics.quality import FeatureScore, ScoreSettings, class_means, make_scorer
from ditmoe.sampling.metrics.training.classifier import load_classifier
from ditmoe.sampling.network.load import LoadedModel, load_model
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.synthesis import make as synthesize_module
from ditmoe.sampling.synthesis.make import drawer, finished, synthesize
from ditmoe.sampling.synthesis.of_crew import made_by
from ditmoe.sampling.synthesis.plan import Synthesis, SynthesisOptions, prepare_synthesis
from tests.forked import DITMOE, run_forked
from tests.markers import change_marker
from tests.obedient import Obedient
from tests.sampling.small_run import images_of, write_noise_classifier

MODEL = ModelConfig(
    depth=1, hidden=16, heads=2, patch=4, experts=2, experts_per_token=1, image_size=8, channels=1, num_classes=10
)
QUICK = replace(RECOGNISER, passes=1)
QUICK_FEATURES = replace(FEATURE_CLASSIFIER, passes=1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a small network of random weights, 300 digits in `shards`, and a cache of classifiers."""
    folder = tmp_path_factory.mktemp("synthesis")
    torch.manual_seed(0)
    network = DiT(MODEL)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    path = checkpoint_path(folder / "run", 0)
    write_weights_checkpoint(path, MODEL, ObjectiveConfig(), canonical_state(network), None)
    pack(open_source("digits", seed=0), folder / "shards", PackSettings(count=300))
    return folder


def options_for(shared: Path, out: Path, **changes: object) -> SynthesisOptions:
    return replace(
        SynthesisOptions(
            source=shared / "run",
            out=out,
            sampler=SamplerConfig(steps=2, seed=1),
            count=45,
            batch=8,
            shard_samples=12,
            score=ScoreSettings("classifier", classifier=QUICK),
            reference=shared / "shards",
            cache=shared / "cache",
        ),
        **changes,  # type: ignore[arg-type]
    )


def test_guidance_that_does_not_fit_is_told_before_anything_starts(shared: Path, tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path / "run", 0)
    model = MODEL.model_copy(update={"label_dropout": 0.0})
    write_weights_checkpoint(path, model, ObjectiveConfig(), canonical_state(DiT(model)), None)
    for sampler, words in (
        (SamplerConfig(steps=2, cfg_scale=2), "has no null class; expected cfg_scale = 1"),
        (SamplerConfig(steps=2, cfg_channels=3), "expected at most the model's 1 channels"),
    ):
        options = options_for(shared, tmp_path / "out", source=path, sampler=sampler)
        with pytest.raises(UserError, match=words):
            prepare_synthesis(options)
    assert not (tmp_path / "out").exists()


def contents(folder: Path) -> dict[str, bytes]:
    """Name → bytes of all that is in a finished folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def made(shared: Path, out: Path, **changes: object) -> Synthesis:
    synthesis = prepare_synthesis(options_for(shared, out, **changes))
    synthesize(synthesis, drawer(synthesis, CPU))
    return synthesis


def test_images_are_those_of_their_numbers_with_label_score_and_provenance(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    synthesis = made(shared, out, classes=(4, 7, 2))
    index = load_index(out)
    assert index == finished(synthesis) and [entry.samples for entry in index.shards] == [12, 12, 12, 9]
    assert (index.name, index.image_size, index.channels, index.num_classes) == ("run-synthetic", 8, 1, 10)
    assert sorted(contents(out)) == [
        "index.json",
        "preview.png",
        *(f"run-synthetic-{shard:05d}.tar" for shard in range(4)),
        "samples.npz",
        "synthesis.json",
    ]
    assert not verify(out).problems

    labels = torch.tensor([(4, 7, 2)[number % 3] for number in range(45)])
    model = load_model(shared / "run")
    expected = generate(model, labels, range(45), SamplerConfig(steps=2, seed=1), 8).image_NHWC.numpy()
    classifier = load_classifier(QUICK, images_of(shared / "shards"), shared / "cache", CPU)
    probability = classifier.probabilities(expected)
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(probability.argmax(1), classifier.predict(expected))
    table = read_table(out, index)
    assert table is not None and table.score_N is not None
    np.testing.assert_array_equal(table.label_N, labels.numpy())
    np.testing.assert_allclose(table.score_N, probability[np.arange(45), labels.numpy()], rtol=1e-4)

    number = 0
    for entry in index.shards:
        shard = Shard.at(out / entry.file, entry)
        for member, key in enumerate(shard.keys):
            facts = json.loads(shard.read(member, "json") or b"")
            image = decode_image("png", shard.read(member, "png") or b"", index)
            np.testing.assert_array_equal(image, expected[number])
            assert key == f"{number:08d}" and facts["number"] == number
            assert facts["label"] == labels[number] == int(shard.read(member, "cls") or b"")
            assert np.float32(facts["score"]) == table.score_N[number]
            number += 1
        shard.close()
    info = read_info(checkpoint_path(shared / "run", 0))
    assert facts["source"] == "run/step-00000000" and facts["seed"] == 1
    assert facts["provenance"]["checkpoint"] == {
        "fingerprint": info.fingerprint,
        "name": "run/step-00000000",
        "step": 0,
        "weights": "ema",
    }
    assert facts["provenance"]["sampler"]["sampler"] == "euler" and facts["provenance"]["sampler"]["steps"] == 2
    assert facts["provenance"]["scorer"]["network"] == classifier.fingerprint


ARGUMENTS = ("synthesize", "--count", "45", "--steps", "2", "--batch", "4", "--shard-samples", "12")
ARGUMENTS += ("--cfg-scale", "1.5")


def test_ranks_and_workers_write_the_bytes_of_one_process(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obedient: Obedient
) -> None:
    monkeypatch.setattr(synthesize_module, "SHARDS_PER_ROUND", 3)
    arguments = [*ARGUMENTS, "--from", str(shared / "run"), "--reference", str(shared / "shards")]
    arguments += ["--cache", str(tmp_path / "cache"), "--classes=-1,9"]
    runner = CliRunner()
    refused = runner.invoke(app, [*arguments, str(tmp_path / "two"), "--processes", "2"])
    assert isinstance(refused.exception, UserError) and "'-1' found; expected numbers from 0" in str(
        refused.exception
    )
    arguments[-1] = "--classes=0,1,2,9"
    one = runner.invoke(app, [*arguments, str(tmp_path / "one"), "--processes", "1"])
    assert one.exit_code == 0, one.output
    assert "synthesised 45 images of 8×8×1 in 4 classes: 4 shards" in one.output
    assert "  scores   median 0." in one.output and str(tmp_path / "one" / "preview.png") in one.output
    ranks = run_forked([*DITMOE, "data", *arguments, str(tmp_path / "ranks")], tmp_path / "output", processes=2)
    assert ranks.returncode == 0, ranks.stderr
    assert contents(tmp_path / "ranks") == contents(tmp_path / "one")

    led = runner.invoke(app, [*arguments, str(tmp_path / "led"), "--processes", "2"])
    assert led.exit_code == 0, led.output
    assert obedient.stages() == {"drawn": 1, "shards": 4}
    assert contents(tmp_path / "led") == contents(tmp_path / "one")
    # Repeating a finished command shows the result.
    again = runner.invoke(app, [*arguments, str(tmp_path / "led"), "--processes", "2"])
    assert again.exit_code == 0 and "synthesised 45 images" in again.output and len(obedient.made) == 5


def test_a_crew_computes_the_means_that_features_are_scored_by(
    shared: Path, tmp_path: Path, obedient: Obedient
) -> None:
    score = ScoreSettings("features", feature_classifier=QUICK_FEATURES)
    changes: dict[str, Any] = {"score": score, "cache": tmp_path / "cache", "classes": (1, 2)}
    made(shared, tmp_path / "one", **changes)
    for folder in (tmp_path / "cache").glob("class-sums-*"):
        shutil.rmtree(folder)
    led = prepare_synthesis(options_for(shared, tmp_path / "led", **changes))
    synthesize(led, drawer(led, CPU), make=made_by(cast(Crew, obedient), led))
    assert led.real is not None
    assert obedient.stages() == {"means": led.real.parts, "drawn": 1, "shards": 4}
    assert contents(tmp_path / "led") == contents(tmp_path / "one")


def all_of(synthesis: Synthesis, seconds: float) -> Callable[[], list[ForkProcess]]:
    """Starts two forked processes that draw cheap images, a chunk of 4 at a time, and wait for each other."""
    context = multiprocessing.get_context("fork")

    def draw(numbers: list[int], label_N: np.ndarray) -> DrawnImages:
        time.sleep(seconds)
        values = np.array(numbers) * 5 + label_N
        return DrawnImages(np.broadcast_to(values[:, None, None, None], (len(numbers), 8, 8, 1)).astype(np.uint8))

    def start() -> list[ForkProcess]:
        barrier, well = context.Barrier(2), context.Array("b", [1, 1])

        def work(rank: int) -> None:
            def all_well(mine: bool) -> bool:
                well[rank] = mine
                barrier.wait()
                result = bool(well[0] and well[1])
                barrier.wait()
                return result

            synthesize(synthesis, draw, Workers(rank, 2, CPU, _all_well=all_well))

        processes = [context.Process(target=work, args=(rank,)) for rank in range(2)]
        for process in processes:
            process.start()
        return processes

    return start


def files(folder: Path) -> set[Path]:
    """Every file that is there now, those on their way included."""
    return {Path(root, name) for root, _, names in os.walk(folder) for name in names}


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_time_it_goes_on_and_ends_with_the_same_bytes(
    shared: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesize_module, "SHARDS_PER_ROUND", 2)
    monkeypatch.setattr(parts_module, "WAIT_SECONDS", 0.01)

    def small_chunks(out: Path) -> Synthesis:
        synthesis = prepare_synthesis(options_for(shared, out, count=61, shard_samples=7))
        return replace(synthesis, plan={**synthesis.plan, "chunk": 4})

    whole = small_chunks(tmp_path / "whole")
    for process in all_of(whole, 0)():
        process.join(120)
        assert process.exitcode == 0
    cut = small_chunks(tmp_path / "cut")
    start = all_of(cut, 0.02)
    draws = random.Random(seed)
    there: dict[Path, int] = {}
    kills = 0
    while finished(cut) is None:
        before, new = files(tmp_path / "cut"), draws.randint(1, 5)
        processes = start()
        while len(files(tmp_path / "cut") - before) < new and any(process.is_alive() for process in processes):
            time.sleep(0.001)
        kills += any(process.is_alive() for process in processes)
        for process in processes:
            if process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
            process.join(120)
        # What is finished is not written again.
        for path in sorted((tmp_path / "cut").glob("*.tar")):
            assert there.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
        assert kills < 200
    assert kills >= 2
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_work_that_is_left_at_the_end_is_removed(shared: Path, tmp_path: Path) -> None:
    synthesis = made(shared, tmp_path / "out", score=ScoreSettings("none"), reference=None)
    before = contents(tmp_path / "out")
    assert read_table(tmp_path / "out", load_index(tmp_path / "out")).score_N is None  # type: ignore[union-attr]
    (tmp_path / "out" / "work" / "done").mkdir(parents=True)
    (tmp_path / "out" / "packing.lock").touch()
    write_record(tmp_path / "out", synthesis.record)
    assert finished(synthesis) is not None
    assert contents(tmp_path / "out") == before


def test_a_damaged_shard_or_chunk_of_an_unfinished_synthesis_is_made_anew(shared: Path, tmp_path: Path) -> None:
    made(shared, tmp_path / "whole")
    out = tmp_path / "out"
    synthesis = prepare_synthesis(options_for(shared, out))
    draw, drawn = drawer(synthesis, CPU), list[int]()

    def dies(numbers: list[int], label_N: np.ndarray) -> DrawnImages:
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(numbers[0])
        return draw(numbers, label_N)

    with pytest.raises(KeyboardInterrupt):
        synthesize(replace(synthesis, plan={**synthesis.plan, "chunk": 8}), dies)
    chunk = sorted((out / "work" / "chunks").glob("*.npz"))[1]
    chunk.write_bytes(chunk.read_bytes()[:-50])
    synthesis = replace(synthesis, plan={**synthesis.plan, "chunk": 8})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesize_module, "_finish", lambda *arguments: pytest.fail("stop here"))
        with pytest.raises(pytest.fail.Exception):
            synthesize(synthesis, draw)
    shards = sorted(out.glob("*.tar"))
    assert len(shards) == 4
    shards[1].write_bytes(b"half")
    (out / "work" / "done" / "00002.json").write_text("{")
    synthesize(synthesis, draw)
    for path in out.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    assert not verify(out).problems


def test_the_noise_classifier_of_chains_is_read_once(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(shared / "run", run)
    write_noise_classifier(run)
    read: list[object] = []
    for module in (synthesize_module, generate_module):
        plain = module.find_posterior
        monkeypatch.setattr(module, "find_posterior", lambda *args, plain=plain: read.append(args) or plain(*args))
    dlg = {"skip": 2, "samples_per_chain": 2, "initial_steps": 2}
    sampler = SamplerConfig.model_validate({"sampler": "dlg:kar1", "steps": 2, "dlg": dlg})
    options = options_for(
        shared, tmp_path / "out", source=run, sampler=sampler, count=16, batch=2, shard_samples=4
    )
    synthesis = prepare_synthesis(replace(options, score=ScoreSettings("none"), reference=None))
    synthesize(synthesis, drawer(synthesis, CPU))
    assert synthesis.store.chunks > 2 and len(read) == 1


def test_bf16_alone_is_held(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[LoadedModel] = []
    plain = synthesize_module.load_model

    def loaded(*args: object, **kwargs: object) -> LoadedModel:
        models.append(plain(*args, **kwargs))  # type: ignore[arg-type]
        return models[-1]

    monkeypatch.setattr(synthesize_module, "load_model", loaded)
    monkeypatch.setattr(LoadedModel, "_in_bfloat16", property(lambda self: pytest.fail("a copy is made")))
    made(
        shared,
        tmp_path / "out",
        sampler=SamplerConfig(steps=2, precision="bf16"),
        score=ScoreSettings("none"),
        reference=None,
    )
    assert len(models) == 1
    assert {parameter.dtype for parameter in models[0].network.parameters()} == {torch.bfloat16}


def test_features_score_by_the_distance_to_the_class(shared: Path, tmp_path: Path) -> None:
    settings = ScoreSettings("features", feature_classifier=QUICK_FEATURES)
    made(shared, tmp_path / "out", score=settings)
    real = images_of(shared / "shards")
    network = load_classifier(QUICK_FEATURES, real, shared / "cache", CPU)
    images = [batch for batch in real.read_all(32)]
    features = np.concatenate([network.features(batch.image_NHWC)["features"] for batch in images]).astype(float)
    label_N = np.concatenate([batch.label_N for batch in images])
    mean_KF = class_means(network, real, shared / "cache")
    np.testing.assert_allclose(mean_KF[3], features[label_N == 3].mean(0), rtol=1e-5)

    index = load_index(tmp_path / "out")
    table = read_table(tmp_path / "out", index)
    assert table is not None and table.score_N is not None
    drawn = [batch.image_NHWC for batch in images_of(tmp_path / "out").read_all(64)]
    described = network.features(np.concatenate(drawn))["features"].astype(float)
    distance = [
        np.sqrt(((row - mean_KF[label]) ** 2).sum()) for row, label in zip(described, table.label_N, strict=True)
    ]
    np.testing.assert_allclose(table.score_N, -np.array(distance), rtol=1e-4)


def test_a_class_without_real_images_has_no_mean(shared: Path, tmp_path: Path) -> None:
    images = np.zeros((18, 8, 8, 1), np.uint8)
    labels = np.array([0, 1, 3, 4, 5, 6, 7, 8, 9] * 2)
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    pack(open_source(str(tmp_path / "x.npz"), seed=0), tmp_path / "few", PackSettings())
    real = images_of(tmp_path / "few")
    settings = ScoreSettings("features", feature_classifier=QUICK_FEATURES)
    with pytest.raises(UserError, match=r"few: has no image of class 2 \(2\), from whose mean"):
        make_scorer(settings, real, [1, 2, 3], tmp_path / "cache", CPU)
    scorer = make_scorer(settings, real, [1, 3], tmp_path / "cache", CPU)
    assert isinstance(scorer, FeatureScore)
    part = next((tmp_path / "cache").glob("class-sums-*/part-00.npz"))
    whole = part.read_bytes()
    part.write_bytes(b"x")
    make_scorer(settings, real, [1, 3], tmp_path / "cache", CPU)
    assert part.read_bytes() == whole


def test_what_does_not_fit_is_told_before_anything_is_drawn(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(open_source("shapes", count=20, classes=3, image_size=16, seed=0), tmp_path / "shapes", PackSettings())
    none, statistics = ScoreSettings("none"), tmp_path / "adm.npz"
    np.savez(statistics, mu=np.zeros(3), sigma=np.eye(3))
    for changes, message in (
        ({"source": tmp_path / "no"}, "no such folder"),
        ({"step": 3}, "no complete checkpoint of step 3"),
        (
            {"weights": "weights", "source": shared / "run", "reference": None},
            "does not say what it was trained on",
        ),
        (
            {"reference": tmp_path / "shapes"},
            "image_size is 16, expected 8; channels is 3, expected 1; num_classes",
        ),
        ({"reference": tmp_path / "no"}, "no such folder"),
        ({"reference": statistics}, r"adm\.npz: is a file; expected shards, whose images and classes"),
        ({"score": none}, "with --score none there is nothing to score by it"),
        ({"score": ScoreSettings("features", "classifier", tmp_path)}, "expected only with --features inception"),
        ({"score": ScoreSettings("features", "inception")}, "--features inception: no file given"),
        ({"out": tmp_path / "shapes"}, "already holds a packed dataset; --overwrite replaces it"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_synthesis(replace(options_for(shared, out), **changes))  # type: ignore[arg-type]
    assert not out.exists()
    out.mkdir()
    (out / "other.tar").touch()
    with pytest.raises(UserError, match=r"holds other\.tar, which `ditmoe` did not write"):
        prepare_synthesis(options_for(shared, out, overwrite=True))
    (out / "index.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds index\.json and 1 more, which"):
        prepare_synthesis(options_for(shared, out, overwrite=True))


def test_another_synthesis_in_the_folder_stays_unless_it_is_to_be_replaced(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    synthesis = made(shared, out)
    before = contents(out)
    with pytest.raises(UserError, match="other settings: count is 20, and was 45; repeat the command as it was"):
        prepare_synthesis(options_for(shared, out, count=20))
    # Of the sampler, too, what differs alone.
    compiled = SamplerConfig(steps=2, seed=1, compile=True)
    with pytest.raises(
        UserError, match=r"other settings: sampler\.compile is true, and was null; repeat the command"
    ):
        prepare_synthesis(options_for(shared, out, sampler=compiled))
    # The same with --overwrite is the same: a killed command that had it goes on.
    assert finished(prepare_synthesis(options_for(shared, out, overwrite=True))) is not None
    assert contents(out) == before
    made(shared, out, count=20, overwrite=True)
    assert load_index(out).total == 20 and not verify(out).problems
    assert finished(synthesis) is None

    (out / "synthesis.json").write_text("{")
    with pytest.raises(UserError, match=r"synthesis\.json: could not be read"):
        prepare_synthesis(options_for(shared, out, count=20))


def dies_at(call: int) -> Callable[..., None]:
    """Stands in for `Path.unlink`, and is interrupted at a call of it."""
    calls, unlink = count(1), Path.unlink

    def stand_in(path: Path, missing_ok: bool = False) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    return stand_in


def test_a_pack_does_not_take_the_place_of_an_unfinished_synthesis(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    synthesis = made(shared, out)
    (out / "index.json").unlink()
    write_record(out, synthesis.record)
    digits = open_source("digits", seed=0)
    with pytest.raises(UserError, match="holds a synthesis that is not finished; --overwrite replaces it"):
        pack(digits, out, PackSettings(count=10))
    pack(digits, out, PackSettings(count=10, overwrite=True))
    assert finished(synthesis) is None and load_index(out).total == 10 and not verify(out).problems
    with pytest.raises(UserError, match="already holds a packed dataset"):
        prepare_synthesis(options_for(shared, out))
    made(shared, out, overwrite=True)
    assert load_index(out).total == 45 and not verify(out).problems
    # A replacement that was cut short while it cleared the folder.
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies_at(3))
        with pytest.raises(KeyboardInterrupt):
            pack(digits, out, PackSettings(count=10, overwrite=True))
    assert not (out / "index.json").exists() and list(out.glob("*.tar"))
    made(shared, out, overwrite=True)
    assert load_index(out).total == 45 and not verify(out).problems


def test_one_synthesis_at_a_time(shared: Path, tmp_path: Path) -> None:
    synthesis = prepare_synthesis(options_for(shared, tmp_path / "out"))
    with Claims(tmp_path / "out").taken(CLAIM) as claim:
        assert claim is not None
        with pytest.raises(UserError, match="another process is writing to it"):
            synthesize(synthesis, drawer(synthesis, CPU))


def test_another_scoring_network_is_noticed_at_resume(shared: Path, tmp_path: Path) -> None:
    synthesis = prepare_synthesis(options_for(shared, tmp_path / "out"))

    def die(numbers: list[int], label_N: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(synthesis, die)
    path = tmp_path / "out" / "work" / "scorer.json"
    path.write_text(path.read_text().replace('"network": "', '"network": "0'))
    with pytest.raises(UserError, match="was begun with another scoring network"):
        synthesize(synthesis, drawer(synthesis, CPU))


def test_images_that_are_not_finite_are_left_out(shared: Path, tmp_path: Path) -> None:
    synthesis = prepare_synthesis(options_for(shared, tmp_path / "out"))
    draw = drawer(synthesis, CPU)

    def overflowing(numbers: list[int], label_N: np.ndarray) -> DrawnImages:
        return draw(numbers, label_N)._replace(finite_N=np.array([number != 13 for number in numbers]))

    index = synthesize(synthesis, overflowing)
    assert [entry.samples for entry in index.shards] == [12, 11, 12, 9] and not verify(tmp_path / "out").problems
    table = read_table(tmp_path / "out", index)
    assert table is not None
    assert table.label_N.tolist() == [number % 10 for number in range(45) if number != 13]
    with closing(Shard.at(tmp_path / "out" / index.shards[1].file, index.shards[1])) as shard:
        assert "00000013" not in shard.keys and "00000014" in shard.keys


def test_names_of_others_that_cannot_be_printed_end_no_synthesis(shared: Path, tmp_path: Path) -> None:
    run = shutil.copytree(shared / "run", tmp_path / "a\x1b[31mrun")

    def rename(facts: dict[str, Any]) -> None:
        facts["dataset"]["class_names"] = [*map(str, range(9)), "ni\nne"]

    change_marker(checkpoint_path(run, 0), rename)
    options = options_for(
        shared, tmp_path / "out", source=run, score=ScoreSettings("none"), reference=None, count=10
    )
    synthesis = prepare_synthesis(options)
    index = synthesize(synthesis, drawer(synthesis, CPU))
    assert "\x1b" not in index.name and "\n" not in index.class_names[9] and "ni" in index.class_names[9]
    assert load_index(tmp_path / "out") == index


def test_what_others_have_in_the_folder_and_the_real_images_stay(shared: Path, tmp_path: Path) -> None:
    for number, name in enumerate(
        ("work/x", "samples.npz", "preview.png", "index.json", "synthesis.json", "x.partial")
    ):
        out = tmp_path / f"out-{number}"
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text('{"mine": 1}')
        for overwrite in (False, True):
            with pytest.raises(UserError, match=f"holds {name.split('/')[0]}/?, which `ditmoe` did not write"):
                prepare_synthesis(options_for(shared, out, overwrite=overwrite))
        assert [path for path in out.rglob("*") if path.is_file()] == [out / name]
    before = contents(shared / "shards")
    with pytest.raises(UserError, match=r"holds .*shards.*, which is to be read"):
        prepare_synthesis(options_for(shared, shared / "shards", overwrite=True))
    assert contents(shared / "shards") == before
