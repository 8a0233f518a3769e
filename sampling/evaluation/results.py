"""What an evaluation leaves: `samples.npz`, `metrics.json`, its row, the gallery, and the table of a terminal."""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from ditmoe.data.storage.files import replacing
from ditmoe.model.outside.text import counted
from ditmoe.sampling.diagnostics.figures import chain_lines
from ditmoe.sampling.diagnostics.results import CHAINS_FILE, chain_results
from ditmoe.sampling.evaluation.gallery.page import write_gallery
from ditmoe.sampling.evaluation.gallery.real import real_side
from ditmoe.sampling.evaluation.gallery.sheets import Sheets
from ditmoe.sampling.evaluation.keeping import SAMPLES_FILE
from ditmoe.sampling.evaluation.row import guidance_interval_told, sampler_told, write_rows
from ditmoe.sampling.evaluation.stored import METRICS_FILE, METRICS_FORMAT, key_for, stored_results
from ditmoe.sampling.jobs.chunks import ChunkStore
from ditmoe.sampling.metrics.classifier import Classifier
from ditmoe.sampling.metrics.descriptions import ChunkDescriptions
from ditmoe.sampling.metrics.features import FeatureNetwork
from ditmoe.sampling.metrics.real_statistics import CPU, RealStatistics
from ditmoe.sampling.metrics.reference import Reference
from ditmoe.sampling.metrics.scores import score
from ditmoe.sampling.settings.names import NOT_FINITE

NUMBERS_SHOWN: Final = 20
"""Images that are not finite and are named."""
WEAK_ACCURACY: Final = 0.5
"""Held-out accuracy of the feature classifier below which the figures in its features carry a warning."""


class Measured(NamedTuple):
    """What is scored in one feature network."""

    request: dict[str, Any]
    network: FeatureNetwork
    statistics: RealStatistics
    descriptions: ChunkDescriptions


def write_results(
    folder: Path,
    evaluation: dict[str, Any],
    store: ChunkStore,
    real: Reference,
    class_names: Sequence[str],
    measured: Sequence[Measured],
    recogniser: Classifier | None,
    judged: ChunkDescriptions | None,
    warnings: Sequence[str] = (),
    samples_per_chain: int | None = None,
    device: torch.device = CPU,
    neighbour_images: int | None = None,
    *,
    samples: bool = True,
) -> None:
    """Score, and write everything; `metrics.json` last, for it marks the evaluation as finished.

    Args:
        class_names: of the drawn images.
        measured: in each feature network; the gallery shows the first one's figures.
        samples_per_chain: None: they are no chains.
        device: where figures are computed.
        neighbour_images: real images that precision and recall look at; None: all that are kept.
        samples: whether `samples.npz` is written.
    """
    not_finite = store.not_finite()
    if samples:
        write_samples(folder / SAMPLES_FILE, store, store.count - len(not_finite))
    _, size, _, channels = store.read(0).image_NHWC.shape
    sheets = Sheets(class_names, size, channels)
    share = _share_recognised(store, sheets, recogniser, judged)
    # Other figures of the same images stay.
    results = stored_results(folder)
    keys = []
    for each in measured:
        result = scored_result(each.request, real, *each[1:], device, neighbour_images)
        result["not_finite"] = {"images": len(not_finite), "first": not_finite[:NUMBERS_SHOWN]}
        if not_finite:
            result["warnings"].append(
                f"{len(not_finite):,} of {counted(store.count, 'image')} are not finite and take no part, "
                f"such as image "
                f"{not_finite[0]}: {NOT_FINITE}"
            )
        result["warnings"] += images_left_out(result)
        result["warnings"] += warnings
        if isinstance(each.network, Classifier):
            result["warnings"] += weak_features(each.network, len(class_names))
        keys.append(key_for(results, each.request))
        if samples_per_chain is not None:
            picture = folder / "gallery" / (CHAINS_FILE if len(keys) == 1 else f"{keys[-1]}-{CHAINS_FILE}")
            real_NF = each.statistics.features_NF
            result["chains"] = (
                {"warnings": [f"{real.where}: has no features of single images: chains have no figures"]}
                if real_NF is None
                else chain_results(picture, store, each.descriptions, samples_per_chain, real_NF)
            )
        results[keys[-1]] = result | share

    metrics = {"format": METRICS_FORMAT, "evaluation": evaluation, "results": results}
    shown = real_side(real, measured[0].statistics, measured[0].descriptions, sheets)
    write_gallery(folder / "gallery", sheets, metrics, keys[0], shown)
    write_rows(folder, metrics)
    with replacing(folder / METRICS_FILE) as file:
        file.write(json.dumps(metrics, indent=1, ensure_ascii=False).encode() + b"\n")


def _share_recognised(
    store: ChunkStore, sheets: Sheets, recogniser: Classifier | None, judged: ChunkDescriptions | None
) -> dict[str, Any]:
    """`recogniser`, where there is one; the sheets get their images in the same pass."""
    right = np.zeros(len(sheets.class_names), dtype=np.int64)
    of_class = np.zeros(len(sheets.class_names), dtype=np.int64)
    for chunk in range(store.chunks):
        drawn = store.read(chunk)
        sheets.add(drawn.image_NHWC, drawn.label_N, chunk)
        of_class += np.bincount(drawn.label_N, minlength=len(of_class))
        if judged is not None and len(drawn.label_N):
            hits = judged.read(chunk)["predicted"] == drawn.label_N
            right += np.bincount(drawn.label_N[hits], minlength=len(right))
    return {} if recogniser is None else {"recogniser": recognised(right, of_class, recogniser)}


def recognised(
    right_K: NDArray[np.int64], of_class_K: NDArray[np.int64], recogniser: Classifier
) -> dict[str, Any]:
    """The share of images, by class, that the recogniser takes for their class.

    Args:
        right_K: images of each class that it takes for it.
        of_class_K: images of each class.
    """
    return {
        "accuracy": float(right_K.sum() / of_class_K.sum()),
        "held_out_accuracy": recogniser.held_out_accuracy,
        "held_out_images": recogniser.held_out_images,
        "fingerprint": recogniser.fingerprint,
        "by_class": [float(r / n) if n else None for r, n in zip(right_K, of_class_K, strict=True)],
        **recogniser.description,
    }


def scored_result(
    request: dict[str, Any],
    real: Reference,
    network: FeatureNetwork,
    statistics: RealStatistics,
    descriptions: ChunkDescriptions,
    device: torch.device = CPU,
    neighbour_images: int | None = None,
) -> dict[str, Any]:
    """The figures in one feature network, with what they are of.

    Args:
        request: what they depend on, besides the images.
        device: where figures are computed.
        neighbour_images: real images that precision and recall look at; None: all that are kept.
    """
    return {
        "request": request,
        "network": {
            "name": network.name,
            "dimension": network.dimension,
            "fingerprint": network.fingerprint,
            **network.description,
        },
        "real": real.facts(statistics.left_out),
        **score(descriptions, statistics, device, neighbour_images),
    }


def images_left_out(result: Mapping[str, Any]) -> list[str]:
    """A warning where real images took no part."""
    left_out = result["real"]["left_out"]
    if not left_out["samples"]:
        return []
    return [f"{left_out['samples']:,} real images cannot be used and take no part, such as {left_out['first'][0]}"]


def weak_features(network: Classifier, classes: int) -> list[str]:
    """A warning where what the feature classifier was taught tells little about images."""
    if classes == 1:
        return ["with one class the feature classifier has nothing to learn: its FID says little"]
    if network.held_out_accuracy < WEAK_ACCURACY:
        return [
            f"the feature classifier is right on {network.held_out_accuracy:.1%} of {network.held_out_images:,} "
            "held-out real images only: its FID says little"
        ]
    return []


def write_samples(path: Path, store: ChunkStore, count: int) -> None:
    """`arr_0` uint8 [N, H, W, 3] (one channel is repeated to three) and `arr_1` labels int64 [N].

    `count` is the number of images that are finite: the others are not in it.

    One chunk is in memory at a time: 50,000 images of 256² are 10 GB.
    """
    first = store.read(0)
    height, width = first.image_NHWC.shape[1:3]
    labels: list[NDArray[np.int64]] = []

    def images() -> Iterator[bytes]:
        for chunk in range(store.chunks):
            drawn = store.read(chunk)
            labels.append(drawn.label_N)
            yield np.ascontiguousarray(to_colour(drawn.image_NHWC)).tobytes()

    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_array(archive, "arr_0", (count, height, width, 3), np.dtype(np.uint8), images())
        label_N = np.concatenate(labels)
        _write_array(archive, "arr_1", label_N.shape, label_N.dtype, iter([label_N.tobytes()]))


def _write_array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Iterator[bytes]
) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        header = {"descr": npy_format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        npy_format.write_array_header_1_0(member, header)
        for block in blocks:
            member.write(block)


def to_colour(image_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[N, H, W, 1 or 3] → [N, H, W, 3]."""
    return np.repeat(image_NHWC, 3, axis=3) if image_NHWC.shape[3] == 1 else image_NHWC


def table(metrics: Mapping[str, Any], *keys: str) -> list[str]:
    """The figures of some results, by their keys, as lines for a terminal."""
    evaluation = metrics["evaluation"]
    sampler = evaluation["sampler"]
    seeds = evaluation.get("seeds") or [sampler["seed"]]
    told = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    drawn = (
        f"{evaluation['count']:,} images, {evaluation['which']} of step {evaluation['step']:,}: "
        f"{sampler_told(sampler)}, {_figure(evaluation['nfe'])} NFE, guidance {sampler['cfg_scale']:g}"
        f"{guidance_interval_told(evaluation)}, "
        f"{evaluation['labels']} labels, {sampler['precision']}, {told}"
    )
    return [drawn, *(line for key in keys for line in figure_lines(metrics["results"][key]))]


def figure_lines(result: Mapping[str, Any]) -> list[str]:
    """What images are compared with, and the figures, as lines for a terminal."""
    network = result["network"]
    lines = [
        f"against {_images(result['real_images'])} of {result['real']['name']}, "
        f"in {network['dimension']} features of {network['name']} {network['fingerprint']}",
    ]
    rows: list[tuple[str, str, str]] = []
    for name, shown in (("fid", "FID"), ("sfid", "sFID")):
        if name in result:
            floor = _figure(result[f"{name}_floor"])
            half = result[f"{name}_floor_images_per_half"]
            note = "no floor" if half is None else f"floor {floor} (two halves of {counted(half, 'real image')})"
            rows.append((shown, _figure(result[name]), _reach(result, name) + note + _ratio(result, name)))
    if result["kid"] is not None:
        subsets = f"{result['kid_subsets']} subsets of {result['kid_subset_images']}"
        rows.append(
            (
                "KID",
                _figure(result["kid"]),
                f"{_reach(result, 'kid')}floor {_figure(result['kid_floor'])}; {subsets}",
            )
        )
    compared = f"{result['neighbour_images_drawn']:,} drawn, {result['neighbour_images_real']:,} real"
    for name, note in (("precision", f"k = {result['neighbours']}"), ("recall", compared)):
        floor = f"floor {_figure(result[f'{name}_floor'])}{_ratio(result, name)}"
        rows.append((name, _figure(result[name]), f"{_reach(result, name)}{floor}; {note}"))
    if "inception_score" in result:
        real = f"real images {_figure(result['inception_score_real'])}{_ratio(result, 'inception_score')}"
        splits = f"{result['inception_score_splits']} split(s)"
        note = f"{_reach(result, 'inception_score')}{real}; {splits}"
        rows.append(("Inception Score", _figure(result["inception_score"]), note))
    if "recogniser" in result:
        judge = result["recogniser"]
        held = f"{judge['held_out_accuracy']:.2%} of {judge['held_out_images']:,} held-out real images"
        spread = "" if judge.get("deviation") is None else f"± {judge['deviation']:.2%} over seeds; "
        rows.append(("recognised", f"{judge['accuracy']:.2%}", f"{spread}by an independent classifier; {held}"))
    lines += [f"  {name:<16}{value:>10}   {note}" for name, value, note in rows]
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    if "chains" in result:
        lines += chain_lines(result["chains"])
    return lines


def _images(count: int | None) -> str:
    return "statistics" if count is None else counted(count, "real image")


def _reach(result: Mapping[str, Any], name: str) -> str:
    """How far the interval around a figure reaches, or how far seeds spread, at the start of a note."""
    if "deviations" in result:
        return f"± {_figure(result['deviations'][name])} over {len(result['seeds'])} seeds; "
    ends = result.get(f"{name}_interval")
    return "" if ends is None else f"95%: {_figure(ends[0])} to {_figure(ends[1])}; "


def _ratio(result: Mapping[str, Any], name: str) -> str:
    """How many times its floor a figure is."""
    ratio = result[f"{name}_ratio"]
    return "" if ratio is None else f", × {ratio:.3g}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
