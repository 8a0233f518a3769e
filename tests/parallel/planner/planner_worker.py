"""Measures real training engines for the planner's tests: `python planner_worker.py CASES.json OUT.json`.

Per case and rank: bytes of the training state, of unique storages, and the payloads of all collectives of a step.
"""

import gc
import json
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor

from ditmoe.model import randomness
from ditmoe.model.config import EmaConfig, ModelConfig, ObjectiveConfig
from ditmoe.model.dit import Block, DiT
from ditmoe.model.experts.moe import MoE
from ditmoe.model.objective import make_objective
from ditmoe.parallel import processes
from ditmoe.parallel.config import OptimConfig
from ditmoe.parallel.engine.passes import MicroBatch
from ditmoe.parallel.engine.step_totals import StepTotals
from ditmoe.parallel.engine.training_engine import TrainingEngine
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.expert_layer import PlannedExpertLayer, Routing
from ditmoe.parallel.planner.ledger import Ledger
from ditmoe.parallel.stages import stage_blocks
from ditmoe.parallel.start.fresh import Fresh
from tests.parallel.batches import micro_batches
from tests.parallel.between_cases import end_groups

CPU = torch.device("cpu")
STEPS = 3
"""The last one is measured: ZeRO 3 learns in the first two in which order weights are used."""


def bytes_of(tensors: Iterable[Any]) -> int:
    """Of the storages behind some tensors, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def make_engine(case: dict[str, Any]) -> TrainingEngine:
    config, layout = ModelConfig.model_validate(case["model"]), Layout(**case["layout"])
    network = DiT(config, stage_blocks(config, layout.pipe)[layout.stage(dist.get_rank())])
    network.checkpoint_blocks = case["recompute"]
    return TrainingEngine(
        network,
        make_objective(ObjectiveConfig()),
        layout,
        OptimConfig(clip=case["clip"]),
        EmaConfig(),
        case["precision"],
        case["extra"],
        torch.device("cpu"),
        Fresh(0),
    )


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps; the state before the last optimiser step, and the collectives of a whole step."""
    engine = make_engine(case)
    for step in range(STEPS):
        ledger = Ledger()
        with ledger:
            engine.train_step(micro_batches(engine, step, ObjectiveConfig(), CPU), lr=1e-4, stop_requested=False)
    weights, optimizer = weights_of(engine), optimizer_of(engine)
    gradients = gradients_of(engine, micro_batches(engine, STEPS, ObjectiveConfig(), CPU))
    compared = compare_layers(engine) if engine.layout.expert > 1 and engine.layout.zero < 3 else None
    result = {
        "layers": compared,
        "sent": dict(ledger.sent),
        "weights": bytes_of(weights),
        "gradients": gradients,
        "optimizer": bytes_of(optimizer),
        "ema": bytes_of(engine.ema),
    }
    engine.close()
    return result


def weights_of(engine: TrainingEngine) -> list[Any]:
    parameters = list(engine._network.parameters())
    return [p.data for p in parameters] + [getattr(p, "ds_tensor", None) for p in parameters]


def optimizer_of(engine: TrainingEngine) -> list[Any]:
    optimizer, states = engine._engine.optimizer, engine._engine.basic_optimizer.state.values()
    flat = [*getattr(optimizer, "single_partition_of_fp32_groups", [])]
    flat += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    weights = {parameter.untyped_storage().data_ptr() for parameter in engine._network.parameters()}
    own = [tensor for tensor in flat if tensor.untyped_storage().data_ptr() not in weights]
    return [tensor for state in states for tensor in state.values()] + own


def gradients_of(engine: TrainingEngine, batches: list[MicroBatch]) -> int:
    """The most that gradients hold: with ZeRO 1 before they are averaged, otherwise after the last pass."""
    optimizer, parameters = engine._engine.optimizer, list(engine._network.parameters())
    before = 0
    if engine.layout.zero == 1:
        reduce = optimizer.reduce_gradients

        def watched(*arguments: Any, **options: Any) -> None:
            nonlocal before
            before = bytes_of(parameter.grad for parameter in parameters)
            reduce(*arguments, **options)

        optimizer.reduce_gradients = watched
    config = engine._network.config
    totals = StepTotals(config.depth if config.experts else 0, config.experts, torch.device("cpu"))
    engine._passes.forward_backward(batches, totals)
    kept = [t for lists in getattr(optimizer, "averaged_gradients", {}).values() for t in lists or []]
    kept += [getattr(optimizer, "grad_partitions_flat_buffer", None)]
    return max(before, bytes_of([*kept, *(parameter.grad for parameter in parameters)]))


def compare_layers(engine: TrainingEngine) -> list[dict[str, Any]]:
    """One pass through DeepSpeed's expert-parallel layer, and one through the dry run's with the same routing."""
    config, layout = engine._network.config, engine.layout
    theirs = next(m for m in engine._network.modules() if isinstance(m, AutoEPMoELayer))
    dtype = theirs.router.gate.weight.dtype
    x_BTD = randomness.normal(dist.get_rank(), "tokens", [0, 1], (config.tokens, config.hidden)).to(dtype)
    seen: list[Tensor] = []
    hook = theirs.router.register_forward_hook(lambda _module, _inputs, output: seen.append(output[2]))
    first = pass_through(theirs, x_BTD)
    hook.remove()
    to_ranks = [counts.view(layout.expert, -1).sum(1).tolist() for counts in processes.gather_objects(seen[0])]
    group, rank = layout.expert_ranks(dist.get_rank()), layout.expert_rank(dist.get_rank())
    planned = Routing(tuple(to_ranks[dist.get_rank()]), tuple(to_ranks[other][rank] for other in group))
    block = Block(config)
    assert isinstance(block.moe, MoE)
    ours = PlannedExpertLayer(block.moe.to(dtype), layout.expert, planned, theirs.ep_group, fused=False).to(dtype)
    shapes = [sorted(tuple(p.shape) for p in layer.parameters()) for layer in (theirs, ours)]
    assert shapes[0] == shapes[1]
    return [first, pass_through(ours, x_BTD)]


def pass_through(layer: torch.nn.Module, x_BTD: Tensor) -> dict[str, Any]:
    """What a forward and a backward pass of a layer keep, hold at most and send."""
    x_BTD = x_BTD.clone().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    ledger = Ledger([x_BTD, *layer.parameters(), *layer.buffers()])
    with ledger:
        before = ledger.held
        out_BTD = layer(x_BTD)
        kept = settled(ledger) - before
        torch.autograd.backward(out_BTD, torch.ones_like(out_BTD))
    return {"kept": kept, "sent": dict(ledger.sent), "calls": dict(ledger.calls)}


def settled(ledger: Ledger) -> int:
    """What is still held when gloo's threads have let go of the last collective's tensors, some time after it."""
    gc.collect()
    least = ledger.held
    for _ in range(30):
        time.sleep(0.02)
        least = min(least, ledger.held)
    return least


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    processes.join(torch.device("cpu"))
    results = []
    for case in cases:
        results.append(processes.gather_objects(measure(case)))
        end_groups()
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    processes.leave()


if __name__ == "__main__":
    main()
