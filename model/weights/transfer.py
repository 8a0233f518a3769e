"""From the weights of one network to the first values of another: what is copied, and what is fresh.

Names are canonical. The new network may have other classes, another input size, wider shared experts, and experts
where the source has none or one. What is fresh is chosen so that the new network computes what the source does:

    another input size     positions are fixed sin-cos, those of the new grid; nothing is copied for them
    other classes          a fresh label table; the null class keeps its row
    wider shared experts   shared'(x) = shared(x) + 0, the new columns of down_proj being zero
    dense → mixture        y = MLP(x) + Σ_k p_k·0: the dense MLP takes the place of the shared experts
                           (`model.shared_mlp: gelu`), and down_proj of the fresh experts is zero
    one expert → N         y = Σ_k p_k·(N/K)·E(x) + shared(x), k over the K experts of the token, each a copy E of
                           the one with down_proj times N/K. The fresh router is `ROUTER_SHARE` of its usual size:
                           it sends tokens as another does, with p_k = 1/N up to about 1e-4, so Σ_k p_k·N/K = 1

The experts are SwiGLUs without biases, which cannot compute a dense block's GELU MLP with biases: so that one is
kept whole, and each token goes through it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from ditmoe.model.canonical import canonical_shapes
from ditmoe.model.config import ModelConfig
from ditmoe.model.errors import UserError

ROUTER_SHARE: Final = 1e-4
LABELS: Final = "y_embedder.embedding_table.weight"
_SHOWN: Final = 5
"""Parameters of another shape that a message lists."""
_ALIKE: Final = (
    "depth",
    "hidden",
    "heads",
    "patch",
    "channels",
    "learn_sigma",
    "attention",
    "timestep_frequencies",
)
"""Fields of the network that must be the source's."""
_MLP: Final = re.compile(r"(blocks\.\d+\.)moe\.shared_experts\.(fc[12]\.(?:weight|bias))")
_EXPERT: Final = re.compile(r"(blocks\.\d+\.moe\.experts\.)\d+(\.(\w+)\.weight)")
_SHARED: Final = re.compile(r"blocks\.\d+\.moe\.shared_experts\.(gate_proj|up_proj|down_proj)\.weight")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Value:
    """What one parameter starts as."""

    source: str | None = None
    """The source's parameter that it is copied from; None: all of it is fresh."""
    scale: float = 1.0
    """What the copy, or the fresh value, is multiplied by."""
    kept: Literal["all", "first rows", "first columns", "last row"] = "all"
    """Where the copy lies in it; what lies beside it is fresh."""
    beside: float = 1.0
    """What the fresh values beside a copy are multiplied by."""

    def fresh_part(self, name: str) -> str | None:
        """What of the parameter is fresh, for a log; None: nothing."""
        if self.source is None:
            size = (
                "" if self.scale == 1 else " (zero)" if self.scale == 0 else f" ({self.scale:g} of its usual size)"
            )
            return name + size
        if self.kept == "all":
            return None
        part = "all but the null class" if self.kept == "last row" else f"beside the {self.kept}"
        return f"{name} ({part}{', zero' if self.beside == 0 else ''})"


def plan_transfer(source: ModelConfig, target: ModelConfig, origin: str) -> dict[str, Value]:
    """What each canonical parameter of a network starts as; both configurations are complete.

    Args:
        origin: where the source is from, for messages.

    Raises:
        UserError: something does not fit: every problem at once, with the key, and names and shapes.
    """
    problems = [
        f"model.{key} = {getattr(target, key)}, found {key} = {getattr(source, key)}"
        for key in _ALIKE
        if getattr(source, key) != getattr(target, key)
    ]
    problems += _feed_forward_problems(source, target)
    found, wanted = canonical_shapes(source), canonical_shapes(target)
    wanted.pop("pos_embed")
    values = {name: _value(name, source, target) for name in wanted}
    wrong = list(_wrong_shapes(values, found, wanted))
    problems += wrong[:_SHOWN] + ([f"and {len(wrong) - _SHOWN} others"] if len(wrong) > _SHOWN else [])
    if problems:
        raise UserError(
            "\n  ".join([f"train.start_from = {origin}: its weights do not fit the model:", *problems])
        )
    return values


def _feed_forward_problems(source: ModelConfig, target: ModelConfig) -> Iterator[str]:
    """Where the source's MLPs and experts have no place in the target."""
    if source.experts == 0 and target.experts and target.shared_mlp != "gelu":
        yield (
            f"model.shared_mlp = {target.shared_mlp}, found a dense network: a mixture keeps its MLP in the place"
            " of the shared experts; expected model.shared_mlp = gelu"
        )
    elif source.experts and source.shared_mlp != target.shared_mlp:
        yield f"model.shared_mlp = {target.shared_mlp}, found shared_mlp = {source.shared_mlp}"
    if source.experts not in (0, 1, target.experts):
        yield (
            f"model.experts = {target.experts}, found experts = {source.experts}; expected as many, or a source"
            " that is dense or has one expert"
        )
    if source.experts == 1 and not target.experts:
        yield "model.experts = 0, found experts = 1: an expert is no MLP of a dense block; expected 1 or more"
    if source.experts and source.shared_experts > target.shared_experts:
        yield (
            f"model.shared_experts = {target.shared_experts}, found shared_experts = {source.shared_experts};"
            " expected as many or more"
        )


def _value(name: str, source: ModelConfig, target: ModelConfig) -> Value:
    """What a parameter of the target starts as."""
    if name == LABELS and source.num_classes != target.num_classes:
        return Value(name, kept="last row")
    if target.experts and not source.experts:
        mlp = _MLP.fullmatch(name)
        if mlp is not None:
            return Value(f"{mlp[1]}mlp.{mlp[2]}")
        if ".moe." in name:
            return Value(scale=0.0 if name.endswith("down_proj.weight") else 1.0)
    expert, shared = _EXPERT.fullmatch(name), _SHARED.fullmatch(name)
    if source.experts == 1 < target.experts:
        if name.endswith(".moe.gate.weight"):
            return Value(scale=ROUTER_SHARE)
        if expert is not None:
            scale = target.experts / target.experts_per_token if expert[3] == "down_proj" else 1.0
            return Value(f"{expert[1]}0{expert[2]}", scale)
    if shared is not None and source.shared_experts != target.shared_experts:
        down = shared[1] == "down_proj"
        if not source.shared_experts:
            return Value(scale=0.0 if down else 1.0)
        return Value(name, kept="first columns", beside=0.0) if down else Value(name, kept="first rows")
    return Value(name)


def _wrong_shapes(values: Mapping[str, Value], found: Shapes, wanted: Shapes) -> Iterator[str]:
    """Where what is to be copied has not the shape of its place."""
    for name, value in values.items():
        if value.source is None:
            continue
        shape = found.get(value.source)
        if shape is None:
            yield f"{name} is {wanted[name]}, and {value.source} is not found"
        elif (shape != wanted[name]) if value.kept == "all" else not _fits(value, shape, wanted[name]):
            yield f"{value.source} is {shape}, expected {wanted[name]}"


def _fits(value: Value, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a copy fits into a part of its place."""
    if value.kept == "first columns":
        return shape[:1] == wanted[:1] and shape[1] <= wanted[1]
    return shape[1:] == wanted[1:] and (value.kept == "last row" or shape[0] <= wanted[0])


def differences(source: ModelConfig, target: ModelConfig) -> list[str]:
    """What keeps the target, its fresh parts apart, from computing what the source does; a line each."""
    lines = []
    if source.experts == target.experts > 0 and source.experts_per_token != target.experts_per_token:
        lines.append(
            f"model.experts_per_token = {target.experts_per_token}, and the source sends a token to"
            f" {source.experts_per_token}"
        )
    if source.image_size != target.image_size:
        lines.append(
            f"the input is of side {target.image_size}, and the source's of {source.image_size}: the fixed"
            " positions are those of the new grid"
        )
    return lines


def listed(parts: Iterable[str]) -> list[str]:
    """Names of parameters with those that differ in numbers alone as one, in the order in which they come.

    `blocks.0.x` and `blocks.1.x` are `blocks.*.x, 2 tensors`.
    """
    together: dict[str, list[str]] = {}
    for part in parts:
        name, _, rest = part.partition(" ")
        pattern = re.sub(r"\.\d+\.(?!weight|bias)", ".*.", name) if re.match(r"blocks\.", name) else name
        together.setdefault(f"{pattern} {rest}".strip(), []).append(part)
    return [
        parts[0] if len(parts) == 1 else f"{pattern}, {len(parts)} tensors" for pattern, parts in together.items()
    ]
