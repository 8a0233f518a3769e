"""Runs training engines on a tiny network in every process of a group: `worker.py CASES.json OUT.json DEVICE`.

Each case is a layout and settings; per case, rank 0 writes the curve of losses, balance losses and gradient norms.
The device is `cpu`, `gpu`, or `pretended`: a CPU that shows itself as a GPU (`tests/pretend`).
"""

import hashlib
import json
import os
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from batches import CLASSES, SHAPE, micro_batches
from between_cases import end_groups

from ditmoe.model import randomness
from ditmoe.model.compiling.blocks import compiled_blocks
from ditmoe.model.config import EmaConfig, ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.experts import paths
from ditmoe.model.initialise import initial_value
from ditmoe.model.objective import make_objective
from ditmoe.parallel import processes
from ditmoe.parallel.checkpoint.saver import CheckpointSaver
from ditmoe.parallel.checkpoint.training_state import load_training_state
from ditmoe.parallel.config import CheckpointConfig, OptimConfig
from ditmoe.parallel.engine import deepspeed_engine, fragments, training_engine
from ditmoe.parallel.engine.fragments import Fragment
from ditmoe.parallel.engine.initial import Initial, WholeValues
from ditmoe.parallel.engine.passes import MicroBatch
from ditmoe.parallel.engine.training_engine import NonFiniteLossError, TrainingEngine
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.stages import stage_blocks
from ditmoe.parallel.start.begin import begun
from ditmoe.parallel.start.fresh import Fresh
from ditmoe.parallel.start.source import Start

DEFAULTS: dict[str, Any] = {
    "objective": "rectified_flow",
    "pipe": 1,
    "depth": 3,
    "expert": 1,
    "tensor": 1,
    "zero": 1,
    "batch": 8,
    "micro_batch": 2,
    "steps": 20,
    "clip": None,
    "precision": "fp32",
    "checkpointing": False,
    "compile": False,
    "balance_group": 1,
    "experts": 4,
    "attention": "plain",
    "starved": False,
    "awake": True,
    "offload": False,
    "deepspeed": {},
    "fault": None,
    "save": None,
    "save_at": None,
    "load": None,
    "skip": 0,
    "start_from": None,
    "model": {},
    "waits": None,
    "copies": False,
    "poison": None,
}

LAUNCHED: Counter[str] = Counter()
"""Kernels of Triton's that a pretended GPU was given, and how often."""


def make_config(case: dict[str, Any]) -> ModelConfig:
    """The tiny network of a case."""
    shape = {
        "depth": case["depth"],
        "hidden": 32,
        "heads": 4,
        "patch": 2,
        "experts": case["experts"],
        "experts_per_token": 2 if case["experts"] else 0,
        "image_size": 8,
        "channels": 1,
        "num_classes": CLASSES,
        "balance_weight": 0.05,
        "balance_group": case["balance_group"],
        "attention": case["attention"],
    }
    return ModelConfig(**{**shape, **case["model"]})


def make_engine(case: dict[str, Any], device: torch.device) -> TrainingEngine:
    """The engine of a case, with weights that depend on the seed alone."""
    data = dist.get_world_size() // (case["pipe"] * case["tensor"])
    layout = Layout(
        pipe=case["pipe"],
        data=data,
        expert=case["expert"],
        tensor=case["tensor"],
        zero=case["zero"],
        micro_batch=case["micro_batch"],
        accumulation=case["batch"] // (case["micro_batch"] * data),
        offload=case["offload"],
    )
    config = make_config(case)
    with torch.device("meta"):
        network = DiT(config, stage_blocks(config, layout.pipe)[layout.stage(dist.get_rank())])
    network.checkpoint_blocks = case["checkpointing"]
    if case["compile"]:
        network.compute_block = compiled_blocks(with_gradients=True)
    objective = ObjectiveConfig(kind=case["objective"])
    start = case["start_from"] and Start(Path(case["start_from"]), None, None, config, objective)
    with begun(Path(case["load"] or "no run"), start, seed=0) as beginning:
        fresh = start is None and beginning.initial is not None
        engine = TrainingEngine(
            network,
            make_objective(objective),
            layout,
            OptimConfig(lr=1.0, clip=case["clip"]),  # each step names its own
            EmaConfig(),
            case["precision"],
            case["deepspeed"],
            device,
            initial_of(case) if fresh else beginning.initial,
        )
    if case["compile"]:
        compiled_blocks(with_gradients=True).prepare(network, layout.micro_batch)
    return engine


def all_compiled(case: dict[str, Any]) -> AbstractContextManager[None]:
    """Fail where a case with compiled blocks compiles anything beside what was prepared."""
    if not case["compile"]:
        return nullcontext()
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(error_on_recompile=True)
    return patched


def initial_of(case: dict[str, Any]) -> Initial:
    """The weights that a case starts from."""
    if case["starved"]:
        return WholeValues(starved_value)
    return WholeValues(awake_value) if case["awake"] else Fresh(0)


def starved_value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Let every router favour the first two experts or the last two, and nothing in between."""
    value = initial_value(name, shape, seed=0)
    if name.endswith(".gate.weight"):
        slope_N = torch.linspace(-1, 1, len(value))
        value = 100 * slope_N[:, None] * value[0]
    return value


def awake_value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Open the gates of the blocks, which start at zero: otherwise hardly a gradient reaches what is inside."""
    if "adaLN_modulation" in name or name.startswith("final_layer."):
        return 0.05 * randomness.normal(2, name, [0], shape)[0]
    return initial_value(name, shape, seed=0)


def run(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Train a case; what is compared between layouts, or the message of an engine that refuses."""
    try:
        with FAULTS[case["fault"]]():
            engine = make_engine(case, device)
    except UserError as error:
        return {"error": str(error)}
    if case["load"]:
        info, skipped = load_training_state(Path(case["load"]), engine)
        assert info is not None and not skipped, skipped
        engine.keep_load(torch.tensor(info.sums["expert_load"], dtype=torch.float64))
    for _ in range(case["skip"]):
        engine.skip_step(stop_requested=False)
    try:
        with all_compiled(case), LateSaver(Path(case["save"] or ""), CheckpointConfig()) as saver:
            result = train(engine, saver, case, device)
        if case["waits"]:
            result["waits"] = waits_of_a_step(engine, case, device)
        if case["copies"]:
            result["copies"] = copies_of_a_step(engine, case, device)
        if case["poison"]:
            result["poison"] = poisoned_steps(engine, case, device)
    except UserError as error:
        result = {"error": str(error)}
    engine.close()
    return result


@contextmanager
def exchanged_names() -> Iterator[None]:
    """On rank 0: find two biases of one shape, which both start as zeros, under each other's names."""

    def find(*arguments: Any) -> list[Fragment]:
        found = fragments.find_fragments(*arguments)
        if dist.get_rank() == 0:
            numbers = [at for at, each in enumerate(found) if each.name.endswith("proj.bias")]
            first, second = next(
                (a, b)
                for a, b in combinations(numbers, 2)
                if found[a].weight.equal(found[b].weight) and found[a].shape == found[b].shape
            )
            names = found[first].name, found[second].name
            found[first] = replace(found[first], name=names[1])
            found[second] = replace(found[second], name=names[0])
        return found

    with patch.object(training_engine, "find_fragments", find):
        yield


@contextmanager
def doubled_gradient() -> Iterator[None]:
    """Let AdamW step with twice the gradient of one parameter."""

    def start(*arguments: Any) -> Any:
        engine = deepspeed_engine.start_deepspeed(*arguments)

        def double(*_: Any) -> None:
            for found in engine.found:
                gradient = found.gradient()
                if found.name == "blocks.1.attn.proj.weight" and gradient is not None:
                    gradient *= 2

        engine.basic_optimizer.register_step_pre_hook(double)
        return engine

    def find(engine: Any, *arguments: Any) -> list[Fragment]:
        engine.found = fragments.find_fragments(engine, *arguments)
        return engine.found  # type: ignore[no-any-return]

    with (
        patch.object(training_engine, "start_deepspeed", start),
        patch.object(training_engine, "find_fragments", find),
    ):
        yield


@contextmanager
def infinite_gradient() -> Iterator[None]:
    """Let one gradient be infinite on the last rank, while the loss is finite."""

    def start(passes: Any, *arguments: Any) -> Any:
        engine = deepspeed_engine.start_deepspeed(passes, *arguments)
        if dist.get_rank() == dist.get_world_size() - 1:
            last = list(passes.network.parameters())[-1]
            last.register_hook(lambda gradient: gradient / 0)
        return engine

    with patch.object(training_engine, "start_deepspeed", start):
        yield


FAULTS: dict[str | None, Callable[[], AbstractContextManager[None]]] = {
    None: nullcontext,
    "exchanged names": exchanged_names,
    "doubled gradient": doubled_gradient,
    "infinite gradient": infinite_gradient,
}
"""What a case may do to an engine while it is made."""


class LateSaver(CheckpointSaver):
    """Writes what it has copied no earlier than `trained` is set: training must not wait for it."""

    trained = threading.Event()

    def _write(self, *arguments: Any) -> None:
        assert self.trained.wait(60), "training waits for the save"
        super()._write(*arguments)


def train(engine: TrainingEngine, saver: LateSaver, case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Step, and save at a step in the middle or at the end."""
    curve, load = [], []
    LAUNCHED.clear()
    saver.trained.clear()
    for step in range(engine.step, case["steps"]):
        lr = 1e-3 * min(1.0, (step + 1) / 5)
        result = engine.train_step(
            micro_batches(engine, step, ObjectiveConfig(kind=case["objective"]), device),
            lr=lr,
            stop_requested=False,
        )
        curve.append([result.loss, result.balance_loss, result.grad_norm])
        load.append(result.load_LN.tolist())
        if engine.step == case["save_at"]:
            save(saver, engine, case)
    with engine.ema_weights() as network, torch.no_grad():
        x_BCHW = torch.linspace(-1, 1, 128, device=device).view(2, *SHAPE)
        timestep_B = torch.full((2,), 0.5, device=device)
        ema = network(x_BCHW, timestep_B, torch.tensor([1, 2], device=device)).double().square().sum().item()
    saver.trained.set()
    if case["save"] and not case["save_at"]:
        save(saver, engine, case)
    owned = sum(fragment.weight.numel() for fragment in engine.fragments)
    return {
        "curve": curve,
        "load": load,
        "ema": ema,
        "owned": owned,
        "alike": tensor_ranks_alike(engine),
        "compiler": "torch._inductor.compile_fx" in sys.modules,
        "kernels": dict(LAUNCHED),
    }


def batches_of(engine: TrainingEngine, case: dict[str, Any], device: torch.device) -> list[MicroBatch]:
    """The samples of the next step."""
    return micro_batches(engine, engine.step, ObjectiveConfig(kind=case["objective"]), device)


def waits_of_a_step(engine: TrainingEngine, case: dict[str, Any], device: torch.device) -> dict[str, int]:
    """Places where the host waits for a device in a step, whose experts are computed in the way that is named."""
    if device.type == "cuda":
        return waits_told_by_cuda(engine, case, device)
    from tests.host_waits import HostWaits  # not on the path of a process that is started by its file

    engine.train_step(batches_of(engine, case, device), 1e-3, False)  # gradients are no longer checked
    batches, waits = batches_of(engine, case, device), HostWaits()
    with patch.object(paths, "expert_path", lambda *_: case["waits"]), waits:
        under_way = engine.start_step(batches, 1e-3, False)
    under_way.result()
    return dict(waits.places)


def copies_of_a_step(engine: TrainingEngine, case: dict[str, Any], device: torch.device) -> float:
    """Numbers that DeepSpeed and our update copy in a step, for each number that is trained."""
    from tests.copies import Copies  # not on the path of a process that is started by its file

    engine.train_step(batches_of(engine, case, device), 1e-3, False)  # gradients are no longer checked
    batches, copies = batches_of(engine, case, device), Copies("/deepspeed/", "parallel/engine/update.py")
    with copies:
        engine.train_step(batches, 1e-3, False)
    return copies.numbers / sum(fragment.weight.numel() for fragment in engine.fragments)


def waits_told_by_cuda(engine: TrainingEngine, case: dict[str, Any], device: torch.device) -> dict[str, int]:
    """The same on a GPU, as torch warns of them."""
    for _ in range(2):  # kernels are made in the first
        engine.train_step(batches_of(engine, case, device), 1e-3, False)
    batches = batches_of(engine, case, device)
    torch.cuda.synchronize()
    stops: Counter[str] = Counter()

    def counted(name: str, stop: Callable[..., None]) -> Callable[..., None]:
        """What a program asks for: of that torch does not warn."""

        def stopping(*arguments: Any) -> None:
            stops[f"{name}, from {'; '.join(map(str, traceback.extract_stack(limit=4)[:-1]))}"] += 1
            stop(*arguments)

        return stopping

    with (
        warnings.catch_warnings(record=True) as caught,
        patch.object(torch.cuda, "synchronize", counted("synchronize", torch.cuda.synchronize)),
        patch.object(torch.cuda.Stream, "synchronize", counted("Stream", torch.cuda.Stream.synchronize)),
    ):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            under_way = engine.start_step(batches, 1e-3, False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    under_way.result()
    told = [each for each in caught if "synchroniz" in str(each.message)]
    return dict(stops + Counter(f"{each.filename}:{each.lineno} {each.message}" for each in told))


def poisoned_steps(engine: TrainingEngine, case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A step that is not finite and one after it, started one after the other, and one that is as it should be."""

    def state() -> list[torch.Tensor]:
        adam = [value for each in engine._engine.basic_optimizer.state.values() for value in each.values()]
        return [tensor.clone() for tensor in (*adam, *engine.ema, *(f.weight for f in engine.fragments))]

    before, step = state(), engine.step
    bad = batches_of(engine, case, device)
    if case["poison"] == "loss":
        bad = [replace(batch, x_BCHW=batch.x_BCHW * torch.nan) for batch in bad]
    handles = [
        parameter.register_hook(lambda gradient: gradient / 0)  # type: ignore[no-untyped-call]
        for parameter in list(engine._network.parameters())[-1:]
        if case["poison"] == "gradient"
    ]
    first = engine.start_step(bad, 1e-3, False)
    for handle in handles:
        handle.remove()
    engine.start_step(batches_of(engine, case, device), 1e-3, False)
    told = ""
    try:
        told = str(first.result().grad_norm)
    except NonFiniteLossError as error:
        told = str(error)
    kept = [old.equal(new) for old, new in zip(before, state(), strict=True)]
    result = engine.train_step(batches_of(engine, case, device), 1e-3, False)
    changed = [not old.equal(new) for old, new in zip(before, state(), strict=True)]
    return {
        "told": told,
        "kept": all(kept),
        "steps": [step, engine.step],
        "after": [result.loss, result.grad_norm],
        "changed": sum(changed) / len(changed),
    }


def tensor_ranks_alike(engine: TrainingEngine) -> bool:
    """Whether what is not shared out over tensor ranks has the same bits on all of them."""
    whole = [fragment.weight.cpu().numpy().tobytes() for fragment in engine.fragments if not fragment.placement]
    digests = processes.gather_objects(hashlib.sha256(b"".join(whole)).hexdigest())
    tensor = engine.layout.tensor
    return all(digest == digests[rank // tensor * tensor] for rank, digest in enumerate(digests))


def save(saver: CheckpointSaver, engine: TrainingEngine, case: dict[str, Any]) -> None:
    config = {"model": make_config(case).model_dump(), "objective": {"kind": case["objective"]}}
    sums = {} if engine.load_LN is None else {"expert_load": engine.load_LN.tolist()}  # None before the first step
    saver.save(engine, engine.step * case["batch"], sums, config, {"name": "test"})


@contextmanager
def own_device(kind: str) -> Iterator[torch.device]:
    """The device of this rank."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if kind == "gpu":
        torch.backends.cudnn.allow_tf32 = False  # products of matrices are not rounded to it by default
        yield torch.device("cuda", local_rank)
    elif kind == "pretended":
        from tests.pretend.gpu import deepspeed_on_it, pretended_gpu
        from tests.pretend.kernels import pretended_triton

        with (
            pretended_gpu(local_rank, int(os.environ["WORLD_SIZE"])) as gpu,
            deepspeed_on_it(),
            pretended_triton(gpu.memory, LAUNCHED),
        ):
            yield gpu.device
    else:
        yield torch.device("cpu")


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    with own_device(sys.argv[3]) as device:
        processes.join(device)
        results = []
        for case in cases:
            results.append(run({**DEFAULTS, **case}, device))
            end_groups()
        if dist.get_rank() == 0:
            Path(sys.argv[2]).write_text(json.dumps(results))
        processes.leave()


if __name__ == "__main__":
    main()
