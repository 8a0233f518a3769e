"""A picture of how Denoising Langevin Gibbs chains move: σ, autocorrelation, modes, and successive samples.

Shapes: C chains, S samples of each, T Langevin–Gibbs steps of each, images H × W of 1 or 3 channels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from numpy.typing import NDArray

from ditmoe.data.storage.files import make_folder, replacing
from ditmoe.sampling.diagnostics.figures import ChainSeries

TRACES: Final = 3
"""Chains whose σ is drawn."""
STEPS: Final = 400
"""Steps of σ that are drawn: the first."""
STRIP_CHAINS: Final = 8
STRIP_SAMPLES: Final = 16
"""Rows and columns of the strip of images, at most."""
_GAP: Final = 0.08
"""Between images, of their side."""
_COLOURS: Final = ("#1f5aa6", "#c85a1e", "#2a8a4a")
_FAINT: Final = "#b8c4d4"
_INCHES: Final = (13.0, 7.0)
"""Width of the picture, and height of its two rows of panels."""


def write_chain_picture(
    path: Path, series: ChainSeries, figures: Mapping[str, Any], image_CSHWC: NDArray[np.uint8]
) -> None:
    """Write one PNG; the folder is made.

    Args:
        figures: `chain_figures` of the series.
        image_CSHWC: successive samples of the first chains; of as many as one likes, at least one.

    Raises:
        UserError: the file cannot be written.
    """
    rows, columns = min(len(image_CSHWC), STRIP_CHAINS), min(image_CSHWC.shape[1], STRIP_SAMPLES)
    height, width = image_CSHWC.shape[2:4]
    strip = min(0.92 * _INCHES[0] * rows * height / (columns * width), 0.6 * rows + 0.6)
    figure = Figure(figsize=(_INCHES[0], _INCHES[1] + strip + 0.6), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(3, 2, height_ratios=(_INCHES[1] / 2, _INCHES[1] / 2, strip + 0.6))
    _draw_sigma(figure.add_subplot(grid[0, 0]), series)
    _draw_modes(figure.add_subplot(grid[0, 1]), figures["modes"])
    _draw_autocorrelation(
        figure.add_subplot(grid[1, 0]), figures["sigma"], "log σ along a chain", "lag (Langevin–Gibbs steps)"
    )
    _draw_autocorrelation(
        figure.add_subplot(grid[1, 1]), figures["features"], "Features from sample to sample", "lag (samples)"
    )
    _draw_strip(figure.add_subplot(grid[2, :]), image_CSHWC[:rows, :columns], series.label_C)
    make_folder(path.parent)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _draw_sigma(axes: Axes, series: ChainSeries) -> None:
    """σ of a few chains with the states that were denoised, over a band of all chains."""
    chains, steps = series.log_sigma_CT.shape
    per_sample = steps // series.sample_sigma_CS.shape[1]
    shown = min(steps, max(STEPS // per_sample, 1) * per_sample)
    step_T = np.arange(1, shown + 1)
    sigma_CT = np.exp(series.log_sigma_CT[:, :shown])
    low_T, middle_T, high_T = np.quantile(sigma_CT, (0.05, 0.5, 0.95), axis=0)
    axes.fill_between(step_T, low_T, high_T, color=_FAINT, alpha=0.6, linewidth=0, label="5% to 95% of all chains")
    axes.plot(step_T, middle_T, color="#667", linewidth=1.2, linestyle="--", label="median")
    stretch_PK = series.log_sigma_CT[:, :shown].reshape(chains, -1, per_sample)
    for chain, colour in zip(range(min(chains, TRACES)), _COLOURS, strict=False):
        sigma_P = series.sample_sigma_CS[chain, : stretch_PK.shape[1]]
        # The state that was denoised is the one of this σ in its stretch.
        place_P = np.abs(stretch_PK[chain] - np.log(sigma_P)[:, None]).argmin(axis=1)
        axes.plot(step_T, sigma_CT[chain], color=colour, linewidth=0.9, label=f"chain {chain}")
        axes.plot(
            1 + np.arange(len(sigma_P)) * per_sample + place_P, sigma_P, ".", color=colour, markersize=6, zorder=3
        )
    axes.set_yscale("log")
    _title(axes, "Noise level σ; dots: states that were denoised")
    of_all = "" if shown == steps else f" (first {shown:,} of {steps:,})"
    axes.set_xlabel("Langevin–Gibbs steps after burn-in" + of_all)
    axes.set_ylabel("σ (units of the network's input)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axes.get_ylim()
    axes.set_ylim(low * (low / high) ** 0.15, high)  # room for the legend
    _legend(axes, loc="lower center", ncols=5, columnspacing=1.0)


def _draw_autocorrelation(axes: Axes, found: Mapping[str, Any], title: str, lag_name: str) -> None:
    """Of all chains, over a band of the chains' own."""
    if not found["lags"]:
        _say(axes, title, "not known: see the warnings")
        return
    lags, (low, high) = np.asarray(found["lags"]), found["of_chains"].values()
    axes.axhline(0, color="#999", linewidth=0.8)
    axes.fill_between(lags, low, high, color=_FAINT, alpha=0.6, linewidth=0, label="10% to 90% of chains")
    marker = "o" if len(lags) <= 30 else ""
    axes.plot(lags, found["autocorrelation"], color=_COLOURS[0], marker=marker, markersize=4, label="all chains")
    # A chain alone is noisy; what runs out of these limits says no more.
    axes.set_ylim(-0.5, 1.05)
    if lags[-1] > 50:
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlim(0, lags[-1])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _title(axes, f"{title}: {found['samples']:,} worth {found['effective']:,.0f} independent")
    axes.set_xlabel(lag_name)
    axes.set_ylabel("autocorrelation")
    _legend(axes)


def _draw_modes(axes: Axes, modes: Mapping[str, Any]) -> None:
    """How many modes chains visit; where that is not known, which modes are occupied."""
    if not modes["modes"]:
        _say(axes, "Modes", "not known: see the warnings")
        return
    visited, changes = modes["visited"], modes["changes"]
    if visited is None:
        mode_G = np.arange(1, modes["modes"] + 1)
        axes.bar(mode_G - 0.2, modes["occupancy_drawn"], 0.4, color=_COLOURS[0], label="drawn")
        axes.bar(mode_G + 0.2, modes["occupancy_real"], 0.4, color=_FAINT, label="real")
        _title(axes, f"Occupancy of modes, {modes['total_variation']:.1%} apart")
        axes.set_xlabel("mode (cluster of real images)")
        axes.set_ylabel("share of images")
    else:
        count_G = np.asarray(modes["visited_histogram"])
        most = max(int(np.flatnonzero(count_G)[-1]) + 1, round(visited["expected"]) + 1)
        most = min(most, modes["modes"])
        axes.bar(np.arange(1, most + 1), count_G[:most], 0.7, color=_FAINT, label="chains")
        axes.axvline(visited["mean"], color=_COLOURS[0], label=f"mean: {visited['mean']:.2f}")
        axes.axvline(
            visited["expected"],
            color=_COLOURS[1],
            linestyle="--",
            label=f"of independent samples: {visited['expected']:.2f}",
        )
        axes.set_ylim(0, 1.35 * count_G.max())  # room for the legend
        _title(
            axes, f"Successive samples change mode: {changes['share']:.1%}; independent: {changes['expected']:.1%}"
        )
        axes.set_xlabel(f"modes that a chain visits, of {modes['modes']}")
        axes.set_ylabel("chains")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)


def _draw_strip(axes: Axes, image_RPHWC: NDArray[np.uint8], label_C: NDArray[np.int64]) -> None:
    """Rows are chains, columns their successive samples."""
    rows, columns, height, width, channels = image_RPHWC.shape
    gap = max(1, round(_GAP * width))
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=np.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = row * (height + gap), column * (width + gap)
            canvas[top : top + height, left : left + width] = image_RPHWC[row, column]
    axes.imshow(canvas.repeat(3, axis=2) if channels == 1 else canvas, interpolation="nearest")
    _title(axes, "Successive samples (from left to right) of a chain (a row)")
    axes.set_xticks((width - 1) / 2 + np.arange(columns) * (width + gap), [str(n) for n in range(columns)])
    axes.set_yticks(
        (height - 1) / 2 + np.arange(rows) * (height + gap),
        [f"chain {row}, class {label}" for row, label in enumerate(label_C[:rows].tolist())],
    )
    axes.set_xlabel("sample of the chain")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _say(axes: Axes, title: str, text: str) -> None:
    """A panel without data."""
    _title(axes, title)
    axes.text(0.5, 0.5, text, ha="center", va="center", color="#666", transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize="medium")


def _legend(axes: Axes, **places: Any) -> None:
    axes.legend(**{"loc": "best", "fontsize": "small", "framealpha": 0.9, **places})
    axes.spines[["top", "right"]].set_visible(False)
