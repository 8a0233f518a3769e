"""Image i is a function of (seed, i) and its label: at any batch size, among any other images."""

import pytest
import torch

from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.initialise import initialise
from ditmoe.sampling.drawing.generate import (
    GeneratedFloats,
    check_finite,
    default_labels,
    generate,
    generate_float,
)
from ditmoe.sampling.network.load import LoadedModel
from ditmoe.sampling.settings.config import SamplerConfig


def tiny_model(kind: str, experts: int = 4) -> LoadedModel:
    """A network whose zero-initialised layers are filled, so that everything makes a difference."""
    config = ModelConfig(
        depth=2,
        hidden=32,
        heads=2,
        patch=2,
        experts=experts,
        experts_per_token=min(2, experts),
        image_size=8,
        channels=1,
        num_classes=5,
    )
    network = DiT(config)
    initialise(network, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    names = tuple(f"class {label}" for label in range(5))
    return LoadedModel(network, config, ObjectiveConfig(kind=kind), names, None, "tiny")


@pytest.fixture(scope="module", params=["rectified_flow", "ddpm"])
def model(request) -> LoadedModel:
    return tiny_model(request.param)


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


def test_rk45_differs_between_batch_sizes_by_no_more_than_its_tolerance():
    """Rounding moves the estimate of an error, and with it the length of a step."""
    model = tiny_model("rectified_flow", experts=0)
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
def test_equal_batch_shapes_give_equal_bits(config, experts):
    """Whatever other images are in the batch, also where they decide how many rows each expert gets."""
    model = tiny_model("rectified_flow", experts=experts)
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
    def drawn(*arguments):
        images = torch.zeros(4, 1, 2, 2)
        images[2, 0, 1, 1] = float("nan")
        images[3, 0, 0, 0] = float("inf")
        return GeneratedFloats(images, torch.ones(4, dtype=torch.int64))

    monkeypatch.setattr("ditmoe.sampling.drawing.generate.generate_float", drawn)
    images = generate(model, None, range(10, 14), SamplerConfig(steps=1), batch=4)
    assert images.finite_N.tolist() == [True, True, False, False]
    assert images.image_NHWC.flatten().tolist() == [128] * 16 and images.image_NHWC.dtype == torch.uint8
    check_finite(images.finite_N[:2], range(2))
    with pytest.raises(UserError, match="image 12 is not finite, and neither are 1 others"):
        check_finite(images.finite_N, range(10, 14))
