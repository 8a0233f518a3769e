"""The model card that lies with weights that go out: what they are, of what run, how good, how to load them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ditmoe.model.count import count
from ditmoe.model.outside.text import printable
from ditmoe.model.weights.published import PublishedWeights
from ditmoe.model.weights.untrusted import parse_json, read_file
from ditmoe.parallel.checkpoint.folder import CheckpointInfo
from ditmoe.sampling.evaluation.row import markdown, rows_of
from ditmoe.sampling.evaluation.stored import METRICS_FILE
from ditmoe.sampling.network.load import home_of
from ditmoe.sampling.settings.config import SamplerConfig

CARD: Final = "README.md"
MOST_METRICS_BYTES: Final = 2**24
CLASSES_SHOWN: Final = 20


def model_card(
    name: str,
    published: PublishedWeights,
    info: CheckpointInfo | None,
    sets: Sequence[str],
    loading: Sequence[str],
    library: str = "ditmoe",
) -> str:
    """A card in Markdown, with the front matter that hubs read.

    Args:
        name: of the model.
        info: the checkpoint that it is of; None: weights of others.
        sets: that are written.
        loading: lines of Python, or commands, that load it.
        library: that loads it.
    """
    front = {
        "license": "other",
        "license_name": "to-be-chosen",
        "library_name": library,
        "tags": [
            "diffusion",
            "dit",
            "class-conditional",
            *(["mixture-of-experts"] if published.config.experts else []),
        ],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {name}", ""]
    lines += _network(published)
    lines += ["## Training", "", *_training(info, sets), ""]
    lines += ["## Sampling", "", *_sampling(published), ""]
    lines += ["## Evaluation", "", *_evaluation(info, sets), ""]
    lines += ["## Loading", "", "```", *loading, "```", ""]
    lines += [
        "## Licence",
        "",
        "None has been chosen. Before you publish this, choose one that the training data allow, and write it here"
        " and in `license` above.",
        "",
    ]
    return "\n".join(lines)


def _network(published: PublishedWeights) -> list[str]:
    config = published.config
    counted = count(config)
    shared = (
        "a dense MLP for all tokens" if config.shared_mlp == "gelu" else f"{config.shared_experts} shared experts"
    )
    kind = (
        f"DiT-MoE: {config.experts} routed experts in each block, {config.experts_per_token} of them for each"
        f" token, and {shared}"
        if config.experts
        else "dense DiT"
    )
    rows = {
        "architecture": kind,
        "preset": config.published_name or "none",
        "depth, width, heads, patch": f"{config.depth}, {config.hidden}, {config.heads}, {config.patch}",
        "parameters": f"{counted.total:,}",
        "activated parameters": f"{counted.activated:,}",
        "multiply-accumulates of a pass": f"{counted.macs / 1e9:,.2f} billion",
        "input": f"{config.channels} × {config.image_size} × {config.image_size}",
        "classes": f"{config.num_classes:,}",
        "attention": config.attention,
        "learned sigma": "yes" if config.learn_sigma else "no",
        "frequencies of time": config.timestep_frequencies,
        "predicts": "unknown" if published.objective is None else _PREDICTS[published.objective.kind],
    }
    lines = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
    names = published.class_names
    if names and names != [str(label) for label in range(len(names))]:
        shown = ", ".join(printable(each) for each in names[:CLASSES_SHOWN])
        lines += [f"Classes: {shown}{', …' if len(names) > CLASSES_SHOWN else ''}.", ""]
    return lines


_PREDICTS: Final = {
    "ddpm": "ε, over 1,000 linear steps (DDPM)",
    "rectified_flow": "v = ε − x, of (1 − t)·x + t·ε (rectified flow)",
}


def _training(info: CheckpointInfo | None, sets: Sequence[str]) -> list[str]:
    held = {"ema": "the moving average of the weights", "weights": "the weights themselves"}
    lines = [f"- holds {' and '.join(held[each] for each in sets)}"]
    if info is None or info.layout is None:
        return ["- not known: the weights come from a file", *lines]
    settings, data = info.config, info.dataset
    lines += [
        f"- data: {printable(str(data.get('name', 'unknown')))}",
        f"- steps: {info.step:,}, images seen: {info.images:,}",
    ]
    for key, value in (
        ("global batch", (settings.get("train") or {}).get("batch")),
        ("learning rate", (settings.get("optim") or {}).get("lr")),
        ("decay of the moving average", (settings.get("ema") or {}).get("decay")),
        ("label dropout", settings["model"].get("label_dropout")),
        ("seed", settings.get("seed")),
    ):
        if value is not None:
            lines.append(f"- {key}: {value}")
    latents = data.get("latents")
    if latents is not None:
        lines.append(f"- latents of a VAE of checksum {latents['vae_sha256'][:16]}, scale {latents['scale']}")
    return lines


def _sampling(published: PublishedWeights) -> list[str]:
    if published.objective is None:
        return ["It is not known what the network predicts, and so not how to draw from it."]
    usual = SamplerConfig()
    sampler = usual.for_a_look(published.objective)
    return [
        f"Defaults of `ditmoe sample`: {sampler.sampler}, {sampler.steps} steps, schedule {sampler.schedule},"
        f" guidance {sampler.cfg_scale:g}. `ditmoe evaluate` takes {usual.steps} steps."
    ]


def _evaluation(info: CheckpointInfo | None, sets: Sequence[str]) -> list[str]:
    """The rows of the evaluations that the run's folder has of these weights."""
    rows: list[dict[str, str]] = []
    if info is not None:
        fingerprints = {f"{info.fingerprint}-{which}" for which in sets}
        for file in sorted((home_of(info.path) / "evaluations").glob(f"*/{METRICS_FILE}")):
            rows += _rows(file, fingerprints)
    if not rows:
        return ["These weights have none yet; `ditmoe evaluate` makes one."]
    alike = [row for row in rows if row.keys() == rows[0].keys()]
    return markdown(alike).splitlines()


def _rows(file: Path, fingerprints: set[str]) -> list[dict[str, str]]:
    """Of one evaluation; none where it is of other weights, or of another version."""
    try:
        metrics: Any = parse_json(read_file(file, MOST_METRICS_BYTES))
        return rows_of(metrics) if metrics["evaluation"]["weights"] in fingerprints else []
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):
        return []
