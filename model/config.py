"""Configuration of the network (`model`), the objective (`objective`) and the EMA (`ema`)."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from ditmoe.model.presets import parse_preset
from ditmoe.model.settings import MOST_IMAGES, NO_UNIT, Settings, Unit

MOST_TOKENS_PER_SIDE: Final = 256
"""Attention over the tokens of a larger square would take more memory than a GPU has."""
BALANCES: Final[dict[str, dict[str, Any]]] = {
    "paper": {"balance_weight": 0.005, "balance_group": 0},
    "published-code": {"balance_weight": 0.01, "balance_group": 32},
}
"""`model.balance` → the keys that it stands for. The paper's sums are over "T tokens" and leave open of which
images; its code takes both means over whatever a device holds."""


class ModelConfig(Settings):
    """The network's shape: a preset, and any field that differs from it."""

    preset: str | None = None
    """A name such as DiT-S/2-8E2A (see `ditmoe models`); null: you give every field of the shape."""
    depth: Annotated[int, Unit("blocks")] = Field(default=0, ge=1, le=1000)
    """Number of blocks L; from the preset when left out."""
    hidden: Annotated[int, Unit("features")] = Field(default=0, ge=4, le=2**20, multiple_of=4)
    """Width D of the token stream (a multiple of 4 for the 2-D sin-cos position embedding)."""
    heads: Annotated[int, Unit("heads")] = Field(default=0, ge=1, le=2**20)
    """Attention heads; divides `hidden`."""
    patch: Annotated[int, Unit("pixels or latent cells")] = Field(default=0, ge=1, le=1024)
    """Side of a patch, in pixels or latent cells; divides `image_size`."""
    experts: Annotated[int, Unit("experts")] = Field(default=0, ge=0, le=2**16)
    """Routed experts N of each block; 0: a dense network with a GELU MLP of width 4D."""
    experts_per_token: Annotated[int, Unit("experts")] = Field(default=0, ge=0, le=2**16)
    """Number K of routed experts that each token goes to."""
    shared_experts: Annotated[int, Unit("experts")] = Field(default=2, ge=0, le=1024)
    """Shared experts of width D each, computed as one SwiGLU of width `shared_experts`·D; 0 with a GELU
    `shared_mlp`."""
    shared_mlp: Literal["swiglu", "gelu"] = "swiglu"
    """What every token of a mixture passes through besides its routed experts. `swiglu`: the shared experts.
    `gelu`: instead, the MLP of a dense block, of width 4D with biases, so that a mixture can start from a
    dense network."""
    image_size: Annotated[int | None, Unit("pixels or latent cells")] = Field(default=None, ge=1, le=2**14)
    """Side of the network's input in pixels or latent cells; null: from the data's index."""
    channels: Annotated[int | None, Unit("channels")] = Field(default=None, ge=1, le=1024)
    """Channels of the network's input; null: from the data's index."""
    num_classes: Annotated[int | None, Unit("classes")] = Field(default=None, ge=1, le=2**24)
    """Classes, without the null class; null: from the data's index."""
    attention: Literal["plain", "qk_norm"] = "plain"
    """`qk_norm`: per-head LayerNorm with affine on queries and keys, as the published XL and G weights have."""
    timestep_frequencies: Literal["dit", "diffusers"] = "dit"
    """The frequencies ω_i of the timestep's features cos ωt and sin ωt, i = 0 … 127. `dit`: 10000^(−i/128), as
    in DiT, SiT and DiT-MoE. `diffusers`: 10000^(−i/127), as in diffusers' own DiT; only such networks give the
    same images in stock diffusers."""
    learn_sigma: bool = True
    """The network outputs 2·channels; DDPM reads the second half as the variance, rectified flow ignores
    it."""
    label_dropout: Annotated[float, Unit("share")] = Field(default=0.1, ge=0, lt=1)
    """Share of training labels replaced by the null class, for classifier-free guidance."""
    balance: Literal["paper", "published-code"] = "paper"
    """The values of `balance_weight` and `balance_group` if they are left out. `paper`: 0.005, over the global
    batch. `published-code`: 0.01, over 32 images, which stand for the batch of one device."""
    balance_weight: Annotated[float, NO_UNIT] = Field(default=0.005, ge=0)
    """α of the balance loss."""
    balance_group: Annotated[int, Unit("samples")] = Field(default=0, ge=0, le=MOST_IMAGES)
    """Consecutive samples of the global order over which the balance loss takes its means.

    0: the whole global batch, with the experts' shares of the last step that had an update; checkpoints keep
    these shares, and in the first step of a run all are equal. 1: each sample by itself. Other values: any
    divisor of `train.micro_batch`, or the whole global micro-step (`micro_batch` × data ranks), reduced over
    the ranks."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        """Take what is left out from the presets; an unreadable one is left to its own field's check."""
        if not isinstance(values, dict):
            return values
        values = {**BALANCES.get(str(values.get("balance")), {}), **values}
        if values.get("shared_mlp") == "gelu":
            values = {"shared_experts": 0, **values}
        if values.get("preset") is None:
            return values
        try:
            preset = parse_preset(str(values["preset"]))
        except ValueError:
            return values
        return {**vars(preset), **values}

    @field_validator("preset")
    @classmethod
    def _check_preset(cls, preset: str | None) -> str | None:
        if preset is not None:
            parse_preset(preset)
        return preset

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        missing = [name for name in ("depth", "hidden", "heads", "patch") if getattr(self, name) == 0]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be given when there is no preset")
        if self.hidden % self.heads:
            raise ValueError(f"hidden = {self.hidden} must be a multiple of heads = {self.heads}")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} must be between 1 and experts = {self.experts}"
            )
        if self.shared_mlp == "gelu" and (self.shared_experts or not self.experts):
            raise ValueError(
                f"shared_mlp = gelu with shared_experts = {self.shared_experts} and experts = {self.experts}: it"
                " takes the place of the shared experts of a mixture; expected shared_experts = 0, experts >= 1"
            )
        if self.image_size is not None and self.image_size % self.patch:
            raise ValueError(f"image_size = {self.image_size} must be a multiple of patch = {self.patch}")
        if self.image_size is not None and self.image_size // self.patch > MOST_TOKENS_PER_SIDE:
            raise ValueError(
                f"image_size = {self.image_size} must be at most {MOST_TOKENS_PER_SIDE} times patch = {self.patch}"
            )
        return self

    @property
    def complete(self) -> bool:
        """Whether the input's shape and classes are known."""
        return None not in (self.image_size, self.channels, self.num_classes)

    @property
    def published_name(self) -> str | None:
        """The preset, if it says the whole shape; None: fields given beside it differ, or there is none."""
        if self.preset is None:
            return None
        shape = {**vars(parse_preset(self.preset)), "shared_mlp": "swiglu"}
        if self.experts:
            shape["shared_experts"] = 2
        return self.preset if all(getattr(self, name) == value for name, value in shape.items()) else None

    @property
    def has_shared(self) -> bool:
        """Whether all tokens of a mixture go through something besides their experts."""
        return self.shared_experts > 0 or self.shared_mlp == "gelu"

    @property
    def tokens(self) -> int:
        """Tokens T of one image."""
        assert self.image_size is not None
        return (self.image_size // self.patch) ** 2

    @property
    def out_channels(self) -> int:
        """Channels of the network's output."""
        assert self.channels is not None
        return 2 * self.channels if self.learn_sigma else self.channels


class ObjectiveConfig(Settings):
    """What the network is trained to predict."""

    kind: Literal["ddpm", "rectified_flow"] = "rectified_flow"
    """`ddpm`: 1000 steps, ε-prediction with learned-range variance; `rectified_flow`: v = ε − x."""


class EmaConfig(Settings):
    """The exponential moving average of the weights that sampling uses."""

    decay: Annotated[float, Unit("share")] = Field(default=0.9999, ge=0, lt=1)
    """The share of the average that is kept at each step."""
    warmup: bool = True
    """Use min(decay, (1 + n) / (10 + n)) after n steps, so that even a short run forgets its initial
    weights."""
