"""Networks of ours as diffusers' folders hold them: by the names of its own class, or of the one of ours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditmoe.model.canonical import split_experts
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.weights.diffusers import (
    EMBEDDERS,
    NETWORK,
    OF_A_BLOCK,
    OUR_CLASS,
    OURS_TO_STOCK,
    QKV,
    STOCK_CLASSES,
    STOCK_CLASSES_OF_LABELS,
    STOCK_TABLE,
    TABLE,
)
from ditmoe.model.weights.lazy import LazyTensors, read, shapes_of, type_of


@dataclass(frozen=True)
class _Recipe:
    """How a tensor of diffusers' folder is made of canonical ones."""

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[[list[Tensor]], Tensor]


def stock_problem(config: ModelConfig) -> str | None:
    """Why diffusers' own class cannot compute what a network computes; None: it can."""
    if config.experts:
        return "it has experts"
    if config.attention != "plain":
        return f"it has {config.attention} attention"
    if config.timestep_frequencies != "diffusers":
        return "its timesteps have DiT's frequencies, 10000^(−i/128), and diffusers computes 10000^(−i/127)"
    return None


def stock_config(config: ModelConfig) -> dict[str, Any]:
    """The configuration of a `DiTTransformer2DModel` with the shape of a dense network."""
    assert config.num_classes is not None
    return {
        "_class_name": STOCK_CLASSES[0],
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.hidden // config.heads,
        "dropout": 0.0,
        "in_channels": config.channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.heads,
        "num_embeds_ada_norm": max(config.num_classes, STOCK_CLASSES_OF_LABELS),
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch,
        "sample_size": config.image_size,
        "upcast_attention": False,
    }


def our_config(config: ModelConfig, objective: ObjectiveConfig, class_names: list[str] | None) -> dict[str, Any]:
    """The configuration of a `DitmoeTransformer2DModel`."""
    return {
        "_class_name": OUR_CLASS,
        "class_names": class_names,
        "in_channels": config.channels,
        "model": config.model_dump(),
        "objective": objective.kind,
        "out_channels": config.out_channels,
        "sample_size": config.image_size,
    }


def to_stock(state: Mapping[str, Tensor], config: ModelConfig) -> LazyTensors:
    """The weights of a dense network by the names of diffusers' class."""
    shapes = shapes_of(state)
    recipes: dict[str, _Recipe] = {}

    def keep(theirs: str, ours: str) -> None:
        recipes[theirs] = _Recipe((ours,), shapes[ours], lambda held: held[0].clone())

    for ours, theirs in OURS_TO_STOCK.items():
        for kind in ("weight", "bias"):
            keep(f"{theirs}.{kind}", f"{ours}.{kind}")
    for number in range(config.depth):
        theirs_at, ours_at = f"transformer_blocks.{number}.", f"blocks.{number}."
        for kind in ("weight", "bias"):
            qkv = f"{ours_at}attn.qkv.{kind}"
            third = (config.hidden, *shapes[qkv][1:])
            for place, part in enumerate(QKV):
                recipes[f"{theirs_at}attn1.{part}.{kind}"] = _Recipe((qkv,), third, _third(place))
            for ours, theirs in OF_A_BLOCK.items():
                keep(f"{theirs_at}{theirs}.{kind}", f"{ours_at}{ours}.{kind}")
            for ours, theirs in EMBEDDERS.items():
                keep(f"{theirs_at}{theirs}.{kind}", f"{ours}.{kind}")
        rows = stock_config(config)["num_embeds_ada_norm"] + 1
        recipes[theirs_at + STOCK_TABLE] = _Recipe((TABLE,), (rows, config.hidden), _filled_up_to(rows))
    return _made(state, recipes)


def to_ours(state: Mapping[str, Tensor], config: ModelConfig) -> LazyTensors:
    """The weights of any network by the names of our class: experts are stacked."""
    with torch.device("meta"):
        network = DiT(config)
    recipes = {}
    for name, tensor in network.state_dict().items():
        experts = split_experts(name, 0, tensor.shape[0] if tensor.ndim else 0)
        make: Callable[[list[Tensor]], Tensor] = (lambda held: held[0]) if experts is None else torch.stack
        recipes[NETWORK + name] = _Recipe(tuple(experts or [name]), tuple(tensor.shape), make)
    return _made(state, recipes)


def _third(place: int) -> Callable[[list[Tensor]], Tensor]:
    return lambda held: held[0].chunk(3)[place].clone()


def _filled_up_to(rows: int) -> Callable[[list[Tensor]], Tensor]:
    """The table with its last row, the null class's, as often as it takes: the pipeline's null label is fixed."""
    return lambda held: torch.cat((held[0], held[0][-1:].expand(rows - len(held[0]), -1)))


def _made(state: Mapping[str, Tensor], recipes: Mapping[str, _Recipe]) -> LazyTensors:
    def made(names: Sequence[str]) -> dict[str, Tensor]:
        sources = dict.fromkeys(source for name in names for source in recipes[name].sources)
        held = read(state, list(sources))
        return {name: recipes[name].make([held[each] for each in recipes[name].sources]) for name in names}

    return LazyTensors({name: recipe.shape for name, recipe in recipes.items()}, made, type_of(state))
