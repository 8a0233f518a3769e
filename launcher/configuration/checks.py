"""What the sections of a configuration demand of each other, of the processes and of the data.

Every check returns a line for each problem, naming the keys and their values, and all of them run before any
process starts. A check's parameters are named after the sections it reads; it is left out while one of them is
invalid. `processes` is their number where it is known, otherwise None.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from ditmoe.data.shards.index import DatasetIndex
from ditmoe.data.stream.config import DataConfig
from ditmoe.launcher.configuration.sections import LaunchConfig, TrainConfig
from ditmoe.launcher.processes import known_processes
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.parallel.config import CheckpointConfig, OptimConfig, ParallelConfig
from ditmoe.parallel.engine.deepspeed_keys import key_problems
from ditmoe.sampling.settings.config import PreviewConfig

Check = Callable[..., list[str]]


def check_grid(parallel: ParallelConfig, processes: int | None) -> list[str]:
    """The axes fit the number of processes, and the expert axis fits into the data axis."""
    across = parallel.pipe * parallel.tensor
    if processes is not None and processes % across:
        return [
            f"launch.processes = {processes} must be a multiple of parallel.pipe × parallel.tensor"
            f" = {parallel.pipe} × {parallel.tensor}"
        ]
    problems = []
    if processes is not None and parallel.data is not None and parallel.data != processes // across:
        problems.append(
            f"parallel.data = {parallel.data} must be launch.processes / (parallel.pipe × parallel.tensor)"
            f" = {processes} / ({parallel.pipe} × {parallel.tensor}) = {processes // across}; or leave it out"
        )
    data = _data_ranks(parallel, processes)
    if data is not None and data % parallel.expert:
        problems.append(f"parallel.expert = {parallel.expert} must divide the data ranks, parallel.data = {data}")
    return problems


def check_experts(parallel: ParallelConfig, model: ModelConfig) -> list[str]:
    """The experts can be dealt to the expert ranks."""
    if parallel.expert == 1 or (model.experts and model.experts % parallel.expert == 0):
        return []
    if not model.experts:
        return [
            f"parallel.expert = {parallel.expert} with model.experts = 0: a dense network has no experts to"
            " share out; expected parallel.expert = 1"
        ]
    return [f"parallel.expert = {parallel.expert} must divide model.experts = {model.experts}"]


def check_tensor(parallel: ParallelConfig, model: ModelConfig) -> list[str]:
    """Heads can be dealt to the tensor ranks, and with them every width: each is a multiple of `heads`."""
    problems = []
    if model.heads % parallel.tensor:
        valid = ", ".join(str(ranks) for ranks in range(1, model.heads + 1) if model.heads % ranks == 0)
        problems.append(
            f"parallel.tensor = {parallel.tensor} must divide model.heads = {model.heads}; expected one of {valid}"
        )
    if parallel.tensor > 1 and parallel.expert > 1:
        problems.append(
            f"parallel.tensor = {parallel.tensor} with parallel.expert = {parallel.expert}: DeepSpeed's"
            " expert-parallel layers take no tensor ranks; expected parallel.tensor = 1 or parallel.expert = 1"
        )
    return problems


def check_pipeline(parallel: ParallelConfig, model: ModelConfig) -> list[str]:
    """Every stage has a block, and ZeRO shards what goes with stages."""
    if parallel.pipe == 1:
        return []
    problems = []
    if parallel.pipe > model.depth:
        problems.append(
            f"parallel.pipe = {parallel.pipe} must not exceed model.depth = {model.depth}:"
            " each stage holds a block or more"
        )
    if parallel.zero > 1:
        problems.append(
            f"parallel.zero = {parallel.zero} with parallel.pipe = {parallel.pipe}: gradients and weights cannot"
            " be sharded while several micro-batches are on their way; expected parallel.zero = 0 or 1"
        )
    return problems


def check_offload(parallel: ParallelConfig) -> list[str]:
    """What is moved to host memory is what ZeRO shards."""
    if parallel.offload and parallel.zero == 0:
        return [
            "parallel.offload = true with parallel.zero = 0: without ZeRO the optimiser steps the weights"
            " themselves; expected parallel.zero = 1 or more"
        ]
    return []


def check_batch(parallel: ParallelConfig, train: TrainConfig, processes: int | None) -> list[str]:
    """The global batch is made of whole micro-batches on every data rank."""
    data = _data_ranks(parallel, processes)
    if train.micro_batch is None:
        if data is None or train.batch % data == 0:
            return []
        return [f"train.batch = {train.batch} must be a multiple of the data ranks, parallel.data = {data}"]
    if data is None:
        if train.batch % train.micro_batch == 0:
            return []
        return [
            f"train.batch = {train.batch} must be a multiple of train.micro_batch = {train.micro_batch}"
            " × the data ranks"
        ]
    if train.batch % (train.micro_batch * data):
        return [
            f"train.batch = {train.batch} must be a multiple of train.micro_batch × parallel.data"
            f" = {train.micro_batch} × {data} = {train.micro_batch * data}"
        ]
    return []


def check_balance_group(
    model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, processes: int | None
) -> list[str]:
    """The balance loss's means are over the batch, parts of a rank's micro-batch, or the whole micro-step."""
    data = _data_ranks(parallel, processes)
    if not model.experts or not model.balance_group or data is None or check_batch(parallel, train, processes):
        return []
    micro = train.micro_batch or train.batch // data
    if micro % model.balance_group == 0 or model.balance_group == micro * data:
        return []
    return [
        f"model.balance_group = {model.balance_group} must divide train.micro_batch = {micro}, or be the whole"
        f" micro-step, train.micro_batch × parallel.data = {micro * data}, or 0, the whole batch"
    ]


def check_precision(parallel: ParallelConfig, train: TrainConfig) -> list[str]:
    """DeepSpeed's bf16 without ZeRO departs from fp32 far beyond rounding."""
    if train.precision == "bf16" and parallel.zero == 0:
        return [
            "train.precision = bf16 with parallel.zero = 0 does not compute correctly;"
            " expected parallel.zero = 1 or more, or train.precision = fp32"
        ]
    return []


def check_compile(parallel: ParallelConfig, train: TrainConfig) -> list[str]:
    """A compiler meets the weights of a block, and nothing that computes with other ranks."""
    if not train.compile:
        return []
    problems = []
    if parallel.zero == 3:
        problems.append(
            "train.compile = true with parallel.zero = 3: DeepSpeed gathers a layer's weights when it is called,"
            " and a compiled block calls none; expected train.compile = false, or parallel.zero = 2 or less"
        )
    if parallel.tensor > 1:
        problems.append(
            f"train.compile = true with parallel.tensor = {parallel.tensor}: megatron-core's layers send within a"
            " block, which cannot be compiled; expected train.compile = false or parallel.tensor = 1"
        )
    return problems


def check_preview(preview: PreviewConfig, model: ModelConfig) -> list[str]:
    """The preview's guidance fits the model."""
    problems = []
    sampler = preview.sampler
    if sampler.precision != "fp32":
        problems.append(
            f"preview.sampler.precision = {sampler.precision}: a preview is drawn by the network that trains, in"
            " train.precision; expected it left out"
        )
    if sampler.cfg_scale != 1 and model.label_dropout == 0:
        problems.append(
            f"preview.sampler.cfg_scale = {sampler.cfg_scale} needs the null class, which"
            " model.label_dropout = 0 never trains; expected cfg_scale = 1, or label_dropout > 0"
        )
    if None not in (sampler.cfg_channels, model.channels) and sampler.cfg_channels > model.channels:  # type: ignore[operator]
        problems.append(
            f"preview.sampler.cfg_channels = {sampler.cfg_channels} must not exceed"
            f" model.channels = {model.channels}"
        )
    return problems


def check_objective(objective: ObjectiveConfig, model: ModelConfig) -> list[str]:
    """DDPM learns its variance."""
    if objective.kind == "ddpm" and not model.learn_sigma:
        return ["objective.kind = ddpm with model.learn_sigma = false: DDPM learns its variance; expected true"]
    return []


def check_schedule(optim: OptimConfig, train: TrainConfig) -> list[str]:
    """Warm-up and decay fit into the run, one after the other."""
    if optim.warmup_steps + optim.decay_steps > train.steps:
        return [
            f"optim.warmup_steps + optim.decay_steps = {optim.warmup_steps} + {optim.decay_steps} must not exceed"
            f" train.steps = {train.steps}"
        ]
    return []


def check_skip_steps(train: TrainConfig) -> list[str]:
    """The steps to skip are of the run."""
    return [
        f"train.skip_steps.{at} = {step}: expected a step from 1 to train.steps = {train.steps}"
        for at, step in enumerate(train.skip_steps)
        if not 1 <= step <= train.steps
    ]


def check_optimiser(optim: OptimConfig) -> list[str]:
    """AdamW's decays are shares."""
    return [
        f"optim.betas.{at} = {beta}: expected a number >= 0 and < 1"
        for at, beta in enumerate(optim.betas)
        if not 0 <= beta < 1
    ]


def check_best(checkpoint: CheckpointConfig, train: TrainConfig) -> list[str]:
    """Each checkpoint has a record to be judged by."""
    by_loss = checkpoint.keep_best and checkpoint.best_metric == "loss"
    if by_loss and train.log_every > train.checkpoint_every:
        return [
            f"train.log_every = {train.log_every} must be at most train.checkpoint_every ="
            f" {train.checkpoint_every}, for checkpoint.keep_best = {checkpoint.keep_best} goes by recorded losses"
        ]
    return []


def check_deepspeed(deepspeed: dict[str, Any], parallel: ParallelConfig, train: TrainConfig) -> list[str]:
    """The free section has keys that leave the loss curve as it is, and no others."""
    problems = key_problems(deepspeed, parallel.zero, parallel.expert)
    if deepspeed.get("communication_data_type") == "bf16" and train.precision != "bf16":
        problems.append(
            f"deepspeed.communication_data_type = 'bf16' with train.precision = {train.precision} would round the"
            " gradients of fp32; leave it out"
        )
    return problems


CHECKS: tuple[Check, ...] = (
    check_grid,
    check_experts,
    check_tensor,
    check_pipeline,
    check_offload,
    check_batch,
    check_balance_group,
    check_precision,
    check_compile,
    check_objective,
    check_preview,
    check_schedule,
    check_skip_steps,
    check_optimiser,
    check_best,
    check_deepspeed,
)


def layout_problems(sections: Mapping[str, Any], processes: int) -> list[str]:
    """What keeps valid sections from running on a number of processes; one message each."""
    return run_checks({**sections, "processes": processes})


def static_problems(sections: Mapping[str, Any]) -> list[str]:
    """Run every check whose sections are valid, without looking at devices or data.

    Args:
        sections: the valid sections by name.
    """
    launch: LaunchConfig | None = sections.get("launch")
    processes = known_processes(launch.processes, launch.device) if launch is not None else None
    return run_checks({**sections, "processes": processes})


def check_data(data: DataConfig, model: ModelConfig, index: DatasetIndex) -> list[str]:
    """The network's input is what the data are."""
    source = data.sources[0].shown
    problems = [
        f"model.{key} = {getattr(model, key)}, but the data of {source} have {getattr(index, key)};"
        " expected the same, or null"
        for key in ("image_size", "channels", "num_classes")
        if getattr(model, key) not in (None, getattr(index, key))
    ]
    if model.image_size is None and index.image_size % model.patch:
        problems.append(f"model.patch = {model.patch} must divide the image size of {source}, {index.image_size}")
    return problems


def with_input_of(model: ModelConfig, index: DatasetIndex) -> ModelConfig:
    """The network with what it leaves out of its input taken from the data."""
    keys = ("image_size", "channels", "num_classes")
    return model.model_copy(update={key: getattr(model, key) or getattr(index, key) for key in keys})


def run_checks(available: Mapping[str, Any]) -> list[str]:
    """Run the checks whose parameters are all available."""
    problems = []
    for check in CHECKS:
        names = _sections_of(check)
        if all(name in available for name in names):
            problems += check(**{name: available[name] for name in names})
    return problems


@cache
def _sections_of(check: Check) -> tuple[str, ...]:
    """Names of a check's parameters."""
    return tuple(inspect.signature(check).parameters)


def _data_ranks(parallel: ParallelConfig, processes: int | None) -> int | None:
    """Data ranks, where they are known: not where `check_grid` refuses them."""
    if processes is None:
        return parallel.data
    ranks, rest = divmod(processes, parallel.pipe * parallel.tensor)
    return None if rest else ranks
