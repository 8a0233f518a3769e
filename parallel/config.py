"""Configuration of the layout (`parallel`), the optimiser (`optim`) and checkpoints (`checkpoint`)."""

from typing import Literal

from pydantic import Field

from ditmoe.model.settings import Settings


class ParallelConfig(Settings):
    """The rank grid, and what of the training state is sharded over it."""

    pipe: int = Field(default=1, ge=1)
    """Pipeline stages, balanced by cost; at most `model.depth`. With several, `zero` is 0 or 1."""
    tensor: int = Field(default=1, ge=1, le=1)
    """Tensor-parallel ranks. One for now."""
    expert: int = Field(default=1, ge=1)
    """Ranks that the experts of each block are dealt to; divides `data` and `model.experts`."""
    data: int | None = Field(default=None, ge=1)
    """Data-parallel ranks; null: all processes. Expert ranks subdivide them."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 0 nothing, 1 optimiser, 2 + gradients, 3 + weights are sharded over data ranks."""
    offload: bool = False
    """Keep the optimiser's state and the EMA in host memory, and step there; needs `zero` 1 or more."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""


class OptimConfig(Settings):
    """AdamW, with linear warm-up to a constant learning rate."""

    lr: float = Field(default=1e-4, gt=0)
    """Learning rate after warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from lr / warmup_steps."""
    decay_steps: int = Field(default=0, ge=0)
    """Last steps of the run over which the learning rate falls linearly to zero; 0: constant. They end at
    `train.steps`, so a run that is resumed with more steps goes back to the full rate until then."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moments."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's ε."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the global gradient; null: no clipping."""


class CheckpointConfig(Settings):
    """Which checkpoints are kept."""

    keep_last: int = Field(default=2, ge=1)
    """The newest ones."""
    keep_every: int | None = Field(default=None, ge=1)
    """Every checkpoint whose step is a multiple of this is kept too."""
