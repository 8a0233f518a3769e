"""Preset names of the DiT and DiT-MoE family, such as `DiT-XL/2-8E2A` (arXiv 2407.11633, Table 1).

A name is `DiT-SIZE/PATCH` for a dense network, with `-NeKa` for N experts of which K are active per token.
"""

import re
from dataclasses import dataclass

from ditmoe.model.outside.nearest import meant


@dataclass(frozen=True)
class Preset:
    """The shape that a preset name stands for."""

    depth: int
    hidden: int
    heads: int
    patch: int
    experts: int
    """Routed experts N of each block; 0 is a dense network."""
    experts_per_token: int
    """K; 0 for a dense network."""


SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "G": (40, 1408, 16),
}
"""Size letter → depth, hidden, heads."""

PATCHES = (2, 4, 8)

PUBLISHED = (
    "DiT-S/2-8E2A",
    "DiT-S/2-16E2A",
    "DiT-B/2-8E2A",
    "DiT-L/2-8E2A",
    "DiT-XL/2-8E2A",
    "DiT-G/2-16E2A",
)
"""The networks of the paper's table."""

_NAME = re.compile(
    r"DiT-(?P<size>S|B|L|XL|G)/(?P<patch>[0-9])(?:-(?P<experts>[0-9]{1,6})[eE](?P<active>[0-9]{1,6})[aA])?"
)


def parse_preset(name: str) -> Preset:
    """Read a preset name.

    Raises:
        ValueError: the name is not of the family; the message gives the form and the valid parts.
    """
    match = _NAME.fullmatch(name)
    form = f"DiT-SIZE/PATCH or DiT-SIZE/PATCH-NeKa with SIZE of {', '.join(SIZES)} and PATCH of 2, 4, 8"
    if match is None or int(match["patch"]) not in PATCHES:
        examples = "such as DiT-S/2-8E2A or DiT-XL/2"
        raise ValueError(f"{name[:60]!r} is not a preset; expected {form}, {examples}{meant(name, PUBLISHED)}")
    depth, hidden, heads = SIZES[match["size"]]
    experts, active = int(match["experts"] or 0), int(match["active"] or 0)
    if match["experts"] is not None and not 1 <= active <= experts:
        raise ValueError(f"{name!r} has {active} active of {experts} experts; expected 1 <= active <= experts")
    return Preset(depth, hidden, heads, int(match["patch"]), experts, active)


def folder_name(name: str) -> str:
    """The preset's name as a folder: `DiT-S/2-8E2A` → `DiT-S-2-8E2A`."""
    return name.replace("/", "-")
