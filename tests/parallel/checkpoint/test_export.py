"""Inspecting and exporting checkpoints: each parameter once, and never the whole model in memory."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from typer.testing import CliRunner

from ditmoe.launcher.commands.checkpoint import app
from ditmoe.model.canonical import canonical_state, load_canonical
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.initialise import initialise
from ditmoe.model.weights.files import read_safetensors, write_safetensors
from ditmoe.model.weights.lazy import sizes_of
from ditmoe.parallel.boxes import Box
from ditmoe.parallel.checkpoint.box_storage import Piece, save_pieces
from ditmoe.parallel.checkpoint.export import open_weights
from ditmoe.parallel.checkpoint.folder import (
    CheckpointInfo,
    incomplete,
    read_info,
    read_weights,
    write_weights_checkpoint,
)
from tests.markers import change_marker

CONFIG = ModelConfig(
    depth=2,
    hidden=32,
    heads=4,
    patch=2,
    experts=4,
    experts_per_token=2,
    image_size=8,
    channels=1,
    num_classes=3,
)
EXPERT = "blocks.1.moe.experts.2.up_proj.weight"


@pytest.fixture
def network() -> DiT:
    network = DiT(CONFIG)
    initialise(network, seed=0)
    return network


@pytest.fixture
def checkpoint(tmp_path: Path, network: DiT) -> Path:
    path = tmp_path / "step-00000000"
    weights = canonical_state(network)
    ema = {name: tensor + 1 for name, tensor in weights.items()}
    write_weights_checkpoint(path, CONFIG, ObjectiveConfig(), weights, ema)
    return path


@pytest.mark.parametrize("shard_bytes", [2**30, 100_000])
def test_export_is_the_same_weights(checkpoint: Path, network: DiT, tmp_path: Path, shard_bytes: int) -> None:
    asked: list[int] = []
    with open_weights(read_info(checkpoint), ["weights"]) as (state,):
        read = state.read

        def counted(names: Sequence[str]) -> Mapping[str, Tensor]:
            asked.append(sum(sizes_of(state)[name] for name in names))
            return read(names)

        state.read = counted
        sizes: list[int] = []
        path = tmp_path / "w.safetensors"
        files = write_safetensors(path, state, shard_bytes=shard_bytes, progress=sizes.append)
    assert (len(files) == 1) == (shard_bytes == 2**30)
    other = DiT(CONFIG)
    load_canonical(other, read_safetensors(files[-1])[0], "export")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    largest = max(tensor.numel() * 4 for tensor in canonical_state(network).values())
    steps = [after - before for before, after in zip([0, *sizes], sizes, strict=False)]
    assert asked == steps and max(steps) <= max(shard_bytes, largest)  # no more are held at a time
    with open_weights(read_info(checkpoint), ["ema"]) as (averages,):
        torch.testing.assert_close(averages[EXPERT], canonical_state(network)[EXPERT] + 1)
        assert torch.equal(averages["pos_embed"], network.pos_embed)
        names = ["pos_embed", *read_info(checkpoint).shapes]
        assert list(averages) == names and len(averages) == len(names)


def test_a_missing_and_a_doubled_expert_are_found(tmp_path: Path, network: DiT, checkpoint: Path) -> None:
    assert incomplete(read_info(checkpoint)) == []
    weights = dict(canonical_state(network))
    del weights[EXPERT]
    lost = tmp_path / "lost"
    write_weights_checkpoint(lost, CONFIG, ObjectiveConfig(), weights, None)
    assert incomplete(read_info(lost)) == [f"{lost}: {EXPERT} is not in it"]
    problem = r"experts\.2\.up_proj\.weight is not in it"
    with pytest.raises(UserError, match=problem), open_weights(read_info(lost), ["ema"]):
        pass

    file = next((checkpoint / "ema").iterdir())
    shutil.copy(file, file.with_name("shard-00009.safetensors"))
    doubled = incomplete(read_info(checkpoint))
    assert len(doubled) == len(read_info(checkpoint).shapes)
    assert any(f"of {EXPERT} are twice in it" in problem for problem in doubled)
    file.with_name("shard-00009.safetensors").rename(tmp_path / "moved")
    (tmp_path / "moved").unlink()
    file.unlink()
    assert f"{checkpoint / 'ema'}: {EXPERT} is not in it" in incomplete(read_info(checkpoint))


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([Box(0, 0, 5, 2)], "rows 5 to 9, columns 0 to 1 of a are nowhere in it"),
        ([Box(0, 0, 10, 2), Box(4, 1, 1, 1)], "rows 4 to 4, columns 1 to 1 of a are twice in it"),
        ([Box(0, 0, 10, 2), Box(9, 2, 1, 1)], "columns 2 to 2 of a are beyond its 10 × 2"),
    ],
)
def test_boxes_that_do_not_tile_are_not_saved(tmp_path: Path, boxes: list[Box], problem: str) -> None:
    pieces = [Piece("a", (10, 2), box, torch.zeros(box.rows, box.columns)) for box in boxes]
    with pytest.raises((AssertionError, CheckpointException), match=problem):
        save_pieces(tmp_path / "part", pieces)


def test_a_marker_of_another_model(checkpoint: Path) -> None:
    change_marker(checkpoint, lambda facts: facts["config"]["model"].update(experts=8))
    problems = incomplete(read_info(checkpoint))
    assert any("blocks.0.moe.experts.7.down_proj.weight is not in it" in problem for problem in problems)
    with pytest.raises(UserError, match=r"experts\.7"):
        read_weights(checkpoint)
    change_marker(checkpoint, lambda facts: facts["config"]["model"].update(depth="deep"))
    with pytest.raises(UserError, match=r"not a checkpoint's marker .*depth"):
        read_info(checkpoint)


def test_the_command(checkpoint: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(checkpoint)])
    assert shown.exit_code == 0, shown.output
    for part in ("4 experts, 2 per token", "ditmoe convert", "weights", "ema", "whole: each parameter"):
        assert part in shown.output
    info: CheckpointInfo = read_info(checkpoint)
    file = info.path / next(iter(info.files))
    file.write_bytes(file.read_bytes()[:-1])
    damaged = CliRunner().invoke(app, ["inspect", str(checkpoint)])
    assert isinstance(damaged.exception, UserError) and "bytes found" in str(damaged.exception)
    with pytest.raises(UserError, match="bytes found"), open_weights(info, ["ema", "weights"]):
        pass
