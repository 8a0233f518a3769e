"""`ditmoe.load` and what it gives: the images of `ditmoe sample`, in the forms that people want."""

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner

import ditmoe
from ditmoe.launcher.commands import sample
from ditmoe.launcher.commands.convert import command as convert
from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.weights.published import PublishedWeights, save_published
from ditmoe.parallel.checkpoint.folder import newest_checkpoint, read_weights
from ditmoe.parallel.start.begin import check_start
from ditmoe.parallel.start.source import Start
from ditmoe.sampling.exchange.hub import local_folder
from ditmoe.sampling.integrators.few_steps import noise_warnings
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import (
    CHAIN_PREFIX,
    SAMPLE_STEPS,
    IntegratorName,
    SamplerName,
    sample_steps,
)
from tests.sampling.exchange.test_hub import NAME, cache, put
from tests.sampling.small_run import MODEL, write_checkpoint, write_noise_classifier, write_photos, write_run

__all__ = ["cache"]  # a fixture


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_run(tmp_path_factory.mktemp("model") / "run")
    write_noise_classifier(path)
    return path


@pytest.fixture(scope="module")
def model(run: Path) -> ditmoe.Model:
    return ditmoe.load(run, device="cpu")


def drawn_by_command(run: Path, *options: str) -> NDArray[np.uint8]:
    """The array that `ditmoe sample` writes."""
    app, out = typer.Typer(), run / "by-command.npy"
    app.command()(sample.command)
    out.unlink(missing_ok=True)
    done = CliRunner().invoke(app, [str(run), "--device", "cpu", "--out", str(out), *options])
    assert done.exit_code == 0, done.output + str(done.exception)
    images: NDArray[np.uint8] = np.load(out)
    return images


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["--steps=3", "--count=5", "--seed=7"], {"steps": 3, "count": 5, "seed": 7}),
        (
            ["--steps=2", "--count=5", "--sampler=heun", "--cfg-scale=2", "--precision=bf16"],
            {"steps": 2, "count": 5, "sampler": "heun", "guidance": 2},
        ),
        (
            ["--steps=2", "--count=5", "--sampler=kar2", "--churn=20", "--batch=2"],
            {"steps": 2, "count": 5, "sampler": "kar2", "churn": 20.0, "batch": 2},
        ),
        (["--steps=2", "--seeds=4-5"], {"steps": 2, "seed": range(4, 6), "count": 4}),
        (["--steps=2", "--seeds=4,9", "--batch=3"], {"steps": 2, "seed": [4, 9], "batch": 3, "count": 4}),
        (
            ["--steps=2", "--count=4", "--sampler=dlg:euler", "--dlg=skip=2"],
            {"steps": 2, "count": 4, "sampler": "dlg:euler", "dlg": {"skip": 2}},
        ),
    ],
)
def test_images_are_those_of_the_command(
    run: Path, model: ditmoe.Model, options: list[str], asked: dict[str, Any]
) -> None:
    expected = drawn_by_command(run, "--classes=3,1", *options)
    chosen = ditmoe.load(run, device="cpu", precision="bf16") if "--precision=bf16" in options else model
    count = asked["count"] if isinstance(asked.get("seed", 0), int) else None
    images = chosen.sample([3, "1"], output="numpy", **{**asked, "count": count})
    assert images.shape == (asked["count"], 8, 8, 1) and images.std() > 1
    assert np.array_equal(images, expected)


@pytest.mark.parametrize("sampler", ["euler", "dpm-solver++", "heun", "dlg:euler"])
def test_steps_that_are_not_given_are_those_of_the_sampler(
    run: Path, model: ditmoe.Model, sampler: SamplerName
) -> None:
    """By the command and in Python, to the bit those of the number; a number that is given stays."""
    options = ("--count=2", f"--sampler={sampler}")
    few = drawn_by_command(run, *options)
    steps = sample_steps(sampler)
    assert steps < 250 and np.array_equal(few, drawn_by_command(run, *options, f"--steps={steps}"))
    assert not np.array_equal(few, drawn_by_command(run, *options, f"--steps={steps + 3}"))
    assert np.array_equal(few, model.sample(sampler=sampler, count=2, output="numpy"))


@pytest.mark.parametrize("kind", ["ddpm", "rectified_flow"])
def test_few_steps_follow_the_objective_and_evaluations_take_those_of_papers(kind: Any) -> None:
    objective = ObjectiveConfig(kind=kind)
    sampler: IntegratorName = "ddpm" if kind == "ddpm" else "euler"
    usual = SamplerConfig()
    assert usual.for_a_look(objective).steps == SAMPLE_STEPS[sampler] != usual.resolved(objective).steps == 250
    assert SamplerConfig(steps=250).for_a_look(objective).steps == 250


def test_no_default_leaves_noise() -> None:
    """Each sampler on its schedule, alone and after chains."""
    for name in get_args(IntegratorName):
        for prefix in ("", CHAIN_PREFIX):
            config = SamplerConfig.model_validate({"sampler": prefix + name, "tolerance": 1e-3})
            assert not noise_warnings(config.for_a_look(ObjectiveConfig())), config.sampler


def test_forms(model: ditmoe.Model) -> None:
    array = model.sample([3, 1], steps=2, output="numpy")
    pictures = model.sample([3, 1], steps=2)
    tensor = model.sample([3, 1], steps=2, output="torch")
    assert array.dtype == np.uint8 and array.shape == (2, 8, 8, 1)
    assert tensor.dtype == torch.uint8 and tensor.shape == (2, 1, 8, 8)
    assert [picture.mode for picture in pictures] == ["L", "L"]
    assert all(
        np.array_equal(np.asarray(each), whole[:, :, 0]) for each, whole in zip(pictures, array, strict=True)
    )
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert len(model.sample(steps=1)) == 10
    assert (
        ditmoe.grid(pictures, captions=["three", "one"]).tobytes()
        == ditmoe.grid(array, 2, ["three", "one"]).tobytes()
    )


def test_several_seeds_draw_each_class_with_each(model: ditmoe.Model) -> None:
    """Image 0 of each seed."""
    images = model.sample(["3", "1"], seed=range(4, 6), steps=2, output="numpy")
    assert len(images) == 4
    for place, (seed, name) in enumerate([(4, "3"), (4, "1"), (5, "3"), (5, "1")]):
        (alone,) = model.sample(name, seed=seed, steps=2, output="numpy")
        assert np.abs(alone.astype(int) - images[place]).max() <= 1  # another batch size rounds otherwise


def test_what_a_model_says_of_itself(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    model = ditmoe.load(str(tmp_path / "photos"), device="cpu")
    assert model.classes == ("cat", "dog", "garden spider")
    assert (model.image_size, model.step, model.device.type) == ((8, 8), 0, "cpu")
    assert "step 0: 1 blocks of width 16, 3 classes, 8×8, cpu>" in repr(model)
    assert len(model.sample(["Cat", 1, "garden spider"], steps=1)) == 3


def test_every_kind_of_source(run: Path, tmp_path: Path) -> None:
    """A checkpoint, a step, the weights themselves, and files of both kinds draw as the run does."""
    images = ditmoe.load(run).sample(3, steps=2, output="numpy")
    newest = newest_checkpoint(run)
    assert newest is not None
    other = write_checkpoint(tmp_path / "other", 4)
    state = {"pos_embed": DiT(MODEL).pos_embed, **read_weights(newest)}
    published = PublishedWeights(MODEL, state, objective=ObjectiveConfig(), class_names=list("abcdefghij"))
    for name in ("weights.pt", "weights.safetensors"):
        save_published(published, tmp_path / name)
        model = ditmoe.load(tmp_path / name, device="cpu")
        assert model.classes == tuple("abcdefghij") and model.step is None
        assert np.array_equal(model.sample("d", steps=2, output="numpy"), images)
    convert(run, tmp_path / "diffusers", to="diffusers")
    assert np.array_equal(ditmoe.load(tmp_path / "diffusers").sample("3", steps=2, output="numpy"), images)
    for source, options in ((newest, {}), (run, {"step": 0, "weights": "weights"})):
        assert np.array_equal(ditmoe.load(source, **options).sample(3, steps=2, output="numpy"), images)  # type: ignore[arg-type]
    assert not np.array_equal(ditmoe.load(other).sample(3, steps=2, output="numpy"), images)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"steps": 0}, r"^steps = 0: "),
        ({"guidance": -1, "sampler": "euler-nine"}, r"(?s)sampler = 'euler-nine'.*guidance = -1"),
        ({"cfg_chanels": 3}, "cfg_chanels = 3: no such key; did you mean cfg_channels[?]"),
        ({"guided": 2}, "guided = 2: "),
        ({"count": 0}, "^count = 0: expected a whole number from 1 on$"),
        ({"seed": [1, 2], "count": 3}, "count = 3 with several seeds"),
        ({"seed": [1, 2], "sampler": "dlg:euler"}, "several seeds with sampler = dlg:euler"),
        ({"output": "jpeg"}, "output = 'jpeg'"),
        ({"classes": "emu"}, "classes: 'emu' found"),
    ],
)
def test_what_cannot_be_drawn_is_one_message(model: ditmoe.Model, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ditmoe.UserError, match=message):
        model.sample(**asked)


def test_a_name_on_the_hub_is_read_out_of_its_cache(cache: Path, tmp_path: Path) -> None:
    """By `ditmoe.load` and as what a run starts from."""
    snapshot = put(cache)
    by_name, by_path = (ditmoe.load(source, device="cpu", objective="ddpm") for source in (NAME, snapshot))
    assert by_name.config == by_path.config and NAME in repr(by_name)
    with pytest.raises(ditmoe.UserError, match=r"draws 4 channels.*vae=FOLDER"):
        by_name.sample(0)
    ddpm = ObjectiveConfig(kind="ddpm")
    start = Start(Path(NAME), None, "ddpm", by_name.config, ddpm, locate=local_folder)
    (line,) = check_start(tmp_path / "run", start)
    assert line.startswith(f"started from the ema of {NAME}: ")
    with pytest.raises(ditmoe.UserError, match="HF_HUB_OFFLINE forbids"):
        ditmoe.load("some-org/other", device="cpu")


def test_what_the_weights_do_not_say_can_be_said(tmp_path: Path) -> None:
    bare = tmp_path / "bare.pt"
    save_published(PublishedWeights(MODEL, canonical_state(DiT(MODEL))), bare, bare=True)
    model = ditmoe.load(bare, model={"heads": 2, "experts_per_token": 1}, objective="rectified_flow", device="cpu")
    assert (model.config.heads, model.config.experts_per_token) == (2, 1)


def test_what_cannot_be_loaded_is_one_message(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.pt"
    save_published(PublishedWeights(MODEL, canonical_state(DiT(MODEL))), bare, bare=True)
    described = tmp_path / "described.pt"
    save_published(PublishedWeights(MODEL, canonical_state(DiT(MODEL))), described)
    for source, options, message in (
        (tmp_path / "none", {}, "none: not found"),
        (run, {"step": 9}, "no complete checkpoint of step 9"),
        (run, {"objective": "ddpm"}, "objective = ddpm: .* which says it"),
        (run, {"device": "cuda:77"}, r"device = cuda:77: not usable here"),
        (bare, {"device": "cpu"}, "the weights do not say heads"),
        (described, {"device": "cpu"}, "objective: .* does not say it"),
        (described, {"step": 3, "device": "cpu"}, "step = 3: .* is no run"),
    ):
        with pytest.raises(ditmoe.UserError, match=message):
            ditmoe.load(source, **options)  # type: ignore[arg-type]


def test_the_import_loads_nothing_of_size() -> None:
    program = (
        "import sys, ditmoe; ditmoe.__version__; dir(ditmoe);"
        " bad = {'torch', 'numpy', 'pydantic', 'PIL'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert {"load", "Model", "grid", "UserError", "__version__"} <= set(dir(ditmoe))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        ditmoe.laod  # type: ignore[attr-defined]  # noqa: B018
