"""What is compiled of a block, and how often. Graphs are made here, and no code of them: that takes long."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ditmoe.model.canonical import canonical_state
from ditmoe.model.compiling import blocks
from ditmoe.model.compiling.blocks import CompiledBlocks, telling_failure
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from tests.host_waits import HostWaits

Maker = Callable[..., DiT]
Passes = Callable[..., dict[str, Tensor]]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that are made, forward ones; each is run as it is."""
    made: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    compile = torch.compile

    def without_code(function: Any, *, options: Any, **settings: Any) -> Any:
        return compile(function, backend=keep, **settings)

    monkeypatch.setattr(blocks.torch, "compile", without_code)
    yield made
    torch._dynamo.reset()


@pytest.mark.parametrize(("experts", "parts"), [(4, 2), (0, 2)])
def test_all_blocks_share_two_graphs(
    graphs: list[Any], make_lively: Maker, passes: Passes, inputs: Any, experts: int, parts: int
) -> None:
    """Whatever their weights; the mixture is in none, and in another graph without gradients."""
    network = make_lively(depth=3, experts=experts, experts_per_token=min(experts, 2))
    expected = passes(network, inputs)
    network.compute_block = CompiledBlocks(with_gradients=True)
    found = passes(network, inputs)
    assert len(graphs) == parts
    assert not any("sort" in str(node.target) for graph in graphs for node in graph.graph.nodes)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    with torch.no_grad():
        network(*inputs)
    assert len(graphs) == parts, "without gradients a block computes as ever"
    passes(network, tuple(each[:2] for each in inputs))
    assert len(graphs) == 2 * parts, "another number of images has graphs of its own"
    passes(network, inputs)
    assert len(graphs) == 2 * parts


def test_what_was_prepared_is_all_that_is_needed(
    graphs: list[Any], make_lively: Maker, passes: Passes, inputs: Any
) -> None:
    network = make_lively(depth=2)
    compiled = CompiledBlocks(with_gradients=True)
    assert compiled.prepare(network, 3) > 0
    made = len(graphs)
    assert made == 2 and compiled.prepare(network, 3) == 0
    assert all(parameter.grad is None for parameter in network.parameters())
    network.compute_block = compiled
    for network.checkpoint_blocks in (False, True):
        passes(network, inputs)
        assert len(graphs) == made
    drawing = CompiledBlocks(with_gradients=False)
    network.compute_block = drawing
    with torch.inference_mode():
        drawing.prepare(network, 3)
        made = len(graphs)
        network(*inputs)
    assert len(graphs) == made == 4


def test_a_dispatch_mode_sees_every_operator(
    graphs: list[Any], make_lively: Maker, passes: Passes, inputs: Any
) -> None:
    """As the one that counts what a step sends, which compiled code would not run under."""
    network = make_lively()
    network.compute_block = CompiledBlocks(with_gradients=True)
    with HostWaits():
        passes(network, inputs)
    assert not graphs


def test_weights_keep_their_names(graphs: list[Any], make_lively: Maker, passes: Passes, inputs: Any) -> None:
    network = make_lively()
    names, canonical = list(network.state_dict()), list(canonical_state(network))
    network.compute_block = CompiledBlocks(with_gradients=True)
    passes(network, inputs)
    assert list(network.state_dict()) == names and list(canonical_state(network)) == canonical
    assert copy.deepcopy(network).compute_block is not None


def test_compiled_parts_are_given_contiguous_tokens(
    graphs: list[Any], make_lively: Maker, monkeypatch: pytest.MonkeyPatch, inputs: Any
) -> None:
    """Patches come transposed; tests/model/compiling/test_code.py has what the compiler makes of such."""
    network = make_lively()
    assert not network.embed(*inputs)[0].is_contiguous()
    compiled = CompiledBlocks(with_gradients=True)
    seen: list[bool] = []
    attend = compiled._attend

    def watched(block: Any, *tensors: Tensor) -> Any:
        seen.extend(tensor.is_contiguous() for tensor in tensors)
        return attend(block, *tensors)

    monkeypatch.setattr(compiled, "_attend", watched)
    network.compute_block = compiled
    network(*inputs)
    assert seen == [True] * 4


def test_a_machine_that_cannot_compile_is_told_of_in_one_message() -> None:
    from torch._inductor.exc import CppCompileError

    failure = CppCompileError(["g++", "x.cpp"], "x.cpp:1:10: fatal error: Python.h: No such file or directory\n")
    with (
        pytest.raises(UserError, match=r"cannot compile a block: .*fatal error: Python\.h.*CXX"),
        telling_failure(),
    ):
        raise RuntimeError("torch wraps it") from failure
    with pytest.raises(ZeroDivisionError), telling_failure():
        raise ZeroDivisionError
