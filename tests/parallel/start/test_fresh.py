"""Fresh values of a part of a parameter: those of the whole, drawn in blocks, up to the end of the part."""

from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditmoe.model.canonical import canonical_shapes
from ditmoe.model.config import ModelConfig
from ditmoe.model.initialise import Draw, initial_value
from ditmoe.parallel.boxes import matrix_shape, whole
from ditmoe.parallel.engine.initial import Part
from ditmoe.parallel.start import fresh
from ditmoe.parallel.start.fresh import Fresh, FreshPart
from tests.parallel.test_boxes import Shares, layouts

NAMES: Final = (
    "blocks.0.attn.qkv.weight",
    "blocks.1.moe.gate.weight",
    "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
    "blocks.0.attn.q_norm.weight",
)
"""Uniform of two widths, normal, zeros and ones."""


@st.composite
def cut(draw: st.DrawFn) -> tuple[tuple[int, ...], Shares]:
    """A shape of more than one dim, also such as torch draws in another way, and a layout of it."""
    rows = draw(st.sampled_from([1, 2, 5, 6, 12, 24, 57]))
    shape = (rows, *draw(st.sampled_from([(1,), (4,), (7,), (12,), (2, 3, 2)])))
    return shape, draw(layouts(shape))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), cut(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 3000))
def test_all_parts_have_the_numbers_of_the_whole(
    name: str, shape_and_cut: tuple[tuple[int, ...], Shares], dtype: torch.dtype, block_bytes: int
) -> None:
    shape, shares = shape_and_cut
    expected_RC = initial_value(name, shape, 11).view(matrix_shape(shape)).to(dtype)
    parts = [
        Part(name, shape, placement, start, torch.full((length,), 7.0, dtype=dtype))
        for placement, start, length in shares
        if length
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "BLOCK_BYTES", block_bytes)
        Fresh(11).fill(parts)
    for part in parts:
        for box, memory_RC in part.boxes():
            assert torch.equal(memory_RC, expected_RC[box.slices])


def test_every_parameter_of_a_network_has_its_values() -> None:
    """With what is drawn once per name, whatever its rule."""
    config = ModelConfig(
        preset="DiT-S/2-8E2A", depth=1, image_size=16, channels=4, num_classes=1000, attention="qk_norm"
    )
    shapes = {name: shape for name, shape in canonical_shapes(config).items() if name != "pos_embed"}
    parts = []
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        parts.append(Part(name, shape, whole(shape), size // 3, torch.full((size - size // 3,), 7.0)))
    Fresh(5).fill(parts)
    for part in parts:
        expected = initial_value(part.name, part.shape, 5).flatten()[part.start :]
        assert torch.equal(part.memory, expected), part.name
    assert {torch.equal(part.memory, torch.zeros_like(part.memory)) for part in parts} == {True, False}


def test_what_is_drawn_is_one_block_at_a_time_and_ends_with_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is made whole: of a large parameter a few rows take a block of memory, and nothing behind them."""
    drawn: list[int] = []
    how = fresh.initial_rule

    def watched(name: str, shape: tuple[int, ...], seed: int) -> Callable[[Tensor], Tensor]:
        draw: Any = how(name, shape, seed)

        def block(memory: Tensor) -> Tensor:
            drawn.append(memory.numel())
            filled: Tensor = draw(memory)
            return filled

        return block

    monkeypatch.setattr(fresh, "initial_rule", watched)
    shape = (4096, 1024)
    memory = torch.empty(3, 1024)
    box = next(Part("a.weight", shape, whole(shape), 1024 * 2000, memory.view(-1)).boxes())
    Fresh(0).draw([FreshPart("a.weight", shape, [box], scale=-2.0)])
    assert max(drawn) * 4 <= fresh.BLOCK_BYTES and sum(drawn) <= (2003 + 256) * 1024
    assert torch.equal(memory, -2 * initial_value("a.weight", shape, 0)[2000:2003])


def test_a_rule_may_change_what_it_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block too: the rule itself is asked for each of them."""

    def rule(name: str, shape: tuple[int, ...], seed: int) -> Draw:
        generator = torch.Generator().manual_seed(seed)
        return lambda memory: memory.uniform_(0, 1, generator=generator).mul_(2)

    monkeypatch.setattr(fresh, "initial_rule", rule)
    shape = (4096, 64)
    part = Part("a.weight", shape, whole(shape), 0, torch.empty(4096 * 64))
    Fresh(3).fill([part])
    assert torch.equal(part.memory, rule("a.weight", shape, 3)(torch.empty(shape)).flatten())
