"""Published weights in every layout, each error that a bad file gives, and bit-exact round trips."""

import argparse
import json
import os
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ditmoe.model
from ditmoe.model.canonical import canonical_shapes, canonical_state, load_canonical
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.weights.published import PublishedWeights, load_published, read_published, save_published

State = dict[str, Tensor]

TINY: dict[str, Any] = {
    "depth": 2,
    "hidden": 32,
    "heads": 4,
    "patch": 2,
    "image_size": 8,
    "channels": 4,
    "num_classes": 10,
}
MOE = ModelConfig(**TINY, experts=3, experts_per_token=2)
QK_NORM = ModelConfig(**TINY, experts=3, experts_per_token=2, attention="qk_norm")
DENSE = ModelConfig(**TINY)
NETWORKS = {"moe": MOE, "qk_norm": QK_NORM, "dense": DENSE}


def make_state(config: ModelConfig, seed: int = 0) -> State:
    """Random weights under the published names."""
    random = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=random) for name, shape in canonical_shapes(config).items()}
    return state | {"pos_embed": DiT(config).pos_embed}


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def error_of(path: Path, **arguments: Any) -> str:
    """The one message that loading gives, which must name the file and be one line."""
    with pytest.raises(UserError) as caught:
        load_published(path, **arguments)
    text = str(caught.value)
    assert path.stem.split(".")[0] in text and "\n" not in text
    return text


LAYOUTS: dict[str, Callable[[State, State], Any]] = {
    "bare": lambda ema, model: ema,
    "ema": lambda ema, model: {"ema": ema},
    "model": lambda ema, model: {"model": ema},
    "both": lambda ema, model: {"model": model, "ema": ema},
    "training": lambda ema, model: {
        "model": {f"module.{name}": tensor for name, tensor in model.items()},
        "ema": ema,
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-S/2-8E2A", num_classes=10),
    },
    "wrapped": lambda ema, model: {f"module.{name}": tensor for name, tensor in ema.items()},
    "no ema": lambda ema, model: {"ema": None, "model": ema},
    "parameters": lambda ema, model: {name: torch.nn.Parameter(tensor) for name, tensor in ema.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_every_layout_of_pt(tmp_path: Path, layout: str, network: str, archive: bool) -> None:
    config = NETWORKS[network]
    state = make_state(config)
    path = tmp_path / "weights.pt"
    torch.save(LAYOUTS[layout](state, make_state(config, seed=1)), path, _use_new_zipfile_serialization=archive)
    found, loaded = load_published(path, config=config)
    assert found == config
    assert_equal(loaded, state)


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_a_network_computes_the_same_with_loaded_weights(tmp_path: Path, config: ModelConfig) -> None:
    original = DiT(config)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.normal_(0, 0.1)
    torch.save(canonical_state(original), tmp_path / "weights.pt")
    found, state = load_published(tmp_path / "weights.pt", config=config)
    copy = DiT(found)
    load_canonical(copy, state, "weights.pt")
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([3, 10]))
    with torch.no_grad():
        assert torch.equal(copy(*inputs), original(*inputs))


def test_other_set_on_request(tmp_path: Path) -> None:
    ema, model = make_state(DENSE), make_state(DENSE, seed=1)
    torch.save({"ema": ema, "model": model}, tmp_path / "weights.pt")
    assert_equal(load_published(tmp_path / "weights.pt", config=DENSE, which="weights")[1], model)
    torch.save({"ema": ema}, tmp_path / "weights.pt")
    assert "has no set 'weights'" in error_of(tmp_path / "weights.pt", config=DENSE, which="weights")


def test_public_name_and_a_real_preset(tmp_path: Path) -> None:
    """`load_published(path, preset=…)` at the smallest published size."""
    config = ModelConfig(preset="DiT-S/8", image_size=32, channels=4, num_classes=1000)
    torch.save(make_state(config), tmp_path / "weights.pt")
    found, _ = ditmoe.model.load_published(tmp_path / "weights.pt", preset="DiT-S/8")
    assert found == config
    found, _ = ditmoe.model.load_published(tmp_path / "weights.pt")  # a dense network of a known size says it all
    assert found == config
    message = error_of(tmp_path / "weights.pt", preset="DiT-B/4-8E2A")
    for part in ("hidden = 384 in the weights, 768 in DiT-B/4-8E2A", "patch = 8", "experts = 0"):
        assert part in message


def test_input_classes_and_sigma_are_read_from_shapes(tmp_path: Path) -> None:
    config = ModelConfig(
        **TINY | {"image_size": 12, "channels": 3, "num_classes": 7, "patch": 4},
        learn_sigma=False,
        experts=5,
        experts_per_token=1,
        shared_experts=3,
    )
    torch.save(make_state(config), tmp_path / "weights.pt")
    expected = ModelConfig(
        depth=2, hidden=32, heads=4, patch=4, experts=5, experts_per_token=1
    )  # says nothing of the rest
    assert load_published(tmp_path / "weights.pt", config=expected)[0] == config


def test_position_embedding_may_be_missing_when_the_size_is_known(tmp_path: Path) -> None:
    state = make_state(MOE)
    del state["pos_embed"]
    torch.save(state, tmp_path / "weights.pt")
    assert load_published(tmp_path / "weights.pt", config=MOE)[0] == MOE
    message = error_of(tmp_path / "weights.pt", config=MOE.model_copy(update={"image_size": None}))
    assert "pos_embed is missing" in message


def test_half_precision_is_kept(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in make_state(MOE).items()}
    torch.save(state, tmp_path / "weights.pt")
    assert_equal(load_published(tmp_path / "weights.pt", config=MOE)[1], state)


# --- what is wrong with a state ----------------------------------------------------------------------------------


def rename(state: State, old: str, new: str) -> State:
    return {new if name == old else name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("config", "change", "expected"),
    [
        (
            MOE,
            lambda s: s.pop("blocks.1.moe.experts.2.up_proj.weight"),
            "1 missing: blocks.1.moe.experts.2.up_proj",
        ),
        (MOE, lambda s: s.pop("blocks.0.moe.gate.weight"), "1 missing: blocks.0.moe.gate.weight"),
        (QK_NORM, lambda s: s.pop("blocks.0.attn.q_norm.bias"), "1 missing: blocks.0.attn.q_norm.bias"),
        (DENSE, lambda s: s.pop("x_embedder.proj.weight"), "x_embedder.proj.weight is missing"),
        (DENSE, lambda s: s.update(extra=torch.ones(1)), "1 unknown: extra"),
        (
            DENSE,
            lambda s: s.update({"blocks.2.attn.qkv.bias": torch.ones(1)}),
            "depth = 3 in the weights, 2 in the",
        ),
        (
            DENSE,
            lambda s: s.update({"blocks.1.mlp.fc1.weight": torch.ones(64, 32)}),
            "1 of another shape: blocks.1.mlp.fc1.weight is (64, 32), expected (128, 32)",
        ),
        (
            DENSE,
            lambda s: s.update({f"extra.{i}": torch.ones(1) for i in range(9)}),
            "9 unknown: extra.0, extra.1, extra.2, extra.3, extra.4, …",
        ),
        (DENSE, lambda s: s.update(pos_embed=torch.ones(1, 15, 32)), "pos_embed has 15 tokens"),
        (DENSE, lambda s: s.update(pos_embed=torch.ones(16, 32)), "pos_embed is (16, 32), expected 3 axes"),
        (
            DENSE,
            lambda s: s.update({"final_layer.linear.bias": torch.ones(32).int()}),
            "final_layer.linear.bias is a",
        ),
        (DENSE, lambda s: s.update({"final_layer.linear.bias": 3}), "'final_layer.linear.bias' holds a int"),
        (DENSE, lambda s: s.update({"blocks.99999.x": torch.ones(1)}), "are no DiT"),
        (QK_NORM, lambda s: s.update({"blocks.0.attn.qkv.weight": torch.ones(1)}), "1 unknown: blocks.0.attn.qkv"),
    ],
)
def test_a_state_that_does_not_fit(tmp_path: Path, config: ModelConfig, change: Any, expected: str) -> None:
    state = make_state(config)
    change(state)
    torch.save(state, tmp_path / "weights.pt")
    assert expected in error_of(tmp_path / "weights.pt", config=config)


def test_both_sets_are_checked(tmp_path: Path) -> None:
    model = make_state(DENSE)
    del model["t_embedder.mlp.0.bias"]
    torch.save({"ema": make_state(DENSE), "model": model}, tmp_path / "weights.pt")
    assert "(weights): the weights do not fit the model (1 missing: t_embedder" in error_of(
        tmp_path / "weights.pt", config=DENSE
    )


def test_the_other_attention_is_named(tmp_path: Path) -> None:
    torch.save(make_state(QK_NORM), tmp_path / "weights.pt")
    plain = ModelConfig(**MOE.model_dump())
    assert "attention = qk_norm in the weights, plain in the configuration" in error_of(
        tmp_path / "weights.pt", config=plain
    )


def test_what_the_weights_do_not_say_is_asked_for(tmp_path: Path) -> None:
    torch.save(make_state(MOE), tmp_path / "weights.pt")
    assert "do not say heads: give the preset (such as DiT-S/2-3E2A)" in error_of(tmp_path / "weights.pt")
    with pytest.raises(UserError, match="'DiT-Q/2' is not a preset"):
        load_published(tmp_path / "weights.pt", preset="DiT-Q/2")


# --- what is wrong with a file -----------------------------------------------------------------------------------


class Malicious:
    """Runs a command when unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch unpickled",)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("value", "named"),
    [(Malicious(), "posix.system"), (pathlib.PurePosixPath("x"), "pathlib.PurePosixPath")],
    ids=["code", "object"],
)
def test_pickled_objects_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: bool, value: Any, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"ema": make_state(DENSE), "args": value}
    torch.save(content, "weights.pt", _use_new_zipfile_serialization=archive)
    message = error_of(Path("weights.pt"), config=DENSE)
    assert f"holds pickled objects ({named})" in message
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01])
def test_truncated_pt(tmp_path: Path, archive: bool, kept: float) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"ema": make_state(DENSE)}, path, _use_new_zipfile_serialization=archive)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert "it may be truncated" in error_of(path, config=DENSE)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x93NUMPY\x01\x00", "not a PyTorch weight file"),
    ],
)
def test_not_a_weight_file(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    assert expected in error_of(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.ones(2)], "holds a list, expected a dictionary"),
        ({"state_dict": {}, "epoch": 3}, "holds 'state_dict', 'epoch'; expected weights, bare or under"),
        ({"ema": torch.ones(2)}, "'ema' holds a Tensor, expected a dictionary"),
        ({"ema": {1: torch.ones(2)}}, "1 holds a Tensor, expected"),
        ({}, "holds nothing"),
        ({"ema": {}}, "x_embedder.proj.weight is missing"),
    ],
)
def test_other_contents(tmp_path: Path, content: Any, expected: str) -> None:
    torch.save(content, tmp_path / "weights.pt")
    assert expected in error_of(tmp_path / "weights.pt")


def test_missing_files(tmp_path: Path) -> None:
    for name in ("weights.pt", "weights.safetensors", "weights.safetensors.index.json"):
        assert "no such file" in error_of(tmp_path / name)
    folder = tmp_path / "weights"
    folder.mkdir()
    assert "found 0" in error_of(folder)


# --- safetensors -------------------------------------------------------------------------------------------------


def make_shards(folder: Path, state: State) -> Path:
    """Weights in two files with an index, as other programs write them."""
    names = list(state)
    halves = {"weights-1.safetensors": names[::2], "weights-2.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: state[name] for name in held}, folder / file)
    index = folder / "weights.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in halves.items() for name in held}}))
    return index


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_safetensors_of_others(tmp_path: Path, config: ModelConfig) -> None:
    state = make_state(config)
    save_file(state, tmp_path / "one.safetensors")
    assert_equal(load_published(tmp_path / "one.safetensors", config=config)[1], state)
    index = make_shards(tmp_path, state)
    for path in (index, tmp_path / "weights.safetensors", tmp_path):
        assert_equal(load_published(path, config=config)[1], state)


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.001, 0])
def test_truncated_safetensors(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(make_state(DENSE), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert "it may be truncated" in error_of(path, config=DENSE)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda m: m.update(pos_embed="../weights-1.safetensors"),
            "pos_embed is said to be in '../weights-1.safetensors'",
        ),
        (lambda m: m.update(pos_embed="/etc/passwd"), "pos_embed is said to be in '/etc/passwd'"),
        (lambda m: m.update(pos_embed=7), "pos_embed is said to be in 7"),
        (lambda m: m.update(extra="weights-2.safetensors"), "extra is missing from weights-2.safetensors"),
        (lambda m: m.update(extra="weights-3.safetensors"), "weights-3.safetensors: no such file"),
        (lambda m: m.pop("pos_embed"), "pos_embed is not in the index but in weights-"),
        (lambda m: m.clear(), "no weight_map"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path: Path, change: Any, expected: str) -> None:
    index = make_shards(tmp_path, make_state(DENSE))
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    assert expected in error_of(index, config=DENSE)


def test_an_index_that_is_not_json(tmp_path: Path) -> None:
    index = tmp_path / "weights.safetensors.index.json"
    index.write_text('{"weight_map": ')
    assert "cannot be read as a safetensors index" in error_of(index)


# --- writing -----------------------------------------------------------------------------------------------------


def make_published(config: ModelConfig, **sets: Any) -> PublishedWeights:
    return PublishedWeights(
        config,
        objective=ObjectiveConfig(kind="ddpm"),
        class_names=["zero", "één"],
        **sets or {"ema": make_state(config), "weights": make_state(config, seed=1)},
    )


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_round_trip_of_both_sets(tmp_path: Path, config: ModelConfig) -> None:
    """A file of ours says everything about itself: no preset is needed to read it."""
    published = make_published(config)
    assert save_published(published, tmp_path / "weights.pt") == [tmp_path / "weights.pt"]
    found = read_published(tmp_path / "weights.pt")
    assert found.config == config
    assert (found.objective, found.class_names) == (published.objective, published.class_names)
    assert found.ema and found.weights and published.ema and published.weights
    assert_equal(found.ema, published.ema)
    assert_equal(found.weights, published.weights)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pt"]


@pytest.mark.parametrize("which", ["ema", "weights"])
@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
def test_round_trip_through_safetensors(tmp_path: Path, which: str, shard_bytes: int) -> None:
    published = make_published(MOE, **{which: make_state(MOE)})
    files = save_published(published, tmp_path / "weights.safetensors", shard_bytes=shard_bytes)
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert (len(files) > 2) == (shard_bytes < 2**30)
    found = read_published(tmp_path / "weights.safetensors")
    assert (found.config, found.objective, found.class_names) == (MOE, published.objective, published.class_names)
    assert (found.ema is None) == (which == "weights")
    assert_equal(found.state(), published.state())


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_others_may_read_a_file_as_the_umask_says(tmp_path: Path, name: str) -> None:
    """The safetensors library leaves a file of its own, for its owner alone."""
    before = os.umask(0o027)
    try:
        save_published(make_published(DENSE, ema=make_state(DENSE)), tmp_path / name)
    finally:
        os.umask(before)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o640


def test_bare_file_is_nothing_but_weights(tmp_path: Path) -> None:
    published = make_published(DENSE, ema=make_state(DENSE))
    save_published(published, tmp_path / "weights.pt", bare=True)
    assert_equal(torch.load(tmp_path / "weights.pt", weights_only=True), published.state())


def test_views_of_stacked_experts_are_written_once(tmp_path: Path) -> None:
    """A network's state holds its experts as views: files hold each of them once, and the same values."""
    network = DiT(MOE)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    state = canonical_state(network)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    for name in ("weights.pt", "weights.safetensors"):
        save_published(make_published(MOE, ema=state), tmp_path / name)
        assert_equal(load_published(tmp_path / name)[1], state)
        assert (tmp_path / name).stat().st_size < size * 1.3


def test_a_description_that_contradicts_the_weights(tmp_path: Path) -> None:
    wrong = PublishedWeights(MOE.model_copy(update={"experts": 5}), ema=make_state(MOE))
    save_published(wrong, tmp_path / "weights.pt")
    assert "experts = 3 in the weights, 5 in the description" in error_of(tmp_path / "weights.pt")
    save_published(make_published(MOE, ema=make_state(MOE)), tmp_path / "weights.pt", overwrite=True)
    other = MOE.model_copy(update={"experts_per_token": 1})
    message = error_of(tmp_path / "weights.pt", config=other)
    assert "experts_per_token = 1 in the configuration, 2 in the description" in message


@pytest.mark.parametrize("description", ["[]", "{", '{"format": "other"}', '{"format": "ditmoe weights 1"}'])
def test_a_description_that_cannot_be_read(tmp_path: Path, description: str) -> None:
    torch.save({"ema": make_state(DENSE), "ditmoe": description}, tmp_path / "weights.pt")
    assert "its description cannot be read" in error_of(tmp_path / "weights.pt")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    both = make_published(DENSE)
    with pytest.raises(UserError, match=r"ends with '.bin', expected one of .pt"):
        save_published(both, tmp_path / "weights.bin")
    with pytest.raises(UserError, match="takes one set of weights, found two"):
        save_published(both, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="takes one set of weights, found two"):
        save_published(both, tmp_path / "weights.pt", bare=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_failing_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    published = make_published(DENSE, ema=make_state(DENSE))
    save_published(published, tmp_path / name)
    before = (tmp_path / name).read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ditmoe.model.weights.files.os.fsync", full)
    with pytest.raises(UserError, match=r"could not be written.*No space left"):
        save_published(make_published(DENSE, ema=make_state(DENSE, seed=5)), tmp_path / name, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == before
