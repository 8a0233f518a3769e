"""Published DiT and DiT-MoE weights: reading the layouts in use, checking them against a network, writing them.

A `.pt` file holds the weights bare, under `ema` or under `model`; a `.safetensors` file (or an index of several)
holds one set. Names are the published ones, which are also our canonical ones; a `module.` prefix that a
data-parallel wrapper left is dropped. The network's shape is read from names and shapes. Two numbers leave no
trace there, heads (with plain attention) and experts per token: they come from the preset, from a configuration,
or from the description that `save_published` puts into its files.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from ditmoe.model.canonical import canonical_shapes, check_canonical
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.presets import PATCHES, SIZES, parse_preset
from ditmoe.model.weights.files import (
    INDEX_SUFFIX,
    PT_SUFFIXES,
    SAFETENSORS,
    SHARD_BYTES,
    read_pt,
    read_safetensors,
    write_pt,
    write_safetensors,
)
from ditmoe.model.weights.untrusted import first_problem, parse_json

Which = Literal["ema", "weights"]
State = dict[str, Tensor]

_PT_KEYS: dict[Which, str] = {"ema": "ema", "weights": "model"}
_WRAPPER = "module."
_MOST_BLOCKS, _MOST_EXPERTS = 1000, 4096  # a damaged file must not make us build a giant
_BLOCK = re.compile(r"blocks\.(\d{1,6})\.")
_EXPERT = re.compile(r"\.moe\.experts\.(\d{1,6})\.")
_DESCRIPTION_FORMAT = "ditmoe weights 1"


@dataclass(frozen=True)
class PublishedWeights:
    """One or two sets of weights by canonical name, and the network that they fit."""

    config: ModelConfig
    ema: State | None = None
    """The averaged weights. A bare file's weights count as these: published bare files hold the average."""
    weights: State | None = None
    """The weights that training goes on from (`model` in a `.pt` file)."""
    objective: ObjectiveConfig | None = None
    """What the network was trained to predict, where the file says it."""
    class_names: list[str] | None = None
    origin: str = "the weights"
    """Where they are from, for messages."""

    def state(self, which: Which | None = None) -> State:
        """One set of weights: the one named, or without a name the EMA if there is one.

        Raises:
            UserError: the set named is not there.
        """
        chosen = (self.ema or self.weights) if which is None else (self.ema if which == "ema" else self.weights)
        if chosen is None:
            other = "weights" if which == "ema" else "ema"
            raise UserError(f"{self.origin}: has no set {which!r}, only {other!r}")
        return chosen

    def only(self, which: Which) -> "PublishedWeights":
        """The same with one set of weights, which must be there."""
        state = self.state(which)
        return replace(self, ema=state if which == "ema" else None, weights=state if which == "weights" else None)


def load_published(
    path: str | Path,
    preset: str | None = None,
    *,
    config: ModelConfig | None = None,
    which: Which | None = None,
) -> tuple[ModelConfig, State]:
    """Read published weights, checked name by name and shape by shape.

    To have a network with them:

        config, state = load_published("DiT-XL-2-256x256.pt", preset="DiT-XL/2")
        network = DiT(config)
        load_canonical(network, state, origin="DiT-XL-2-256x256.pt")

    Args:
        path: a `.pt` or `.safetensors` file, a safetensors index, or a folder that holds one of the latter.
        preset: the network expected, such as DiT-G/2-16E2A. May be left out for a dense network of a known size
            and for a file that describes itself.
        config: an expected shape instead of (or besides) the preset; fields left at their default are not checked.
        which: the set wanted from a `.pt` file with two; by default the EMA, or the only one.

    Returns:
        a complete configuration, and CPU tensors by canonical name in the file's own precision (mapped from
        the file, so that nothing is read before it is used).

    Raises:
        UserError: the file cannot be read, or does not fit; the message names the file and what is wrong.
    """
    published = read_published(path, preset, config=config)
    return published.config, published.state(which)


def read_published(
    path: str | Path, preset: str | None = None, *, config: ModelConfig | None = None
) -> PublishedWeights:
    """Read every set of weights in a published file; arguments and errors as for `load_published`."""
    path = Path(path)
    sets, description = _read_sets(path)
    described = _parse_description(description, path)
    wanted = _wanted(path, preset, config, described)
    states = {which: _clean(state, path) for which, state in sets.items()}
    first = next(iter(states.values()))
    complete = _identify(first, wanted, config or (described.config if described else None), path)
    shapes = canonical_shapes(complete)
    for which, state in states.items():
        check_canonical(state, shapes, f"{path} ({which})" if len(states) > 1 else str(path))
    return PublishedWeights(
        complete,
        states.get("ema"),
        states.get("weights"),
        described.objective if described else None,
        described.class_names if described else None,
        str(path),
    )


def save_published(
    published: PublishedWeights, path: str | Path, *, bare: bool = False, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write weights in a published layout, atomically.

    Args:
        published: the sets to write; a bare or safetensors file takes exactly one.
        path: ends with `.pt` (`{"ema": …, "model": …}`, or the bare set) or `.safetensors`.
        bare: write a `.pt` file that is nothing but the set of weights.
        shard_bytes: cut a larger safetensors file into numbered ones with an index.

    Returns:
        the files written, the one to read last.

    Raises:
        UserError: the suffix is another, two sets for a file that takes one, or the disk refuses.
    """
    path = Path(path)
    sets: dict[Which, State] = {}
    if published.ema is not None:
        sets["ema"] = published.ema
    if published.weights is not None:
        sets["weights"] = published.weights
    assert sets, "no weights to write"
    if path.suffix not in (*PT_SUFFIXES, SAFETENSORS):
        expected = ", ".join((*PT_SUFFIXES, SAFETENSORS))
        raise UserError(f"{path}: ends with {path.suffix!r}, expected one of {expected}")
    single = bare or path.suffix == SAFETENSORS
    if single and len(sets) > 1:
        raise UserError(f"{path}: a {'bare' if bare else SAFETENSORS} file takes one set of weights, found two")
    which, state = next(iter(sets.items()))
    if path.suffix == SAFETENSORS:
        return write_safetensors(path, state, _describe(published, which), shard_bytes)
    if bare:
        write_pt(path, state)
    else:
        write_pt(path, {_PT_KEYS[name]: held for name, held in sets.items()}, _describe(published, None))
    return [path]


# --- the sets of weights in a file -----------------------------------------------------------------------------


def _read_sets(path: Path) -> tuple[dict[Which, Mapping[Any, Any]], str | None]:
    """The sets in a file, unchecked, and its description."""
    if path.is_dir() or path.suffix == SAFETENSORS or path.name.endswith(INDEX_SUFFIX):
        state, description = read_safetensors(path)
        return {_described_set(description): state}, description
    content, description = read_pt(path)
    sets: dict[Which, Mapping[Any, Any]] = {}
    for which, key in _PT_KEYS.items():
        held = content.get(key)
        if isinstance(held, dict):
            sets[which] = held
        elif held is not None:
            raise UserError(f"{path}: {key!r} holds a {type(held).__name__}, expected a dictionary of tensors")
    if not sets:
        if not any(isinstance(value, Tensor) for value in content.values()):
            keys = ", ".join(repr(key) for key in list(content)[:5]) or "nothing"
            raise UserError(f"{path}: holds {keys}; expected weights, bare or under 'ema' or 'model'")
        sets["ema"] = content
    return sets, description


def _clean(state: Mapping[Any, Any], path: Path) -> State:
    """Check that a set is names and floating-point tensors, and drop a wrapper's prefix."""
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {repr(name)[:100]} holds a {type(tensor).__name__}, expected a tensor")
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not tensor.is_floating_point() or not dense:
            raise UserError(f"{path}: {name[:100]} is a tensor of {tensor.dtype}, expected dense floating point")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(
                f"{path}: {name[:100]} is {tuple(tensor.shape)}, which is more than the file holds of it"
            )
    wrapped = all(name.startswith(_WRAPPER) for name in state)
    return {name.removeprefix(_WRAPPER) if wrapped else name: tensor.detach() for name, tensor in state.items()}


# --- the network that the weights fit --------------------------------------------------------------------------


def _wanted(
    path: Path, preset: str | None, config: ModelConfig | None, described: PublishedWeights | None
) -> list[tuple[str, dict[str, Any]]]:
    """Each source that says something of the shape: its name, and its fields."""
    wanted: list[tuple[str, dict[str, Any]]] = []
    if preset is not None:
        try:
            wanted.append((preset, vars(parse_preset(preset))))
        except ValueError as error:
            raise UserError(str(error)) from error
    if config is not None:
        wanted.append(("the configuration", config.model_dump(include=config.model_fields_set)))
    if described is not None:
        wanted.append((f"the description in {path.name}", described.config.model_dump()))
    return wanted


def _identify(
    state: State, wanted: list[tuple[str, dict[str, Any]]], base: ModelConfig | None, path: Path
) -> ModelConfig:
    """The complete configuration of the network that a state belongs to.

    Raises:
        UserError: the state is not a DiT's, contradicts what is wanted, or leaves heads or K unknown.
    """
    known = _shape_of(state, path)
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
    fields = base.model_dump() if base else {}
    fields |= {"preset": _preset_name(known), **known}
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where, text = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: no such network: {where} {text}") from error


def _shape_of(state: State, path: Path) -> dict[str, Any]:
    """The fields of ModelConfig that names and shapes give.

    They are read from whichever block has them, so that a key missing elsewhere is reported as just that.
    """
    hidden, channels, patch = _shape(state, "x_embedder.proj.weight", 4, path)[:3]
    depth = 1 + max((int(match[1]) for match in map(_BLOCK.match, state) if match), default=-1)
    gate = _first(state, ".moe.gate.weight")
    numbered = (int(match[1]) for match in map(_EXPERT.search, state) if match)
    experts = _shape(state, gate, 2, path)[0] if gate else 1 + max(numbered, default=-1)
    too_many = depth * max(1, experts) > len(state) or depth > _MOST_BLOCKS or experts > _MOST_EXPERTS
    if depth < 1 or too_many or not all((hidden, channels, patch)):
        raise UserError(f"{path}: {depth} blocks, {experts} experts and width {hidden} are no DiT")
    outputs = _shape(state, "final_layer.linear.weight", 2, path)[0]
    known: dict[str, Any] = {
        "depth": depth,
        "hidden": hidden,
        "patch": patch,
        "channels": channels,
        "experts": experts,
        "num_classes": _shape(state, "y_embedder.embedding_table.weight", 2, path)[0] - 1,
        "learn_sigma": outputs != patch * patch * channels,
        "attention": "qk_norm" if _first(state, ".attn.Wqkv.weight") else "plain",
    }
    if experts:
        shared = _first(state, ".moe.shared_experts.gate_proj.weight")
        known["shared_experts"] = _shape(state, shared, 2, path)[0] // hidden if shared else 0
    else:
        known["experts_per_token"] = 0
    norm = _first(state, ".attn.q_norm.weight")
    if norm and known["attention"] == "qk_norm":
        known["heads"] = hidden // max(1, _shape(state, norm, 1, path)[0])
    if "pos_embed" in state:
        tokens = _shape(state, "pos_embed", 3, path)[1]
        side = round(tokens**0.5)
        if side * side != tokens or not tokens:
            raise UserError(f"{path}: pos_embed has {tokens} tokens, expected a square number")
        known["image_size"] = side * patch
    return known


def _first(state: State, suffix: str) -> str | None:
    """The first name with an ending."""
    return next((name for name in state if name.endswith(suffix)), None)


def _shape(state: State, name: str, axes: int, path: Path) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    if name not in state:
        raise UserError(f"{path}: {name} is missing: these are not the weights of a DiT")
    if state[name].ndim != axes:
        raise UserError(f"{path}: {name} is {tuple(state[name].shape)}, expected {axes} axes")
    return tuple(state[name].shape)


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


# --- the description that our own files carry -------------------------------------------------------------------


def _describe(published: PublishedWeights, which: Which | None) -> str:
    """What the weights do not say of themselves, as JSON."""
    return json.dumps(
        {
            "format": _DESCRIPTION_FORMAT,
            "model": published.config.model_dump(),
            "objective": published.objective.model_dump() if published.objective else None,
            "class_names": published.class_names,
            "set": which,
        }
    )


def _described_set(description: str | None) -> Which:
    """The set that a safetensors file holds; one without a description counts as the average."""
    try:
        held = parse_json(description or "{}")
    except ValueError:
        return "ema"  # `_parse_description` refuses it
    return "weights" if isinstance(held, dict) and held.get("set") == "weights" else "ema"


def _parse_description(description: str | None, path: Path) -> PublishedWeights | None:
    """Read a description back; the weights themselves are not in it."""
    if description is None:
        return None
    try:
        held = parse_json(description)
        if not isinstance(held, dict) or held.get("format") != _DESCRIPTION_FORMAT:
            raise ValueError(f"expected {_DESCRIPTION_FORMAT!r}")
        names, objective = held.get("class_names"), held.get("objective")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("class_names must be a list of texts")
        return PublishedWeights(
            ModelConfig(**held["model"]),
            objective=ObjectiveConfig(**objective) if objective else None,
            class_names=cast(list[str] | None, names),
        )
    except ValidationError as error:
        raise UserError(f"{path}: its description cannot be read ({first_problem(error)})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its description cannot be read ({str(error)[:200]})") from error
