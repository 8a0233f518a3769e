"""Configuration of the layout (`parallel`), the optimiser (`optim`) and checkpoints (`checkpoint`)."""

from typing import Annotated, Final, Literal

from pydantic import Field

from ditmoe.model.settings import MOST_STEPS, NO_UNIT, Settings, Unit

MOST_PROCESSES: Final = 2**20
"""Of a run, on all its machines."""


class ParallelConfig(Settings):
    """The grid of ranks, and which parts of the training state are sharded over it."""

    pipe: Annotated[int, Unit("stages")] = Field(default=1, ge=1, le=MOST_PROCESSES)
    """Pipeline stages, balanced by cost; at most `model.depth`. More than one needs `zero` 0 or 1."""
    tensor: Annotated[int, Unit("ranks")] = Field(default=1, ge=1, le=MOST_PROCESSES)
    """Tensor-parallel ranks: they divide the heads of attention and the width of MLPs and experts among them,
    and read the same samples. Must divide `model.heads`; needs `expert` = 1."""
    expert: Annotated[int, Unit("ranks")] = Field(default=1, ge=1, le=MOST_PROCESSES)
    """Ranks among which the experts of each block are divided; must divide `data` and `model.experts`."""
    data: Annotated[int | None, Unit("ranks")] = Field(default=None, ge=1, le=MOST_PROCESSES)
    """Data-parallel ranks; null: all processes. Expert ranks subdivide them."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage. What is sharded over data ranks: 0 nothing, 1 the optimiser, 2 also gradients, 3 also
    weights."""
    offload: bool = False
    """Keep the optimiser's state and the EMA in host memory, and step there; needs `zero` 1 or more."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""


class OptimConfig(Settings):
    """AdamW, with linear warm-up to a constant learning rate."""

    lr: Annotated[float, Unit("learning rate")] = Field(default=1e-4, gt=0)
    """The learning rate after warm-up."""
    warmup_steps: Annotated[int, Unit("optimiser steps")] = Field(default=0, ge=0, le=MOST_STEPS)
    """Steps over which the learning rate rises linearly from lr / warmup_steps."""
    decay_steps: Annotated[int, Unit("optimiser steps")] = Field(default=0, ge=0, le=MOST_STEPS)
    """The last steps of the run, over which the learning rate falls linearly to zero; 0: it stays constant.
    They end at `train.steps`, so a run that is resumed with more steps returns to the full rate until its new
    last steps."""
    betas: Annotated[tuple[float, float], Unit("share")] = (0.9, 0.999)
    """Decay of AdamW's first and second moments."""
    eps: Annotated[float, NO_UNIT] = Field(default=1e-8, gt=0)
    """AdamW's ε."""
    weight_decay: Annotated[float, NO_UNIT] = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    clip: Annotated[float | None, Unit("norm of the gradient")] = Field(default=None, gt=0)
    """Largest norm of the global gradient; null: no clipping."""

    def learning_rate(self, step: int, steps: int) -> float:
        """Of a step (from 1) of a run of `steps`: linear warm-up, constant, linear decay."""
        rate = self.lr
        if step <= self.warmup_steps:
            rate *= step / self.warmup_steps
        if step > steps - self.decay_steps:
            rate *= (steps - step + 1) / self.decay_steps
        return rate


class CheckpointConfig(Settings):
    """How checkpoints are written, and which are kept: a checkpoint stays if any of the keys below selects it."""

    asynchronous: bool = True
    """Training waits only until the state is copied to host memory; the copy is written while training goes
    on. It takes 16 bytes for each parameter that a rank owns, until it is written (on GPUs: pinned memory,
    kept to the end of the run). false: training waits for the disk, and there is no copy."""
    keep_last: Annotated[int, Unit("checkpoints")] = Field(default=2, ge=1, le=MOST_STEPS)
    """The newest ones."""
    keep_every: Annotated[int | None, Unit("optimiser steps")] = Field(default=None, ge=1, le=MOST_STEPS)
    """Every checkpoint whose step is a multiple of this is kept too."""
    keep_best: Annotated[int, Unit("checkpoints")] = Field(default=0, ge=0, le=MOST_STEPS)
    """This many of the best checkpoints by `best_metric` are kept too; 0: none."""
    best_metric: Literal["loss", "fid", "sfid", "kid", "precision", "recall", "inception_score"] = "loss"
    """`loss`: the mean over the records of the last `train.checkpoint_every` steps; lower is better. The
    others are figures of `ditmoe evaluate RUN`: lower is better for FID, sFID and KID, higher for the rest. A
    checkpoint without the figure cannot be among the best, and only evaluations with the settings of the
    latest one are compared."""
