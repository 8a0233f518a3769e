"""The row that an evaluation is in a table: figures with all that they depend on, in Markdown and LaTeX."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ditmoe.data.storage.files import replacing
from ditmoe.model.config import ModelConfig
from ditmoe.sampling.settings.config import SamplerConfig

MARKDOWN_FILE: Final = "row.md"
LATEX_FILE: Final = "row.tex"
NOTHING: Final = "–"
"""What stands where something is not known, or does not apply."""
FIGURES: Final = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "IS",
}
"""Key of a figure → the title of its column."""
_WITH_COLUMNS: Final = {"sampler", "steps", "schedule", "precision", "seed"}
"""Settings of a sampler, besides those of guidance, that a row tells elsewhere: steps by the NFE."""
_ESCAPED: Final = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "±": r"$\pm$",
    "×": r"$\times$",
    **{each: f"\\{each}" for each in "&%$#_{}"},
}


def rows_of(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each feature network of `metrics.json`: title of the column → text.

    What an older evaluation did not write down is `NOTHING`.
    """
    return [_row(metrics["evaluation"], result) for result in metrics["results"].values()]


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows under their titles."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    return "".join(f"| {' | '.join(each.replace('|', chr(92) + '|') for each in line)} |\n" for line in lines)


def latex(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows under their titles, as a `tabular` with the rules of booktabs."""
    lines = [" & ".join(map(_escaped, line)) + r" \\" for line in (rows[0], *(row.values() for row in rows))]
    begin, end = rf"\begin{{tabular}}{{{'l' * len(rows[0])}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end]) + "\n"


def write_rows(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write `row.md` and `row.tex`."""
    rows = rows_of(metrics)
    for name, text in ((MARKDOWN_FILE, markdown(rows)), (LATEX_FILE, latex(rows))):
        with replacing(folder / name) as file:
            file.write(text.encode())


def _row(evaluation: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    sampler: Mapping[str, Any] = evaluation.get("sampler", {})
    network: Mapping[str, Any] = result.get("network", {})
    real: Mapping[str, Any] = result.get("real", {})
    counts: Mapping[str, Any] = evaluation.get("parameters") or {}
    guided = sampler.get("cfg_scale") not in (None, 1)
    guidance = _number(sampler.get("cfg_scale"))
    if guided and sampler.get("cfg_channels") is not None:
        guidance += f" on {sampler['cfg_channels']} channels"
    seeds = evaluation.get("seeds") or [sampler.get("seed")]
    decay = (evaluation.get("ema") or {}).get("decay")
    average = f" {decay:g}" if evaluation.get("which") == "ema" and decay is not None else ""
    resize = f", resize {network['resize']}" if network.get("resize") else ""
    return {
        "network": _network(evaluation.get("model") or {}),
        "parameters": _number(counts.get("total")),
        "activated": _number(counts.get("activated")),
        "trained on": _text(evaluation.get("trained_on")),
        "steps": _number(evaluation.get("step")),
        "images seen": _number(evaluation.get("images_seen")),
        "epochs": _number(evaluation.get("epochs")),
        "batch": _number(evaluation.get("train_batch")),
        "weights": f"{_text(evaluation.get('which'))}{average}",
        "sampler": sampler_told(sampler),
        "schedule": _text(sampler.get("schedule")),
        "NFE": _number(evaluation.get("nfe")),
        "passes": _number(evaluation.get("network_passes")),
        "guidance": guidance,
        "guided": _text(evaluation.get("guidance_interval")),
        "arithmetic": _text(sampler.get("precision")),
        "seed": ", ".join(map(_number, seeds)),
        "N": _number(result.get("drawn_images")),
        "labels": _text(evaluation.get("labels")),
        "reference": f"{_text(real.get('name'))} {_text(real.get('fingerprint'))}",
        "source": _source(real),
        "real images": _number(result.get("real_images")),
        "evaluator": f"{_text(network.get('name'))} {_text(network.get('fingerprint'))}{resize}",
        **{title: _with_spread(result, key) for key, title in FIGURES.items()},
        "recognised": _figure((result.get("recogniser") or {}).get("accuracy")),
        "95% intervals": _intervals(result),
    }


def sampler_told(sampler: Mapping[str, Any]) -> str:
    """The sampler, with its settings that are not the defaults and stand nowhere else: `euler, cache_interval 2`.

    Args:
        sampler: as `metrics.json` has it.
    """
    known = {key: field.default for key, field in SamplerConfig.model_fields.items()}
    chosen = {
        key: sampler[key]
        for key in known
        if key in sampler and key not in _WITH_COLUMNS and not key.startswith("cfg_") and key != "dlg"
    }
    chains = {key: value for key, value in (sampler.get("dlg") or {}).items() if key != "preset"}
    told = [_setting(key, value) for key, value in chosen.items() if value != known[key]]
    defaults = known["dlg"].model_dump(mode="json")
    told += [_setting(f"dlg.{key}", value) for key, value in chains.items() if value != defaults.get(key)]
    return ", ".join([_text(sampler.get("sampler")), *told])


def guidance_interval_told(evaluation: Mapping[str, Any]) -> str:
    """` at` the noise levels where guidance acts, if not at all of them, as `metrics.json` has it."""
    interval = evaluation.get("guidance_interval")
    return "" if interval in (None, "all noise levels") else f" at {interval}"


def _setting(key: str, value: object) -> str:
    if value is True:
        return key
    return f"{key} {value if isinstance(value, str) else _number(value)}"


def _network(model: Mapping[str, Any]) -> str:
    """The preset, or the corners of a network that is none: with another `model.depth` beside it, for example."""
    known = {key: value for key, value in model.items() if key in ModelConfig.model_fields}
    if known.get("preset") and (name := ModelConfig.model_validate(known).published_name):
        return name
    corners = [f"{name} {model[name]}" for name in ("depth", "hidden", "patch", "experts") if model.get(name)]
    return ", ".join(corners) or NOTHING


def _text(value: object) -> str:
    return NOTHING if value is None else str(value)


def _number(value: object) -> str:
    """Counts in full, others to six digits: what a run is must be told exactly."""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.6g}"
    return f"{int(value):,}" if isinstance(value, int | float) else NOTHING


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else NOTHING


def _with_spread(result: Mapping[str, Any], key: str) -> str:
    """A figure, with its deviation over seeds where there are several."""
    deviation = (result.get("deviations") or {}).get(key)
    return _figure(result.get(key)) + ("" if deviation is None else f" ± {deviation:.2g}")


def _source(real: Mapping[str, Any]) -> str:
    """Where the reference lies, what it was made of, and which of the images were chosen."""
    made_of = (real.get("made_of") or {}).get("place")
    choice = ", ".join(f"{key} {value}" for key, value in (real.get("choice") or {}).items())
    told = [_text(real.get("place")), made_of and f"of {made_of}", choice]
    return "; ".join(part for part in told if part)


def _intervals(result: Mapping[str, Any]) -> str:
    """Of each figure that has one, for other images of the same network."""
    ends = {title: result.get(f"{key}_interval") for key, title in FIGURES.items()}
    told = [f"{title} {_figure(each[0])} to {_figure(each[1])}" for title, each in ends.items() if each]
    return ", ".join(told) or NOTHING


def _escaped(text: str) -> str:
    return re.sub("|".join(map(re.escape, _ESCAPED)), lambda match: _ESCAPED[match[0]], text)
