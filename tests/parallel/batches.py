"""For the workers: the samples of a step, which are functions of their positions, so the same on every layout."""

import torch
import torch.distributed as dist

from ditmoe.model import randomness
from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.objective import make_objective
from ditmoe.parallel.engine.passes import MicroBatch
from ditmoe.parallel.engine.training_engine import TrainingEngine

CLASSES = 10
SHAPE = (1, 8, 8)


def micro_batches(
    engine: TrainingEngine, step: int, objective: ObjectiveConfig, device: torch.device
) -> list[MicroBatch]:
    """This rank's part of a step's global batch."""
    layout, rank = engine.layout, engine.layout.data_rank(dist.get_rank())
    batches = []
    for micro_step in range(layout.accumulation):
        first = step * layout.batch + (micro_step * layout.data + rank) * layout.micro_batch
        positions = list(range(first, first + layout.micro_batch))
        draws = make_objective(objective).draw(0, positions, SHAPE, label_dropout=0.1)
        label_B = torch.where(draws.drop_B, CLASSES, torch.tensor([p % CLASSES for p in positions]))
        x_BCHW = randomness.normal(1, "image", positions, SHAPE).clamp(-1, 1)
        batches.append(MicroBatch(x_BCHW.to(device), label_B.to(device), draws.to(device)))
    return batches
