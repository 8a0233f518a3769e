"""The plain baseline computes what our network computes: same weights, same outputs, losses and steps."""

import pytest
import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.plain import PlainTraining
from benchmarks.suite.networks import batch_for, our_network, plain_network
from benchmarks.suite.settings import TINY
from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import balance_losses
from ditmoe.model.objective import RectifiedFlow
from ditmoe.sampling.drawing.generate import draw
from ditmoe.sampling.drawing.noise import ImageNoise
from ditmoe.sampling.network.denoiser import make_denoiser
from ditmoe.sampling.settings.config import SamplerConfig

IMAGES = 4
CONFIG = ModelConfig.model_validate({**TINY.model_dump(), "balance_group": IMAGES, "balance_weight": 0.1})
BATCH = batch_for(CONFIG, IMAGES, torch.device("cpu"))


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_both_begin_with_the_same_weights_and_put_something_out() -> None:
    ours, theirs = canonical_state(our_network(CONFIG)), plain_network(CONFIG).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_the_network() -> None:
    inputs = (BATCH.x_BCHW, BATCH.draws.timestep_B, BATCH.label_B)
    with torch.no_grad():
        expected = plain_network(CONFIG)(*inputs)
        found = our_network(CONFIG)(*inputs)
    assert expected.std() > 0.01
    same(found, expected)


def test_loss_balance_loss_and_gradients() -> None:
    ours, theirs = our_network(CONFIG), plain_network(CONFIG)
    loss = RectifiedFlow().loss(ours, BATCH.x_BCHW, BATCH.label_B, BATCH.draws).mean()
    loss.backward()
    draws = BATCH.draws
    expected = plain.flow_loss(theirs, BATCH.x_BCHW, BATCH.label_B, draws.noise_BCHW, draws.timestep_B)
    balance = torch.stack([block.moe.balance_loss for block in theirs.blocks])
    (expected + balance.sum()).backward()
    same(loss, expected)
    same(torch.stack([each.recorded()[0] for each in balance_losses(ours)]), balance)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        stacked, _, rest = name.partition(".experts.")
        if rest:
            expert, kind, _ = rest.split(".")
            found = gradients[f"{stacked}.experts.{kind}"][int(expert)]  # type: ignore[index]
        else:
            found = gradients[name]
        same(found, parameter.grad)  # type: ignore[arg-type]


def test_training() -> None:
    """Three steps of AdamW and EMA, by ways that share no code but torch's optimiser."""
    theirs = PlainTraining(plain_network(CONFIG), lr=1e-3, decay=0.9)
    ours = our_network(CONFIG)
    average = {name: value.clone() for name, value in canonical_state(ours).items()}
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, weight_decay=0, fused=True)
    for _ in range(3):
        draws = BATCH.draws
        expected = theirs.step(BATCH.x_BCHW, BATCH.label_B, draws.noise_BCHW, draws.timestep_B)
        optimizer.zero_grad()
        loss = RectifiedFlow().loss(ours, BATCH.x_BCHW, BATCH.label_B, draws).mean()
        loss.backward()
        optimizer.step()
        for name, value in canonical_state(ours).items():
            average[name].lerp_(value, 0.1)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    for name, value in theirs.ema.items():
        torch.testing.assert_close(average[name], value, rtol=1e-4, atol=1e-5)


def test_sampling() -> None:
    """Euler's steps under guidance, from the same noise."""
    objective, label_B = ObjectiveConfig(), torch.tensor([1, 2, 3, 0])
    sampler = SamplerConfig(sampler="euler", steps=4, cfg_scale=1.5).resolved(objective)
    noise = ImageNoise(0, range(IMAGES), tuple(BATCH.x_BCHW.shape[1:]), torch.device("cpu"))
    with torch.inference_mode():
        denoiser = make_denoiser(our_network(CONFIG).eval(), CONFIG, objective, sampler)
        found = draw(denoiser, label_B, noise.initial(), noise, sampler).x_BCHW
    expected = plain.sample(plain_network(CONFIG), noise.initial(), label_B, steps=4, cfg_scale=1.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_an_expert_without_tokens_and_one_with_all() -> None:
    for network in (ours := our_network(CONFIG), theirs := plain_network(CONFIG)):
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("moe.gate.weight"):
                    parameter.zero_()  # all alike: the first experts get everything
    inputs = (BATCH.x_BCHW, BATCH.draws.timestep_B, BATCH.label_B)
    with torch.no_grad():
        same(ours(*inputs), theirs(*inputs))
    loads = torch.stack(
        [balance.last_load_N for balance in balance_losses(ours) if balance.last_load_N is not None]
    )
    assert (loads == 0).any() and (loads.max(1).values == loads.sum(1) / 2).all()
