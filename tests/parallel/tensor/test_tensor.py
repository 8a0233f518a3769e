"""Tensor ranks: the loss curve of one process, checkpoints that move, and process groups that are compared."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ditmoe.parallel.groups import check_groups
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.tensor.shards import TensorShard

Runner = Callable[..., list[dict[str, Any]]]

pytestmark = pytest.mark.filterwarnings("ignore:Transformer Engine and Apex are not installed")

EXACT: Final = 1e-5
BF16: Final = 0.01
STEPS: Final = 6
SAVED: Final = 3

MIXED: Final = {"steps": STEPS, "clip": 0.3, "attention": "qk_norm"}
DENSE: Final = {"steps": STEPS, "experts": 0, "objective": "ddpm"}
GROUP: Final = {"steps": STEPS, "balance_group": 8}

REFERENCES: Final = {"mixed": MIXED, "dense": DENSE, "group": {**GROUP, "micro_batch": 8}}
CASES: Final[dict[str, tuple[str, int, dict[str, Any]]]] = {
    **{f"2 ranks, ZeRO {zero}": ("mixed", 2, {**MIXED, "tensor": 2, "zero": zero}) for zero in (0, 3)},
    "2 ranks, dense": ("dense", 2, {**DENSE, "tensor": 2, "zero": 1, "micro_batch": 8}),
    "2 ranks, bf16": ("mixed", 2, {**MIXED, "tensor": 2, "precision": "bf16"}),
    "2 × data 2, recomputation": ("mixed", 4, {**MIXED, "tensor": 2, "zero": 2, "checkpointing": True}),
    "2 × data 2, dense": ("dense", 4, {**DENSE, "tensor": 2, "zero": 0, "micro_batch": 4}),
    "2 × data 2, balance over the micro-step": ("group", 4, {**GROUP, "tensor": 2, "micro_batch": 4}),
    "2 × pipe 2": ("mixed", 4, {**MIXED, "tensor": 2, "pipe": 2, "zero": 1}),
    "2 × pipe 2, dense": ("dense", 4, {**DENSE, "tensor": 2, "pipe": 2, "zero": 0}),
    "4 ranks": ("mixed", 4, {**MIXED, "tensor": 4, "zero": 1, "micro_batch": 4}),
}
"""Name → its reference, its processes, and the case; all of one size run in one start of its processes."""


@pytest.fixture(scope="module")
def results(run_cases: Runner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Name → result, of references, cases, and of what was saved at one layout and continued at another."""
    one, four = (str(tmp_path_factory.mktemp(name)) for name in ("one", "four"))
    moved = {
        "saved at one": (1, {**MIXED, "zero": 0, "steps": SAVED, "save": one}),
        "saved at four": (4, {**MIXED, "tensor": 4, "zero": 3, "steps": SAVED, "save": four}),
        "one to 2 × pipe 2": (4, {**MIXED, "tensor": 2, "pipe": 2, "zero": 1, "load": one}),
        "four to 2": (2, {**MIXED, "tensor": 2, "zero": 0, "load": four}),
        "four to data 2": (2, {**MIXED, "zero": 3, "load": four}),
    }
    cases = {name: (1, case) for name, case in REFERENCES.items()}
    cases |= {name: (world, case) for name, (_, world, case) in CASES.items()} | moved
    found: dict[str, dict[str, Any]] = {}
    for world in (1, 4, 2):
        names = [name for name, (processes, _) in cases.items() if processes == world]
        found |= zip(names, run_cases(world, [cases[name][1] for name in names]), strict=True)
    return found


def largest_difference(result: dict[str, Any], reference: dict[str, Any], last: int = STEPS) -> float:
    """Relative, over loss, balance loss (where there is one) and gradient norm of the last steps."""
    found, expected = np.array(result["curve"]), np.array(reference["curve"])[-last:]
    assert found.shape == expected.shape
    columns = expected.all(axis=0)
    assert columns[[0, 2]].all() and not found[:, ~columns].any()
    return float(np.max(np.abs(found[:, columns] / expected[:, columns] - 1)))


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("name", [name for name in CASES if "bf16" not in name])
def test_tensor_ranks_have_one_loss_curve(results: dict[str, dict[str, Any]], name: str) -> None:
    reference = results[CASES[name][0]]
    assert largest_difference(results[name], reference) <= EXACT
    assert results[name]["ema"] == pytest.approx(reference["ema"], rel=EXACT)
    assert results[name]["alike"]


@pytest.mark.slow
def test_bf16_stays_near_fp32(results: dict[str, dict[str, Any]]) -> None:
    found, reference = (np.array(results[name]["curve"]) for name in ("2 ranks, bf16", "mixed"))
    assert 0 < np.max(np.abs(found[:, 0] / reference[:, 0] - 1)) < BF16
    assert results["2 ranks, bf16"]["alike"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one to 2 × pipe 2", "four to 2", "four to data 2"])
def test_checkpoints_move_between_tensor_layouts(results: dict[str, dict[str, Any]], name: str) -> None:
    """Weights, moments and EMA: the curve and the EMA go on as those of one process."""
    assert largest_difference(results[name], results["mixed"], STEPS - SAVED) <= EXACT
    assert results[name]["ema"] == pytest.approx(results["mixed"]["ema"], rel=EXACT)


@pytest.mark.slow
def test_ranks_hold_less(results: dict[str, dict[str, Any]]) -> None:
    """Of a block's 12D² in attention and MLP, half; the 6D² of its modulation are whole on both."""
    whole, half = results["dense"]["owned"], results["2 ranks, dense"]["owned"]
    width, depth = 32, 3
    shared_out = depth * (12 * width**2 + (3 + 4) * width)  # with the biases of qkv and fc1
    assert half == whole - shared_out // 2


@pytest.mark.parametrize(
    ("shape", "dim", "stacked"), [((12, 5), -2, 1), ((12, 5), -2, 3), ((12,), -1, 3), ((5, 12), -1, 1)]
)
@pytest.mark.parametrize("ranks", (1, 2, 4))
def test_a_shard_is_where_its_boxes_say(shape: tuple[int, ...], dim: int, stacked: int, ranks: int) -> None:
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    matrix = whole.view(shape[0], -1)
    for rank in range(ranks):
        shard = TensorShard(dim, rank, ranks, stacked)
        part = shard.take(whole)
        boxes = shard.placement(shape)
        assert len(boxes) == stacked
        stood_for = [matrix[b.row : b.row + b.rows, b.column : b.column + b.columns].flatten() for b in boxes]
        assert torch.equal(part.flatten(), torch.cat(stood_for))
        assert shard.whole_shape(tuple(part.shape)) == shape
        assert shard.part_shape(shape) == tuple(part.shape)


@contextmanager
def world_of(processes: int, rank: int) -> Iterator[None]:
    """A process group whose other ranks are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def grid(pipe: int, data: int, tensor: int) -> Layout:
    return Layout(pipe=pipe, data=data, expert=1, tensor=tensor, zero=1, micro_batch=1, accumulation=1)


def test_groups_of_the_rank_grid() -> None:
    layout = grid(pipe=2, data=2, tensor=2)
    assert layout.group(5, "tensor") == [4, 5]
    assert layout.group(5, "data") == [5, 7]
    assert layout.group(5, "pipe") == [1, 5]
    assert layout.group(5, "pipe", "tensor") == [0, 1, 4, 5]
    experts = Layout(pipe=2, data=4, expert=2, tensor=1, zero=1, micro_batch=1, accumulation=1)
    assert experts.expert_ranks(5) == [4, 5] and experts.expert_copy_ranks(5) == [5, 7]


@pytest.mark.parametrize("sizes", [(1, 1, 2), (1, 2, 2), (2, 2, 2), (3, 1, 4), (2, 4, 1)])
def test_megatron_makes_the_same_groups(sizes: tuple[int, int, int]) -> None:
    from ditmoe.parallel.tensor.megatron_grid import make_megatron_grid

    layout = grid(*sizes)
    for rank in range(layout.processes):
        with world_of(layout.processes, rank):
            unit = make_megatron_grid(layout)
            assert unit.get_data_parallel_group_ranks() == layout.group(rank, "data")
            assert unit.get_tensor_model_parallel_rank() == layout.coordinates(rank)[2]


def test_another_order_of_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipe before data: the same sizes of groups, and others in them."""
    from ditmoe.parallel.tensor import megatron_grid

    original = megatron_grid.parallel_state.initialize_model_parallel

    def in_another_order(**arguments: Any) -> None:
        original(**{**arguments, "order": "tp-cp-ep-pp-dp"})

    monkeypatch.setattr(megatron_grid.parallel_state, "initialize_model_parallel", in_another_order)
    with (
        world_of(8, rank=2),
        pytest.raises(AssertionError, match=r"megatron-core's data group joins ranks \[2, 6\], expected \[0, 2\]"),
    ):
        megatron_grid.make_megatron_grid(grid(pipe=2, data=2, tensor=2))


def test_ranks_in_another_order_are_refused() -> None:
    with world_of(4, rank=1):
        group = dist.new_group([0, 1])
        check_groups([("a group", group, [0, 1])])
        with pytest.raises(AssertionError, match=r"on rank 1: .*a group joins ranks \[0, 1\], expected \[1, 0\]"):
            check_groups([("a group", group, [1, 0])])
