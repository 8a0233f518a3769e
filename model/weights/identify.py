"""Which network weights are of: its configuration, from their names and shapes and from what is said of them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ditmoe.model.config import ModelConfig
from ditmoe.model.errors import UserError
from ditmoe.model.presets import PATCHES, SIZES, parse_preset
from ditmoe.model.weights.untrusted import first_problem

Shapes = Mapping[str, tuple[int, ...]]
"""Of a state's tensors, by name."""
Expected = ModelConfig | Mapping[str, Any]
"""A configuration, or some of its fields by name, unchecked."""

_MOST_BLOCKS, _MOST_EXPERTS = 1000, 4096  # a damaged file must not make us build a giant
_BLOCK = re.compile(r"blocks\.(\d{1,6})\.")
_EXPERT = re.compile(r"\.moe\.experts\.(\d{1,6})\.")


def identify(
    shapes: Shapes, path: Path, preset: str | None, config: Expected | None, described: ModelConfig | None
) -> ModelConfig:
    """The complete configuration of the network that a state of these shapes belongs to.

    Args:
        path: where the state is from, for messages.
        preset: the network expected.
        config: what is expected of it.
        described: what the file says of itself.

    Raises:
        UserError: the state is not a DiT's, contradicts what is wanted, or leaves heads or K unknown.
    """
    wanted = _wanted(path, preset, config, described)
    base = described.model_dump() if described is not None else {}
    return _identify(shapes, wanted, base | _given_fields(config or {}), path)


def _wanted(
    path: Path, preset: str | None, config: Expected | None, described: ModelConfig | None
) -> list[tuple[str, dict[str, Any]]]:
    """Each source that says something of the shape: its name, and its fields."""
    wanted: list[tuple[str, dict[str, Any]]] = []
    if preset is not None:
        try:
            wanted.append((preset, vars(parse_preset(preset))))
        except ValueError as error:
            raise UserError(str(error)) from error
    if config is not None:
        wanted.append(("the configuration", _given_fields(config)))
    if described is not None:
        wanted.append((f"the description in {path.name}", described.model_dump()))
    return wanted


def _given_fields(config: Expected) -> dict[str, Any]:
    """Those that are not left at their default."""
    return config.model_dump(exclude_unset=True) if isinstance(config, ModelConfig) else dict(config)


def _identify(
    shapes: Shapes, wanted: list[tuple[str, dict[str, Any]]], base: dict[str, Any], path: Path
) -> ModelConfig:
    """As `identify`; fields that the weights say nothing of are taken from `base`."""
    known = _shape_of(shapes, path)
    known_from = dict.fromkeys(known, "the weights")
    problems = []
    for source, fields in wanted:
        for key, value in fields.items():
            if value is None:
                continue
            if key in known and value != known[key]:
                problems.append(f"{key} = {known[key]} in {known_from[key]}, {value} in {source}")
            elif key not in known and key in ("heads", "experts_per_token", "image_size"):
                known[key], known_from[key] = value, source
    if problems:
        raise UserError(f"{path}: another network than expected: {'; '.join(problems)}")
    if "image_size" not in known:
        raise UserError(f"{path}: pos_embed is missing and nothing else says image_size: give a configuration")
    _fill_from_family(known, path)
    fields = {**base, "preset": _preset_name(known), **known}
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        raise UserError(f"{path}: no such network: {first_problem(error)}") from error


def _shape_of(shapes: Shapes, path: Path) -> dict[str, Any]:
    """The fields of ModelConfig that names and shapes give.

    They are read from whichever block has them, so that a key missing elsewhere is reported as just that.
    """
    hidden, channels, patch = _shape(shapes, "x_embedder.proj.weight", 4, path)[:3]
    depth = 1 + max((int(match[1]) for match in map(_BLOCK.match, shapes) if match), default=-1)
    gate = _first(shapes, ".moe.gate.weight")
    numbered = (int(match[1]) for match in map(_EXPERT.search, shapes) if match)
    experts = _shape(shapes, gate, 2, path)[0] if gate else 1 + max(numbered, default=-1)
    too_many = depth * max(1, experts) > len(shapes) or depth > _MOST_BLOCKS or experts > _MOST_EXPERTS
    if depth < 1 or too_many or not all((hidden, channels, patch)):
        raise UserError(f"{path}: {depth} blocks, {experts} experts and width {hidden} are no DiT")
    outputs = _shape(shapes, "final_layer.linear.weight", 2, path)[0]
    known: dict[str, Any] = {
        "depth": depth,
        "hidden": hidden,
        "patch": patch,
        "channels": channels,
        "experts": experts,
        "num_classes": _shape(shapes, "y_embedder.embedding_table.weight", 2, path)[0] - 1,
        "learn_sigma": outputs != patch * patch * channels,
        "attention": "qk_norm" if _first(shapes, ".attn.Wqkv.weight") else "plain",
    }
    if experts:
        shared = _first(shapes, ".moe.shared_experts.gate_proj.weight")
        known["shared_experts"] = _shape(shapes, shared, 2, path)[0] // hidden if shared else 0
        known["shared_mlp"] = "gelu" if _first(shapes, ".moe.shared_experts.fc1.weight") else "swiglu"
    else:
        known["experts_per_token"] = 0
    norm = _first(shapes, ".attn.q_norm.weight")
    if norm and known["attention"] == "qk_norm":
        known["heads"] = hidden // max(1, _shape(shapes, norm, 1, path)[0])
    if "pos_embed" in shapes:
        tokens = _shape(shapes, "pos_embed", 3, path)[1]
        side = round(tokens**0.5)
        if side * side != tokens or not tokens:
            raise UserError(f"{path}: pos_embed has {tokens} tokens, expected a square number")
        known["image_size"] = side * patch
    return known


def _first(shapes: Shapes, suffix: str) -> str | None:
    """The first name with an ending."""
    return next((name for name in shapes if name.endswith(suffix)), None)


def _shape(shapes: Shapes, name: str, axes: int, path: Path) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    if name not in shapes:
        raise UserError(f"{path}: {name} is missing: these are not the weights of a DiT")
    if len(shapes[name]) != axes:
        raise UserError(f"{path}: {name} is {shapes[name]}, expected {axes} axes")
    return shapes[name]


def _fill_from_family(known: dict[str, Any], path: Path) -> None:
    """Heads of a known size; both numbers that leave no trace must be known afterwards."""
    size = _size_of(known)
    if "heads" not in known and size is not None:
        known["heads"] = SIZES[size][2]
    form = f"DiT-{size or 'S'}/{known['patch']}" + (f"-{known['experts']}E2A" if known["experts"] else "")
    for key in ("heads", "experts_per_token"):
        if key not in known:
            raise UserError(
                f"{path}: the weights do not say {key}: give the preset (such as {form}) or a configuration"
            )


def _size_of(known: dict[str, Any]) -> str | None:
    """The size letter of a depth and width."""
    return next((name for name, shape in SIZES.items() if shape[:2] == (known["depth"], known["hidden"])), None)


def _preset_name(known: dict[str, Any]) -> str | None:
    """The preset that a shape has, or None."""
    size = _size_of(known)
    if size is None or known["heads"] != SIZES[size][2] or known["patch"] not in PATCHES:
        return None
    experts = f"-{known['experts']}E{known['experts_per_token']}A" if known["experts"] else ""
    return f"DiT-{size}/{known['patch']}{experts}"
