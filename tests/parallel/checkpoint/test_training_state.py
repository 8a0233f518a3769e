"""Checkpoints: bit-exact continuation, other layouts, damage, and what retention keeps."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ditmoe.model.errors import UserError
from ditmoe.parallel import processes
from ditmoe.parallel.boxes import column_slice, matrix_shape, row_slices, whole
from ditmoe.parallel.checkpoint.box_storage import load_pieces
from ditmoe.parallel.checkpoint.folder import (
    PARTIAL,
    CheckpointInfo,
    checkpoint_path,
    checkpoints,
    damaged,
    newest_checkpoint,
    read_info,
    read_weights,
    start_partial,
    superseded,
)
from ditmoe.parallel.checkpoint.holds import reading
from ditmoe.parallel.checkpoint.marker import MARKER
from ditmoe.parallel.checkpoint.removal import Removal
from ditmoe.parallel.checkpoint.saver import CheckpointSaver, finish
from ditmoe.parallel.checkpoint.training_state import PARTS, held_pieces, load_training_state
from ditmoe.parallel.config import CheckpointConfig
from ditmoe.parallel.engine.fragments import MOMENTS, Fragment
from ditmoe.parallel.layout import Layout
from tests.markers import change_marker

Runner = Callable[..., list[dict[str, Any]]]


@pytest.mark.timeout(280)
@pytest.mark.parametrize("stages", [(1,), pytest.param((0, 1, 2, 3), marks=pytest.mark.slow)], ids=str)
def test_every_stage_continues_bit_for_bit_and_on_other_layouts(
    run_cases: Runner, tmp_path: Path, stages: tuple[int, ...]
) -> None:
    folders = {zero: tmp_path / f"zero-{zero}" for zero in stages}
    # With closed gates the key biases stay at zero: open, AdamW scales up what is rounding noise in them.
    # The balance loss over the global batch needs the experts' shares of the last step before.
    start = {"expert": 2, "awake": False, "balance_group": 0}
    first = [{**start, "zero": zero, "steps": 4, "save": str(path)} for zero, path in folders.items()]
    # These are written when the run is over already: what they hold was copied after the fourth step.
    late = {zero: tmp_path / f"late-{zero}" for zero in folders}
    whole = [{**start, "zero": zero, "steps": 8, "save": str(path), "save_at": 4} for zero, path in late.items()]
    later = [{**start, "zero": zero, "steps": 8, "load": str(path)} for zero, path in folders.items()]
    results = run_cases(2, first + whole + later)
    uninterrupted_of = dict(zip(stages, results[len(stages) :], strict=False))
    for zero, continued in zip(stages, results[2 * len(stages) :], strict=True):
        uninterrupted = uninterrupted_of[zero]
        assert continued["curve"] == uninterrupted["curve"][4:], f"ZeRO {zero}"
        assert continued["ema"] == uninterrupted["ema"], f"ZeRO {zero}"
        early, later_on = (read_info(checkpoint_path(run[zero], 4)) for run in (folders, late))
        assert early.files == later_on.files and early.fingerprint == later_on.fingerprint, f"ZeRO {zero}"
    # The same files, read by another world: one process, and ZeRO stages that did not write them.
    moved = [
        {**start, "expert": 1, "zero": (zero + 2) % 4, "steps": 8, "load": str(path)}
        for zero, path in folders.items()
    ]
    for zero, result in zip(folders, run_cases(1, moved), strict=True):
        expected = np.array(uninterrupted_of[zero]["curve"])[4:]
        assert np.max(np.abs(np.array(result["curve"]) / expected - 1)) <= 1e-5, f"from ZeRO {zero}"
    weights = [read_weights(newest_checkpoint(path), "ema") for path in folders.values()]  # type: ignore[arg-type]
    for name, tensor in weights[0].items():
        for other in weights[1:]:
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)
    assert "blocks.2.moe.experts.3.down_proj.weight" in weights[0]
    _check_damage(folders[1])


@pytest.mark.timeout(180)
def test_the_balance_loss_goes_on_from_the_last_updates_shares(run_cases: Runner, tmp_path: Path) -> None:
    """They are of the whole batch, all micro-steps of it: bit for bit on the layout that wrote them, to rounding
    on one with other micro-steps, and whatever `balance_group` was before, and with skipped steps between."""
    start = {"expert": 2, "awake": False, "balance_group": 0, "micro_batch": 1, "save": str(tmp_path / "batch")}
    own = {**start, "balance_group": 1, "save": str(tmp_path / "own")}
    later = {"steps": 6, "save": None}
    whole, _, continued, _, changed, skipping = run_cases(
        2,
        [
            {**start, **later},
            {**start, "steps": 4},
            {**start, **later, "load": start["save"]},
            {**own, "steps": 4},
            {**start, **later, "load": own["save"]},
            {**start, **later, "load": start["save"], "skip": 2, "steps": 7},
        ],
    )
    assert continued["curve"] == whole["curve"][4:] and continued["ema"] == whole["ema"]
    moved = {**start, **later, "load": start["save"], "expert": 1, "micro_batch": 8}
    (on_one,) = run_cases(1, [moved])
    np.testing.assert_allclose(on_one["curve"], whole["curve"][4:], rtol=1e-5)
    # The shares of the step before in each first step: fᵢ·Pᵢ of unlike experts is not the α of like ones.
    alike = 3 * 0.05
    assert whole["curve"][0][1] == pytest.approx(alike, rel=1e-6)
    for result in (continued, changed, skipping):
        assert abs(result["curve"][0][1] / alike - 1) > 1e-4
    kept_LN = read_info(checkpoint_path(tmp_path / "own", 4)).sums["expert_load"]
    assert np.array(kept_LN).sum(1) == pytest.approx(1)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


MODEL = {"depth": 1, "hidden": 32, "heads": 2, "patch": 2, "image_size": 8, "channels": 1, "num_classes": 2}
SHAPES = {"qkv.weight": (12, 4), "qkv.bias": (12,), "proj.weight": (4, 6), "norm.weight": (4,)}


def sharded(tensor_ranks: int, cuts: int, fill: bool, ranks: Sequence[int]) -> Any:
    """What saving and loading see of an engine, with these ranks of a tensor-parallel layout in one process.

    Each tensor rank's part of a parameter is cut into so many flat fragments, as ZeRO does; what all tensor ranks
    hold is a replica on each. Values are those of the place in the whole parameter and of the part; or zero.
    """
    fragments, averages = [], []
    for name, shape in SHAPES.items():
        rows, columns = matrix_shape(shape)
        matrix = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
        for rank in ranks:
            placement, replicas = None, 1
            if name.startswith("qkv"):
                placement = row_slices(shape, rank, tensor_ranks, parts=3)
            elif name.startswith("proj"):
                placement = column_slice(shape, rank, tensor_ranks)
            else:
                replicas = tensor_ranks
            boxes = placement or whole(shape)
            local = torch.cat([matrix[b.row : b.row + b.rows, b.column : b.column + b.columns] for b in boxes])
            bounds = [local.numel() * number // cuts for number in range(cuts + 1)]
            for first, last in pairwise(bounds):
                run = local.flatten()[first:last]
                values = [run + 100 * part if fill else torch.zeros_like(run) for part in range(4)]
                moments = dict(zip(MOMENTS, values[2:], strict=True))
                fragments.append(
                    Fragment(name, shape, first, values[0], moments, run, rank % replicas, replicas, placement)
                )
                averages.append(values[1])
    layout = Layout(pipe=1, data=1, expert=1, tensor=1, zero=1, micro_batch=1, accumulation=1)
    return SimpleNamespace(fragments=fragments, ema=averages, step=7, layout=layout, device=torch.device("cpu"))


@pytest.mark.parametrize("source", [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("target", [(1, 2), (2, 3)])
@pytest.mark.usefixtures("one_process")
def test_tensor_parallel_parts_move(tmp_path: Path, source: tuple[int, int], target: tuple[int, int]) -> None:
    with CheckpointSaver(tmp_path, CheckpointConfig()) as saver:
        engine = sharded(*source, fill=True, ranks=range(source[0]))
        path = saver.save(engine, 0, {}, {"model": MODEL, "objective": {"kind": "ddpm"}}, {})
    assert read_info(path).shapes == SHAPES
    for rank in range(target[0]):
        found, expected = (sharded(*target, fill=fill, ranks=[rank]) for fill in (False, True))
        for part in PARTS:
            load_pieces(path / part, held_pieces(found, part))
        for one, other in zip(found.fragments, expected.fragments, strict=True):
            assert torch.equal(one.weight, other.weight)
            assert all(torch.equal(one.moments[name], other.moments[name]) for name in MOMENTS)
        assert all(map(torch.equal, found.ema, expected.ema))


def odd(run: Path, step: int, kind: str) -> str:
    """Make something by the name of a checkpoint; what is said of it."""
    path = checkpoint_path(run, step)
    if kind == "a file":
        path.write_text("")
        return f"{path / MARKER}: cannot be read (Not a directory)"
    if kind == "no marker":
        path.mkdir()
        return f"{path}: no {MARKER} found"
    shutil.copytree(checkpoint_path(run, 7), path)
    change_marker(path, lambda facts: facts.update(step=step))
    file = path / "ema" / "shard-00001.safetensors"
    if kind == "another step":
        change_marker(path, lambda facts: facts.update(step=7))
        return f"{path / MARKER}: is of step 7, expected {step} as its folder's name says"
    if kind == "a folder for the marker":
        (path / MARKER).unlink()
        (path / MARKER).mkdir()
        return f"{path / MARKER}: is a folder, expected a file"
    if kind == "a folder for a file":
        file.unlink()
        file.mkdir()
        return f"{file}: is a folder, expected a file"
    if kind == "odd values":
        change_marker(path, lambda facts: facts.update(images=None))
        return f"{path / MARKER}: not a checkpoint's marker (images = None"
    if kind == "a file that is not listed":
        shutil.copy(file, file.with_name("shard-00002.safetensors"))
        return f"{file.with_name('shard-00002.safetensors')}: is not in the list of {MARKER}"
    if kind == "no optimiser":
        drop = lambda facts: facts.update(parts=["weights"], files=only(facts["files"], "weights/"))  # noqa: E731
        change_marker(path, drop)
        return f"{path}: holds weights without ema and exp_avg and exp_avg_sq"
    if kind == "a link out":
        file.rename(run / "elsewhere")
        file.symlink_to(run / "elsewhere")
        return f"{file}: is a link that leads out of the checkpoint"
    if kind in ("a changed number", "a changed header"):
        content = bytearray(file.read_bytes())
        place = len(content) - 2 if kind == "a changed number" else content.index(b"saved_offsets")
        content[place] ^= 4
        file.write_bytes(content)
        return f"{file}: its contents have changed (checksum differs from the one in {MARKER})"
    assert kind == "an odd header"
    content = file.read_bytes().replace(b"saved_offsets", b"saved_0ffsets", 1)
    file.write_bytes(content)
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_marker(path, lambda marker: marker["files"].update({f"ema/{file.name}": facts}))
    return f"{file}: DCP_SHARDING_INFO of its header cannot be read"


def only(files: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name: facts for name, facts in files.items() if name.startswith(prefix)}


ODDITIES = (
    *("a file that is not listed",),
    *("a file", "no marker", "another step", "a folder for the marker", "a folder for a file", "odd values"),
    *("no optimiser", "a link out", "an odd header", "a changed number", "a changed header"),
)


@pytest.mark.usefixtures("one_process")
def test_odd_checkpoints_are_told_and_an_older_one_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The fragments of this engine are not a whole network; what a model has is another test's.
    monkeypatch.setattr("ditmoe.parallel.checkpoint.training_state.incomplete", only_headers)
    engine = sharded(1, 1, fill=True, ranks=[0])
    engine.resume_at = lambda step: setattr(engine, "step", step)
    with CheckpointSaver(tmp_path, CheckpointConfig()) as saver:
        saver.save(engine, 0, {}, {"model": MODEL, "objective": {"kind": "ddpm"}}, {})
    expected = [odd(tmp_path, 20 + number, kind) for number, kind in enumerate(ODDITIES)]
    engine.step = 0
    info, skipped = load_training_state(tmp_path, engine)
    assert info is not None and info.step == engine.step == 7
    for fragment, good in zip(engine.fragments, sharded(1, 1, fill=True, ranks=[0]).fragments, strict=True):
        assert torch.equal(fragment.weight, good.weight), "what a damaged one has left is written over"
    assert len(skipped) == len(expected)
    for found, beginning in zip(reversed(skipped), expected, strict=True):
        assert found.startswith(beginning), found
    shutil.rmtree(checkpoint_path(tmp_path, 7))
    with pytest.raises(UserError, match="no intact checkpoint is left") as caught:
        load_training_state(tmp_path, engine)
    assert all(beginning in str(caught.value) for beginning in expected)


def only_headers(info: CheckpointInfo) -> list[str]:
    return [problem for stored in info.stored.values() for problem in stored.missing(info.shapes)]


def _check_damage(run: Path) -> None:
    """Truncation, bit flips and a missing marker are seen."""
    path = newest_checkpoint(run)
    assert path is not None
    info = read_info(path)
    assert damaged(info, info.files) == []
    name = sorted(name for name in info.files if name.startswith("ema/"))[0]
    good = (path / name).read_bytes()
    (path / name).write_bytes(good[:-1])
    assert "bytes found" in damaged(info, [name])[0]
    flipped = bytearray(good)
    flipped[-3] ^= 4
    (path / name).write_bytes(flipped)
    assert "checksum" in damaged(info, [name])[0]
    with pytest.raises(UserError, match=r"ema/shard-.*checksum"):
        read_weights(path, "ema")
    read_weights(path, "weights")
    (path / name).write_bytes(good)
    facts = json.loads((path / MARKER).read_text())
    (path / MARKER).write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(UserError, match="format 99 found, expected 2"):
        read_info(path)
    (path / MARKER).write_text(json.dumps({**facts, "format": 1}))
    with pytest.raises(UserError, match="format 1 found, expected 2; export it with the version that wrote it"):
        read_info(path)
    (path / MARKER).write_text(json.dumps(facts)[:50])
    with pytest.raises(UserError, match="not a checkpoint's marker"):
        read_info(path)
    (path / MARKER).unlink()
    assert checkpoints(run) == [] and newest_checkpoint(run) is None


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "gone"),
    [(1, None, [10, 20, 30]), (2, None, [10, 20]), (2, 20, [10]), (9, None, [])],
)
def test_retention(keep_last: int, keep_every: int | None, gone: list[int]) -> None:
    assert superseded([30, 10, 40, 20], keep_last, keep_every) == gone
    assert superseded([30, 10, 40, 20], keep_last, keep_every, best=[10]) == [step for step in gone if step != 10]


def save_marker(run: Path, step: int, retention: CheckpointConfig) -> None:
    """Finish a checkpoint that has nothing but its marker."""
    path, removal = checkpoint_path(run, step), Removal(run)
    finish(start_partial(path), path, {"step": step}, {}, retention, removal)
    removal.wait()


def test_retention_does_not_count_later_damaged_checkpoints(tmp_path: Path) -> None:
    """A run that went back before a damaged checkpoint keeps what it saves from there on."""
    for step in (3, 6):
        save_marker(tmp_path, step, CheckpointConfig())
    for step in (4, 5):
        save_marker(tmp_path, step, CheckpointConfig(keep_last=1))
        assert [path.name[-1] for path in checkpoints(tmp_path)] == [str(step), "6"]
    (checkpoint_path(tmp_path, 6) / "damaged").touch()
    save_marker(tmp_path, 6, CheckpointConfig(keep_last=1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]
    assert not (checkpoint_path(tmp_path, 6) / "damaged").exists()


def test_what_is_being_read_stays_until_the_next_save(tmp_path: Path) -> None:
    for step in (3, 4):
        save_marker(tmp_path, step, CheckpointConfig())
    with reading(checkpoint_path(tmp_path, 3)), reading(checkpoint_path(tmp_path, 3)):
        save_marker(tmp_path, 5, CheckpointConfig(keep_last=1))
        assert [path.name[-1] for path in checkpoints(tmp_path)] == ["3", "5"]
    save_marker(tmp_path, 6, CheckpointConfig(keep_last=1))
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["6"]
    with pytest.raises(UserError, match="its run has removed it"), reading(checkpoint_path(tmp_path, 3)):
        pass


def test_a_kill_while_an_old_checkpoint_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it is not there to be found, and the next start removes it."""
    save_marker(tmp_path, 3, CheckpointConfig())
    with monkeypatch.context() as patch:
        patch.setattr(Removal, "sweep", lambda self: None)
        save_marker(tmp_path, 4, CheckpointConfig(keep_last=1))
    assert checkpoints(tmp_path) == [checkpoint_path(tmp_path, 4)]
    assert [*(tmp_path / "checkpoints").glob(f"*{PARTIAL}")]
    removal = Removal(tmp_path)
    removal.sweep()
    removal.wait()
    assert [*(tmp_path / "checkpoints").iterdir()] == [checkpoint_path(tmp_path, 4)]


def test_several_processes_need_a_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each would train alone and believe itself rank 0."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(UserError, match="RANK is set in the environment without MASTER_PORT"):
        processes.join(torch.device("cpu"))
