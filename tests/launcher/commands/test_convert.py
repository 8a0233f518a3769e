"""`ditmoe convert` in every direction, bit for bit, and `ditmoe models`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditmoe.launcher.commands import models
from ditmoe.launcher.commands.convert import command as convert
from ditmoe.model.canonical import canonical_state, load_canonical
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.presets import SIZES
from ditmoe.model.weights.published import PublishedWeights, read_published, save_published
from ditmoe.model.weights.sit import from_sit
from ditmoe.parallel.checkpoint.folder import read_info, read_weights
from tests.forked import DITMOE, run_forked

SHAPE: dict[str, Any] = {
    "depth": 2,
    "hidden": 32,
    "heads": 4,
    "patch": 2,
    "image_size": 8,
    "channels": 4,
    "num_classes": 3,
}
CONFIG = ModelConfig(**SHAPE, experts=3, experts_per_token=2, attention="qk_norm")
NAMES = ["cat", "dog", "owl"]


def make_state(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    network = DiT(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=random)
    return canonical_state(network)


def assert_equal(found: dict[str, Tensor] | None, expected: dict[str, Tensor] | None) -> None:
    assert found is not None and expected is not None and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def published(tmp_path: Path) -> PublishedWeights:
    """Two sets that say everything of themselves, in `source.pt`."""
    both = PublishedWeights(CONFIG, make_state(), make_state(seed=1), ObjectiveConfig(kind="ddpm"), NAMES)
    save_published(both, tmp_path / "source.pt")
    return both


def test_there_and_back(tmp_path: Path, published: PublishedWeights) -> None:
    """.pt → checkpoint → .pt → checkpoint: both sets, the network, the objective and the classes stay."""
    convert(tmp_path / "source.pt", tmp_path / "checkpoint")
    info = read_info(tmp_path / "checkpoint")
    assert (info.model, info.objective, info.dataset["class_names"]) == (CONFIG, published.objective, NAMES)
    convert(tmp_path / "checkpoint", tmp_path / "back.pt")
    found = read_published(tmp_path / "back.pt")
    assert (found.config, found.objective, found.class_names) == (CONFIG, published.objective, NAMES)
    assert_equal(found.ema, published.ema)
    assert_equal(found.weights, published.weights)
    convert(tmp_path / "back.pt", tmp_path / "again")
    for which in ("ema", "weights"):
        assert_equal(read_weights(tmp_path / "again", which), read_weights(tmp_path / "checkpoint", which))


@pytest.mark.parametrize("which", ["ema", "weights"])
def test_through_safetensors_in_files(tmp_path: Path, published: PublishedWeights, which: Any) -> None:
    """checkpoint → .safetensors → checkpoint: one set, here cut into several files."""
    convert(tmp_path / "source.pt", tmp_path / "checkpoint")
    size = sum(tensor.numel() * 4 for tensor in published.state().values())
    convert(tmp_path / "checkpoint", tmp_path / "one.safetensors", weights=which, shard_size=size / 2**31)
    assert len(list(tmp_path.glob("one-*-of-*.safetensors"))) > 1
    convert(tmp_path / "one.safetensors", tmp_path / "back")
    expected = {name: tensor for name, tensor in published.state(which).items() if name != "pos_embed"}
    assert_equal(read_weights(tmp_path / "back", "ema"), expected)
    assert_equal(read_weights(tmp_path / "back", "weights"), expected)


def test_a_run_gives_its_newest_checkpoint(tmp_path: Path, published: PublishedWeights) -> None:
    run = tmp_path / "run"
    convert(tmp_path / "source.pt", run / "checkpoints" / "step-00000000")
    save_published(published.only("weights"), tmp_path / "other.pt")
    convert(tmp_path / "other.pt", run / "checkpoints" / "step-00000007")
    convert(run, tmp_path / "run.pt", bare=True)
    found = torch.load(tmp_path / "run.pt", weights_only=True)
    assert_equal(found, published.weights)


def test_a_published_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense file as others publish it: the preset checks it, the objective is given."""
    monkeypatch.setitem(SIZES, "S", (2, 32, 4))  # the preset's name with less to write
    config = ModelConfig(preset="DiT-S/8", image_size=32, channels=4, num_classes=10)
    torch.save(make_state(config), tmp_path / "dense.pt")
    with pytest.raises(UserError, match=r"--objective: .*dense\.pt does not say it"):
        convert(tmp_path / "dense.pt", tmp_path / "checkpoint", preset="DiT-S/8")
    convert(tmp_path / "dense.pt", tmp_path / "checkpoint", preset="DiT-S/8", objective="ddpm")
    assert "DiT-S/8, 0.1M parameters (ema), ddpm" in capsys.readouterr().out
    assert read_info(tmp_path / "checkpoint").model == config
    with pytest.raises(UserError, match="hidden = 32 in the checkpoint, 768 in DiT-B/8"):
        convert(tmp_path / "checkpoint", tmp_path / "back.pt", preset="DiT-B/8")


def test_what_is_refused(tmp_path: Path, published: PublishedWeights) -> None:
    source = tmp_path / "source.pt"
    (tmp_path / "taken").mkdir()
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "sharded.safetensors.index.json").touch()
    save_published(published.only("ema"), tmp_path / "single.pt")
    refused: list[tuple[str, Path, Path, dict[str, Any]]] = [
        ("exists already", source, tmp_path / "taken", {}),
        ("exists already", source, tmp_path / "sharded.safetensors", {}),
        ("ends with '.onnx'", source, tmp_path / "new.onnx", {}),
        ("is not a .pt file", source, tmp_path / "new", {"bare": True}),
        ("ddpm", source, tmp_path / "new", {"objective": "rectified_flow"}),
        ("no such file", tmp_path / "nothing.pt", tmp_path / "new", {}),
        ("no complete checkpoint", tmp_path / "empty", tmp_path / "new", {}),
        ("expected one .safetensors", tmp_path / "taken", tmp_path / "new", {}),
        ("has no set 'weights'", tmp_path / "single.pt", tmp_path / "new", {"weights": "weights"}),
        ("is not a preset", source, tmp_path / "new", {"preset": "DiT-Q"}),
    ]
    for message, origin, destination, options in refused:
        with pytest.raises(UserError, match=message):
            convert(origin, destination, **options)
    assert not (tmp_path / "new").exists()


def test_another_position_embedding_is_not_lost_in_silence(tmp_path: Path, published: PublishedWeights) -> None:
    assert published.ema is not None
    published.ema["pos_embed"] = torch.zeros_like(published.ema["pos_embed"])
    save_published(published.only("ema"), tmp_path / "learned.pt")
    with pytest.raises(UserError, match="pos_embed departs by 1 from the fixed"):
        convert(tmp_path / "learned.pt", tmp_path / "checkpoint")


def test_a_position_embedding_that_training_averaged(
    tmp_path: Path, published: PublishedWeights, capsys: pytest.CaptureFixture[str]
) -> None:
    """Published training averages all of the state, and float32 rounds. The fixed one is taken, and told."""
    assert published.ema is not None
    fixed = published.ema["pos_embed"]
    average = fixed.clone()
    for _ in range(1000):
        average.mul_(0.9999).add_(fixed, alpha=1 - 0.9999)
    difference = (average - fixed).abs().max().item()
    assert 1e-5 < difference < 2e-4
    published.ema["pos_embed"] = average
    save_published(published, tmp_path / "averaged.pt")
    convert(tmp_path / "averaged.pt", tmp_path / "checkpoint")
    assert f"pos_embed departs by {difference:.2g}" in capsys.readouterr().err
    convert(tmp_path / "checkpoint", tmp_path / "back.pt")
    assert_equal(read_published(tmp_path / "back.pt").ema, {**published.ema, "pos_embed": fixed})

    for which, change in (("ema", 6e-4), ("weights", 1e-4)):
        state = getattr(published.only(which), which)  # type: ignore[arg-type]
        state["pos_embed"] = fixed + change
        save_published(published.only(which), tmp_path / f"{which}.pt")  # type: ignore[arg-type]
        with pytest.raises(UserError, match="expected the fixed one"):
            convert(tmp_path / f"{which}.pt", tmp_path / "other")


def test_names_and_keys_of_training_frameworks(tmp_path: Path, published: PublishedWeights) -> None:
    """DeepSpeed's file of model states, and what compilation and data parallelism add to names."""
    expected, extra = (
        published.weights,
        {"global_steps": 3, "ds_version": "0.19", "sparse_tensor_module_names": set()},
    )
    assert expected is not None
    names: list[Any] = [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"module._orig_mod.module.{name}",
        lambda name: name.replace(".attn", "._orig_mod.attn").replace(".moe", "._checkpoint_wrapped_module.moe"),
    ]
    for number, rename in enumerate(names):
        torch.save({"module": {rename(name): t for name, t in expected.items()}, **extra}, tmp_path / "states.pt")
        out = tmp_path / f"ours-{number}"
        convert(
            tmp_path / "states.pt",
            out,
            ["model.experts_per_token=2", "model.heads=4"],
            objective="ddpm",
        )
        found = read_weights(out, "weights")
        assert_equal(found, {name: tensor for name, tensor in expected.items() if name != "pos_embed"})
    twice = {**expected, "_orig_mod.final_layer.linear.bias": expected["final_layer.linear.bias"]}
    torch.save(twice, tmp_path / "twice.pt")
    with pytest.raises(UserError, match="holds some weights twice"):
        convert(tmp_path / "twice.pt", tmp_path / "new")
    torch.save({"module": {name: torch.empty(0) for name in expected}}, tmp_path / "zero3.pt")
    with pytest.raises(UserError, match="zero_to_fp32"):
        convert(tmp_path / "zero3.pt", tmp_path / "new")


def test_a_mixture_outside_the_presets(tmp_path: Path) -> None:
    """Heads and experts per token leave no trace in weights: a run's file says them, or overrides."""
    plain = ModelConfig(**SHAPE, experts=3, experts_per_token=2, balance_weight=0.01)
    torch.save(make_state(plain), tmp_path / "bare.pt")
    with pytest.raises(UserError, match="the weights do not say heads"):
        convert(tmp_path / "bare.pt", tmp_path / "new", objective="ddpm")
    run = tmp_path / "run.yaml"
    run.write_text(
        "model: {depth: 2, hidden: 32, heads: 4, patch: 2, experts: 3, experts_per_token: 2,"
        " balance_weight: 0.01}\nobjective: {kind: rectified_flow}\ndata: {sources: [{path: nowhere}]}\n"
    )
    convert(tmp_path / "bare.pt", tmp_path / "from-file", config=run)
    info = read_info(tmp_path / "from-file")
    assert info.model == plain and info.objective.kind == "rectified_flow"
    convert(
        tmp_path / "bare.pt",
        tmp_path / "mixed",
        ["model.balance_weight=0.5"],
        config=run,
        objective="rectified_flow",
    )
    assert read_info(tmp_path / "mixed").model.balance_weight == 0.5
    convert(tmp_path / "mixed", tmp_path / "back.pt", ["model.heads=4"])

    known = ["model.experts_per_token=2"]
    refused: list[tuple[str, Path, list[str], dict[str, Any]]] = [
        ("experts = 3 in the weights, 4 in the configuration", tmp_path / "bare.pt", ["model.experts=4"], {}),
        ("heads = 4 in the checkpoint, 2 in the configuration", tmp_path / "mixed", ["model.heads=2"], {}),
        ("expected a key of model or objective", tmp_path / "bare.pt", ["optim.lr=1"], {}),
        ("no such key; did you mean model.heads", tmp_path / "bare.pt", ["model.haeds=4"], {}),
        ("no such network: heads = 'many'", tmp_path / "bare.pt", [*known, "model.heads=many"], {}),
        (
            "objective.kind: 'edm' given, expected ddpm",
            tmp_path / "bare.pt",
            ["objective.kind=edm"],
            {"config": run},
        ),
        ("cannot be read", tmp_path / "bare.pt", [], {"config": tmp_path / "none.yaml"}),
    ]
    for message, source, overrides, options in refused:
        with pytest.raises(UserError, match=message):
            convert(source, tmp_path / "new", overrides, **{"preset": None, **options})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_sit_runs_the_other_way(tmp_path: Path, learn_sigma: bool) -> None:
    """What it computes at 1 − t, with the other sign, is what the converted network computes at t."""
    config = ModelConfig(**SHAPE, learn_sigma=learn_sigma)
    theirs, ours = DiT(config), DiT(config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.2, generator=random)
    torch.save({"ema": canonical_state(theirs)}, tmp_path / "sit.pt")
    for options in ({"objective": "sit"}, {"objective": "sit", "bare": True}):
        target = tmp_path / ("ours.pt" if options.get("bare") else "ours")
        convert(tmp_path / "sit.pt", target, ["model.heads=4"], **options)  # type: ignore[arg-type]
    info = read_info(tmp_path / "ours")
    assert info.objective.kind == "rectified_flow"
    load_canonical(ours, read_weights(tmp_path / "ours"), "ours")
    assert_equal(read_published(tmp_path / "ours.pt", config={"heads": 4}).ema, canonical_state(ours))

    x_BCHW = torch.randn(5, 4, 8, 8, generator=random)
    t_B, label_B = torch.tensor([0.0, 0.1, 0.5, 0.77, 1.0]), torch.arange(5) % 3
    with torch.no_grad():
        expected = -theirs(x_BCHW, 1 - t_B, label_B)
        assert not torch.allclose(expected, -theirs(x_BCHW, t_B, label_B), atol=0.1)
        torch.testing.assert_close(ours(x_BCHW, t_B, label_B), expected, rtol=1e-4, atol=1e-4)
    again = from_sit(canonical_state(ours), config, "ours")
    for name, tensor in canonical_state(theirs).items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=1e-6)


def test_dense_flow_is_not_guessed(tmp_path: Path, published: PublishedWeights) -> None:
    torch.save(make_state(ModelConfig(**SHAPE)), tmp_path / "dense.pt")
    source, heads = tmp_path / "dense.pt", ["model.heads=4"]
    with pytest.raises(UserError, match=r"may be SiT's.*give --objective sit if they are, or --not-sit"):
        convert(source, tmp_path / "new", heads, objective="rectified_flow")
    with pytest.raises(UserError, match="--not-sit: given with --objective sit"):
        convert(source, tmp_path / "new", heads, objective="sit", not_sit=True)
    convert(source, tmp_path / "flow", heads, objective="rectified_flow", not_sit=True)
    assert_equal(read_weights(tmp_path / "flow"), read_weights_of(source))
    with pytest.raises(UserError, match="says rectified_flow"):
        convert(tmp_path / "flow", tmp_path / "new.pt", objective="sit")
    bare = published.only("ema")
    assert bare.ema is not None
    torch.save(bare.ema, tmp_path / "moe.pt")
    with pytest.raises(UserError, match="has 3 experts and qk_norm attention; SiT's networks are dense"):
        convert(tmp_path / "moe.pt", tmp_path / "new", ["model.experts_per_token=2"], objective="sit")
    assert not (tmp_path / "new").exists()


def read_weights_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in torch.load(path, weights_only=True).items() if name != "pos_embed"}


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, published: PublishedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ditmoe.parallel.checkpoint.folder.save_pieces", full)
    with pytest.raises(UserError, match=r"could not be written.*No space left"):
        convert(tmp_path / "source.pt", tmp_path / "checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.pt"]


def test_what_lies_beside_the_destination_stays(tmp_path: Path, published: PublishedWeights) -> None:
    (tmp_path / "ours.partial").mkdir()
    (tmp_path / "ours.partial" / "mine").touch()
    (tmp_path / "w-00002-of-00002.safetensors").write_text("mine")
    convert(tmp_path / "source.pt", tmp_path / "ours")
    total = sum(tensor.numel() for tensor in published.state("ema").values()) * 4
    with pytest.raises(UserError, match=r"w-00002-of-00002\.safetensors: exists already"):
        convert(tmp_path / "source.pt", tmp_path / "w.safetensors", shard_size=total * 0.7 / 2**30)
    assert (tmp_path / "ours.partial" / "mine").exists()
    assert (tmp_path / "w-00002-of-00002.safetensors").read_text() == "mine"


def test_from_the_command_line(tmp_path: Path, published: PublishedWeights) -> None:
    done = run_forked([*DITMOE, "convert", "source.pt", "ours", "--weights", "ema"], tmp_path / "output")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ours: a network of its own shape")
    again = run_forked([*DITMOE, "convert", "source.pt", "ours"], tmp_path / "output")
    assert again.returncode == 2
    assert again.stderr.startswith("error: ours: exists already") and "Traceback" not in again.stderr


def test_models_prints_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    models.command()
    lines = capsys.readouterr().out.splitlines()
    assert lines[6].split()[:3] == ["DiT-G/2-16E2A", "16.50B", "3.18B"]
    assert len(lines[1:7]) == 6 and lines[7] == ""


def test_models_by_name_and_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    models.command(["DiT-S/2-32E4A", "DiT-B/*"], as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [row["preset"] for row in rows[:3]] == ["DiT-S/2-32E4A", "DiT-B/2", "DiT-B/4"]
    with pytest.raises(UserError, match="'DiT-Q' is not a preset"):
        models.command(["DiT-Q"])
    with pytest.raises(UserError, match="matches no preset"):
        models.command(["DiT-Q*"])
