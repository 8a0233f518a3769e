"""Figures of chains: known autocorrelation, chains that stand still, modes never left, and degenerate sizes."""

import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditmoe.sampling.diagnostics import recall as chain_recall
from ditmoe.sampling.diagnostics.autocorrelation import correlation, split_r_hat
from ditmoe.sampling.diagnostics.figures import ChainSeries, chain_figures, chain_lines
from ditmoe.sampling.diagnostics.modes import mode_figures
from ditmoe.sampling.diagnostics.picture import write_chain_picture
from ditmoe.sampling.diagnostics.recall import recall_figures
from ditmoe.sampling.diagnostics.results import chain_results
from ditmoe.sampling.jobs.chunks import ChunkStore, DrawnImages

STEPS_PER_SAMPLE = 5
CLASSES, FEATURES = 2, 6
SCALE_F = np.arange(1, FEATURES + 1) ** -0.5


@pytest.fixture(autouse=True)
def no_warnings_of_numpy() -> Iterator[None]:
    """Divisions by zero, means of nothing and the like fail a test."""
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error", RuntimeWarning)
        yield


def autoregressive(phi: float, chains: int, steps: int, features: int = 1, seed: int = 0) -> np.ndarray:
    """x_t = φ·x_{t−1} + √(1 − φ²)·z, started from its stationary N(0, 1), `[C, T, F]`; ρ_t = φ^t."""
    random = np.random.default_rng(seed)
    x_TCF = random.standard_normal((steps, chains, features))
    for step in range(1, steps):
        x_TCF[step] = phi * x_TCF[step - 1] + (1 - phi**2) ** 0.5 * x_TCF[step]
    return x_TCF.transpose(1, 0, 2)


def centres(spread: float) -> np.ndarray:
    return spread * np.random.default_rng(99).standard_normal((CLASSES, FEATURES))


def real_features(count: int = 600, spread: float = 3.0) -> np.ndarray:
    random = np.random.default_rng(7)
    return centres(spread)[np.arange(count) % CLASSES] + random.standard_normal((count, FEATURES)) * SCALE_F


def series(phi: float, chains: int, samples: int, seed: int = 0, spread: float = 3.0) -> ChainSeries:
    """Chains whose features are autoregressive about the centre of their class, like `real_features`."""
    label_C = np.arange(chains) % CLASSES
    moved_CSF = autoregressive(phi, chains, samples, FEATURES, seed) * SCALE_F
    log_sigma_CT = autoregressive(phi, chains, samples * STEPS_PER_SAMPLE, seed=seed + 1)[:, :, 0]
    sigma_CSK = np.exp(log_sigma_CT).reshape(chains, samples, STEPS_PER_SAMPLE)
    features_CSF = (centres(spread)[label_C][:, None] + moved_CSF).astype(np.float32)
    return ChainSeries(log_sigma_CT, sigma_CSK.min(axis=2), features_CSF, label_C)


def one_group(chains: int) -> np.ndarray:
    return np.zeros(chains, dtype=np.int64)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_autocorrelation_of_autoregressive_chains_is_the_closed_form(phi: float) -> None:
    chains, steps = 100, 2000
    found = correlation(autoregressive(phi, chains, steps), one_group(chains))
    assert found is not None
    np.testing.assert_allclose(found.rho_T[:20], phi ** np.arange(20), atol=0.02)
    time = (1 + phi) / (1 - phi)
    assert found.time == pytest.approx(time, rel=0.04)
    assert found.effective == pytest.approx(chains * steps / time, rel=0.04)
    assert np.median(found.effective_C) == pytest.approx(steps / time, rel=0.15)


@pytest.mark.parametrize(("phi", "steps"), [(0.9, 2), (0.5, 3), (0.9, 10)])
def test_short_chains_are_worth_what_the_mean_of_them_is(phi: float, steps: int) -> None:
    chains = 4000
    x_CTF = autoregressive(phi, chains, steps)
    found = correlation(x_CTF, one_group(chains))
    assert found is not None
    lag = np.arange(1, steps)
    time = 1 + 2 * np.sum((1 - lag / steps) * phi**lag)
    assert found.time == pytest.approx(time, rel=0.04)
    # The definition: the variance of a chain's mean is that of one state, divided by what the chain is worth.
    assert found.effective / chains == pytest.approx(1 / x_CTF.mean(axis=1).var(), rel=0.06)


def test_autocorrelation_by_hand() -> None:
    # Two chains of three states: W = (1 + 4)/2, means 1 and 5, var⁺ = 2/3·W + 8.
    x_CTF = np.array([[0.0, 1, 2], [3, 5, 7]])[:, :, None]
    found = correlation(x_CTF, one_group(2))
    assert found is not None
    variance = 2 / 3 * 2.5 + 8
    np.testing.assert_allclose(found.rho_CT[0], [1, 1 - 0.5 * 1 / variance, 1 - 0.5 * 4 / variance])
    np.testing.assert_allclose(found.rho_CT[1], [1, 1 - 0.5 * 4 / variance, 1 - 0.5 * 16 / variance])
    np.testing.assert_allclose(found.rho_T, found.rho_CT.mean(axis=0))
    # Each twice: four halves with means 1, 1, 5, 5.
    twice_CTF = np.tile(x_CTF, (1, 2, 1))
    assert split_r_hat(twice_CTF, one_group(2)) == pytest.approx(((2 / 3 * 2.5 + 16 / 3) / 2.5) ** 0.5)


def test_autocorrelation_does_not_change_with_rotation_offset_or_scale() -> None:
    x_CTF = autoregressive(0.7, 12, 30, 5) * np.arange(1, 6)
    rotation, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))
    found, turned = correlation(x_CTF, one_group(12)), correlation(1e4 + 3 * x_CTF @ rotation, one_group(12))
    assert found is not None and turned is not None
    np.testing.assert_allclose(turned.rho_CT, found.rho_CT, rtol=1e-6, atol=1e-6)
    assert turned.effective == pytest.approx(found.effective, rel=1e-6)


def test_classes_are_not_taken_for_chains_that_are_stuck() -> None:
    label_C = np.arange(40) % 2
    x_CTF = autoregressive(0.0, 40, 50) + 100 * label_C[:, None, None]
    within, across = correlation(x_CTF, label_C), correlation(x_CTF, one_group(40))
    assert within is not None and across is not None
    assert within.effective == pytest.approx(2000, rel=0.05)
    assert across.effective == pytest.approx(40, rel=0.05)
    r_hat = split_r_hat(x_CTF, label_C)
    assert r_hat is not None and r_hat < 1.02 < split_r_hat(x_CTF, one_group(40))


def test_a_chain_that_is_stuck_among_others_is_found() -> None:
    x_CTF = autoregressive(0.0, 20, 200)
    x_CTF[3] = 0.0  # in the midst of the others
    found = correlation(x_CTF, one_group(20))
    assert found is not None
    assert found.effective_C.argmin() == 3 and found.effective_C[3] == 1
    assert np.median(found.effective_C) > 150


def test_independent_samples_pass() -> None:
    given = series(0.0, 80, 12)
    figures = chain_figures(given, real_features())
    features, modes = figures["features"], figures["modes"]
    assert features["effective_share"] > 0.95
    assert figures["sigma"]["autocorrelation_time"] < 1.05
    assert figures["recall"]["ratio"] == pytest.approx(1, abs=0.04)
    assert modes["changes"]["share"] == pytest.approx(modes["changes"]["expected"], rel=0.05)
    assert modes["visited"]["mean"] == pytest.approx(modes["visited"]["expected"], rel=0.03)
    assert modes["total_variation"] < 2 * modes["total_variation_of_chance"]
    assert figures["warnings"] == []


def test_chains_that_stand_still_count_once_each() -> None:
    chains, samples = 60, 10
    given = series(0.0, chains, samples)
    still = ChainSeries(
        np.repeat(given.log_sigma_CT[:, :1], samples * STEPS_PER_SAMPLE, axis=1),
        np.repeat(given.sample_sigma_CS[:, :1], samples, axis=1),
        np.repeat(given.features_CSF[:, :1], samples, axis=1),
        given.label_C,
    )
    figures = chain_figures(still, real_features())
    features, modes = figures["features"], figures["modes"]
    assert features["effective"] == pytest.approx(chains) and features["autocorrelation"] == pytest.approx(
        [1.0] * 6
    )
    assert features["effective_per_chain"] == pytest.approx({"least": 1, "median": 1, "most": 1})
    assert figures["sigma"]["effective"] == pytest.approx(chains)
    assert figures["recall"]["ratio"] < 0.1
    assert modes["changes"]["share"] == 0 and modes["changes"]["expected"] > 0.3
    assert modes["visited"]["most"] == 1 and modes["visited"]["expected"] > 3
    text = "\n".join(figures["warnings"])
    assert "600 samples are worth 60 independent ones" in text
    assert "recall of whole chains is" in text and "change their mode in 0.0%" in text
    json.dumps(figures, allow_nan=False)


def test_more_correlation_is_seen_in_every_figure() -> None:
    found = [chain_figures(series(phi, 60, 10), real_features()) for phi in (0.0, 0.6, 0.95)]
    for falling in (
        [figures["features"]["effective"] for figures in found],
        [figures["recall"]["ratio"] for figures in found],
        [figures["modes"]["changes"]["ratio"] for figures in found],
        [figures["modes"]["visited"]["mean"] for figures in found],
    ):
        assert falling[0] > 1.1 * falling[1] > 1.1**2 * falling[2]


def test_chains_that_never_leave_their_mode_are_caught_though_each_looks_mixed() -> None:
    # Two narrow modes of one class, far apart; each chain draws independently, but from one of them.
    random = np.random.default_rng(3)
    place_F = np.zeros(FEATURES)
    place_F[0] = 10
    side_C = np.arange(40) // 2 % 2
    loose_CS = random.integers(2, size=(40, 20))
    noise_CSF = random.standard_normal((40, 20, FEATURES))
    real_NF = random.standard_normal((400, FEATURES)) + (np.arange(400) % 2)[:, None] * place_F
    label_C, given = one_group(40), series(0.0, 40, 20)

    def figures(mode_CS: np.ndarray) -> dict:
        features_CSF = noise_CSF + mode_CS[:, :, None] * place_F
        moved = ChainSeries(given.log_sigma_CT, given.sample_sigma_CS, features_CSF, label_C)
        return chain_figures(moved, real_NF)

    free, kept = figures(loose_CS), figures(np.repeat(side_C[:, None], 20, axis=1))
    # Inside, a chain of the second kind is as mixed as can be:
    alone = correlation(noise_CSF[:1], one_group(1))
    assert alone is not None and alone.effective > 15
    assert free["warnings"] == []
    assert free["features"]["effective"] > 700 and kept["features"]["effective"] < 60
    assert kept["features"]["split_r_hat"] > 1.5 > 1.05 > free["features"]["split_r_hat"]
    assert kept["modes"]["visited"]["ratio"] < 0.7 < 0.95 < free["modes"]["visited"]["ratio"]
    text = "\n".join(kept["warnings"])
    assert "800 samples are worth" in text and "a chain visits" in text
    # Both kinds fill the modes alike, so that no figure of all samples together tells them apart.
    assert kept["modes"]["total_variation"] == pytest.approx(free["modes"]["total_variation"], abs=0.05)


def test_changes_of_mode_by_hand() -> None:
    # Four places with real images; two chains of a class, and one that is alone in its own.
    corner_GF = np.array([[0.0, 0], [0, 9], [9, 0], [9, 9]])
    real_NF = np.repeat(corner_GF, 10, axis=0)
    place_CS = np.array([[0, 0, 1], [1, 1, 1], [2, 3, 2]])
    figures, _ = mode_figures(corner_GF[place_CS], np.array([0, 0, 1]), np.array([True, True, False]), real_NF)
    assert figures["modes"] == 4
    assert figures["changes"]["share"] == pytest.approx(1 / 4)  # the first chain once, in two times two pairs
    assert figures["changes"]["expected"] == pytest.approx(2 / 3)  # of 3 × 3 pairs between them, 6 differ
    assert figures["visited"] == {
        "mean": 1.5,
        "least": 1,
        "median": 1.5,
        "most": 2,
        "ratio": pytest.approx(1.5 / 1.8),
        # Three of the six, of which two lie in one mode and four in the other: both, unless all are of the four.
        "expected": pytest.approx(2 - 4 / 20),
    }
    assert figures["visited_histogram"] == [1, 1, 0, 0]
    assert sorted(figures["occupancy_drawn"]) == pytest.approx([1 / 9, 2 / 9, 2 / 9, 4 / 9])
    assert figures["total_variation"] == pytest.approx(4 / 9 - 1 / 4)


@pytest.mark.parametrize(("samples", "sets"), [(4, 4), (30, 8)])
def test_sets_of_both_kinds_are_disjoint_and_alike_but_for_their_chains(samples: int, sets: int) -> None:
    label_C = np.repeat([0, 1, 2], [30, 61, 1])
    stretch = chain_recall._stretch(label_C, samples)
    assert stretch == samples
    whole, single = chain_recall._sets(label_C, stretch, sets)
    for parts in (whole, single):
        assert len(parts) == sets
        pairs = [pair for chain, place in parts for pair in zip(chain.tolist(), place.tolist(), strict=True)]
        assert len(set(pairs)) == len(pairs) and max(place for _, place in pairs) < samples
    for (few, places), (each, _) in zip(whole, single, strict=True):
        assert np.array_equal(np.bincount(label_C[few]), np.bincount(label_C[each]))
        assert len(set(each.tolist())) == len(each) == len(few) == stretch * len(set(few.tolist()))
        assert np.array_equal(places.reshape(-1, stretch)[0], np.arange(stretch))
    if sets == stretch:  # then both kinds are cuts of the same images
        of_whole, of_single = (
            {pair for chain, place in parts for pair in zip(chain.tolist(), place.tolist(), strict=True)}
            for parts in (whole, single)
        )
        assert of_whole == of_single


@pytest.mark.parametrize("features", [4, 16, 64])
def test_the_ratio_of_recalls_holds_for_the_smallest_sets_that_are_taken(features: int) -> None:
    scale_F = np.arange(1, features + 1) ** -0.75
    real_NF = np.random.default_rng(0).standard_normal((500, features)) * scale_F
    found: dict[float, list[float]] = {0.0: [], 0.9: []}
    for phi, ratios in found.items():
        for seed in range(6):
            features_CSF = autoregressive(phi, 8, 8, features, seed) * scale_F
            figures, told = recall_figures(features_CSF, one_group(8), real_NF)
            assert figures["images"] == chain_recall.FEWEST and told == []
            ratios.append(figures["ratio"])
        print(f"{features} features, {phi} from one to the next: {np.mean(ratios):.2f} ± {np.std(ratios):.2f}")
    assert np.mean(found[0.0]) == pytest.approx(1, abs=0.03) and np.std(found[0.0]) < 0.06
    assert max(found[0.9]) < 0.6


@pytest.mark.parametrize("chains", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("real", [1, 5, 25, 100])
@pytest.mark.parametrize("kind", ["moving", "constant"])
def test_degenerate_sizes_give_null_and_say_so(chains: int, samples: int, real: int, kind: str) -> None:
    given = series(0.5, chains, samples)
    if kind == "constant":
        given = ChainSeries(
            np.full_like(given.log_sigma_CT, 0.1),
            np.full_like(given.sample_sigma_CS, 0.3),
            np.full_like(given.features_CSF, 0.1),
            given.label_C,
        )
    figures = chain_figures(given, np.full((real, FEATURES), 0.1) if kind == "constant" else real_features(real))
    json.dumps(figures, allow_nan=False)
    known = [figures["features"]["effective"], figures["recall"]["ratio"], figures["modes"]["changes"]["ratio"]]
    assert None not in known or figures["warnings"]
    lines = chain_lines(figures)
    assert len(lines) == 8 + len(figures["warnings"]) and not any(
        "None" in line or "nan" in line for line in lines
    )
    if chains < 3 or samples == 1 or kind == "constant":
        assert figures["features"]["effective"] is None
    if kind == "constant":
        assert figures["sigma"]["effective"] is None and figures["sigma"]["split_r_hat"] is None


def test_classes_of_one_chain_are_left_out_and_named() -> None:
    given = series(0.0, 41, 10)
    label_C = given.label_C.copy()
    label_C[-1] = 7
    lone = ChainSeries(given.log_sigma_CT, given.sample_sigma_CS, given.features_CSF, label_C)
    figures = chain_figures(lone, real_features())
    assert figures["chains"] == 41 and figures["chains_compared"] == 40 and figures["features"]["samples"] == 400
    assert any(
        warning.startswith("1 of 41 chains are the only ones of their class") for warning in figures["warnings"]
    )


def test_lags_of_long_chains_are_thinned() -> None:
    figures = chain_figures(series(0.5, 4, 1000), real_features(100))
    sigma = figures["sigma"]
    assert sigma["lags"][:4] == [0, 1, 2, 3] and sigma["lags"][-1] == 2500 and len(sigma["lags"]) <= 100
    assert len(sigma["autocorrelation"]) == len(sigma["of_chains"]["0.1"]) == len(sigma["lags"])
    assert sigma["autocorrelation"][2] == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(
    ("chains", "samples", "channels"), [(40, 20, 1), (4, 3, 3), (1, 1, 1), (1, 300, 3)], ids=str
)
def test_the_picture_is_a_png_that_shows_every_image(
    chains: int, samples: int, channels: int, tmp_path: Path
) -> None:
    given = series(0.8, chains, samples)
    figures = chain_figures(given, real_features())
    image_CSHWC = np.full((chains, samples, 8, 8, channels), 90, dtype=np.uint8)
    path = tmp_path / "new" / "chains.png"
    write_chain_picture(path, given, figures, image_CSHWC)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and [file.name for file in path.parent.iterdir()] == ["chains.png"]
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.width == 1300 and 750 < picture.height < 1700
        grey = np.asarray(picture.convert("L"))
    # The images are drawn, side by side: the middle row of the first of them is crossed once by each.
    rows = np.flatnonzero((grey == 90).sum(axis=1) > 20)
    line = grey[rows[len(rows) // (2 * min(chains, 8))]] == 90
    assert (np.diff(line.astype(int)) == 1).sum() == min(samples, 16)


def test_the_picture_also_takes_what_is_not_known(tmp_path: Path) -> None:
    given = series(0.8, 2, 1)
    write_chain_picture(
        tmp_path / "a.png", given, chain_figures(given, real_features(3)), np.zeros((1, 1, 4, 4, 1), np.uint8)
    )
    assert (tmp_path / "a.png").stat().st_size > 10_000


class Described:
    """What a feature network says of the chunks of a store."""

    def __init__(self, store: ChunkStore, features_NF: np.ndarray) -> None:
        self.store, self.features_NF = store, features_NF

    def read(self, chunk: int) -> dict[str, np.ndarray]:
        number_N = self.store.read(chunk).number_N
        return {"features": self.features_NF[number_N]} if len(number_N) else {}


@pytest.mark.parametrize("lost", [[], [23], [0, 1, 2, 3], [*range(24, 72)], [5, 399]])
def test_chains_with_samples_that_are_not_finite_take_no_part(tmp_path: Path, lost: list[int]) -> None:
    samples, found = 4, series(0.5, 100, 4)
    lost_chains = {number // samples for number in lost}
    features_NF = found.features_CSF.reshape(400, -1)
    trace_NT = np.exp(found.log_sigma_CT).reshape(400, -1).astype(np.float32)

    def draw(numbers: list[int], label_N: np.ndarray) -> DrawnImages:
        images = np.repeat(np.array(numbers) // samples, 12).astype(np.uint8).reshape(-1, 2, 2, 3)
        finite_N = np.array([number not in lost for number in numbers])
        sigma_N = found.sample_sigma_CS.reshape(-1)[numbers].astype(np.float32)
        return DrawnImages(images, None, sigma_N, trace_NT[numbers], finite_N)

    store = ChunkStore(tmp_path / "chunks", 400, 24, "settings").drawn_by(
        draw, lambda numbers: found.label_C[np.array(numbers) // samples]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkStore, "check_finite", lambda store, numbers: None)
        store.draw_pending()
    figures = chain_results(tmp_path / "a.png", store, Described(store, features_NF), samples, real_features())  # type: ignore[arg-type]
    whole_C = np.array([chain not in lost_chains for chain in range(100)])
    kept = ChainSeries(
        np.log(trace_NT.reshape(100, -1)[whole_C].astype(np.float64)),
        found.sample_sigma_CS[whole_C].astype(np.float32).astype(np.float64),
        found.features_CSF[whole_C],
        found.label_C[whole_C],
    )
    expected = chain_figures(kept, real_features())
    if lost:
        expected["warnings"].append(
            f"{len(lost_chains)} of 100 chains have samples that are not finite: "
            "the figures of chains leave them out"
        )
    assert figures == expected and (tmp_path / "a.png").exists()
