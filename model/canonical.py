"""Canonical parameters: the published state-dict names, one entry per expert.

Inside the network the experts of a block are stacked in three tensors; everywhere a weight leaves a process
(checkpoints, published files) it has its canonical name, `blocks.3.moe.experts.5.gate_proj.weight`.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ditmoe.model.config import ModelConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError

_STACKED = re.compile(r"(.*\.experts)\.(gate_proj|up_proj|down_proj)")
_LISTED = 5  # names shown of each kind of mismatch


def split_experts(name: str, first: int, count: int) -> list[str] | None:
    """The canonical names in a stacked expert tensor, or None for any other tensor.

    Args:
        name: name in the network.
        first: global number of the tensor's first expert.
        count: experts in the tensor.
    """
    match = _STACKED.fullmatch(name)
    if match is None:
        return None
    return [f"{match[1]}.{expert}.{match[2]}.weight" for expert in range(first, first + count)]


def canonical_items(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Rename a network's tensors to canonical ones; experts become views of their stacks."""
    for name, tensor in tensors:
        experts = split_experts(name, 0, tensor.shape[0] if tensor.ndim else 0)
        if experts is None:
            yield name, tensor
        else:
            yield from zip(experts, tensor, strict=True)


def canonical_state(network: nn.Module) -> dict[str, Tensor]:
    """The network's weights and position embedding by canonical name, as views."""
    return dict(canonical_items((name, tensor.detach()) for name, tensor in network.state_dict().items()))


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of everything in the canonical state, without allocating it."""
    with torch.device("meta"):
        network = DiT(config)
    return {name: tuple(tensor.shape) for name, tensor in canonical_state(network).items()}


def load_canonical(network: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copy a canonical state into the network.

    The position embedding may be missing: it is fixed.

    Raises:
        UserError: names are missing, unknown or of another shape; names `origin` and what is wrong.
    """
    own = canonical_state(network)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_canonical(found, {name: tuple(tensor.shape) for name, tensor in own.items()}, origin)
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def check_canonical(
    found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], origin: str
) -> None:
    """Compare the names and shapes of a state with the expected ones.

    Raises:
        UserError: one message with every kind of mismatch.
    """
    missing = [name for name in shapes if name not in found and name != "pos_embed"]
    unknown = [name for name in found if name not in shapes]
    wrong = [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in shapes.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{', …' if len(names) > _LISTED else ''}"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise UserError(f"{origin}: the weights do not fit the model ({'; '.join(problems)})")
