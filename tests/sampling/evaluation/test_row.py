"""The row of a table says what the figures are of, and is neither broken Markdown nor broken LaTeX."""

import re
from typing import Any

import pytest

from ditmoe.model.config import ModelConfig
from ditmoe.sampling.evaluation.gallery.page import summary
from ditmoe.sampling.evaluation.results import table
from ditmoe.sampling.evaluation.row import FIGURES, NOTHING, latex, markdown, rows_of
from ditmoe.sampling.settings.chains import DlgConfig
from ditmoe.sampling.settings.config import SamplerConfig

METRICS: dict[str, Any] = {
    "evaluation": {
        "step": 400_000,
        "which": "ema",
        "sampler": {
            "sampler": "heun",
            "schedule": "karras",
            "cfg_scale": 1.5,
            "cfg_channels": 3,
            "precision": "fp32",
            "seed": 0,
        },
        "labels": "random",
        "nfe": 249.0,
        "network_passes": 498.0,
        "images_seen": 102_400_000,
        "train_batch": 256,
        "parameters": {"total": 199_000_000, "activated": 71_000_000},
        "model": {"preset": "DiT-S/2-8E2A"},
        "trained_on": "a_b & c|d",
    },
    "results": {
        "inception": {
            "network": {"name": "inception", "fingerprint": "0123", "resize": "pytorch-fid"},
            "real": {"name": "imagenet", "fingerprint": "4567"},
            "drawn_images": 50_000,
            "real_images": 1_281_167,
            "fid": 2.345678,
            "fid_interval": [2.3001, 2.4],
            "precision": 0.8,
            "recall": None,
        },
        "classifier": {"real": {"name": "others"}},
    },
}


def test_all_that_a_table_needs_is_there() -> None:
    row, other = rows_of(METRICS)
    assert (
        row.items()
        >= {
            "network": "DiT-S/2-8E2A",
            "parameters": "199,000,000",
            "activated": "71,000,000",
            "images seen": "102,400,000",
            "batch": "256",
            "weights": "ema",
            "sampler": "heun",
            "NFE": "249",
            "passes": "498",
            "guidance": "1.5 on 3 channels",
            "arithmetic": "fp32",
            "seed": "0",
            "N": "50,000",
            "labels": "random",
            "reference": "imagenet 4567",
            "evaluator": "inception 0123, resize pytorch-fid",
            "FID": "2.346",
            "95% intervals": "FID 2.3 to 2.4",
            "recall": NOTHING,
        }.items()
    )
    assert other.keys() == row.keys() and other["reference"] == f"others {NOTHING}"
    assert [other[title] for title in FIGURES.values()] == [NOTHING] * len(FIGURES)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"cache_interval": 2, "cache_order": 0}, "heun, cache_interval 2, cache_order 0"),
        ({"sampler": "kar2", "churn": 20.0, "tweedie": True}, "kar2, churn 20, tweedie"),
        ({"compile": True, "steps": 4, "cfg_sigma_max": 0.7}, "heun, compile"),
        ({"sampler": "dlg:heun", "dlg": DlgConfig(skip=5)}, "dlg:heun, dlg.skip 5"),
    ],
)
def test_settings_that_images_depend_on_are_told(settings: dict[str, Any], told: str) -> None:
    sampler = SamplerConfig(**METRICS["evaluation"]["sampler"] | settings).plain()
    metrics = METRICS | {"evaluation": METRICS["evaluation"] | {"sampler": sampler}}
    assert rows_of(metrics)[0]["sampler"] == told
    interval = {"count": 100, "guidance_interval": "0 < σ ≤ 0.7"}
    (line,) = table({"evaluation": metrics["evaluation"] | interval})
    assert f": {told}, 249 NFE, guidance 1.5 at 0 < σ ≤ 0.7, random labels" in line
    sentence = summary(metrics["evaluation"] | interval, {"real": {"name": "digits"}})
    assert f"({told}, {sampler['steps']} steps, guidance 1.5 at 0 &lt; σ ≤ 0.7)" in sentence


def test_markdown_has_as_many_cells_in_each_line() -> None:
    rows = rows_of(METRICS)
    lines = markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {len(rows[0]) + 2}
    assert r"a_b & c\|d" in lines[2]


def test_latex_is_escaped() -> None:
    rows = rows_of(METRICS)
    text = latex(rows)
    assert r"a\_b \& c|d" in text and text.count(r" \\") == 1 + len(rows)
    assert {len(re.findall(r"(?<!\\)&", line)) for line in text.splitlines() if "&" in line} == {len(rows[0]) - 1}
    assert "–" not in text
    assert latex([{r"\&%$#_{}~^": "×"}]).splitlines()[2] == (
        r"\textbackslash{}\&\%\$\#\_\{\}\textasciitilde{}\textasciicircum{} \\"
    )


def test_a_network_that_differs_from_its_preset_does_not_have_its_name() -> None:
    for changes, name in (({}, "DiT-S/2-8E2A"), ({"depth": 3}, "depth 3, hidden 384, patch 2, experts 8")):
        model = ModelConfig(preset="DiT-S/2-8E2A", **changes).model_dump()
        metrics = METRICS | {"evaluation": METRICS["evaluation"] | {"model": model}}
        assert rows_of(metrics)[0]["network"] == name


def test_a_network_without_a_preset_is_told_by_its_corners() -> None:
    model = {"preset": None, "depth": 4, "hidden": 64, "patch": 2, "experts": 8}
    metrics = METRICS | {"evaluation": METRICS["evaluation"] | {"model": model}}
    assert rows_of(metrics)[0]["network"] == "depth 4, hidden 64, patch 2, experts 8"
