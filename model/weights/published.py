"""Published DiT and DiT-MoE weights: reading the layouts in use, checking them against a network, writing them.

A `.pt` file holds the weights bare, under `ema` or under `model`; a `.safetensors` file (or an index of several)
holds one set, and so does a folder of diffusers. Names are the published ones, which are also our canonical ones;
a `module.` prefix that a data-parallel wrapper left is dropped. The network's shape is read from names and shapes.
Two numbers leave no trace there, heads (with plain attention) and experts per token: they come from the preset,
from a configuration, or from the description that `save_published` puts into its files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditmoe.model.canonical import canonical_items, canonical_shapes, check_canonical
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.weights.description import Description, Which, parse_description
from ditmoe.model.weights.diffusers import NETWORK, diffusers_folder, read_diffusers
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
from ditmoe.model.weights.identify import Expected, identify
from ditmoe.model.weights.lazy import JoinedTensors, parts_of, read, shapes_of

_PT_KEYS: dict[Which, str] = {"ema": "ema", "weights": "model"}
_DEEPSPEED_KEY = "module"
"""Holds the weights in DeepSpeed's `mp_rank_00_model_states.pt`."""
_WRAPPER = "module."
_INNER_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that torch.compile, FSDP and recomputation add to names, wherever they wrapped a module."""


@dataclass(frozen=True)
class PublishedWeights:
    """One or two sets of weights by canonical name, and the network that they fit."""

    config: ModelConfig
    ema: Mapping[str, Tensor] | None = None
    """The averaged weights. A bare file's weights count as these: published bare files hold the average."""
    weights: Mapping[str, Tensor] | None = None
    """The weights that training goes on from (`model` in a `.pt` file)."""
    objective: ObjectiveConfig | None = None
    """What the network was trained to predict, where the file says it."""
    class_names: list[str] | None = None
    origin: str = "the weights"
    """Where they are from, for messages."""

    def state(self, which: Which | None = None) -> Mapping[str, Tensor]:
        """One set of weights: the one named, or without a name the EMA if there is one.

        Raises:
            UserError: the set named is not there.
        """
        chosen = (self.ema or self.weights) if which is None else (self.ema if which == "ema" else self.weights)
        if chosen is None:
            other = "weights" if which == "ema" else "ema"
            raise UserError(f"{self.origin}: has no set {which!r}, only {other!r}")
        return chosen

    def description(self, which: Which | None) -> Description:
        """What the weights do not say of themselves.

        Args:
            which: the set that a file holds alone; None: it says so itself.
        """
        return Description(self.config, self.objective, self.class_names, which)

    def only(self, which: Which) -> "PublishedWeights":
        """The same with one set of weights, which must be there."""
        state = self.state(which)
        return replace(self, ema=state if which == "ema" else None, weights=state if which == "weights" else None)


def load_published(
    path: str | Path,
    preset: str | None = None,
    *,
    config: Expected | None = None,
    which: Which | None = None,
) -> tuple[ModelConfig, dict[str, Tensor]]:
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
            A mapping has some fields of one, such as {"heads": 8, "experts_per_token": 2}.
        which: the set wanted from a `.pt` file with two; by default the EMA, or the only one.

    Returns:
        a complete configuration, and CPU tensors by canonical name in the file's own precision (mapped from
        the file, so that nothing is read before it is used).

    Raises:
        UserError: the file cannot be read, or does not fit; the message names the file and what is wrong.
    """
    published = read_published(path, preset, config=config)
    return published.config, dict(published.state(which))


def read_published(
    path: str | Path, preset: str | None = None, *, config: Expected | None = None, trusted: bool = False
) -> PublishedWeights:
    """Read every set of weights in a published file; other arguments and errors as for `load_published`.

    Args:
        trusted: somebody else finds out whether weights that must be the same are, which takes reading them.
    """
    path = Path(path)
    folder = diffusers_folder(path)
    sets: dict[Which, Mapping[Any, Any]]
    described: Description | None
    if folder is not None:
        state, described = read_diffusers(folder, trusted=trusted)
        sets = {described.which or "ema": state}
    else:
        sets, described = _read_sets(path)
    states = {which: _clean(state, path) for which, state in sets.items()}
    first = shapes_of(next(iter(states.values())))
    complete = identify(first, path, preset, config, described.config if described else None)
    shapes = canonical_shapes(complete)
    for which, state in states.items():
        check_canonical(
            shapes_of(state),
            shapes,
            f"{path} ({which})" if len(states) > 1 else str(path),
        )
    return PublishedWeights(
        complete,
        states.get("ema"),
        states.get("weights"),
        described.objective if described else None,
        described.class_names if described else None,
        str(path),
    )


def save_published(
    published: PublishedWeights,
    path: str | Path,
    *,
    bare: bool = False,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write weights in a published layout, atomically.

    Args:
        published: the sets to write; a bare or safetensors file takes exactly one.
        path: ends with `.pt` (`{"ema": …, "model": …}`, or the bare set) or `.safetensors`.
        bare: write a `.pt` file that is nothing but the set of weights.
        shard_bytes: cut a larger safetensors file into numbered ones with an index.
        overwrite: replace what has the name.
        progress: of safetensors: called with the bytes written so far after each file.

    Returns:
        the files written, the one to read last.

    Raises:
        UserError: the suffix is another, two sets for a file that takes one, something has the name, or the disk
            refuses.
    """
    path = Path(path)
    sets: dict[Which, Mapping[str, Tensor]] = {}
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
        description = published.description(which).text()
        return write_safetensors(path, state, description, shard_bytes, overwrite=overwrite, progress=progress)
    if bare:
        write_pt(path, read(state), overwrite=overwrite)
    else:
        content = {_PT_KEYS[name]: read(held) for name, held in sets.items()}
        write_pt(path, content, published.description(None).text(), overwrite=overwrite)
    return [path]


# --- the sets of weights in a file -----------------------------------------------------------------------------


def _read_sets(path: Path) -> tuple[dict[Which, Mapping[Any, Any]], Description | None]:
    """The sets in a file, unchecked, and its description. A safetensors file without one counts as the average."""
    if path.is_dir() or path.suffix == SAFETENSORS or path.name.endswith(INDEX_SUFFIX):
        state, text = read_safetensors(path)
        description = parse_description(text, path)
        return {(description and description.which) or "ema": state}, description
    content, text = read_pt(path)
    description = parse_description(text, path)
    sets: dict[Which, Mapping[Any, Any]] = {}
    for which, key in _PT_KEYS.items():
        held = content.get(key)
        if isinstance(held, dict):
            sets[which] = held
        elif held is not None:
            raise UserError(f"{path}: {key!r} holds a {type(held).__name__}, expected a dictionary of tensors")
    if not sets and isinstance(content.get(_DEEPSPEED_KEY), dict):
        sets["weights"] = content[_DEEPSPEED_KEY]
    if not sets:
        if not any(isinstance(value, Tensor) for value in content.values()):
            keys = ", ".join(repr(key) for key in list(content)[:5]) or "nothing"
            raise UserError(f"{path}: holds {keys}; expected weights, bare or under 'ema', 'model' or 'module'")
        sets["ema"] = content
    return sets, description


def _clean(state: Mapping[Any, Any], path: Path) -> Mapping[str, Tensor]:
    """Check that a set is names and floating-point tensors, and drop what wrappers added to the names."""
    pieces = [(name, piece) for name in state for piece in parts_of(state, name)]
    for name, tensor in pieces:
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {repr(name)[:100]} holds a {type(tensor).__name__}, expected a tensor")
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not tensor.is_floating_point() or not dense:
            raise UserError(f"{path}: {name[:100]} is a tensor of {tensor.dtype}, expected dense floating point")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(
                f"{path}: {name[:100]} is {tuple(tensor.shape)}, which is more than the file holds of it"
            )
        if not tensor.numel():
            raise UserError(
                f"{path}: {name[:100]} is empty; ZeRO 3 keeps the weights in other files: join them first, with"
                " DeepSpeed's zero_to_fp32.py"
            )
    if isinstance(state, JoinedTensors):
        return state  # of diffusers' own class, which no wrapper's name fits
    names = {name: _unwrapped(name) for name in state}
    for wrapper in (_WRAPPER, NETWORK):
        while names and all(name.startswith(wrapper) for name in names.values()):
            names = {stored: name.removeprefix(wrapper) for stored, name in names.items()}
    if len(set(names.values())) < len(names):
        raise UserError(f"{path}: holds some weights twice, with and without the names of wrappers")
    # Networks of ours have the experts of a block in one tensor each.
    return dict(canonical_items((name, state[stored].detach()) for stored, name in names.items()))


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _INNER_WRAPPERS)
