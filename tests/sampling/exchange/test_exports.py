"""Every exporter's file reads back to equal weights of an equal network, whatever its shape.

Nothing is overwritten unasked, and each export has its card.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from ditmoe.launcher.commands.convert import command as convert
from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.weights.published import PublishedWeights, read_published, save_published
from ditmoe.parallel.checkpoint.folder import checkpoint_path, read_info, read_weights, write_weights_checkpoint
from ditmoe.sampling.exchange.card import CARD
from tests.markers import change_marker
from tests.sampling.evaluation.test_row import METRICS

SHAPE: dict[str, Any] = {
    "depth": 2,
    "hidden": 16,
    "heads": 2,
    "patch": 2,
    "experts": 0,
    "image_size": 8,
    "channels": 4,
    "num_classes": 3,
}
EXPERTS = {"experts": 3, "experts_per_token": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, diffusers' frequencies": {"timestep_frequencies": "diffusers"},
    "dense, no learned sigma": {"learn_sigma": False, "channels": 1},
    "dense, patch 4, more heads": {"patch": 4, "heads": 4, "depth": 1},
    "unconditional": {"num_classes": 1, "label_dropout": 0.0},
    "mixture": EXPERTS,
    "mixture, one shared expert": {**EXPERTS, "shared_experts": 1},
    "mixture, none shared": {**EXPERTS, "shared_experts": 0},
    "mixture, a dense MLP shared": {**EXPERTS, "shared_mlp": "gelu"},
    "mixture, published balance": {**EXPERTS, "balance": "published-code", "attention": "qk_norm"},
    "mixture, own balance": {"experts": 1, "experts_per_token": 1, "balance_weight": 0.5, "image_size": 4},
}


def make_state(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    network = DiT(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2, generator=random)
    return canonical_state(network)


def make_checkpoint(path: Path, config: ModelConfig, kind: str = "ddpm", names: list[str] | None = None) -> None:
    """A checkpoint of ours with another average than weights."""
    states = make_state(config), make_state(config, seed=1)
    write_weights_checkpoint(path, config, ObjectiveConfig.model_validate({"kind": kind}), *states, names)


def assert_equal(found: Any, expected: Any) -> None:
    assert found is not None and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


EXPORTS: dict[str, Callable[[Path, Path], Path]] = {
    "pt": lambda source, folder: to(source, folder / "x.pt"),
    "safetensors": lambda source, folder: to(source, folder / "x.safetensors"),
    "several safetensors": lambda source, folder: to(source, folder / "x.safetensors", shard_size=2e-5),
    "checkpoint": lambda source, folder: to(source, folder / "x"),
    "diffusers": lambda source, folder: to(source, folder / "x", to="diffusers"),
    "several files of diffusers": lambda source, folder: to(source, folder / "x", to="diffusers", shard_size=2e-5),
}


def to(source: Path, destination: Path, **options: Any) -> Path:
    convert(source, destination, **options)
    return destination


@pytest.mark.parametrize("shape", SHAPES)
def test_every_export_reads_back(tmp_path: Path, shape: str) -> None:
    """From the file alone: the network, the objective, the names of the classes and every bit of the weights."""
    config = ModelConfig(**{**SHAPE, **SHAPES[shape]})
    kind = "ddpm" if config.learn_sigma else "rectified_flow"
    names = [f"class {label}" for label in range(config.num_classes or 0)]
    make_checkpoint(tmp_path / "source", config, kind, names)
    expected = make_state(config, seed=1)
    for name, export in EXPORTS.items():
        folder = tmp_path / name
        folder.mkdir()
        made = export(tmp_path / "source", folder)
        assert (made / CARD if made.is_dir() else made.with_name(f"{made.name}.md")).is_file(), name
        if name == "checkpoint":
            info = read_info(made)
            assert (info.model, info.objective.kind, info.dataset["class_names"]) == (config, kind, names)
            assert_equal({"pos_embed": DiT(config).pos_embed, **read_weights(made, "ema")}, expected)
        else:
            found = read_published(made)
            assert (found.config, found.class_names) == (config, names), name
            assert found.objective is not None and found.objective.kind == kind
            assert_equal(found.state("ema"), expected)
    assert len(list((tmp_path / "several safetensors").glob("x-*-of-*.safetensors"))) > 1
    # A checkpoint again, without a word of what it is.
    convert(tmp_path / "several files of diffusers" / "x", tmp_path / "again")
    assert_equal(read_weights(tmp_path / "again", "ema"), read_weights(tmp_path / "source", "ema"))
    assert read_info(tmp_path / "again").model == config
    assert len(list((tmp_path / "several files of diffusers/x/transformer").glob("*-of-*.safetensors"))) > 1


@pytest.mark.parametrize("which", ["ema", "weights"])
def test_one_set_says_which_it_is(tmp_path: Path, which: Any) -> None:
    config = ModelConfig(**SHAPE)
    make_checkpoint(tmp_path / "source", config)
    for name, options in {"x.safetensors": {}, "x.pt": {}, "x": {"to": "diffusers"}}.items():
        made = to(tmp_path / "source", tmp_path / name, weights=which, **options)
        found = read_published(made)
        assert_equal(getattr(found, which), make_state(config, seed=int(which == "ema")))
        assert getattr(found, {"ema": "weights", "weights": "ema"}[which]) is None


@pytest.mark.parametrize("name", list(EXPORTS))
def test_nothing_is_overwritten_unasked(tmp_path: Path, name: str) -> None:
    """And an export that replaces another leaves nothing of it."""
    config, other = ModelConfig(**SHAPE), ModelConfig(**{**SHAPE, **EXPERTS})
    make_checkpoint(tmp_path / "one", config)
    make_checkpoint(tmp_path / "two", other)
    out = tmp_path / "out"
    out.mkdir()
    made = EXPORTS[name](tmp_path / "one", out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="exists already; give --overwrite"):
        EXPORTS[name](tmp_path / "two", out)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    form = {"to": "diffusers"} if name.endswith("diffusers") else {}
    convert(tmp_path / "two", made, overwrite=True, **form)  # type: ignore[arg-type]
    found = read_info(made).model if name == "checkpoint" else read_published(made).config
    assert found == other
    left = {file.name for file in out.rglob("*") if file.is_file()}
    assert not any("-of-" in each for each in left) and not any(each.startswith(".") for each in left), left


def test_what_is_no_export_is_never_overwritten(tmp_path: Path) -> None:
    config = ModelConfig(**SHAPE)
    make_checkpoint(tmp_path / "one", config)
    make_checkpoint(checkpoint_path(tmp_path / "run", 0), config)
    make_checkpoint(tmp_path / "trained", config)
    axes = dict.fromkeys(("pipe", "data", "expert", "tensor"), 1)
    change_marker(tmp_path / "trained", lambda facts: facts.update(layout={**axes, "zero": 0}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "folder.pt").mkdir()
    save_published(PublishedWeights(config, make_state(config)), tmp_path / "in.pt")
    for message, source, destination in (
        ("is no folder that", "one", "run"),
        ("is no folder that", "one", "trained"),
        ("is no folder that", "one", "mine"),
        ("is no file", "one", "folder.pt"),
        ("is what is converted", "one", "one"),
        ("is what is converted", "run", "run"),
        ("is what is converted", "in.pt", "in.pt"),
    ):
        with pytest.raises(UserError, match=message):
            convert(tmp_path / source, tmp_path / destination, overwrite=True)
    (tmp_path / "w.safetensors.md").write_text("mine")
    with pytest.raises(UserError, match=r"w\.safetensors\.md: exists already"):
        convert(tmp_path / "one", tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors.md").read_text() == "mine"


def test_the_card_of_a_run(tmp_path: Path) -> None:
    """It says what is known, from the run's own records, and that nobody has chosen a licence."""
    config = ModelConfig(**{**SHAPE, **EXPERTS})
    path = checkpoint_path(tmp_path / "run", 7)
    make_checkpoint(path, config, names=["cat", "dog", "owl"])
    axes = dict.fromkeys(("pipe", "data", "expert", "tensor"), 1)

    def trained(facts: dict[str, Any]) -> None:
        facts.update(step=7, images=112, layout={**axes, "zero": 0})
        facts["dataset"]["name"] = "photos"
        facts["config"].update(train={"batch": 16}, ema={"decay": 0.999}, optim={"lr": 1e-4}, seed=3)

    change_marker(path, trained)
    weights = f"{read_info(path).fingerprint}-ema"
    evaluation = tmp_path / "run" / "evaluations" / "first"
    evaluation.mkdir(parents=True)
    metrics = {**METRICS, "evaluation": {**METRICS["evaluation"], "weights": weights}}
    (evaluation / "metrics.json").write_text(json.dumps(metrics))
    other = tmp_path / "run" / "evaluations" / "other"
    other.mkdir()
    metrics["evaluation"]["weights"] = "another-ema"
    (other / "metrics.json").write_text(json.dumps(metrics))
    damaged = tmp_path / "run" / "evaluations" / "damaged"
    damaged.mkdir()
    (damaged / "metrics.json").write_text("{")
    convert(tmp_path / "run", tmp_path / "photos", to="diffusers")
    card = (tmp_path / "photos" / CARD).read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "other" and front["library_name"] == "diffusers"
    assert "mixture-of-experts" in front["tags"]
    for words in (
        "3 routed experts in each block, 2 of them for each token, and 2 shared experts",
        "data: photos",
        "steps: 7, images seen: 112",
        "global batch: 16",
        "decay of the moving average: 0.999",
        "holds the moving average",
        "Classes: cat, dog, owl.",
        "Defaults of `ditmoe sample`: ddpm, 100 steps",
        "`ditmoe evaluate` takes 250 steps",
        "None has been chosen. Before you publish this, choose one",
        'DitmoePipeline.from_pretrained("photos")',
    ):
        assert words in card, words
    assert card.count("102,400,000") == 2, "a row for each of two feature networks, of these weights alone"
    convert(tmp_path / "photos", tmp_path / "again.pt")
    assert "not known: the weights come from a file" in (tmp_path / "again.pt.md").read_text()


def test_a_run_names_its_own_configuration_and_step(tmp_path: Path) -> None:
    """`--config` takes a run, a file, or the name of a shipped configuration."""
    config = ModelConfig(**{**SHAPE, **EXPERTS})
    save_published(PublishedWeights(config, make_state(config)), tmp_path / "bare.pt", bare=True)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        "model: {heads: 2, experts_per_token: 2, experts: 3}\nobjective: {kind: ddpm}\n"
    )
    convert(tmp_path / "bare.pt", tmp_path / "out", config=run)
    assert read_info(tmp_path / "out").model.experts_per_token == 2
    assert read_info(tmp_path / "out").objective.kind == "ddpm"
    with pytest.raises(UserError, match=r"another network than expected: .*hidden = 16 in the weights"):
        convert(tmp_path / "bare.pt", tmp_path / "new", config=Path("photos"))
    with pytest.raises(UserError, match=r"nothing\.yaml"):
        convert(tmp_path / "bare.pt", tmp_path / "new", config=tmp_path / "nothing.yaml")
    for step, seed in ((0, 1), (3, 5)):
        state = make_state(config, seed)
        write_weights_checkpoint(checkpoint_path(run, step), config, ObjectiveConfig(), state, None)
    convert(run, tmp_path / "newest.safetensors")
    convert(run, tmp_path / "first.safetensors", step=0)
    assert_equal(read_published(tmp_path / "newest.safetensors").ema, make_state(config, 5))
    assert_equal(read_published(tmp_path / "first.safetensors").ema, make_state(config, 1))
    with pytest.raises(UserError, match="no complete checkpoint of step 1"):
        convert(run, tmp_path / "new.pt", step=1)
    with pytest.raises(UserError, match=r"--step 1: .* is no run"):
        convert(tmp_path / "bare.pt", tmp_path / "new.pt", step=1, config=run)
