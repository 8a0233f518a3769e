"""Image i is a function of (seed, i) and its label: at any batch size, among any other images."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.randomness import normal
from ditmoe.sampling.drawing.generate import (
    as_bytes,
    check_finite,
    default_labels,
    draw,
    generate,
    generate_float,
)
from ditmoe.sampling.drawing.noise import ImageNoise
from ditmoe.sampling.integrators.flow import Drawn
from ditmoe.sampling.network.load import LoadedModel
from ditmoe.sampling.settings.config import SamplerConfig


@pytest.fixture(scope="module", params=["rectified_flow", "ddpm"])
def model(request, lively_model) -> LoadedModel:
    return lively_model(request.param)


SAMPLERS = [
    SamplerConfig(steps=6),
    SamplerConfig(sampler="heun", steps=4),
    SamplerConfig(sampler="ddim", steps=5, ddim_eta=0.7, cfg_scale=2.0),
    SamplerConfig(sampler="rk45", tolerance=1e-3),
    SamplerConfig(sampler="reverse-diffusion", steps=20, corrector_steps=1, tweedie=True),
]
SAMPLER_NAMES = ["default", "heun", "ddim guided", "rk45", "corrected"]


@pytest.mark.parametrize("config", [config for config in SAMPLERS if config.sampler != "rk45"])
def test_batch_size_and_company_change_an_image_by_rounding_only(model, config):
    numbers = list(range(7))
    images = generate_float(model, None, numbers, config, batch=7).image_NCHW
    assert images.shape == (7, 1, 8, 8) and images.dtype == torch.float32 and images.std() > 0.01
    for batch in (1, 3, 16):
        other = generate_float(model, None, numbers, config, batch=batch).image_NCHW
        torch.testing.assert_close(other, images, rtol=1e-4, atol=1e-4)
    some = generate_float(model, torch.tensor([0, 3]), [5, 3], config, batch=4).image_NCHW
    torch.testing.assert_close(some, images[[5, 3]], rtol=1e-4, atol=1e-4)


def test_rk45_differs_between_batch_sizes_by_no_more_than_its_tolerance(lively_model):
    """Rounding moves the estimate of an error, and with it the length of a step."""
    model = lively_model(experts=0)
    config = SamplerConfig(sampler="rk45", tolerance=1e-3)
    images = [generate_float(model, None, range(7), config, batch).image_NCHW for batch in (7, 3, 1)]
    for other in images[1:]:
        torch.testing.assert_close(other, images[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("config", SAMPLERS, ids=SAMPLER_NAMES)
def test_equal_batches_give_equal_bits(model, config):
    whole = generate_float(model, None, range(10), config, batch=4).image_NCHW
    parts = [generate_float(model, None, part, config, batch=4).image_NCHW for part in (range(4), range(4, 10))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("config", SAMPLERS, ids=SAMPLER_NAMES)
@pytest.mark.parametrize("experts", [0, 4])
def test_equal_batch_shapes_give_equal_bits(lively_model, config, experts):
    """Whatever other images are in the batch, also where they decide how many rows each expert gets."""
    model = lively_model(experts=experts)
    whole = generate_float(model, None, range(10), config, batch=4).image_NCHW
    parts = [generate_float(model, None, part, config, batch=4).image_NCHW for part in (range(3), range(3, 10))]
    assert torch.equal(torch.cat(parts), whole)


def test_seed_and_label_matter(model):
    config = SamplerConfig(steps=4)
    labels = torch.tensor([1, 1])

    def images_of(labels, numbers, config):
        return generate(model, labels, numbers, config, batch=2).image_NHWC

    images = images_of(labels, [0, 1], config)
    assert images.dtype == torch.uint8 and images.shape == (2, 8, 8, 1)
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images, images_of(labels, [0, 1], config))
    assert not torch.equal(images, images_of(labels, [0, 1], config.model_copy(update={"seed": 1})))
    assert not torch.equal(images[0], images_of(torch.tensor([2]), [0], config)[0])


def test_evaluations_and_progress(model):
    told: list[int] = []
    config = SamplerConfig(sampler="heun", steps=3, cfg_scale=2.0)
    images = generate(model, None, range(5), config, 2, told.append)
    assert (images.nfe, images.network_evaluations) == (5, 10)
    assert told == [2, 4, 5]
    config = SamplerConfig(sampler="rk45", tolerance=0.01, cfg_scale=2)
    adaptive = generate(model, None, range(5), config, 2)
    # In other company, in a batch of the same shape, each takes the same steps.
    assert adaptive.nfe_N.tolist() == [generate(model, None, [i], config, 2).nfe for i in range(5)]
    assert adaptive.nfe == adaptive.nfe_N.double().mean() and adaptive.network_evaluations == 2 * adaptive.nfe
    plain = generate(model, None, range(5), SamplerConfig(steps=3), 2)
    assert (plain.nfe, plain.network_evaluations) == (3, 3)


def test_the_network_is_in_evaluation_mode_and_goes_back(model):
    seen: list[bool] = []
    hook = model.network.register_forward_pre_hook(lambda network, inputs: seen.append(network.training))
    model.network.train()
    generate(model, None, [0], SamplerConfig(steps=2), batch=1)
    hook.remove()
    assert seen == [False, False] and model.network.training
    model.network.eval()


def test_bf16_is_near_fp32(model):
    config = SamplerConfig(sampler="heun", steps=4)
    exact = generate_float(model, None, range(3), config, 3).image_NCHW
    rough = generate_float(model, None, range(3), config.model_copy(update={"precision": "bf16"}), 3).image_NCHW
    assert rough.dtype == torch.float32
    difference = (rough - exact).square().mean().sqrt() / exact.std()
    assert 0 < difference < 0.1


def test_wrong_labels(model):
    with pytest.raises(UserError, match="class 5: expected 0 to 4"):
        generate(model, torch.tensor([0, 5]), [0, 1], SamplerConfig(steps=1), batch=2)
    with pytest.raises(UserError, match="class -1"):
        generate(model, torch.tensor([-1]), [0], SamplerConfig(steps=1), batch=2)


def test_defaults():
    assert default_labels([0, 4, 5, 12], 5).tolist() == [0, 4, 0, 2]
    flow, ddpm = ObjectiveConfig(kind="rectified_flow"), ObjectiveConfig(kind="ddpm")
    assert (SamplerConfig().resolved(flow).sampler, SamplerConfig().resolved(flow).schedule) == ("euler", "own")
    assert SamplerConfig().resolved(ddpm).sampler == "ddpm"
    assert SamplerConfig(sampler="heun").resolved(ddpm).schedule == "karras"


def test_images_that_are_not_finite_are_told_from_others(model, monkeypatch):
    def drawn(denoiser, label_B, *arguments):
        images = torch.zeros(len(label_B), 1, 8, 8)
        images[2, 0, 1, 1] = float("nan")
        images[3, 0, 0, 0] = float("inf")
        return Drawn(images, 1)

    monkeypatch.setattr("ditmoe.sampling.drawing.generate.draw", drawn)
    images = generate(model, None, range(10, 14), SamplerConfig(steps=1), batch=4)
    assert images.finite_N.tolist() == [True, True, False, False]
    assert images.image_NHWC.flatten().tolist() == [128] * 256 and images.image_NHWC.dtype == torch.uint8
    check_finite(images.finite_N[:2], range(2))
    with pytest.raises(UserError, match="image 12 is not finite, and neither are 1 others"):
        check_finite(images.finite_N, range(10, 14))


def test_bytes_are_made_where_the_images_are_and_round_as_the_rule_says():
    on_meta, finite_N = as_bytes(torch.empty(2, 3, 4, 5, device="meta"))  # nothing could be copied from there
    assert (on_meta.device.type, on_meta.dtype, on_meta.shape) == ("meta", torch.uint8, (2, 4, 5, 3))
    assert finite_N.device.type == "meta"
    generator = np.random.default_rng(0)
    images = generator.normal(0, 0.8, (40, 3, 8, 8)).astype(np.float32)
    # Halves between two bytes, and their neighbours.
    images[1] = np.linspace(-1.01, 1.01, images[1].size, dtype=np.float32).reshape(images[1].shape)
    halves = (np.arange(255, dtype=np.float32) + np.float32(0.5)) / np.float32(127.5) - 1
    images[2:6].reshape(-1)[: 3 * 255] = np.concatenate(
        [halves, np.nextafter(halves, np.float32(2)), np.nextafter(halves, np.float32(-2))]
    )
    found, finite_N = as_bytes(torch.from_numpy(images))
    scaled = (images + np.float32(1)) * np.float32(127.5)  # float32, rounded after each operation
    expected = np.clip(np.rint(scaled), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    assert np.array_equal(found.numpy(), expected) and bool(finite_N.all())


def test_images_as_bytes_are_those_of_the_floats(model):
    config = SamplerConfig(steps=4)
    floats = generate_float(model, None, range(7), config, batch=3)
    images = generate(model, None, range(7), config, batch=3)
    assert torch.equal(images.image_NHWC, as_bytes(floats.image_NCHW)[0])
    assert torch.equal(images.nfe_N, floats.nfe_N)


class Recorded(ThreadPoolExecutor):
    """Writes down what is asked of the threads, and lets what is drawn be asked for first."""

    def __init__(self, threads: int, log: list[str]) -> None:
        super().__init__(threads)
        self.log = log

    def submit(self, function, out, rows, purpose):
        self.log.append(f"begun {purpose} of {function.__self__.image_numbers[rows]}")
        return super().submit(function, out, rows, purpose)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_noise_drawn_ahead_has_the_same_bits(threads):
    numbers, shape, cpu = [7, 3, 2**40, 9, 9], (2, 3, 4), torch.device("cpu")
    plain = ImageNoise(5, numbers, shape, cpu)
    with Recorded(threads, log := []) as pool:
        ahead = ImageNoise(5, numbers, shape, cpu, pool)
        ahead.prepare()
        assert [line.split(" of ")[1] for line in log] == [f"{some}" for some in ([7, 3], [2**40, 9], [9])]
        for ours, alone, purpose in (
            (ahead.initial(), plain.initial(), "image/start"),
            (ahead(0), plain(0), "image/step 0"),
            (ahead(1), plain(1), "image/step 1"),
            (ahead(7), plain(7), "image/step 7"),
        ):
            assert torch.equal(ours, alone) and torch.equal(ours, normal(5, purpose, numbers, shape))
        log.clear()
        assert torch.equal(ahead(8), plain(8))
        assert {line.split(" of ")[0] for line in log} == {"begun image/step 9"}  # 8 was drawn already
        ahead.forget()
        assert not ahead._ahead


def test_the_noise_of_a_batch_is_begun_before_the_batch_before_is_drawn(model, monkeypatch):
    events: list[str] = []
    monkeypatch.setattr("ditmoe.sampling.drawing.noise.ThreadPoolExecutor", lambda *_: Recorded(1, events))
    whole = draw

    def watched(denoiser, label_B, initial_BCHW, noise, config):
        events.append(f"drawn {list(noise.image_numbers)}")
        return whole(denoiser, label_B, initial_BCHW, noise, config)

    monkeypatch.setattr("ditmoe.sampling.drawing.generate.draw", watched)
    generate(model, None, range(5), SamplerConfig(sampler="euler", steps=1), batch=2)
    starts = [event for event in events if "step" not in event]
    assert starts == [
        "begun image/start of [0]",
        "begun image/start of [1]",
        "begun image/start of [2]",
        "begun image/start of [3]",
        "drawn [0, 1]",
        "begun image/start of [4]",
        "begun image/start of [4]",
        "drawn [2, 3]",
        "drawn [4, 4]",
    ]


@pytest.mark.parametrize("sampler", [SAMPLERS[2], SAMPLERS[3]])
def test_a_cpu_draws_shards_of_one_thread_however_many_it_has(model, sampler, monkeypatch):
    """The network never splits a sum among threads, and their number has no say in what is drawn at once."""
    monkeypatch.setattr("ditmoe.sampling.drawing.generate.SHARD_TOKENS", 3 * 16)
    seen: list[tuple[int, int]] = []
    watch = model.network.register_forward_pre_hook(
        lambda _, inputs: seen.append((torch.get_num_threads(), len(inputs[0])))
    )
    before, images = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            images.append(generate_float(model, None, range(10), sampler, batch=7).image_NCHW)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
        watch.remove()
    guided = 2 if sampler.cfg_scale != 1 else 1
    assert set(seen) == {(1, 3 * guided)}, "shards of 3, 3 and 1 of a batch of 7, filled up"
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
