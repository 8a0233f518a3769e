"""Steps whose blocks are extrapolated, and guidance at some noise levels: what they ask, cost, and leave."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from ditmoe.model.config import ObjectiveConfig
from ditmoe.sampling.drawing.generate import draw, generate, generate_float
from ditmoe.sampling.drawing.noise import ImageNoise
from ditmoe.sampling.evaluation.job import _where_it_guides
from ditmoe.sampling.evaluation.run_job import _passes_of
from ditmoe.sampling.integrators.samplers import planned_nfe, planned_passes
from ditmoe.sampling.network.denoiser import make_denoiser
from ditmoe.sampling.network.load import LoadedModel
from ditmoe.sampling.network.pace import Evaluation, Forecast, extrapolation, full_steps
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import IntegratorName
from tests.sampling.conftest import LivelyModel

FIXED = [name for name in get_args(IntegratorName) if name != "rk45"]


@pytest.fixture(scope="module", params=["rectified_flow", "ddpm"])
def model(request: pytest.FixtureRequest, lively_model: LivelyModel) -> LoadedModel:
    return lively_model(request.param)


def floats(model: LoadedModel, count: int = 4, batch: int = 4, **settings: Any) -> Tensor:
    return generate_float(model, None, range(count), SamplerConfig.model_validate(settings), batch).image_NCHW


class Asked:
    """A network that notes the rows which it is asked for, and those of its end alone; it looks at x only."""

    def __init__(self) -> None:
        self.labels: list[list[int]] = []
        self.ends: list[list[int]] = []

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.labels.append(label.tolist())
        return x / 2

    def hidden(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self(x, t, label)

    def predict_hidden(self, hidden: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.ends.append(label.tolist())
        return hidden


def asked(model: LoadedModel, **settings: Any) -> tuple[Asked, Any]:
    """What the network is asked for while one image is drawn, and the denoiser."""
    config = SamplerConfig.model_validate(settings).resolved(model.objective_config)
    network = Asked()
    denoiser = make_denoiser(network, model.model_config, model.objective_config, config)
    noise = ImageNoise(0, [0], (1, 8, 8), torch.device("cpu"))
    with torch.inference_mode():
        draw(denoiser, torch.tensor([3]), noise.initial(), noise, config)
    return network, denoiser


def test_which_steps_are_full() -> None:
    assert full_steps([False] * 8, 3, 1) == [True, True, False, False, True, False, False, True]
    assert full_steps([False] * 4, 1, 0) == [True] * 4
    assert full_steps([True] * 6, 4, 0) == [True, False, False, False, True, False]
    # Guidance sets in at the fourth step: nothing is known of the null class. It may end at any.
    assert full_steps([False, False, False, True, True, True, False, False], 2, 1) == [
        *(True, True, False),
        *(True, True, False, True, False),
    ]


@given(
    st.integers(0, 4).flatmap(
        lambda order: st.tuples(
            st.lists(st.integers(0, 40), min_size=order + 1, max_size=order + 1, unique=True),
            st.lists(st.integers(-9, 9), min_size=order + 1, max_size=order + 1),
        )
    ),
    st.integers(41, 60),
)
def test_a_polynomial_of_the_order_is_foretold_exactly(drawn: tuple[list[int], list[int]], at: int) -> None:
    nodes, factors = drawn

    def value(step: int) -> int:
        return sum(factor * step**power for power, factor in enumerate(factors))

    found = sum(w * value(node) for w, node in zip(extrapolation(nodes, at), nodes, strict=True))
    assert found == pytest.approx(value(at), rel=1e-6, abs=1e-3)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_what_leaves_the_blocks_is_foretold_of_each_row_and_stage(order: int) -> None:
    class Polynomial:
        """Of stage s at step n, row r: r + s + nᵖ."""

        def hidden(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            return (label + t + x.flatten() ** order)[:, None, None].expand(-1, 2, 3)

        def predict_hidden(self, hidden: Tensor, t: Tensor, label: Tensor) -> Tensor:
            return hidden

    forecast = Forecast(Polynomial(), order)
    for step, full in enumerate(full_steps([True] * 9, 3, order)):
        for stage in (0, 1):
            rows = torch.arange(4 if step < 7 else 2)  # guidance ends
            x = torch.full((len(rows), 1), float(step))
            found = forecast.predict(Evaluation(step, stage, True, full), x, torch.tensor(float(stage)), rows)
            expected = rows + stage + (float(step) ** order if order or full else 1.0)
            torch.testing.assert_close(found, expected[:, None, None].expand(-1, 2, 3).float())


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddpm"])
def test_full_steps_alone_change_no_bit(model: LoadedModel, sampler: IntegratorName) -> None:
    plain = floats(model, 2, 2, sampler=sampler, steps=3, cfg_scale=1.5)
    assert torch.equal(floats(model, 2, 2, sampler=sampler, steps=3, cfg_scale=1.5, cache_order=5), plain)
    # The same through the cache, where the first steps are all that there are.
    cached = {"cache_interval": 2, "cache_order": 2}
    assert torch.equal(floats(model, 2, 2, sampler=sampler, steps=3, cfg_scale=1.5, **cached), plain)
    whole = {"cfg_sigma_min": 1e-9, "cfg_sigma_max": 1e9}
    assert torch.equal(floats(model, 2, 2, sampler=sampler, steps=3, cfg_scale=1.5, **whole), plain)


@pytest.mark.parametrize("sampler", FIXED)
@pytest.mark.parametrize(
    "settings",
    [
        {"cache_interval": 3, "cache_order": 0},
        {"cache_interval": 2, "cfg_scale": 2.0, "tweedie": True},
        {"cfg_scale": 2.0, "cfg_sigma_min": 0.05, "cfg_sigma_max": 2.0, "tweedie": True},
        {"cache_interval": 2, "cache_order": 0, "cfg_scale": 2.0, "cfg_sigma_max": 2.0},
        {"cache_interval": 2, "cfg_scale": 2.0, "cfg_sigma_min": 0.5},
        {"cfg_scale": 2.0},
    ],
)
def test_what_is_planned_is_what_is_asked(
    model: LoadedModel, sampler: IntegratorName, settings: dict[str, Any]
) -> None:
    corrected = {"corrector_steps": 2} if sampler in ("reverse-diffusion", "euler-maruyama") else {}
    settings = {"sampler": sampler, "steps": 7, **corrected, **settings}
    config = SamplerConfig.model_validate(settings).resolved(model.objective_config)
    network, denoiser = asked(model, **settings)
    planned = planned_passes(config, model.objective_config)
    rows = sum(map(len, network.labels))
    assert planned is not None and planned.full == rows == denoiser.network_evaluations
    assert planned.cached == denoiser.cached_evaluations
    assert denoiser.nfe == planned_nfe(config)
    if config.cache_interval > 1:
        assert 0 < planned.cached == sum(map(len, network.ends)) - rows
    if config.guides_in_part:
        assert denoiser.nfe < planned.full + planned.cached < 2 * denoiser.nfe


def test_images_say_what_they_took(model: LoadedModel) -> None:
    config = SamplerConfig(sampler="heun", steps=5, cache_interval=2, cfg_scale=2.0, cfg_sigma_max=2.0)
    config = config.resolved(model.objective_config)
    planned, rows = planned_passes(config, model.objective_config), []
    images = generate(model, None, range(3), config, batch=2, on_evaluation=rows.append)
    assert planned is not None and images.nfe == 9
    assert images.network_evaluations == pytest.approx(planned.full)
    assert images.cached_evaluations == pytest.approx(planned.cached)
    assert sum(rows) == 4 * planned.full  # two batches of two


def test_the_null_class_is_asked_for_within_the_interval_alone(model: LoadedModel) -> None:
    settings = {"sampler": "heun", "steps": 6, "schedule": "karras", "cfg_scale": 3.0}
    network, _ = asked(model, **settings, cfg_sigma_min=0.3, cfg_sigma_max=20.0)
    config = SamplerConfig.model_validate(settings).resolved(model.objective_config)
    denoiser = make_denoiser(model.network, model.model_config, model.objective_config, config)
    root = torch.linspace(denoiser.sigma_max ** (1 / 7), denoiser.sigma_min ** (1 / 7), 6)
    inside = [0.3 < float(level) <= 20 for level in root**7]
    assert any(inside) and not all(inside)
    expected = [[3, 5] if here else [3] for here in inside for _ in range(2)][:-1]
    assert network.labels == expected
    # Where it acts nowhere, the images are those without guidance.
    nowhere = floats(model, **settings, cfg_sigma_min=1e8)
    assert torch.equal(nowhere, floats(model, **(settings | {"cfg_scale": 1.0})))


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddpm"])
def test_an_image_has_the_same_bits_in_any_company(model: LoadedModel, sampler: IntegratorName) -> None:
    settings = {"sampler": sampler, "steps": 8, "cache_interval": 3, "cfg_scale": 2.0, "cfg_sigma_max": 5.0}
    config = SamplerConfig.model_validate(settings)
    labels = torch.tensor([1, 2, 3, 4, 0, 2])

    def drawn(order: list[int]) -> Tensor:
        return generate_float(model, labels[order], order, config, batch=2).image_NCHW

    together = drawn([0, 1, 2, 3, 4, 5])
    for order in ([5, 0, 3, 2, 4, 1], [4, 4, 1], [3]):
        assert torch.equal(drawn(order), together[order])


def test_extrapolating_is_nearer_than_fewer_steps_on_a_smooth_network(lively_model: LivelyModel) -> None:
    """Second-order and third-order errors against that of steps twice as long."""
    model = lively_model()
    whole = floats(model, sampler="euler", steps=40)

    def off(**settings: Any) -> float:
        return (floats(model, sampler="euler", **settings) - whole).square().mean().sqrt().item()

    fewer, repeated = off(steps=20), off(steps=40, cache_interval=2, cache_order=0)
    once, twice = (off(steps=40, cache_interval=2, cache_order=order) for order in (1, 2))
    assert once < 0.5 * fewer and once < 0.5 * repeated and twice < once


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "rk45", "cache_interval": 2}, "cache_interval with sampler = rk45: each image takes steps"),
        ({"sampler": "dlg:kar1", "cache_interval": 2}, "dlg:kar1: a chain has no sequence of steps"),
        ({"sampler": "rk45", "cfg_scale": 2.0, "cfg_sigma_max": 3.0}, "cfg_sigma_min, cfg_sigma_max with"),
        ({"cfg_sigma_min": 3.0, "cfg_sigma_max": 3.0}, "cfg_sigma_min = 3 is not below cfg_sigma_max = 3"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplerConfig.model_validate(settings)


def test_an_evaluation_says_what_it_took_and_keeps_its_name_without_them() -> None:
    plain: Callable[..., SamplerConfig] = lambda **settings: SamplerConfig(sampler="heun", steps=4, **settings)  # noqa: E731
    without = plain().plain()
    assert not without.keys() & {"cache_interval", "cache_order", "cfg_sigma_min", "cfg_sigma_max"}
    assert plain(cache_order=3, cfg_sigma_max=4.0).plain() == without  # they change no image
    cached = plain(cache_interval=2, cfg_scale=2.0, cfg_sigma_max=1.0)
    assert cached.plain().keys() >= {"cache_interval", "cache_order", "cfg_sigma_min", "cfg_sigma_max"}
    objective = ObjectiveConfig(kind="rectified_flow")
    config = cached.resolved(objective)
    passes = planned_passes(config, objective)
    assert passes is not None
    assert _passes_of(config, 7, objective.model_dump()) == {
        "network_passes": passes.full,
        "cached_passes": passes.cached,
    }
    assert _passes_of(plain(cfg_scale=2.0), 7, None) == {"network_passes": 14}
    assert _where_it_guides(cached) == "0 < σ ≤ 1" and _where_it_guides(plain()) is None
    assert _where_it_guides(plain(cfg_scale=2.0)) == "all noise levels"
