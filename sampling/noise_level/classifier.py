"""The noise-level classifier of a run: p(σ | x) from a small convolutional network (DMCMC, arXiv 2209.14593).

It is kept beside the run, in `noise-classifier/`, with what space it was trained for: a classifier of other
images, or of another range of σ, would lead chains astray without a word.

Shapes: B images, N levels.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ditmoe.data.storage.files import replacing
from ditmoe.model.errors import UserError
from ditmoe.model.weights.untrusted import parse_json
from ditmoe.parallel.checkpoint.folder import CheckpointInfo
from ditmoe.sampling.network.denoiser import column, make_denoiser
from ditmoe.sampling.network.load import complete_config, home_of
from ditmoe.sampling.noise_level.levels import LEVELS, log_uniform_levels
from ditmoe.sampling.settings.config import SamplerConfig

FOLDER: Final = "noise-classifier"
WEIGHTS_FILE: Final = "classifier.safetensors"
FACTS_FILE: Final = "classifier.json"
PICTURE_FILE: Final = "calibration.png"
WIDTHS: Final = (32, 64, 128, 256)
MOST_LEVELS: Final = 100_000
CELLS: Final = 4
"""Side that images are reduced to before the linear layer: that of a 32×32 image after three halvings."""


class NoiseSpace(NamedTuple):
    """The product space that a classifier is for."""

    shape: tuple[int, int, int]
    """(C, H, W) of what the network draws, pixels or latents."""
    objective: str
    data: tuple[str, ...]
    """Fingerprint of each source of the training data; empty where it is not known."""
    sigma_min: float
    sigma_max: float
    levels: int

    @property
    def level_N(self) -> Tensor:
        """σ of each level."""
        return log_uniform_levels(self.sigma_min, self.sigma_max, self.levels)


class NoiseNetwork(nn.Module):
    """Four 3×3 convolutions with average pools between, then a linear layer to the levels.

    Images come scaled by 1/√(1 + r²), where r² is their mean square, and with a constant channel of its logarithm:
    σ runs over more than four powers of ten, and a network with plain inputs hardly learns at its ends.
    """

    def __init__(self, channels: int, size: int, levels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before, side = channels + 1, size
        for number, width in enumerate(WIDTHS):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            if number < len(WIDTHS) - 1 and side > CELLS:
                layers.append(nn.AvgPool2d(2, ceil_mode=True))
                side = (side + 1) // 2
            before = width
        if side > CELLS:
            layers.append(nn.AdaptiveAvgPool2d(CELLS))
            side = CELLS
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(WIDTHS[-1] * side**2, levels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Noisy images, float32 → scores of the levels, `[B, N]`."""
        square_B = 1 + x_BCHW.square().flatten(1).mean(1)
        plane_B1HW = column(square_B.log(), x_BCHW).expand(-1, 1, *x_BCHW.shape[2:])
        scores_BN: Tensor = self.head(
            self.body(torch.cat((x_BCHW * column(square_B.rsqrt(), x_BCHW), plane_B1HW), 1))
        )
        return scores_BN


@dataclass(frozen=True)
class NoiseClassifier:
    """A trained classifier: a `NoisePosterior`. It does not look at labels."""

    network: NoiseNetwork
    space: NoiseSpace
    facts: Mapping[str, Any]
    """Settings of its training and figures of its calibration."""
    level_N: Tensor
    fingerprint: str
    """Of its weights, first 16 hex digits."""

    @torch.inference_mode()
    def __call__(self, x_BCHW: Tensor, label_B: Tensor) -> Tensor:
        """Log probability of each level, float64 `[B, N]`."""
        scores_BN: Tensor = self.network(x_BCHW.float())
        return scores_BN.double().log_softmax(1)


def classifier_folder(info: CheckpointInfo) -> Path:
    """Where the classifier of a checkpoint's run is kept."""
    return home_of(info.path) / FOLDER


def space_of(info: CheckpointInfo, levels: int = LEVELS) -> NoiseSpace:
    """The whole space of a checkpoint: the σ range in which its denoiser is to be trusted.

    UserError when the checkpoint does not describe a model.
    """
    try:
        config, objective = complete_config(info.model, info), info.objective
    except (KeyError, ValueError) as error:
        raise UserError(f"{info.path}: its configuration does not describe a model: {error}") from error
    assert config.channels is not None and config.image_size is not None
    denoiser = make_denoiser(_no_network, config, objective, SamplerConfig())
    return NoiseSpace(
        (config.channels, config.image_size, config.image_size),
        objective.kind,
        tuple(info.dataset.get("fingerprint") or ()),
        denoiser.sigma_min,
        denoiser.sigma_max,
        levels,
    )


def narrowed(space: NoiseSpace, sigma_min: float | None, sigma_max: float | None) -> NoiseSpace:
    """The space with a smaller range of σ; None leaves an end as it is.

    UserError when an end lies outside the range, or nothing is left of it.
    """
    low = space.sigma_min if sigma_min is None else sigma_min
    high = space.sigma_max if sigma_max is None else sigma_max
    if not space.sigma_min <= low < high <= space.sigma_max:
        raise UserError(
            f"--sigma-min {low:g} and --sigma-max {high:g}: expected a range within the denoiser's, "
            f"{space.sigma_min:g} to {space.sigma_max:g}"
        )
    return space._replace(sigma_min=low, sigma_max=high)


def _no_network(input_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
    """Stands for the network of a denoiser that is only asked for its range of σ."""
    raise AssertionError("it is never asked")


def save_noise_classifier(
    folder: Path, network: NoiseNetwork, space: NoiseSpace, facts: Mapping[str, Any]
) -> None:
    """Write the weights with all facts in them, and the facts once more for people to read."""
    whole = {"space": space._asdict(), **facts}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with replacing(folder / FACTS_FILE) as file:
        file.write((json.dumps(whole, indent=2) + "\n").encode())
    with replacing(folder / WEIGHTS_FILE) as file:
        file.write(save(state, metadata={"facts": json.dumps(whole)}))


def load_noise_classifier(
    folder: Path, expected: NoiseSpace, device: str | torch.device = "cpu"
) -> NoiseClassifier:
    """Read a classifier for a space.

    Args:
        folder: that of the run's classifier.
        expected: `space_of` the model; the classifier's σ may have a smaller range and other levels.

    Raises:
        UserError: there is none, it cannot be read, or it was trained for another space.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(
            f"{path}: there is no noise-level classifier, which DLG chains need; "
            f"train it with: ditmoe noise-classifier train {folder.parent}"
        )
    try:
        with safe_open(path, framework="pt") as stored:
            facts = parse_json(stored.metadata()["facts"])
            space = _space_from(facts.pop("space"))
            problems = _differences(space, expected)
            if problems:
                raise UserError(
                    f"{path}: trained for another space: {'; '.join(problems)}; "
                    "train it again with: ditmoe noise-classifier train RUN --overwrite"
                )
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        network = NoiseNetwork(space.shape[0], space.shape[1], space.levels)
        network.load_state_dict(state)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path}: unreadable noise-level classifier ({error}); train it again") from error
    digest = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()
    network = network.eval().requires_grad_(False).to(device)
    return NoiseClassifier(network, space, facts, space.level_N.to(device), digest[:16])


def _space_from(values: Mapping[str, Any]) -> NoiseSpace:
    channels, height, width = map(int, values["shape"])
    if not 2 <= int(values["levels"]) <= MOST_LEVELS:
        raise ValueError(f"levels is {values['levels']}, expected 2 to {MOST_LEVELS}")
    return NoiseSpace(
        (channels, height, width),
        str(values["objective"]),
        tuple(map(str, values["data"])),
        float(values["sigma_min"]),
        float(values["sigma_max"]),
        int(values["levels"]),
    )


def _differences(found: NoiseSpace, expected: NoiseSpace) -> list[str]:
    """What of a classifier's space does not fit a model's, a line each."""
    problems = []
    if found.shape != expected.shape:
        problems.append(f"shape {list(found.shape)}, expected {list(expected.shape)}")
    if found.objective != expected.objective:
        problems.append(f"objective {found.objective}, expected {expected.objective}")
    if found.data and expected.data and found.data != expected.data:
        problems.append(
            f"data {', '.join(each[:16] for each in found.data)}, "
            f"expected that of the run, {', '.join(each[:16] for each in expected.data)}"
        )
    slack = 1 + 1e-9
    if found.sigma_min * slack < expected.sigma_min or found.sigma_max > expected.sigma_max * slack:
        problems.append(
            f"σ from {found.sigma_min:g} to {found.sigma_max:g}, expected within the denoiser's range, "
            f"{expected.sigma_min:g} to {expected.sigma_max:g}"
        )
    return problems
