"""Checks across sections name the keys and both values; what follows from data and processes is filled in."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ditmoe.data.shards.index import DatasetIndex, load_index
from ditmoe.launcher.configuration.resolve import layout_of, resolve
from ditmoe.launcher.configuration.run_config import load_config
from ditmoe.launcher.processes import known_processes, process_count
from ditmoe.model.errors import UserError
from ditmoe.parallel.layout import Layout

Write = Callable[..., Path]


@pytest.fixture
def index(shards: Path) -> DatasetIndex:
    return load_index(shards)


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["parallel.data=4"], ["parallel.data = 4", "2 / (1 × 1) = 2"]),
        (["parallel.pipe=3", "launch.processes=6", "train.batch=24"], ["parallel.pipe = 3", "model.depth = 2"]),
        (
            ["parallel.pipe=2", "parallel.expert=1", "parallel.zero=2"],
            ["parallel.zero = 2", "parallel.pipe = 2", "0 or 1"],
        ),
        (
            ["parallel.offload=true", "parallel.zero=0"],
            ["parallel.offload = true", "parallel.zero = 0", "1 or more"],
        ),
        (["parallel.expert=4"], ["parallel.expert = 4", "parallel.data = 2"]),
        (
            ["launch.processes=3", "parallel.expert=3", "train.batch=12"],
            ["parallel.expert = 3", "model.experts = 4"],
        ),
        (["model.experts=0", "model.experts_per_token=0"], ["parallel.expert = 2", "model.experts = 0"]),
        (
            ["launch.processes=4", "parallel.tensor=2"],
            ["parallel.tensor = 2", "parallel.expert = 2", "expected parallel.tensor = 1 or parallel.expert = 1"],
        ),
        (
            ["launch.processes=3", "parallel.expert=1", "parallel.tensor=3"],
            ["parallel.tensor = 3", "model.heads = 2", "one of 1, 2"],
        ),
        (
            ["parallel.pipe=2", "launch.processes=1"],
            ["launch.processes = 1", "parallel.pipe × parallel.tensor = 2 × 1"],
        ),
        (["train.batch=20"], ["train.batch = 20", "4 × 2 = 8"]),
        (["train.batch=15", "train.micro_batch=null"], ["train.batch = 15", "parallel.data = 2"]),
        (["train.precision=bf16", "parallel.zero=0"], ["train.precision = bf16", "parallel.zero = 0"]),
        (["model.balance_group=3"], ["model.balance_group = 3", "train.micro_batch = 4", "= 8"]),
        (["objective.kind=ddpm", "model.learn_sigma=false"], ["objective.kind = ddpm", "learn_sigma = false"]),
        (
            ["model.label_dropout=0", "preview.sampler.cfg_scale=2"],
            ["cfg_scale = 2", "model.label_dropout = 0"],
        ),
        (["preview.sampler.precision=bf16"], ["preview.sampler.precision = bf16", "train.precision"]),
        (
            ["optim.warmup_steps=15", "optim.decay_steps=10"],
            ["optim.warmup_steps + optim.decay_steps = 15 + 10", "train.steps = 20"],
        ),
        (
            ["model.channels=1", "preview.sampler.cfg_channels=3"],
            ["cfg_channels = 3", "model.channels = 1"],
        ),
        (
            ["checkpoint.keep_best=1", "train.log_every=10", "train.checkpoint_every=5"],
            ["train.log_every = 10", "train.checkpoint_every = 5", "checkpoint.keep_best = 1"],
        ),
        (["train.skip_steps=[3, 0]"], ["train.skip_steps.1 = 0", "from 1 to train.steps = 20"]),
        (["deepspeed.train_batch_size=4"], ["deepspeed.train_batch_size", "train.batch"]),
        (["deepspeed.zero_optimization.stage=2"], ["zero_optimization.stage", "parallel.zero"]),
        (
            ["deepspeed.zero_optimization.offload_optimizer={device: cpu}"],
            ["zero_optimization.offload_optimizer", "parallel.offload"],
        ),
        (["deepspeed.gradient_clipping=1"], ["deepspeed.gradient_clipping", "optim.clip"]),
        (["deepspeed.optimizer={type: SGD}"], ["deepspeed.optimizer", "optim"]),
        (["deepspeed.zero_optimization.cpu_offload=true"], ["cpu_offload", "parallel.offload"]),
        (["deepspeed.zero_optimization=3"], ["zero_optimization = 3 must be a mapping"]),
        (
            ["deepspeed.zero_optimization={reduce_bucket_sise: 5}"],
            [
                "reduce_bucket_sise = 5 may not be set",
                "did you mean deepspeed.zero_optimization.reduce_bucket_size?",
            ],
        ),
        (
            ["deepspeed.reduce_bucket_size=5"],
            ["deepspeed.reduce_bucket_size", "did you mean deepspeed.zero_optimization.reduce_bucket_size?"],
        ),
        (
            ["deepspeed.zero_optimization.max_live_parameters=5", "parallel.zero=3"],
            ["may not be set", "did you mean deepspeed.zero_optimization.stage3_max_live_parameters?"],
        ),
        (
            ["deepspeed.gradient_allreduce_op=sum"],
            ["gradient_allreduce_op = 'sum' may not be set", "docs/training.md"],
        ),
        (
            ["deepspeed.zero_optimization.allgather_bucket_size=5"],
            ["allgather_bucket_size = 5", "an even number >= 2"],
        ),
        (
            ["deepspeed.zero_optimization.reduce_bucket_size=true"],
            ["reduce_bucket_size = True", "an integer >= 1"],
        ),
        (
            ["deepspeed.communication_data_type=fp16"],
            ["communication_data_type = 'fp16'", "expected fp32 or bf16"],
        ),
        (
            ["deepspeed.communication_data_type=bf16", "train.precision=fp32"],
            ["communication_data_type = 'bf16'", "train.precision = fp32"],
        ),
        (
            ["deepspeed.expert_parallel.async_split_plan=true", "parallel.expert=1"],
            ["deepspeed.expert_parallel.async_split_plan", "parallel.expert = 1"],
        ),
        (
            ["deepspeed.zero_optimization.contiguous_gradients=false"],
            ["contiguous_gradients", "parallel.expert = 2", "parallel.zero = 1", "expected parallel.zero = 3"],
        ),
        (
            ["deepspeed.zero_optimization.sub_group_size=1000000"],
            ["sub_group_size", "parallel.zero = 1", "expected parallel.zero = 3"],
        ),
    ],
)
def test_each_check(write_config: Write, overrides: list[str], found: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write_config(), overrides)
    heading, line = str(caught.value).splitlines()
    assert heading.endswith(": 1 problem")
    for part in found:
        assert part in line


def test_what_of_deepspeed_may_be_set(write_config: Write) -> None:
    """An empty section reads as null; a key that goes with the stage passes as it is."""
    for value in ("null", "{zero_optimization: null}", "{zero_optimization: {overlap_comm: true}}"):
        assert load_config(write_config(), [f"deepspeed={'{}' if value == 'null' else value}"])
    assert load_config(
        write_config(), ["deepspeed.zero_optimization.contiguous_gradients=false", "parallel.expert=1"]
    )


def test_checks_without_known_processes(write_config: Write) -> None:
    """The number of GPUs is not asked for when a file is read."""
    path = write_config(launch={}, parallel={"expert": 8})
    with pytest.raises(UserError, match=r"parallel\.expert = 8 must divide model\.experts = 4"):
        load_config(path, [])
    with pytest.raises(UserError, match=r"train\.micro_batch = 5"):
        load_config(write_config(launch={}), ["train.micro_batch=5"])


def test_resolve_fills_in_what_follows(write_config: Write, index: DatasetIndex) -> None:
    config = resolve(load_config(write_config(), ["train.micro_batch=null"]), index, 2)
    assert config.model.complete
    assert (config.model.image_size, config.model.channels, config.model.num_classes) == (8, 1, 10)
    assert (config.parallel.data, config.train.micro_batch) == (2, 8)
    assert layout_of(config) == Layout(pipe=1, data=2, expert=2, tensor=1, zero=1, micro_batch=8, accumulation=1)


def test_layout_facts(write_config: Write, index: DatasetIndex) -> None:
    config = load_config(write_config(), ["launch.processes=4", "train.batch=32", "train.micro_batch=4"])
    layout = layout_of(resolve(config, index, 4))
    assert (layout.processes, layout.batch, layout.accumulation, layout.expert_copies) == (4, 32, 2, 2)
    assert [layout.expert_rank(rank) for rank in range(4)] == [0, 1, 0, 1]
    assert list(layout.expert_slice(3, 4)) == [2, 3]
    blocks = [range(2)]
    assert "stage 0, copy 1 of the experts: rank 2: experts 0–1 | rank 3: experts 2–3" in layout.picture(4, blocks)
    assert "stage 0: rank 0 to 3" in layout.picture(0, blocks)
    layout = Layout(pipe=2, data=1, expert=1, tensor=2, zero=1, micro_batch=4, accumulation=4)
    picture = layout.picture(4, [range(2), range(2, 3)])
    assert "blocks of the stages: 0–1 | 2" in picture
    assert "stage 1, copy 0 of the experts: ranks 2–3: experts 0–3" in picture


def test_whole_micro_step_is_a_balance_group(write_config: Write, index: DatasetIndex) -> None:
    config = load_config(write_config(), ["model.balance_group=8"])
    assert resolve(config, index, 2).model.balance_group == 8


def test_data_that_do_not_fit(write_config: Write, index: DatasetIndex, shards: Path) -> None:
    overrides = ["model.image_size=16", "model.channels=3", "model.num_classes=10"]
    with pytest.raises(UserError) as caught:
        resolve(load_config(write_config(), overrides), index, 2, origin="tiny.yaml")
    assert str(caught.value).splitlines() == [
        "tiny.yaml: 2 problems",
        f"  model.image_size = 16, but the data of {shards} have 8; expected the same, or null",
        f"  model.channels = 3, but the data of {shards} have 1; expected the same, or null",
    ]
    with pytest.raises(UserError, match=rf"model\.patch = 3 must divide the image size of {shards}, 8"):
        resolve(load_config(write_config(), ["model.patch=3"]), index, 2)


def test_known_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_processes(None, "cpu") == 1
    assert known_processes(3, "auto") == 3
    assert known_processes(None, "auto") is None
    assert process_count(3, "cpu") == 3
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert known_processes(3, "auto") == 6
    monkeypatch.setenv("DITMOE_NODE_TASK", "1")  # each of six nodes has one task of srun, which starts its ranks
    assert known_processes(3, "auto") == process_count(3, "cpu") == 18
    assert known_processes(None, "cpu") == process_count(None, "cpu") == 6
    assert known_processes(None, "auto") is None
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="RANK is set in the environment without WORLD_SIZE"):
        known_processes(None, "auto")


@pytest.mark.parametrize(("axis", "ranks"), [("pipe", 2), ("pipe", 1000), ("tensor", 2)])
@pytest.mark.parametrize("processes", [1, 5])
def test_more_stages_and_tensor_ranks_than_processes(
    write_config: Write, index: DatasetIndex, axis: str, ranks: int, processes: int
) -> None:
    """The grid's own message comes: nothing is divided by the data ranks that there are none of."""
    path = write_config(launch={"device": "cpu"})
    overrides = [f"parallel.{axis}={ranks}", "parallel.expert=1", "model.depth=1000"]
    config = load_config(path, [*overrides, "launch.processes=null", "launch.device=auto"])
    for found in (
        lambda: load_config(path, [*overrides, f"launch.processes={processes}"]),
        lambda: resolve(config, index, processes),
    ):
        with pytest.raises(UserError, match=f"launch.processes = {processes} must be a multiple of parallel.pipe"):
            found()
