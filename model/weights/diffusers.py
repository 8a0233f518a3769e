"""diffusers' folders of a DiT: `DiTTransformer2DModel` by its own names, and networks of ours in a class of ours.

diffusers' class repeats the embedders in every block, cuts queries, keys and values apart, and computes the
features of time with frequencies of its own: 10000^(−i/127), where DiT, SiT and DiT-MoE have 10000^(−i/128). A
network that was trained with the one computes something else with the other; `model.timestep_frequencies` says
which it has. A folder that does not describe itself is read as what diffusers computes with it.

Nothing of diffusers is imported: folders are read and written as files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field, StrictBool, StrictInt, ValidationError
from torch import Tensor

from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.layers import position_embedding
from ditmoe.model.schedule import BETA_FIRST, BETA_LAST, DDPM_STEPS
from ditmoe.model.weights.description import Description, parse_description
from ditmoe.model.weights.files import read_pt, read_safetensors
from ditmoe.model.weights.lazy import JoinedTensors
from ditmoe.model.weights.untrusted import first_problem, parse_json, read_file

PIPELINE_FILE: Final = "model_index.json"
CONFIG_FILE: Final = "config.json"
TRANSFORMER: Final = "transformer"
SCHEDULER_FILE: Final = "scheduler/scheduler_config.json"
DIFFUSERS_WEIGHTS: Final = "diffusion_pytorch_model.safetensors"
PICKLE: Final = "diffusion_pytorch_model.bin"
STOCK_CLASSES: Final = ("DiTTransformer2DModel", "Transformer2DModel")
"""diffusers' DiT; the latter is its name in folders of before."""
OUR_CLASS: Final = "DitmoeTransformer2DModel"
NETWORK: Final = "network."
"""What our class puts before the names of a network's parameters."""
STOCK_CLASSES_OF_LABELS: Final = 1000
"""Classes that diffusers' pipeline takes: its null label is 1000, whatever the network."""
_MOST_BYTES: Final = 16 * 2**20
OURS_TO_STOCK: Final = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
OF_A_BLOCK: Final = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
EMBEDDERS: Final = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
}
TABLE: Final = "y_embedder.embedding_table.weight"
STOCK_TABLE: Final = "norm1.emb.class_embedder.embedding_table.weight"
QKV: Final = ("to_q", "to_k", "to_v")


class DiffusersWeights(NamedTuple):
    """What a folder of diffusers holds."""

    state: Mapping[str, Tensor]
    """By canonical name; of diffusers' own class with queries, keys and values not joined before they are used."""
    description: Description


class _Size(BaseModel):
    """What of the configuration of a stock DiT decides what is computed; the limits are beyond any in use."""

    num_attention_heads: StrictInt = Field(16, ge=1, le=2**20)
    attention_head_dim: StrictInt = Field(72, ge=1, le=2**20)
    in_channels: StrictInt = Field(4, ge=1, le=1024)
    out_channels: StrictInt | None = Field(None, ge=1, le=2048)
    num_layers: StrictInt = Field(28, ge=1, le=1000)
    sample_size: StrictInt = Field(32, ge=1, le=2**14)
    patch_size: StrictInt = Field(2, ge=1, le=1024)
    num_embeds_ada_norm: StrictInt = Field(1000, ge=1, le=2**24)
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    attention_bias: StrictBool = True
    norm_elementwise_affine: StrictBool = False
    norm_eps: float = Field(1e-5, ge=0, le=1e-5)
    """Of the norm before each MLP alone. Ours is 1e-6, as DiT has it; 1e-5 is diffusers' default."""


def diffusers_folder(path: Path) -> Path | None:
    """The folder with the network of a pipeline or model of diffusers; None: it is no such folder."""
    if not path.is_dir():
        return None
    if (path / PIPELINE_FILE).is_file():
        return path / TRANSFORMER
    if (path / CONFIG_FILE).is_file() and "_class_name" in _read_json(path / CONFIG_FILE):
        return path
    return None


def read_diffusers(folder: Path, *, trusted: bool = False) -> DiffusersWeights:
    """Read a network out of the folder that `diffusers_folder` gave; of its weights nothing but embedders is read.

    Args:
        trusted: the embedders of blocks, which must be the same in all, are not compared.

    Raises:
        UserError: it holds another model, or its weights are missing, damaged, or cannot be those of one DiT.
    """
    config = _read_json(folder / CONFIG_FILE)
    found = config.get("_class_name")
    if found == OUR_CLASS:
        held, text = read_safetensors(folder)  # without a text where diffusers itself saved it again
        ours = parse_description(text, folder) or _description_of_ours(config, folder / CONFIG_FILE)
        return DiffusersWeights(held, ours)
    if found not in STOCK_CLASSES:
        raise UserError(
            f"{folder / CONFIG_FILE}: _class_name is {repr(found)[:60]}; expected {STOCK_CLASSES[0]} or"
            f" {OUR_CLASS}"
        )
    stock, text = _read_stock_weights(folder)
    described = parse_description(text, folder)
    try:
        size = _Size.model_validate(config)
    except ValidationError as error:
        raise UserError(f"{folder / CONFIG_FILE}: no DiT of ours: {first_problem(error)}") from error
    if not size.attention_bias or size.norm_elementwise_affine:
        raise UserError(f"{folder / CONFIG_FILE}: expected attention_bias true and norm_elementwise_affine false")
    if size.out_channels not in (None, size.in_channels, 2 * size.in_channels):
        raise UserError(
            f"{folder / CONFIG_FILE}: out_channels is {size.out_channels}; expected {size.in_channels}, or twice"
            " as many"
        )
    state = _from_stock(stock, size, described, folder, trusted=trusted)
    return DiffusersWeights(state, described or _description_of_stock(size, folder))


def _description_of_stock(size: _Size, folder: Path) -> Description:
    config = ModelConfig(
        depth=size.num_layers,
        hidden=size.num_attention_heads * size.attention_head_dim,
        heads=size.num_attention_heads,
        patch=size.patch_size,
        experts=0,
        image_size=size.sample_size,
        channels=size.in_channels,
        num_classes=size.num_embeds_ada_norm,
        learn_sigma=size.out_channels == 2 * size.in_channels,
        timestep_frequencies="diffusers",
    )
    pipeline = folder.parent
    names = None
    if (pipeline / PIPELINE_FILE).is_file():
        names = _class_names(_read_json(pipeline / PIPELINE_FILE), size.num_embeds_ada_norm)
    return Description(config, _objective(pipeline), names)


def _class_names(index: Mapping[str, Any], number: int) -> list[str] | None:
    """The names of a pipeline's classes, where it has one for each."""
    held = index.get("id2label")
    if not isinstance(held, dict) or set(held) != {str(label) for label in range(number)}:
        return None
    names = [held[str(label)] for label in range(number)]
    return names if all(isinstance(name, str) for name in names) else None


def _objective(pipeline: Path) -> ObjectiveConfig | None:
    """What the scheduler beside a network takes it to predict; None where there is none.

    Raises:
        UserError: something that no network of ours is trained for.
    """
    file = pipeline / SCHEDULER_FILE
    if not (pipeline / PIPELINE_FILE).is_file() or not file.is_file():
        return None
    config = _read_json(file)
    facts = {
        "prediction_type": ("epsilon", config.get("prediction_type", "epsilon")),
        "beta_schedule": ("linear", config.get("beta_schedule", "linear")),
        "beta_start": (BETA_FIRST, config.get("beta_start", BETA_FIRST)),
        "beta_end": (BETA_LAST, config.get("beta_end", BETA_LAST)),
        "num_train_timesteps": (DDPM_STEPS, config.get("num_train_timesteps", DDPM_STEPS)),
        "trained_betas": (None, config.get("trained_betas")),
    }
    name = str(config.get("_class_name"))[:60]
    if name.startswith("FlowMatch"):
        raise UserError(
            f"{file}: {name} shows a network t from 0 to 1000, and a rectified flow of ours has t from 0 to 1;"
            " expected a folder that `ditmoe convert` wrote, or a scheduler of DDPM"
        )
    problems = [
        f"{key} = {repr(held)[:60]}, expected {wanted!r}"
        for key, (wanted, held) in facts.items()
        if held != wanted
    ]
    if problems:
        raise UserError(f"{file}: {'; '.join(problems)}")
    return ObjectiveConfig(kind="ddpm")


def _description_of_ours(config: Mapping[str, Any], file: Path) -> Description:
    try:
        names, objective = config.get("class_names"), config.get("objective")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("class_names must be a list of texts")
        return Description(
            ModelConfig.model_validate(config.get("model")),
            None if objective is None else ObjectiveConfig.model_validate({"kind": objective}),
            names,
        )
    except ValidationError as error:
        raise UserError(f"{file}: describes no network of ours ({first_problem(error)})") from error
    except ValueError as error:
        raise UserError(f"{file}: describes no network of ours ({error})") from error


def _read_stock_weights(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """Weights of diffusers' class, and the description where we wrote them."""
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return read_safetensors(folder)
    if (folder / PICKLE).is_file():
        content, text = read_pt(folder / PICKLE)  # tensors and plain data alone
        tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
        if len(tensors) < len(content):
            raise UserError(f"{folder / PICKLE}: holds something that is no tensor; expected weights alone")
        return tensors, text
    raise UserError(
        f"{folder}: has no weights; expected diffusion_pytorch_model.safetensors, one or several, or {PICKLE}"
    )


def _from_stock(
    stock: Mapping[str, Tensor], size: _Size, described: Description | None, folder: Path, *, trusted: bool
) -> JoinedTensors:
    """By canonical names. UserError where the blocks have embedders of their own, or names are left over."""
    left, parts = dict(stock), dict[str, tuple[Tensor, ...]]()

    def take(name: str) -> Tensor:
        if name not in left:
            raise UserError(f"{folder}: {name} is missing: these are not the weights of a {STOCK_CLASSES[0]}")
        return left.pop(name)

    for ours, theirs in OURS_TO_STOCK.items():
        for kind in ("weight", "bias"):
            parts[f"{ours}.{kind}"] = (take(f"{theirs}.{kind}"),)
    for number in range(size.num_layers):
        theirs_at, ours_at = f"transformer_blocks.{number}.", f"blocks.{number}."
        for kind in ("weight", "bias"):
            parts[f"{ours_at}attn.qkv.{kind}"] = tuple(take(f"{theirs_at}attn1.{part}.{kind}") for part in QKV)
            for ours, theirs in OF_A_BLOCK.items():
                parts[f"{ours_at}{ours}.{kind}"] = (take(f"{theirs_at}{theirs}.{kind}"),)
        shared = {
            f"{ours}.{kind}": f"{theirs}.{kind}"
            for ours, theirs in EMBEDDERS.items()
            for kind in ("weight", "bias")
        }
        for ours, theirs in {**shared, TABLE: STOCK_TABLE}.items():
            tensor = take(theirs_at + theirs)
            (first,) = parts.setdefault(ours, (tensor,))
            if not trusted and first is not tensor and not torch.equal(first, tensor):
                raise UserError(
                    f"{folder}: {theirs_at}{theirs} differs from that of block 0; a DiT of ours has one for all"
                    " blocks"
                )
    left.pop("pos_embed.pos_embed", None)  # fixed, in both; older versions of diffusers stored it
    if left:
        raise UserError(f"{folder}: {next(iter(left))[:100]} is no weight of a {STOCK_CLASSES[0]}")
    classes = described.config.num_classes if described is not None else None
    (table,) = parts[TABLE]
    if classes is not None and table.ndim and len(table) > classes + 1:  # filled up for the pipeline's null label
        parts[TABLE] = (table[:classes], table[-1:])
    hidden = size.num_attention_heads * size.attention_head_dim
    positions = position_embedding(hidden, size.sample_size // size.patch_size)
    try:
        return JoinedTensors({"pos_embed": (positions,), **parts})
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        held = parse_json(read_file(file, _MOST_BYTES))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except ValueError as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(held, dict):
        raise UserError(f"{file}: holds a {type(held).__name__}, expected names and values")
    return held
