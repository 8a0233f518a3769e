"""Reading a model from a run or a checkpoint, and the `sample` command on it."""

import ctypes
import multiprocessing
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ditmoe.launcher.commands.pictures.choice import choose_classes
from ditmoe.launcher.commands.pictures.naming import picture_name
from ditmoe.launcher.commands.sample import command
from ditmoe.model.canonical import canonical_state, load_canonical
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.initialise import initialise
from ditmoe.parallel.checkpoint.folder import checkpoint_path, read_info, read_weights, write_weights_checkpoint
from ditmoe.sampling.network.load import find_checkpoint, home_of, load_model
from ditmoe.sampling.noise_level.classifier import NoiseNetwork, classifier_folder, save_noise_classifier, space_of
from ditmoe.sampling.python.choices import image_numbers
from ditmoe.sampling.settings.config import SamplerConfig
from tests.markers import change_marker

CONFIG = ModelConfig(
    depth=1, hidden=16, heads=2, patch=4, experts=2, experts_per_token=1, image_size=8, channels=1, num_classes=3
)
NAMES = ("zero", "one", "two")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with checkpoints of the steps 10 and 20, and one of step 30 that was never finished."""
    folder = tmp_path_factory.mktemp("run")
    for step in (10, 20):
        states = []
        for seed in (step, step + 1):
            network = DiT(CONFIG)
            initialise(network, seed)
            states.append(canonical_state(network))
        path = checkpoint_path(folder, step)
        path.parent.mkdir(exist_ok=True)
        write_weights_checkpoint(path, CONFIG, ObjectiveConfig(), states[0], states[1], NAMES)
        change_marker(path, lambda facts, step=step: facts.update(step=step))
    checkpoint_path(folder, 30).mkdir()
    return folder


def first_weight(seed: int) -> torch.Tensor:
    network = DiT(CONFIG)
    initialise(network, seed)
    return network.x_embedder.proj.weight


def test_the_newest_ema_is_the_default(run):
    model = load_model(run)
    assert model.info is not None and model.info.path == checkpoint_path(run, 20)
    assert torch.equal(model.network.x_embedder.proj.weight, first_weight(21))
    assert model.class_names == NAMES and model.model_config == CONFIG
    assert model.objective_config.kind == "rectified_flow"
    assert not model.network.training and not any(p.requires_grad for p in model.network.parameters())


def test_other_steps_and_weights(run):
    plain = load_model(run, "weights", step=10)
    assert torch.equal(plain.network.x_embedder.proj.weight, first_weight(10))
    alone = load_model(checkpoint_path(run, 10))
    assert torch.equal(alone.network.x_embedder.proj.weight, first_weight(11))
    assert len({plain.fingerprint, alone.fingerprint, load_model(run).fingerprint}) == 3
    assert load_model(run, step=10).fingerprint == alone.fingerprint


def test_nothing_to_load(run, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no complete checkpoint found"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="no complete checkpoint of step 30; found steps: 10, 20"):
        find_checkpoint(run, 30)
    with pytest.raises(UserError, match="is one checkpoint"):
        find_checkpoint(checkpoint_path(run, 10), 10)


def test_sample_draws_a_picture(run, capsys):
    command(run, classes="two,0", count=5, steps=3, cfg_scale=1.5, seed=4)
    path = run / "samples" / "step-00000020_euler_3steps_cfg1.5_seed4_classes-2-0_5images.png"
    with Image.open(path) as picture:
        assert picture.size == (2 + 2 * 66, 2 + 18 + 3 * 66)
    out = capsys.readouterr().out
    assert str(path) in out and "NFE 3 per image (6 network evaluations)" in out and "s per image" in out


def test_sample_to_a_file_of_ones_own(run, tmp_path, capsys):
    command(checkpoint_path(run, 10), classes="1", steps=2, sampler=None, out=tmp_path / "ones.png")
    with Image.open(tmp_path / "ones.png") as picture:
        assert picture.size == (2 + 8 * 66, 2 + 66)


def test_choosing_classes():
    assert choose_classes(None, NAMES) == [0, 1, 2]
    assert choose_classes("one, 2", NAMES) == [1, 2]
    assert choose_classes("7", ("7", "8")) == [0]  # a name comes before a number
    many = choose_classes(None, tuple(map(str, range(1000))))
    assert len(many) == 16 and many[0] == 0 and many[-1] == 937
    with pytest.raises(
        UserError, match="'three', '3' found; expected numbers from 0 to 2, or names: zero, one, two"
    ):
        choose_classes("three,1,3", NAMES)


def test_a_name_with_commas_is_one_class():
    names = ("tench, Tinca tinca", "goldfish, Carassius auratus", "tench", "a, b, c")
    assert choose_classes("goldfish, Carassius auratus,tench, Tinca tinca,tench,0", names) == [1, 0, 2, 0]
    assert choose_classes(" a, b, c ", names) == [3]
    with pytest.raises(UserError, match="'goldfish' found"):
        choose_classes("goldfish,tench", names)


def test_what_is_made_of_a_checkpoint_goes_to_its_run_or_into_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = Path(os.path.relpath(checkpoint_path(run, 10), tmp_path))
    assert home_of(relative).resolve() == run.resolve()
    assert home_of(tmp_path / "converted") == Path("converted")
    assert home_of(Path("/elsewhere/converted")) == Path("/elsewhere/converted")


def test_the_name_states_what_departs_from_the_defaults():
    config = SamplerConfig(
        sampler="ddim", ddim_eta=0.5, schedule="karras", cfg_scale=2, cfg_channels=3, precision="bf16"
    )
    name = picture_name(7, "weights", None, None, config)
    assert name == "step-00000007_ddim_250steps_schedule-karras_eta0.5_cfg2_on3channels_seed0_weights_bf16.png"


def test_the_name_states_the_settings_of_each_sampler():
    def name(**settings) -> str:
        return picture_name(7, "ema", None, None, SamplerConfig(**settings).resolved(ObjectiveConfig()))

    assert name(sampler="kar1", steps=9) == "step-00000007_heun_9steps_cfg1_seed0.png"
    assert name(sampler="kar2", steps=9) == "step-00000007_kar2_9steps_cfg1_seed0.png"
    churned = name(sampler="kar2", steps=9, churn=10, churn_noise=1, tweedie=True)
    assert churned == "step-00000007_kar2_9steps_churn10_churn-noise1_tweedie_cfg1_seed0.png"
    assert name(sampler="rk45", tolerance=1e-3) == "step-00000007_rk45_tolerance0.001_cfg1_seed0.png"
    corrected = name(sampler="reverse-diffusion", steps=9, corrector_steps=2, schedule="own")
    assert corrected == "step-00000007_reverse-diffusion_9steps_schedule-own_2corrections-snr0.16_cfg1_seed0.png"
    assert name(sampler="dpm-solver++", steps=9) == "step-00000007_dpm-solver++_9steps_cfg1_seed0.png"

    assert name(sampler="dlg:kar1", steps=9) == "step-00000007_dlg-heun_9steps_cfg1_seed0.png"
    walked = name(sampler="dlg:rk45", tolerance=1e-3, dlg={"skip": 3, "step_size": 0.5})
    assert walked == "step-00000007_dlg-rk45_tolerance0.001_step-size-0.5_skip-3_cfg1_seed0.png"
    dlg = {"skip": 3, "step_size": 0.5, "class_scales": tuple(range(1, 40)), "samples_per_chain": 7, "thin": 2}
    long = name(sampler="dlg:kar1", steps=9, dlg=dlg)
    assert len(long) < 90 and long != name(sampler="dlg:kar1", steps=9, dlg={**dlg, "thin": 3})

    # What chains start from takes the settings of its own sampler; the default is kar2.
    started = {name(sampler="dlg:kar1", steps=9, **more) for more in ({}, {"churn": 10.0}, {"churn_min": 0.3})}
    for initial, more in (
        ("ddim", {"ddim_eta": 0.5}),
        ("rk45", {"tolerance": 1e-3}),
        ("sit-sde", {"diffusion_form": "decreasing"}),
    ):
        for settings in ({}, more):
            started.add(name(sampler="dlg:kar1", steps=9, dlg={"initial": initial}, **settings))
    assert len(started) == 9
    close = {name(cfg_scale=scale) for scale in (1.2345678, 1.2345679)}
    assert sorted(close) == [
        f"step-00000007_euler_250steps_cfg{scale}_seed0.png" for scale in (1.2345678, 1.2345679)
    ]


def test_images_take_the_classes_in_turn_and_samples_of_a_chain_stand_in_its_column():
    assert image_numbers(7, 3, 1) == list(range(7))
    assert image_numbers(6, 2, 3) == [0, 3, 1, 4, 2, 5]
    # Three rows of two columns, and only two samples in a chain: the third row is of new chains.
    assert image_numbers(6, 2, 2) == [0, 2, 1, 3, 4, 6]


def test_chains_are_drawn_into_a_picture(run, tmp_path, capsys):
    out = tmp_path / "chains.png"
    with pytest.raises(UserError, match="there is no noise-level classifier"):
        command(run, sampler="dlg:kar1", out=out)
    with pytest.raises(UserError) as told:
        command(run, sampler="dlg:kar1", dlg=["skp=3", "thin", "skip=0", "step_rule=fast"])
    assert len(str(told.value).splitlines()) == 4
    assert "--dlg skp=3: no such setting; expected one of preset, step_size, step_rule" in str(told.value)
    with pytest.raises(UserError, match="expected a sampler of chains"):
        command(run, sampler="kar1", dlg=["skip=3"])
    info = read_info(checkpoint_path(run, 10))
    space = space_of(info, 30)
    classifier_folder(info).mkdir()
    classifier, generator = NoiseNetwork(space.shape[0], space.shape[1], 30), torch.Generator().manual_seed(0)
    for parameter in classifier.parameters():  # which have no values yet
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    save_noise_classifier(classifier_folder(info), classifier, space, {})
    try:
        arguments = {"sampler": "dlg:kar1", "steps": 2, "count": 6, "classes": "0,1", "out": out}
        command(run, **arguments, dlg=["skip=2", "initial=euler", "initial_steps=3"])
    finally:
        shutil.rmtree(classifier_folder(info))
    # Each column is a chain of three: (3 + 20)/3 for its start, 2 steps, 3 to finish, and one of Tweedie.
    assert "6 images, dlg:heun, 2 steps, NFE 13.6667 per image" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.height > picture.width


def test_sample_refuses_what_does_not_fit(run, tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint found"):
        command(tmp_path)
    with pytest.raises(UserError, match="cfg_channels = 2"):
        command(run, cfg_scale=2.0, cfg_channels=2)
    with pytest.raises(UserError, match="--cfg-scale inf: Input should be a finite number"):
        command(run, cfg_scale=float("inf"))
    with pytest.raises(UserError, match="--device meta: not usable here"):
        command(run, device="meta")
    with pytest.raises(UserError, match="--device nonsense: not usable here"):
        command(run, device="nonsense")
    assert not (tmp_path / "samples").exists()


def test_pictures_of_other_classes_and_counts_have_other_names():
    config = SamplerConfig(sampler="euler", schedule="own")
    assert picture_name(7, "ema", [3, 1], 12, config).endswith("_seed0_classes-3-1_12images.png")
    names = {picture_name(7, "ema", list(range(n)), None, config) for n in range(30, 60)}
    assert len(names) == 30 and max(map(len, names)) < 120


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A checkpoint of 38 MB of weights, mostly experts."""
    config = CONFIG.model_copy(update={"depth": 3, "hidden": 256, "experts": 4})
    network = DiT(config)
    initialise(network, 0)
    state = canonical_state(network)
    path = tmp_path_factory.mktemp("large") / "step-00000001"
    write_weights_checkpoint(path, config, ObjectiveConfig(), state, state, NAMES)
    return path


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_those_that_were_written_in_the_type_that_is_asked_for(large, precision):
    model = load_model(large, precision=precision)
    plain = DiT(model.model_config)
    load_canonical(plain, read_weights(large, "ema"), "test")
    plain = plain.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    expected = plain.state_dict()
    found = model.network.state_dict()
    assert list(found) == list(expected) and "pos_embed" in found
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert model.network_in(precision) is model.network


def _load_and_watch(path: Path, precision: str, sender: Any) -> None:
    """Sends the most memory of its own that loading took, what it kept, and the bytes of the weights in fp32."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).malloc_trim(0)  # memory that was free already would not be counted
    own = Path("/proc/self/status")

    def now() -> int:
        return int(re.search(r"RssAnon:\s+(\d+) kB", own.read_text())[1]) * 1024  # type: ignore[index]

    before, most, done = now(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            most[0] = max(most[0], now())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(path, precision=precision)  # type: ignore[arg-type]
    held = now() - before
    done.set()
    watcher.join()
    elements = sum(parameter.numel() for parameter in model.network.parameters())
    sender.send((max(most[0] - before, held), held, elements * 4))


@pytest.mark.parametrize(("precision", "share"), [("fp32", 1.0), ("bf16", 0.5)])
def test_loading_takes_the_memory_of_the_weights_once(large, precision, share):
    """Of a process's own memory: the pages of the files are the machine's, once for all processes."""
    load_model(large, precision=precision)  # modules are imported, and caches filled, before
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_load_and_watch, args=(large, precision, sender))
    process.start()
    assert receiver.poll(60)
    most, held, size = receiver.recv()
    process.join(60)
    assert size > 30e6
    assert 0.9 * share < held / size, "the measure sees the weights"
    assert most / size < share + 0.25, (most / size, held / size)
