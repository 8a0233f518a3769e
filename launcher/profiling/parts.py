"""The parts of a training step by name, and how a trace comes to have them: modules say when they compute."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import nn
from torch.profiler import record_function

ATTENTION, ROUTER, DISPATCH, EXPERTS = "attention", "router", "dispatch", "experts"
SHARED, MLP, NORMS = "shared experts", "MLP", "norms and modulation"
EMBEDDERS, FINAL_LAYER, OPTIMISER, EMA = "embedders", "final layer", "optimiser", "EMA"
DATA, RECORDS, COMMUNICATION, REST = "data", "records", "communication", "rest"

PARTS: Final = (
    *(ATTENTION, ROUTER, DISPATCH, EXPERTS, SHARED, MLP, NORMS, EMBEDDERS, FINAL_LAYER),
    *(OPTIMISER, EMA, COMMUNICATION, DATA, RECORDS, REST),
)
"""All of them, in the order of the table. `records` are saves and previews too; the rest is the objective, and
what Python does between operations."""

PREFIX: Final = "ditmoe: "
"""Begins the name of an annotation in a trace; the part's name follows."""

_MODULES: Final = (
    (r"blocks\.\d+", NORMS),
    (r"blocks\.\d+\.attn", ATTENTION),
    (r"blocks\.\d+\.mlp", MLP),
    (r"blocks\.\d+\.moe", DISPATCH),
    (r"blocks\.\d+\.moe\.(gate|router|balance)", ROUTER),
    (r"blocks\.\d+\.moe\.experts", EXPERTS),
    (r"blocks\.\d+\.moe\.shared_experts", SHARED),
    (r"[xty]_embedder", EMBEDDERS),
    (r"final_layer", FINAL_LAYER),
)
"""Name of a module, as a pattern → the part that its operations belong to, but for those of modules within it."""


def part_of_module(name: str) -> str:
    """The part that a module of a DiT belongs to: that of the innermost module of the list which contains it."""
    found = REST
    for pattern, part in _MODULES:
        if re.match(rf"{pattern}(\.|$)", name):
            found = part
    return found


@contextmanager
def annotated(network: nn.Module) -> Iterator[None]:
    """While it is open, the network's modules write their parts into every trace that is taken.

    They do so where they begin and end, also where a block is computed again for the backward pass, and whatever
    DeepSpeed or megatron-core have put in their place.
    """
    open_ranges: list[Any] = []
    handles = []

    def begins(part: str) -> Any:
        def begin(*_: Any) -> None:
            opened: Any = record_function(PREFIX + part)
            opened.__enter__()
            open_ranges.append(opened)

        return begin

    def end(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    for name, module in network.named_modules():
        part = next((part for pattern, part in _MODULES if re.fullmatch(pattern, name)), None)
        if part is not None:
            handles.append(module.register_forward_pre_hook(begins(part)))
            handles.append(module.register_forward_hook(end, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
