"""The ways that GPUs compute the experts, on a CPU: against the loop, without a wait, and with fake tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final, cast
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.experts import paths
from ditmoe.model.experts.balance import BalanceLoss
from ditmoe.model.experts.dispatch import assign
from ditmoe.model.experts.moe import MoE
from ditmoe.model.experts.paths import Path
from ditmoe.model.objective import Draws, make_objective
from tests.host_waits import HostWaits

HIDDEN, EXPERTS, ACTIVE, IMAGES, TOKENS = 32, 8, 2, 4, 16
DEVICE: Final = "cuda" if torch.backends.cuda.is_built() else "meta"
"""The device of fake tensors; a torch built for the CPU alone has none called cuda."""
GPU_PATHS: Final[tuple[Path, ...]] = ("grouped", "batched")
ROUTINGS: Final = ("random", "one expert", "two experts")


@contextmanager
def steered(path: Path) -> Iterator[None]:
    """Compute this way, whatever the device."""
    with patch.object(paths, "expert_path", lambda *_: path):
        yield


def make_layer(dtype: torch.dtype) -> MoE:
    torch.manual_seed(0)
    layer = MoE(HIDDEN, EXPERTS, ACTIVE, 1, BalanceLoss(EXPERTS, 0.1, TOKENS, 1))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return layer.to(dtype)


def selected(routing: str) -> Tensor:
    """int64 `[T, K]`; some experts get nothing, or all but one."""
    tokens = IMAGES * TOKENS
    if routing == "one expert":
        return torch.full((tokens, 1), 3)
    if routing == "two experts":
        return torch.tensor([[7, 0]]).expand(tokens, 2).contiguous()
    return torch.rand(tokens, EXPERTS).topk(ACTIVE).indices


def passed(layer: MoE, routing: Tensor, path: Path) -> list[Tensor]:
    """What the layer gives, and the gradients of tokens, scores and weights."""
    weight = layer.gate.weight
    torch.manual_seed(1)
    x_TD = torch.randn(len(routing), HIDDEN).to(weight).requires_grad_()
    scores_TK = torch.rand(routing.shape).to(weight.device).requires_grad_()
    layer.zero_grad()
    with steered(path):
        out_TD = layer.mix(x_TD, scores_TK, routing)
        (out_TD.float() * torch.randn(out_TD.shape).to(weight.device)).sum().backward()
    experts = [cast(Tensor, parameter.grad) for parameter in layer.experts.parameters()]
    return [out_TD.detach(), cast(Tensor, x_TD.grad), cast(Tensor, scores_TK.grad), *experts]


@pytest.mark.parametrize("path", (None, *GPU_PATHS))
def test_rows_are_laid_out_without_the_weights(path: Path | None) -> None:
    """When blocks are recomputed, ZeRO 3 has put the weights away before the experts' own forward pass."""
    layer, x_TD = make_layer(torch.float32), torch.randn(IMAGES * TOKENS, HIDDEN)
    with steered(path) if path else nullcontext():
        expected = layer.experts.together(x_TD, ACTIVE * len(x_TD))
        for parameter in layer.experts.parameters():
            parameter.data = torch.empty(0)
        assert layer.experts.together(x_TD, ACTIVE * len(x_TD)) == expected


@pytest.mark.parametrize("path", GPU_PATHS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_they_compute_the_same_as_the_loop(path: Path, routing: str, dtype: torch.dtype, tolerance: float) -> None:
    layer, choice = make_layer(dtype), selected(routing)
    plain = passed(make_layer(torch.float32), choice, "one_by_one")
    for found, expected in zip(passed(layer, choice, path), plain, strict=True):
        assert (found.float() - expected).abs().max() <= tolerance * expected.abs().max()
    gradient_N = passed(layer, choice, path)[3].flatten(1).abs().amax(1)
    got = torch.bincount(choice.flatten(), minlength=EXPERTS)
    assert ((gradient_N > 0) == (got > 0)).all(), "whoever got nothing has no gradient, and everybody else has"


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_a_gpu_computes_the_same(
    figures: list[tuple[str, str]], routing: str, dtype: torch.dtype, tolerance: float
) -> None:
    """In the way that it takes by itself, forward and backward, without a wait."""
    choice = selected(routing)
    plain = passed(make_layer(torch.float32), choice, "one_by_one")
    layer = make_layer(dtype).to("cuda")
    choice = choice.to("cuda")
    way = paths.expert_path(layer.gate.weight.data, 4 * HIDDEN)
    passed(layer, choice, way)  # kernels are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.manual_seed(1)
        layer.mix(
            torch.zeros(len(choice), HIDDEN, device="cuda", dtype=dtype), choice.float(), choice
        ).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    worst = 0.0
    for found, expected in zip(passed(layer, choice, way), plain, strict=True):
        worst = max(worst, float((found.float().cpu() - expected).abs().max() / expected.abs().max()))
    figures.append((f"mixture layer, {routing}, {dtype}, {way}: difference from the CPU in fp32", f"{worst:.1e}"))
    assert worst <= tolerance


@pytest.mark.parametrize("together", (16, 64))
@pytest.mark.parametrize("routing", ROUTINGS)
def test_rows_are_laid_out_by_shapes_alone(routing: str, together: int) -> None:
    """Every expert has rows, all begin at multiples, each assignment has one of its own expert's."""
    choice = selected(routing)
    rows = assign(choice, EXPERTS, together)
    assert len(rows.token_A) == (choice.numel() // together + EXPERTS) * together == rows.counts_N.sum()
    assert (rows.counts_N > 0).all() and (rows.counts_N % together == 0).all()
    ends_N = rows.counts_N.cumsum(0)
    assert torch.equal(torch.searchsorted(ends_N, rows.slot_TK, right=True), choice)
    assert rows.slot_TK.unique().numel() == choice.numel()
    token_TK = torch.arange(len(choice)).unsqueeze(1).expand_as(choice)
    assert torch.equal(rows.token_A[rows.slot_TK], token_TK)
    between = torch.ones(len(rows.token_A), dtype=torch.bool).index_fill(0, rows.slot_TK.flatten(), False)
    assert (rows.order_A[between] == choice.numel()).all() and (rows.token_A < len(choice)).all()


@pytest.mark.parametrize("path", GPU_PATHS)
def test_nothing_of_a_layer_waits_for_the_device(path: Path) -> None:
    """And the counting finds what the loop waits for."""
    layer, x_BTD = make_layer(torch.bfloat16), torch.randn(IMAGES, TOKENS, HIDDEN, dtype=torch.bfloat16)
    counted = {}
    for way in (path, "one_by_one"):
        with steered(cast(Path, way)), HostWaits() as waits:
            layer(x_BTD).sum().backward()
        counted[way] = waits
    assert not counted[path].places, counted[path].places
    assert counted["one_by_one"].of("one_by_one") == 1


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    """Tensors without values: any that is read, or comes from another device than the rest, is an error."""
    with FakeTensorMode() as mode:
        yield mode


CONFIG: Final = ModelConfig(
    depth=2,
    hidden=32,
    heads=4,
    patch=2,
    experts=8,
    experts_per_token=2,
    image_size=8,
    channels=4,
    num_classes=10,
)


@pytest.mark.parametrize(
    ("kind", "path", "dtype", "recompute"),
    [
        ("ddpm", "grouped", torch.bfloat16, True),
        ("rectified_flow", "grouped", torch.bfloat16, False),
        ("ddpm", "batched", torch.float32, False),
        ("rectified_flow", "batched", torch.bfloat16, True),
    ],
)
def test_a_whole_pass_stays_on_a_gpu(
    fake: FakeTensorMode, kind: Any, path: Path, dtype: torch.dtype, recompute: bool
) -> None:
    """Shapes, number types and devices of a training pass as it is on a GPU; no value is read."""
    with torch.device(DEVICE):
        network = DiT(CONFIG.model_copy(update={"learn_sigma": kind == "ddpm"}))
        for parameter in network.parameters():
            parameter.data = torch.empty_like(parameter, dtype=dtype)
        x_BCHW, t_B, label_B = torch.empty(4, 4, 8, 8), torch.empty(4), torch.zeros(4, dtype=torch.int64)
        draws = Draws(torch.empty(4, 4, 8, 8), t_B, torch.zeros(4, dtype=torch.bool))
    network.checkpoint_blocks = recompute
    objective = make_objective(ObjectiveConfig(kind=kind))
    objective.noised(x_BCHW, draws)  # the first batch takes tables to its device
    with steered(path), no_copies():
        loss_B = objective.loss(network, x_BCHW, label_B, draws)
        loss_B.mean().backward()
    assert loss_B.shape == (4,) and loss_B.dtype == torch.float32 and loss_B.device.type == DEVICE
    for name, parameter in network.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        assert gradient.shape == parameter.shape and gradient.dtype == dtype and gradient.device.type == DEVICE


@contextmanager
def no_copies() -> Iterator[None]:
    """Fails where a tensor goes to another device."""
    with _Copies() as copies:
        yield
    assert not copies.found, copies.found


class _Copies(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.found.append(f"{tuple(out.shape)} from {args[0].device} to {out.device}")
        return out


def test_mixed_devices_are_found(fake: FakeTensorMode) -> None:
    with torch.device(DEVICE):
        layer = MoE(HIDDEN, EXPERTS, ACTIVE, 1, BalanceLoss(EXPERTS, 0.1, TOKENS, 1))
    broken: list[Callable[[], object]] = [
        lambda: layer(torch.empty(IMAGES, TOKENS, HIDDEN)),
        lambda: layer.experts.one_by_one(
            torch.empty(16, HIDDEN, device=DEVICE), torch.ones(8, dtype=torch.int64, device=DEVICE)
        ),
    ]
    for run in broken:
        with steered("batched"), pytest.raises(Exception, match=r"device|_local_scalar_dense"):
            run()
