"""Whether dense weights answer to noise as SiT's do: what a file does not say, and a wrong guess would spoil.

Shown white noise z halfway, at t = ½, a trained network's prediction has a slope on z. For data of variance s² in
a direction it is, by the posterior mean of a Gaussian,

    rectified flow of ours    v = ε − x of (1 − t)·x + t·ε    2(1 − s²)/(1 + s²)
    SiT                       v = x − ε of t·x + (1 − t)·ε    −2(1 − s²)/(1 + s²)

and data have less variance than noise in most directions, since neighbouring pixels are alike. So SiT's is clearly
negative, there and at its noise, t = 0. A network of DDPM predicts the noise: at timestep 999 its slope is 1, and
nowhere clearly negative. The two that are not SiT's are not told apart. Weights that were hardly trained tell
nothing.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ditmoe.model.canonical import load_canonical
from ditmoe.model.config import ModelConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.weights.lazy import read
from ditmoe.model.weights.sit import could_be_sit

IMAGES: Final = 4
CLEAR: Final = 0.5
"""Slope that says something; trained ones were met at about 1."""
RELATED: Final = 0.3
"""Correlation from which a slope counts: that of random weights may be steep by chance."""
NOISE, MIDDLE, LAST_OF_DDPM = 0.0, 0.5, 999.0


def slopes(state: Mapping[str, Tensor], config: ModelConfig) -> dict[float, float]:
    """Slope of a network's prediction, without a class, on the noise that it is shown, at timesteps that tell.

    It is 0 where the two have little to do with each other.
    """
    assert config.channels and config.image_size and config.num_classes is not None
    network = DiT(config)
    load_canonical(network, read(state), "the weights")
    network.eval().requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    z_BCHW = torch.randn(IMAGES, config.channels, config.image_size, config.image_size, generator=random)
    label_B = torch.full((IMAGES,), config.num_classes)
    found = {}
    for timestep in (NOISE, MIDDLE, LAST_OF_DDPM):
        shown_BCHW = z_BCHW * (0.5**0.5 if timestep == MIDDLE else 1.0)  # the deviation that images have there
        answer_BCHW = network(shown_BCHW, torch.full((IMAGES,), timestep), label_B)[:, : config.channels]
        slope = (answer_BCHW * shown_BCHW).sum() / shown_BCHW.square().sum()
        correlation = slope * shown_BCHW.norm() / answer_BCHW.norm().clamp(min=1e-12)
        found[timestep] = slope.item() if correlation.abs() > RELATED else 0.0
    return found


def is_sit(state: Mapping[str, Tensor], config: ModelConfig) -> bool | None:
    """Whether weights are SiT's, as far as they tell; None: they do not."""
    found = slopes(state, config)
    if found[NOISE] < -CLEAR and found[MIDDLE] < -CLEAR:
        return True
    if found[MIDDLE] > CLEAR or (found[LAST_OF_DDPM] > CLEAR and found[MIDDLE] > -CLEAR / 2):
        return False
    return None


def check_objective(state: Mapping[str, Tensor], config: ModelConfig, said: str, key: str, origin: str) -> None:
    """Refuse what the weights of a dense network contradict; others cannot be SiT's.

    Args:
        said: ddpm, rectified_flow or sit.
        key: with which it was said, for messages.

    Raises:
        UserError: they are SiT's and something else was said, or the other way round.
    """
    if not could_be_sit(config):
        return
    found = is_sit(state, config)
    if found is None or found == (said == "sit"):
        return
    answer = "as SiT's do: expected sit" if found else "otherwise than SiT's do: expected ddpm or rectified_flow"
    raise UserError(
        f"{key}: {said} given, and the weights of {origin} answer to noise {answer}; `ditmoe convert` with "
        "--trust-objective takes your word for it"
    )
