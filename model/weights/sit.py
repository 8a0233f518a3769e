"""SiT's weights as a rectified flow of ours: time turned round in the weights themselves.

SiT (Ma et al., arXiv 2401.08740, linear path, velocity) is trained on t·x + (1 − t)·ε and predicts x − ε. Ours is
trained on (1 − t)·x + t·ε and predicts ε − x. So what we need is v(z, t) = −SiT(z, 1 − t).

Both changes are linear maps of weights. The sign goes into the last layer. Time enters a network of this family by
its features cos ωt and sin ωt alone, and

    cos ω(1 − t) = cos ω · cos ωt + sin ω · sin ωt,    sin ω(1 − t) = sin ω · cos ωt − cos ω · sin ωt,

so the reversal goes into the first layer of the timestep embedder, computed in float64 and rounded once.

Names and shapes of SiT's files are those of a dense DiT: nothing in them tells which of the two they are.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ditmoe.model.config import ModelConfig
from ditmoe.model.errors import UserError
from ditmoe.model.layers import timestep_frequencies

TIME: Final = "t_embedder.mlp.0.weight"
LAST: Final = ("final_layer.linear.weight", "final_layer.linear.bias")


def could_be_sit(config: ModelConfig) -> bool:
    """Whether SiT has networks of this form: dense, with plain attention and DiT's features of time."""
    return config.experts == 0 and config.attention == "plain" and config.timestep_frequencies == "dit"


def from_sit(state: Mapping[str, Tensor], config: ModelConfig, origin: str) -> dict[str, Tensor]:
    """SiT's weights as those of our rectified flow; the same map leads back.

    Args:
        state: canonical, as SiT's files have it.
        origin: where it is from, for messages.

    Raises:
        UserError: it is of no SiT.
    """
    if not could_be_sit(config):
        found = f"{config.experts} experts and {config.attention} attention"
        if config.timestep_frequencies != "dit":
            found += f", and {config.timestep_frequencies}' frequencies of time"
        raise UserError(
            f"{origin}: has {found}; SiT's networks are dense, with plain attention, and DiT's frequencies"
        )
    omega = timestep_frequencies(torch.device("cpu")).double()
    of_cosine, of_sine = state[TIME].double().chunk(2, dim=1)
    turned = (
        of_cosine * omega.cos() + of_sine * omega.sin(),
        of_cosine * omega.sin() - of_sine * omega.cos(),
    )
    return {**state, TIME: torch.cat(turned, dim=1).float(), **{name: -state[name] for name in LAST}}
