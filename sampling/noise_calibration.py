"""How well a noise-level classifier's posterior holds: figures, and a picture of predicted against true σ.

A posterior that is calibrated has its cross-entropy equal to its entropy, and covers the true level as often as it
says. One that is too sure of itself makes a chain with drawn levels behave like one that takes the likeliest.

Shapes: B noisy images, N levels.
"""

import math
from typing import Any, Final, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

BINS: Final = 20
"""Stretches of log σ that figures are given for."""
_COVERED: Final = (0.5, 0.9)
_SIDE: Final = 320
_MARGIN: Final = 64
_PAPER, _INK, _FAINT = (255, 255, 255), (32, 32, 32), (200, 200, 200)
_POINT, _SECOND = (31, 90, 166), (200, 80, 30)


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


def calibration_picture(predictions: Predictions, level_N: Tensor) -> Image.Image:
    """Two panels over the true σ: the likeliest level of each image, and entropy beside cross-entropy."""
    picture = Image.new("RGB", (2 * (_SIDE + _MARGIN) + _MARGIN // 2, _SIDE + 2 * _MARGIN), _PAPER)
    pen, count = ImageDraw.Draw(picture), len(level_N)
    log_level_N = level_N.log()
    reach = (float(log_level_N[0]), float(log_level_N[-1]) + 1e-9)
    true_B = log_level_N[predictions.level_B]

    left = _Panel(pen, _MARGIN, reach, reach)
    left.frame("predicted sigma (likeliest level) against true sigma", decades=True)
    left.line([reach[0], reach[1]], [reach[0], reach[1]], _FAINT)
    for true, found in zip(
        true_B.tolist(), log_level_N[predictions.log_probability_BN.argmax(1)].tolist(), strict=True
    ):
        left.point(true, found, _POINT)

    entropy_B, loss_B = predictions.entropy_B, predictions.loss_B
    bin_B = _bins(predictions.level_B, count)
    bins = sorted(set(bin_B.tolist()))
    at = [true_B[bin_B == number].mean().item() for number in bins]
    entropy = [entropy_B[bin_B == number].mean().item() for number in bins]
    loss = [loss_B[bin_B == number].mean().item() for number in bins]
    right = _Panel(pen, 2 * _MARGIN + _SIDE, reach, (0.0, max(math.log(count), *entropy, *loss) * 1.05))
    right.frame("nats against true sigma: entropy (blue), cross-entropy (red)", decades=False)
    right.line(at, entropy, _POINT)
    right.line(at, loss, _SECOND)
    return picture


class _Panel:
    """A square with axes; x is log σ."""

    def __init__(
        self, pen: ImageDraw.ImageDraw, left: int, x_reach: tuple[float, float], y_reach: tuple[float, float]
    ) -> None:
        self._pen, self._left, self._x, self._y = pen, left, x_reach, y_reach
        self._font = ImageFont.load_default(11)

    def frame(self, title: str, *, decades: bool) -> None:
        """Border, title, powers of ten along x, and along y powers of ten or whole numbers.

        Titles write sigma out: Pillow's own font has no Greek.
        """
        left, top = self._left, _MARGIN
        self._pen.rectangle((left, top, left + _SIDE, top + _SIDE), outline=_INK)
        self._pen.text((left + _SIDE / 2, top - 14), title, _INK, self._font, anchor="mm")
        for power, at in _decades(*self._x):
            x = self._place(at, self._y[0])[0]
            self._pen.line((x, top + _SIDE, x, top + _SIDE + 4), _INK)
            self._pen.text((x, top + _SIDE + 14), f"1e{power}", _INK, self._font, anchor="mm")
        ticks = (
            [(f"1e{power}", at) for power, at in _decades(*self._y)]
            if decades
            else [(str(number), float(number)) for number in range(math.floor(self._y[1]) + 1)]
        )
        for text, at in ticks:
            y = self._place(self._x[0], at)[1]
            self._pen.line((left - 4, y, left, y), _INK)
            self._pen.text((left - 8, y), text, _INK, self._font, anchor="rm")

    def point(self, x: float, y: float, colour: tuple[int, int, int]) -> None:
        across, down = self._place(x, y)
        self._pen.rectangle((across, down, across + 1, down + 1), colour)

    def line(self, x: list[float], y: list[float], colour: tuple[int, int, int]) -> None:
        self._pen.line([self._place(a, b) for a, b in zip(x, y, strict=True)], colour, 2)

    def _place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self._x[0]) / (self._x[1] - self._x[0])
        up = (y - self._y[0]) / (self._y[1] - self._y[0])
        return self._left + across * _SIDE, _MARGIN + (1 - up) * _SIDE


def _decades(low: float, high: float) -> list[tuple[int, float]]:
    """Powers of ten between two logarithms, with their own."""
    first, last = math.ceil(low / math.log(10)), math.floor(high / math.log(10))
    return [(power, power * math.log(10)) for power in range(first, last + 1)]


def _bins(level_B: Tensor, levels: int) -> Tensor:
    return torch.div(level_B * BINS, levels, rounding_mode="floor")
