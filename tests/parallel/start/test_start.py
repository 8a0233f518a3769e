"""Training that starts from weights continues at the loss of their network, on every layout.

All cases of one world size run in one start of its processes; each test then compares its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import pytest
import torch

from ditmoe.model import randomness
from ditmoe.model.canonical import canonical_state, load_canonical
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.initialise import initial_value
from ditmoe.model.objective import make_objective
from ditmoe.model.weights.published import PublishedWeights, save_published
from ditmoe.parallel.checkpoint.box_storage import whole_piece
from ditmoe.parallel.checkpoint.folder import checkpoint_path, read_weights, write_weights_checkpoint
from ditmoe.parallel.start.begin import check_start
from ditmoe.parallel.start.source import Source, Start, opened

Runner = Callable[..., list[dict[str, Any]]]

FLOW: Final = ObjectiveConfig()
EXACT: Final = 1e-5
"""Relative difference in fp32 where the function is the source's."""
NEARLY: Final = 3e-4
"""As above, where the scores of the small router stand in for those of one expert."""
BATCH: Final = 8
SHAPE: Final = (1, 8, 8)

SOURCES: Final[dict[str, dict[str, Any]]] = {
    "mixture": {"experts": 4, "experts_per_token": 2},
    "dense": {"experts": 0, "experts_per_token": 0},
    "single": {"experts": 1, "experts_per_token": 1},
}
LAYOUTS: Final[dict[str, tuple[int, dict[str, Any]]]] = {
    "1 process": (1, {"zero": 1}),
    "expert 2, ZeRO 1": (2, {"zero": 1, "expert": 2}),
    "pipeline 2": (2, {"pipe": 2, "zero": 0}),
    "tensor 2": (2, {"tensor": 2, "zero": 0}),
    "ZeRO 3": (2, {"zero": 3}),
}
STARTS: Final[dict[str, tuple[str, str, dict[str, Any]]]] = {
    "published": ("mixture", "mixture.pt", {}),
    "run": ("mixture", "run", {}),
    "dense": ("dense", "dense.safetensors", {"shared_mlp": "gelu"}),
    "single": ("single", "single", {}),
}
"""Name → source, where it lies, and what the network that starts from it has besides the defaults."""
PAIRS: Final = (
    *((start, "1 process") for start in STARTS),
    *(("dense", layout) for layout in LAYOUTS if layout != "1 process"),
    ("published", "expert 2, ZeRO 1"),
    ("run", "pipeline 2"),
    ("single", "ZeRO 3"),
)


def network_of(**changes: Any) -> DiT:
    """A network whose every parameter matters."""
    shape = {"depth": 2, "hidden": 32, "heads": 4, "patch": 2, "image_size": 8, "channels": 1, "num_classes": 10}
    network = DiT(ModelConfig(**{**shape, **changes})).eval()
    with torch.no_grad():
        for name, tensor in canonical_state(network).items():
            if name != "pos_embed":
                tensor.copy_(0.15 * randomness.normal(5, name, [0], tuple(tensor.shape))[0])
    return network


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a published .pt, a described safetensors file, a run, and a checkpoint."""
    folder = tmp_path_factory.mktemp("sources")
    mixture, dense, single = (network_of(**fields) for fields in SOURCES.values())
    other = {name: torch.zeros_like(tensor) for name, tensor in canonical_state(mixture).items()}
    other["pos_embed"] = mixture.pos_embed
    save_published(PublishedWeights(mixture.config, canonical_state(mixture), other), folder / "mixture.pt")
    described = PublishedWeights(dense.config, canonical_state(dense), objective=FLOW)
    save_published(described, folder / "dense.safetensors")
    for path, network in ((checkpoint_path(folder / "run", 0), mixture), (folder / "single", single)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_weights_checkpoint(path, network.config, FLOW, canonical_state(network), None)
    return folder


def loss_of_first_step(network: DiT) -> float:
    """Of a network by itself, on the samples and noise of the worker's first step."""
    positions = list(range(BATCH))
    objective = make_objective(FLOW)
    draws = objective.draw(0, positions, SHAPE, label_dropout=0.1)
    label_B = torch.where(draws.drop_B, 10, torch.tensor([position % 10 for position in positions]))
    x_BCHW = randomness.normal(1, "image", positions, SHAPE).clamp(-1, 1)
    with torch.no_grad():
        return objective.loss(network, x_BCHW, label_B, draws).mean().item()


@pytest.fixture(scope="module")
def losses(run_cases: Runner, sources: Path) -> dict[tuple[str, str], float]:
    """(start, layout) → the loss of step 1."""
    found: dict[tuple[str, str], float] = {}
    for world in (1, 2):
        keys = [(start, layout) for start, layout in PAIRS if LAYOUTS[layout][0] == world]
        cases = [
            {
                "steps": 1,
                "depth": 2,
                "start_from": str(sources / STARTS[start][1]),
                "model": STARTS[start][2],
                **LAYOUTS[name][1],
            }
            for start, name in keys
        ]
        for key, result in zip(keys, run_cases(world, cases), strict=True):
            found[key] = result["curve"][0][0]
    return found


@pytest.mark.parametrize(("start", "layout"), PAIRS)
def test_the_first_loss_is_the_source_s(losses: dict[tuple[str, str], float], start: str, layout: str) -> None:
    expected = loss_of_first_step(network_of(**SOURCES[STARTS[start][0]]))
    assert losses[start, layout] == pytest.approx(expected, rel=NEARLY if start == "single" else EXACT)


BF16: Final[tuple[tuple[int, dict[str, Any]], ...]] = (
    (1, {"zero": 1}),
    (2, {"zero": 2, "expert": 2}),
    (2, {"zero": 3}),
    (2, {"zero": 1, "pipe": 2}),
    (2, {"zero": 1, "tensor": 2}),
)


@pytest.fixture(scope="module")
def begun_in_bf16(run_cases: Runner, sources: Path) -> Path:
    """A folder with the checkpoint of step 0 of each layout, from a source and fresh."""
    folder = sources / "bf16"
    for world in (1, 2):
        cases = [
            {"steps": 0, "depth": 2, "precision": "bf16", "save": str(folder / f"{start}-{number}"), **fields}
            | ({"start_from": str(sources / "mixture.pt")} if start == "source" else {"awake": False})
            for number, (of_world, fields) in enumerate(BF16)
            for start in ("source", "fresh")
            if of_world == world
        ]
        assert all("error" not in result for result in run_cases(world, cases))
    return folder


@pytest.mark.parametrize("number", range(len(BF16)))
@pytest.mark.parametrize("start", ["source", "fresh"])
@pytest.mark.parametrize("which", ["weights", "ema"])
def test_in_bf16_the_optimiser_and_the_ema_begin_with_the_exact_values(
    begun_in_bf16: Path, number: int, start: str, which: Literal["weights", "ema"]
) -> None:
    """Only what the network computes with is rounded."""
    found = read_weights(checkpoint_path(begun_in_bf16 / f"{start}-{number}", 0), which)
    expected = canonical_state(network_of(**SOURCES["mixture"]))
    if start == "fresh":
        names = expected.keys() - {"pos_embed"}
        expected = {name: initial_value(name, tuple(expected[name].shape), seed=0) for name in names}
    assert found.keys() == expected.keys() - {"pos_embed"}
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def asked(path: Path, **changes: Any) -> Start:
    config = network_of(**SOURCES["mixture"]).config
    values = {"path": path, "which": None, "said": None, "model": config, "objective": FLOW}
    return Start(**{**values, **changes})


def fetched(source: Source, name: str) -> torch.Tensor:
    """A whole parameter."""
    tensor = torch.empty(source.shapes[name])
    source.fill([whole_piece(name, tensor)])
    return tensor


def test_the_set_that_is_asked_for_is_read(sources: Path) -> None:
    name = "x_embedder.proj.weight"
    for which, zero in ((None, False), ("ema", False), ("weights", True)):
        with opened(asked(sources / "mixture.pt", which=which)) as source:
            assert (fetched(source, name) == 0).all().item() is zero
            assert source.facts["set"] == (which or "ema")


def test_what_cannot_be_started_from_is_one_message(sources: Path, tmp_path: Path) -> None:
    dense = network_of(**SOURCES["dense"])
    bare = tmp_path / "bare.pt"
    save_published(PublishedWeights(dense.config, canonical_state(dense)), bare, bare=True)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for start, message in (
        (asked(bare, model=dense.config), r"start_objective is left out.*SiT"),
        (asked(sources / "run", said="ddpm"), r"start_objective = ddpm, but .* says rectified_flow"),
        (asked(tmp_path / "empty"), "the run has no complete checkpoint"),
        (asked(tmp_path / "none.pt"), "none.pt: no such file"),
        (asked(sources / "dense.safetensors"), r"start_from = (.|\n)*expected model\.shared_mlp = gelu"),
    ):
        with pytest.raises(UserError, match=message):
            check_start(tmp_path / "run", start)


def test_sit_s_files_are_turned_round(tmp_path: Path) -> None:
    """v(z, t) = −SiT(z, 1 − t)."""
    dense = network_of(**SOURCES["dense"])
    bare = tmp_path / "sit.pt"
    save_published(PublishedWeights(dense.config, canonical_state(dense)), bare, bare=True)
    turned = DiT(dense.config).eval()
    with opened(asked(bare, said="sit", model=dense.config)) as source:
        names = [name for name in canonical_state(dense) if name != "pos_embed"]
        load_canonical(turned, {name: fetched(source, name) for name in names}, "sit")
    x_BCHW, label_B = torch.linspace(-1, 1, 128).view(2, *SHAPE), torch.tensor([1, 10])
    t_B = torch.tensor([0.25, 0.75])
    with torch.no_grad():
        torch.testing.assert_close(
            turned(x_BCHW, t_B, label_B), -dense(x_BCHW, 1 - t_B, label_B), rtol=0, atol=1e-4
        )


def test_a_resume_takes_nothing(sources: Path) -> None:
    """A run that has a checkpoint is not even compared with what it might have started from."""
    (line,) = check_start(sources / "run", asked(sources / "nowhere"))
    assert "is ignored" in line


def test_names_of_classes_that_differ_are_told(sources: Path, tmp_path: Path) -> None:
    names = tuple("abcdefghij")
    said = check_start(tmp_path / "run", asked(sources / "run", class_names=names))
    assert said[0].endswith("tensors are copied") and len(said) == 2
    assert "the names of 10 classes" in said[1] and "class 0 is 'a' here and '0' there" in said[1]
    assert len(check_start(tmp_path / "run", asked(sources / "run", class_names=tuple("0123456789")))) == 1
