"""Ranks that share out the experts draw the images of one process, bit for bit."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ditmoe.launcher.commands.evaluate import command as evaluate
from ditmoe.launcher.commands.sample import command as sample
from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import checkpoint_path, write_weights_checkpoint
from ditmoe.sampling.drawing.generate import Generated, generate
from ditmoe.sampling.drawing.together import dealt_rows
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, prepare_job
from ditmoe.sampling.network.load import load_model
from ditmoe.sampling.settings.config import SamplerConfig
from tests.forked import DITMOE, run_forked
from tests.sampling.small_run import write_digits, write_noise_classifier, write_run

MODEL = ModelConfig(
    depth=2,
    hidden=32,
    heads=2,
    patch=2,
    experts=8,
    experts_per_token=2,
    shared_experts=1,
    image_size=8,
    channels=1,
    num_classes=10,
)
CASES = [
    ({"sampler": "euler", "steps": 3, "cfg_scale": 1.5}, 22),
    ({"sampler": "ddpm", "steps": 3}, 5),  # one batch, of one rank
    ({"sampler": "rk45", "tolerance": 0.02}, 22),  # as many evaluations as each image needs
    ({"sampler": "dlg:kar1", "steps": 2, "dlg": {"skip": 2, "samples_per_chain": 3, "initial_steps": 2}}, 33),
    ({"sampler": "euler", "steps": 5, "cfg_scale": 1.5, "cache_interval": 2, "cfg_sigma_max": 3.0}, 22),
    ({"sampler": "euler", "steps": 3, "precision": "bf16"}, 22),
]
BATCH = 4

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from ditmoe.sampling.drawing.together import generate_together
from ditmoe.sampling.jobs.workers import join_workers
from ditmoe.parallel.checkpoint.checked_files import CheckedFiles
from ditmoe.sampling.network.load import load_model
from ditmoe.sampling.settings.config import SamplerConfig

torch.set_num_threads(1)
checkpoint, out, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
workers = join_workers("test", size)
group, asked, hashed = workers.group, [], []
fill = CheckedFiles.fill

def watched_fill(files, wanted):
    asked.extend(piece.name for pieces in wanted.values() for piece in pieces)
    hashed.extend(files.own)
    return fill(files, wanted)

CheckedFiles.fill = watched_fill
for number, (settings, count) in enumerate(json.loads(sys.argv[4])):
    config = SamplerConfig.model_validate({"seed": 3, **settings})
    asked.clear(), hashed.clear()
    model = load_model(checkpoint, precision=config.precision, device=workers.device, group=group)
    images = generate_together(model, None, range(count), config, 4)
    found = {"image": images.image_NHWC, "nfe": images.nfe_N, "finite": images.finite_N}
    if images.chains is not None:
        found |= {"sigma": images.chains.sigma_N, "trace": images.chains.trace_NT}
    torch.save(found, out / f"{number}-{workers.rank}.pt")
facts = {
    "asked": asked, "hashed": hashed, "number": group.number, "rank": group.rank,
    "bytes": sum(parameter.nbytes for parameter in model.network.parameters()),
    "experts": sum(p.nbytes for name, p in model.network.named_parameters() if ".moe.experts." in name),
}
(out / f"facts-{workers.rank}.json").write_text(json.dumps(facts))
workers.leave()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a network with eight experts."""
    folder = tmp_path_factory.mktemp("together") / "run"
    torch.manual_seed(0)
    network = DiT(MODEL)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    path = checkpoint_path(folder, 0)
    write_weights_checkpoint(path, MODEL, ObjectiveConfig(), canonical_state(network), None)
    write_noise_classifier(folder)
    return folder


@functools.cache
def alone(run: Path, number: int) -> Generated:
    """A case's images of one process."""
    settings, count = CASES[number]
    config = SamplerConfig.model_validate({"seed": 3, **settings})
    return generate(load_model(run, precision=config.precision), None, range(count), config, BATCH)


@pytest.mark.parametrize(("processes", "size"), [(2, 2), (4, 4), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_a_group_draws_the_images_of_one_process(run: Path, tmp_path: Path, processes: int, size: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    arguments = [str(program), str(checkpoint_path(run, 0)), str(tmp_path), str(size), json.dumps(CASES)]
    done = run_forked(arguments, tmp_path / "output", processes=processes, seconds=240)
    assert done.returncode == 0, done.stderr
    for number, (settings, _) in enumerate(CASES):
        expected = alone(run, number)
        for rank in range(processes):
            found = torch.load(tmp_path / f"{number}-{rank}.pt")
            difference = found["image"].int() - expected.image_NHWC.int()
            if settings.get("precision") == "bf16":  # products of other numbers of rows round otherwise
                assert difference.abs().max() <= 3 and (difference == 0).float().mean() > 0.9
            else:
                assert torch.equal(found["image"], expected.image_NHWC), (settings, difference.abs().max())
            assert torch.equal(found["nfe"], expected.nfe_N)
            assert expected.finite_N is not None and torch.equal(found["finite"], expected.finite_N)
            if expected.chains is not None:
                assert torch.equal(found["sigma"], expected.chains.sigma_N)
                assert torch.equal(found["trace"], expected.chains.trace_NT)
    facts = [json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in range(processes)]
    assert [(each["number"], each["rank"]) for each in facts] == [divmod(r, size) for r in range(processes)]
    whole = load_model(run, precision="bf16").network
    stored = canonical_state(whole).keys() - {"pos_embed"}
    routed = {name for name in stored if ".moe.experts." in name}
    of_experts = sum(p.nbytes for name, p in whole.named_parameters() if ".moe.experts." in name)
    for first in range(0, processes, size):
        members = facts[first : first + size]
        for each in members:  # reads all but the routed experts, and its share of these
            assert stored - routed <= set(each["asked"])
            assert len(each["asked"]) == len(set(each["asked"])) == len(stored - routed) + len(routed) // size
            assert each["experts"] == of_experts // size
            assert each["bytes"] == sum(p.nbytes for p in whole.parameters()) - of_experts + of_experts // size
        assert {name for each in members for name in each["asked"]} == stored
        hashed = [name for each in members for name in each["hashed"]]
        assert len(hashed) == len(set(hashed)) and all(name.startswith("ema/") for name in hashed) and hashed


def test_batches_are_dealt_in_turn() -> None:
    numbers = list(range(10))
    assert [dealt_rows(numbers, 1, 4, rank, 2) for rank in range(2)] == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7]]
    # Whole chains, wherever their images stand.
    numbers = [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert [dealt_rows(numbers, 3, 1, rank, 2) for rank in range(2)] == [[0, 2, 3, 5, 6, 8], [1, 4, 7]]


def test_sample_by_two_processes_is_the_animation_of_one(run: Path, tmp_path: Path) -> None:
    pictures = []
    for name, more in (("alone.png", []), ("together.png", ["--expert-parallel", "2"])):
        out = tmp_path / name
        program = [*DITMOE, "sample", str(run), "--classes", "0,1", "--seeds", "0-4,9", "--batch", "4"]
        program += ["--steps", "2", "--animate", "--out", str(out)]
        done = run_forked([*program, *more], tmp_path / name.partition(".")[0], seconds=240)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("12 images, euler, 2 steps") == 1
        with Image.open(out) as picture:
            assert picture.n_frames == 2
            pictures.append([np.asarray(frame) for frame in ImageSequence.Iterator(picture)])
    np.testing.assert_array_equal(*pictures)


def test_an_evaluation_of_two_groups_is_that_of_one_process(tmp_path: Path) -> None:
    run, digits, cache = write_run(tmp_path / "run"), write_digits(tmp_path / "digits"), tmp_path / "cache"
    arguments = [*DITMOE, "evaluate", str(run), "--reference", str(digits), "--cache", str(cache), "--steps", "2"]
    arguments += ["--count", "40", "--batch", "4", "--no-recogniser"]
    job = prepare_job(
        EvaluationOptions(source=run, sampler=SamplerConfig(steps=2), count=40, data=digits, recogniser=False)
    )
    found = []
    for name, processes, more in (("one", 1, []), ("groups", 4, ["--expert-parallel", "2"])):
        done = run_forked([*arguments, *more], tmp_path / name, processes=processes, seconds=240)
        assert done.returncode == 0, done.stderr
        metrics = json.loads((job.folder / "metrics.json").read_text())
        with np.load(job.folder / "samples.npz") as samples:
            found.append((samples["arr_0"], samples["arr_1"], metrics["results"]))
        chunk = json.loads((job.folder / "evaluation.json").read_text())["chunk"]
        assert chunk == 8, "two batches: of one process four chunks, of two groups two each"
        job.folder.rename(job.folder.with_name(f"{name}-done"))
    for one, other in zip(*found, strict=True):
        if isinstance(one, dict):
            assert json.dumps(one) == json.dumps(other)
        else:
            np.testing.assert_array_equal(one, other)


def test_what_cannot_be_dealt_is_told_before_anything_starts(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="--expert-parallel 3: the network has 8 experts in each block; expected a"
    ):
        sample(run, expert_parallel=3)
    with pytest.raises(UserError, match="--device cpu: expected without --expert-parallel"):
        sample(run, expert_parallel=2, device="cpu")
    digits = write_digits(tmp_path / "digits")
    for option in ({"crew": tmp_path / "crew"}, {"watch": True}, {"grid": tmp_path / "grid.yaml"}):
        (name,) = option
        with pytest.raises(UserError, match=f"--expert-parallel 2: expected without --{name}"):
            evaluate(run, expert_parallel=2, data=str(digits), cache=tmp_path / "cache", **option)
    options = EvaluationOptions(source=run, sampler=SamplerConfig(), data=digits)
    with pytest.raises(UserError, match="--expert-parallel 5: the network has 8 experts"):
        prepare_job(EvaluationOptions(**{**vars(options), "expert_parallel": 5}))
    network = DiT(MODEL.model_copy(update={"experts": 0}))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    dense = tmp_path / "dense"
    state = canonical_state(network)
    write_weights_checkpoint(dense, network.config, ObjectiveConfig(), state, state)
    with pytest.raises(UserError, match="--expert-parallel 2: the network is dense"):
        sample(dense, expert_parallel=2)


@pytest.mark.parametrize(("processes", "size"), [(3, 2), (2, 4)])
def test_processes_that_make_no_whole_groups_are_refused(
    run: Path, tmp_path: Path, processes: int, size: int
) -> None:
    arguments = [*DITMOE, "sample", str(run), "--steps", "1", "--expert-parallel", str(size)]
    done = run_forked(arguments, tmp_path / "output", processes=processes, seconds=120)
    assert done.returncode == 2
    message = f"--expert-parallel {size}: there are {processes} processes (WORLD_SIZE), and {size} of them draw"
    assert done.stderr.count(message) == 1, done.stderr
    assert not (run / "samples").exists() or "step" not in " ".join(os.listdir(run / "samples"))
