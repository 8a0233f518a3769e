"""How well a noise-level classifier's posterior holds: figures, and a picture of predicted against true σ.

A posterior that is calibrated has its cross-entropy equal to its entropy, and covers the true level as often as it
says. One that is too sure of itself makes a chain with drawn levels behave like one that takes the likeliest.

Shapes: B noisy images, N levels.
"""

import math
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ditmoe.data.storage.files import make_folder, replacing

BINS: Final = 20
"""Stretches of log σ that figures are given for."""
_COVERED: Final = (0.5, 0.9)
_COLOURS: Final = ("#1f5aa6", "#c85a1e")


class Predictions(NamedTuple):
    """Of images with noise of known levels."""

    log_probability_BN: Tensor
    """float64."""
    level_B: Tensor
    """The true ones, int64."""

    @property
    def entropy_B(self) -> Tensor:
        """Of each posterior, nats."""
        return -(self.log_probability_BN.exp() * self.log_probability_BN).sum(1)

    @property
    def loss_B(self) -> Tensor:
        """Minus the log probability of the true level, nats."""
        return -self.log_probability_BN.gather(1, self.level_B[:, None])[:, 0]


def calibration_figures(predictions: Predictions, level_N: Tensor) -> dict[str, Any]:
    """Plain numbers; entropies in nats, errors in log σ."""
    log_level_N, probability_BN = level_N.log(), predictions.log_probability_BN.exp()
    true_B = log_level_N[predictions.level_B]
    likeliest_B = log_level_N[predictions.log_probability_BN.argmax(1)]
    mean_B = probability_BN @ log_level_N
    # The true level's place in the distribution function; a level counts for half of its own probability.
    own_B = probability_BN.gather(1, predictions.level_B[:, None])[:, 0]
    place_B = probability_BN.cumsum(1).gather(1, predictions.level_B[:, None])[:, 0] - 0.5 * own_B
    covered = {f"{share:.0%}": ((place_B - 0.5).abs() <= share / 2).double().mean().item() for share in _COVERED}
    bin_B = _bins(predictions.level_B, len(level_N))
    rows = []
    for number in sorted(set(bin_B.tolist())):
        inside_B = bin_B == number
        error_B = (likeliest_B - true_B)[inside_B]
        rows.append(
            {
                "sigma": true_B[inside_B].mean().exp().item(),
                "draws": int(inside_B.sum()),
                "argmax_bias": error_B.mean().item(),
                "argmax_error": error_B.square().mean().sqrt().item(),
                "mean_bias": (mean_B - true_B)[inside_B].mean().item(),
                "entropy": predictions.entropy_B[inside_B].mean().item(),
                "cross_entropy": predictions.loss_B[inside_B].mean().item(),
            }
        )
    return {
        "draws": len(true_B),
        "cross_entropy": predictions.loss_B.mean().item(),
        "entropy": predictions.entropy_B.mean().item(),
        "entropy_of_guessing": math.log(len(level_N)),
        "argmax_error": (likeliest_B - true_B).square().mean().sqrt().item(),
        "covered": covered,
        "by_sigma": rows,
    }


def write_calibration_picture(path: Path, predictions: Predictions, level_N: Tensor) -> None:
    """Two panels over the true σ: the likeliest level of each image, and entropy beside cross-entropy.

    Raises:
        UserError: the file cannot be written.
    """
    true_B = level_N[predictions.level_B]
    figure = Figure(figsize=(10, 4.8), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    ends = [float(level_N[0]), float(level_N[-1])]
    left.plot(ends, ends, color="0.75", label="right")
    likeliest_B = level_N[predictions.log_probability_BN.argmax(1)]
    left.plot(true_B, likeliest_B, ".", markersize=2, color=_COLOURS[0], label="an image")
    left.set(title="Likeliest σ", xlabel="true σ", ylabel="predicted σ", xscale="log", yscale="log")

    bin_B = _bins(predictions.level_B, len(level_N))
    bins = sorted(set(bin_B.tolist()))
    at = [true_B[bin_B == number].log().mean().exp().item() for number in bins]
    for value_B, colour, label in (
        (predictions.entropy_B, _COLOURS[0], "entropy: how sure it is"),
        (predictions.loss_B, _COLOURS[1], "cross-entropy: how sure it may be"),
    ):
        right.plot(at, [value_B[bin_B == number].mean().item() for number in bins], color=colour, label=label)
    right.axhline(math.log(len(level_N)), color="0.75", linestyle="--", label="guessing")
    right.set(title="Posterior of σ", xlabel="true σ", ylabel="nats", xscale="log")
    right.set_ylim(bottom=0)
    for panel in (left, right):
        panel.legend(fontsize="small")
        panel.spines[["top", "right"]].set_visible(False)
    make_folder(path.parent)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _bins(level_B: Tensor, levels: int) -> Tensor:
    return torch.div(level_B * BINS, levels, rounding_mode="floor")
