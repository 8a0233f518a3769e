"""The position embedding of a file against the fixed one, which a checkpoint of ours leaves out."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ditmoe.model.config import ModelConfig
from ditmoe.model.errors import UserError
from ditmoe.model.layers import position_embedding

AVERAGED: Final = 5e-4
"""Largest departure of a position embedding that training averaged with the weights. Float32 rounds at each of the
1 / (1 − decay) steps or so that an average remembers; 2e-4 was met at a decay of 0.9999."""


def check_position_embedding(
    state: Mapping[str, Tensor], config: ModelConfig, origin: str, averaged: bool
) -> str | None:
    """Check that a state's position embedding, where it has one, is the fixed one, to rounding.

    Args:
        config: complete, of the network that the state is of.
        origin: where the state is from, for messages.
        averaged: training averaged the weights, and may have averaged the embedding with them.

    Returns:
        What is to be said where it was averaged; None where it is the fixed one.

    Raises:
        UserError: it is another.
    """
    held = state.get("pos_embed")
    assert config.image_size is not None
    if held is None:
        return None
    fixed = position_embedding(config.hidden, config.image_size // config.patch)
    difference = (held.float() - fixed).abs().max().item()
    rounding = 8 * torch.finfo(held.dtype).eps
    if averaged and rounding < difference <= AVERAGED:
        return (
            f"{origin}: pos_embed departs by {difference:.2g} from the fixed sin-cos embedding, as where training"
            " averages it too; the fixed one is taken"
        )
    if not difference <= rounding:
        raise UserError(
            f"{origin}: pos_embed departs by {difference:.2g} from the fixed sin-cos embedding, which a checkpoint"
            " does not hold; expected the fixed one"
        )
    return None
