"""A network that the ranks of a group sample with together, because one of them could not hold it.

Each reads its part of the experts, and all the rest; headers and checksums of the files are divided among them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ditmoe.model.canonical import canonical_shapes, check_canonical, split_experts
from ditmoe.model.config import ModelConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.layers import position_embedding
from ditmoe.model.outside.text import counted
from ditmoe.parallel.checkpoint.checked_files import Readers
from ditmoe.parallel.checkpoint.folder import load_weights
from ditmoe.parallel.expert_group import ExpertGroup, NetworkOfGroup


def check_dealt(config: ModelConfig, ranks: int, option: str = "--expert-parallel") -> None:
    """UserError where a network's experts cannot be dealt to so many ranks."""
    if ranks > 1 and not config.experts:
        raise UserError(f"{option} {ranks}: the network is dense, it has no experts to deal out; expected 1")
    if ranks > 1 and config.experts % ranks:
        raise UserError(
            f"{option} {ranks}: the network has {counted(config.experts, 'expert')} in each block; expected "
            f"a number that "
            f"divides them"
        )


def network_of_group(
    path: Path, which: Literal["ema", "weights"], config: ModelConfig, dtype: torch.dtype, group: ExpertGroup
) -> NetworkOfGroup:
    """Read a rank's part of a network; all ranks of the group call it.

    Raises:
        UserError: the checkpoint is damaged, on every rank; or the experts cannot be dealt to so many.
    """
    check_dealt(config, group.size)

    held: list[NetworkOfGroup] = []

    def allocate(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
        check_canonical(shapes, canonical_shapes(config), origin=f"{path} ({which})")
        with torch.device("meta"):
            network = NetworkOfGroup(DiT(config).to(dtype), group)
        network.to_empty(device=group.device)
        held.append(network)
        return dict(_memory(network, group.experts(config.experts)))

    load_weights(path, which, allocate, Readers(group.rank, group.size, group.gather))
    (network,) = held
    assert config.image_size is not None
    network.network.pos_embed.copy_(position_embedding(config.hidden, config.image_size // config.patch))
    return network


def _memory(network: NetworkOfGroup, held: range) -> Iterator[tuple[str, Tensor]]:
    """Canonical name → memory of each parameter that is here."""
    for name, parameter in network.network.named_parameters():
        experts = split_experts(name.replace(".experts.local.", ".experts."), held.start, len(held))
        if experts is None:
            yield name, parameter.detach()
        else:
            yield from zip(experts, parameter.detach(), strict=True)
