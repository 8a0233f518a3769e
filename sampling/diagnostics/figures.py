"""Figures of Denoising Langevin Gibbs chains: how far their samples are from independent ones.

Samples of one chain may be good and alike, and a score of all samples does not show it. Four views: σ along the
chains, features from sample to sample, recall of whole chains, and changes of mode.

    figures = chain_figures(series, real_features_NF)
    print(*chain_lines(figures), sep="\\n")

Shapes: C chains, S samples of each, T Langevin–Gibbs steps of each, F features, N real images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ditmoe.sampling.diagnostics.autocorrelation import Correlation, correlation, split_r_hat
from ditmoe.sampling.diagnostics.modes import mode_figures
from ditmoe.sampling.diagnostics.recall import recall_figures

LAGS: Final = 100
"""Lags at which an autocorrelation is given, at most: more are thinned out evenly in the logarithm."""
QUANTILES: Final = (0.05, 0.5, 0.95)
"""Of σ."""
CHAIN_QUANTILES: Final = (0.1, 0.9)
"""Of the chains' own autocorrelations."""

# Beyond these a figure comes with a warning.
MOST_R_HAT: Final = 1.1
LEAST_SHARE: Final = 0.5
"""Effective samples of those drawn, and changes of mode of those expected."""
LEAST_VISITED: Final = 0.8
"""Modes that a chain visits, of those expected."""
LEAST_RECALL: Final = 0.9
"""Recall of chains, of that of independent samples."""


@dataclass(frozen=True)
class ChainSeries:
    """C whole chains with S samples each, T = S·(steps per sample) Langevin–Gibbs steps."""

    log_sigma_CT: NDArray[np.float64]
    """log σ after each step of the stretches; without burn-in."""
    sample_sigma_CS: NDArray[np.float64]
    """σ of the state that was denoised."""
    features_CSF: NDArray[np.floating]
    """Of the finished samples, in the evaluation's feature network."""
    label_C: NDArray[np.int64]
    """Class of each chain."""

    def __post_init__(self) -> None:
        (chains, samples), (_, steps) = self.sample_sigma_CS.shape, self.log_sigma_CT.shape
        assert chains > 0 and samples > 0 and steps > 0 and steps % samples == 0
        assert self.features_CSF.shape[:2] == (chains, samples)
        assert len(self.label_C) == len(self.log_sigma_CT) == chains

    @property
    def compared_C(self) -> NDArray[np.bool_]:
        """Chains whose class has other chains, so that one can tell where they do not go."""
        _, place_C, count_K = np.unique(self.label_C, return_inverse=True, return_counts=True)
        compared_C: NDArray[np.bool_] = count_K[place_C] > 1
        return compared_C


def chain_figures(series: ChainSeries, real_features_NF: NDArray[np.floating]) -> dict[str, Any]:
    """Every figure as plain JSON data; null where one cannot be computed, and `warnings` that say why.

    Args:
        real_features_NF: of real images, in the same network.

    Returns:
        `chains`, `samples_per_chain`, `steps_per_sample`, `classes`, `chains_compared` (of classes with more than
        one chain), `sigma` and `features` (`_of_correlation`), `recall` (`recall_figures`), `modes`
        (`mode_figures`) and `warnings`.
    """
    chains, samples = series.sample_sigma_CS.shape
    compared_C = series.compared_C
    warnings: list[str] = []
    if samples == 1:
        warnings.append("each chain gave one sample: there are no successive samples to compare")
    alone = int((~compared_C).sum())
    if alone and samples > 1:
        warnings.append(
            f"{alone:,} of {chains:,} chains are the only ones of their class: what they never reach cannot be "
            "known, and the figures of features and modes leave them out; draw 2 chains of a class or more"
        )
    figures: dict[str, Any] = {
        "chains": chains,
        "samples_per_chain": samples,
        "steps_per_sample": series.log_sigma_CT.shape[1] // samples,
        "classes": len(np.unique(series.label_C)),
        "chains_compared": int(compared_C.sum()),
        "sigma": _sigma(series, warnings),
        "features": _features(series, compared_C, warnings),
    }
    recall, recall_warnings = recall_figures(series.features_CSF, series.label_C, real_features_NF)
    modes, mode_warnings = mode_figures(series.features_CSF, series.label_C, compared_C, real_features_NF)
    if samples > 1:  # otherwise it has been said
        warnings += recall_warnings
    warnings += mode_warnings
    return {**figures, "recall": recall, "modes": modes, "warnings": warnings + _alarms(recall, modes)}


def _sigma(series: ChainSeries, warnings: list[str]) -> dict[str, Any]:
    """Of log σ over steps. All chains share its target, whatever their class: p(σ) is the same for all."""
    log_sigma_CT1 = series.log_sigma_CT[:, :, None]
    one_C = np.zeros(len(log_sigma_CT1), dtype=np.int64)
    found = correlation(log_sigma_CT1, one_C)
    if found is None:
        warnings.append("σ never changes, or each chain took one step: its autocorrelation is not known")
    elif len(one_C) == 1:
        warnings.append("one chain: levels of σ that it never reaches cannot be known")
    r_hat = split_r_hat(log_sigma_CT1, one_C)
    if r_hat is not None and r_hat > MOST_R_HAT:
        warnings.append(f"chains, or their halves, differ in σ (R̂ = {r_hat:.3g}): they are short or stuck")
    return {
        "quantiles": dict(zip(map(str, QUANTILES), _quantiles(np.exp(series.log_sigma_CT)), strict=True)),
        "denoised_quantiles": dict(zip(map(str, QUANTILES), _quantiles(series.sample_sigma_CS), strict=True)),
        **_of_correlation(found, r_hat),
    }


def _features(series: ChainSeries, compared_C: NDArray[np.bool_], warnings: list[str]) -> dict[str, Any]:
    """Of features over samples, about the mean of the class: a chain keeps it, and only motion within counts.

    A chain that is alone in its class has no such mean but its own, about which one that is stuck looks mixed.
    """
    found = r_hat = None
    if compared_C.any():
        features_CSF, label_C = series.features_CSF[compared_C], series.label_C[compared_C]
        found = correlation(features_CSF, label_C)
        r_hat = split_r_hat(features_CSF, label_C)
        if found is None and features_CSF.shape[1] > 1:
            warnings.append("all samples of a class have the same features: nothing varies")
    figures = _of_correlation(found, r_hat)
    share = figures["effective_share"]
    if found is not None and share < LEAST_SHARE:
        warnings.append(
            f"{found.rho_CT.size:,} samples are worth {found.effective:,.0f} independent ones: samples of a chain "
            "are alike"
        )
    return figures


def _of_correlation(found: Correlation | None, r_hat: float | None) -> dict[str, Any]:
    """`samples` (or steps) of all chains, `effective` of them, `effective_share`, and what it comes from.

    Also `effective_per_chain` (least, median, most), `autocorrelation_time` in samples (or steps), `split_r_hat`,
    and at `lags` the `autocorrelation`, and `of_chains`: quantiles of it among chains.
    """
    if found is None:
        return {
            "samples": 0,
            "effective": None,
            "effective_share": None,
            "effective_per_chain": None,
            "autocorrelation_time": None,
            "split_r_hat": r_hat,
            "lags": [],
            "autocorrelation": [],
            "of_chains": {},
        }
    chains, steps = found.rho_CT.shape
    lags = _lags(steps)
    of_chains = np.quantile(found.rho_CT[:, lags], CHAIN_QUANTILES, axis=0)
    return {
        "samples": chains * steps,
        "effective": found.effective,
        "effective_share": found.effective / (chains * steps),
        "effective_per_chain": {
            "least": float(found.effective_C.min()),
            "median": float(np.median(found.effective_C)),
            "most": float(found.effective_C.max()),
        },
        "autocorrelation_time": found.time,
        "split_r_hat": r_hat,
        "lags": lags.tolist(),
        "autocorrelation": found.rho_T[lags].tolist(),
        "of_chains": dict(zip(map(str, CHAIN_QUANTILES), of_chains.tolist(), strict=True)),
    }


def _lags(steps: int) -> NDArray[np.int64]:
    """Lags from 0 to half of the steps: beyond it there are few pairs."""
    last = max(1, steps // 2)
    if last < LAGS:
        return np.arange(last + 1)
    return np.unique(np.concatenate([[0], np.geomspace(1, last, LAGS - 1).round()]).astype(np.int64))


def _quantiles(values: NDArray[np.float64]) -> list[float]:
    quantiles: list[float] = np.quantile(values, QUANTILES).tolist()
    return quantiles


def _alarms(recall: Mapping[str, Any], modes: Mapping[str, Any]) -> list[str]:
    """What is worse than it may be, in words."""
    alarms = []
    if recall["ratio"] is not None and recall["ratio"] < LEAST_RECALL:
        alarms.append(
            f"recall of whole chains is {recall['ratio']:.0%} of that of as many images from different chains"
        )
    changes = modes["changes"]
    if changes["ratio"] is not None and changes["ratio"] < LEAST_SHARE:
        alarms.append(
            f"chains change their mode in {changes['share']:.1%} of their samples, independent ones in "
            f"{changes['expected']:.1%}"
        )
    visited = modes["visited"]
    if visited is not None and visited["ratio"] < LEAST_VISITED:
        alarms.append(
            f"a chain visits {visited['mean']:.3g} modes in the mean, as many independent samples of its class "
            f"{visited['expected']:.3g}"
        )
    return alarms


def chain_lines(figures: Mapping[str, Any]) -> list[str]:
    """The figures as lines for a terminal, warnings last."""
    warnings = [f"warning: {warning}" for warning in figures["warnings"]]
    if "chains" not in figures:
        return warnings
    sigma, features = figures["sigma"], figures["features"]
    recall, modes = figures["recall"], figures["modes"]
    changes, visited = modes["changes"], modes["visited"]
    low, middle, high = sigma["quantiles"].values()
    one_chain = features["effective_per_chain"]
    rows = [
        (
            "effective",
            _figure(features["effective"]),
            f"of {features['samples']:,} samples compared"
            + (f"; a chain's: {_range(one_chain)} of {figures['samples_per_chain']:,}" if one_chain else "")
            + f"; R̂ {_figure(features['split_r_hat'])}",
        ),
        (
            "σ time",
            _figure(sigma["autocorrelation_time"]),
            f"steps to an independent σ; {figures['steps_per_sample']:,} from sample to sample; "
            f"R̂ {_figure(sigma['split_r_hat'])}",
        ),
        ("σ", _figure(middle), f"median; 5% to 95%: {_figure(low)} to {_figure(high)}"),
        (
            "recall ratio",
            _figure(recall["ratio"]),
            f"{_figure(recall['recall_of_chains'])} of whole chains, {_figure(recall['recall_of_independent'])} "
            f"of different ones; {recall['images']:,} images each",
        ),
        (
            "mode changes",
            _share(changes["share"]),
            f"independent: {_share(changes['expected'])}; {modes['modes']} modes",
        ),
        (
            "modes of a chain",
            _figure(None if visited is None else visited["mean"]),
            f"independent: {_figure(None if visited is None else visited['expected'])}",
        ),
        (
            "occupancy off by",
            _share(modes["total_variation"]),
            f"total variation from real images; by chance {_share(modes['total_variation_of_chance'])}",
        ),
    ]
    head = (
        f"{figures['chains']:,} chains of {figures['samples_per_chain']:,} samples, "
        f"{figures['steps_per_sample']:,} steps from one to the next"
    )
    lines = [head, *(f"  {name:<16}{value:>10}   {note}" for name, value, note in rows)]
    return lines + warnings


def _range(values: Mapping[str, float]) -> str:
    return f"{_figure(values['least'])} to {_figure(values['most'])}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
