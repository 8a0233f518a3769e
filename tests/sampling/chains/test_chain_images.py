"""Images of chains: a function of (seed, image number), resumable, and counted in full."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.sampling.chains import images as chain_images
from ditmoe.sampling.chains.images import StateFile
from ditmoe.sampling.drawing.generate import check_finite, generate
from ditmoe.sampling.integrators.samplers import planned_nfe
from ditmoe.sampling.network.load import LoadedModel
from ditmoe.sampling.noise_level.classifier import NoiseClassifier, NoiseNetwork, NoiseSpace
from ditmoe.sampling.noise_level.levels import LevelRange
from ditmoe.sampling.settings.chains import DlgConfig
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import ChainPreset

MODEL = ModelConfig(
    depth=1, hidden=16, heads=2, patch=4, experts=2, experts_per_token=1, image_size=8, channels=1, num_classes=3
)
DLG = {"skip": 2, "samples_per_chain": 4, "initial_steps": 2, "burn_in_first": 1, "burn_in": 1}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    torch.manual_seed(0)
    network = DiT(MODEL)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    return LoadedModel(network.eval(), MODEL, ObjectiveConfig(), ("a", "b", "c"), None, "test")


@pytest.fixture(scope="module")
def posterior() -> NoiseClassifier:
    torch.manual_seed(1)
    space = NoiseSpace((1, 8, 8), "rectified_flow", (), 0.05, 20.0, 40)
    return NoiseClassifier(NoiseNetwork(1, 8, 40).eval(), space, {}, space.level_N, "test")


def config_of(sampler: str = "dlg:kar2", steps: int = 2, **dlg: object) -> SamplerConfig:
    return SamplerConfig.model_validate({"sampler": sampler, "steps": steps, "dlg": {**DLG, **dlg}})


def test_an_image_is_the_same_whatever_is_drawn_beside_it(model, posterior):
    config = config_of()
    whole = generate(model, None, range(10), config, 3, posterior=posterior)
    assert whole.image_NHWC.shape == (10, 8, 8, 1) and whole.image_NHWC.dtype == torch.uint8
    assert whole.chains is not None and whole.chains.trace_NT.shape == (10, 2)
    # Two other chains, in another order, one only in part, two of a batch of two.
    some = generate(model, torch.tensor([2, 1, 2]), [9, 5, 8], config, 2, posterior=posterior)
    assert some.chains is not None
    assert (some.image_NHWC.int() - whole.image_NHWC[[9, 5, 8]].int()).abs().max() <= 1
    torch.testing.assert_close(some.chains.trace_NT, whole.chains.trace_NT[[9, 5, 8]])
    assert not torch.equal(whole.image_NHWC[0], whole.image_NHWC[1])
    assert not torch.equal(whole.image_NHWC[0], whole.image_NHWC[4])
    other = generate(model, None, range(10), config.model_copy(update={"seed": 1}), 3, posterior=posterior)
    assert not torch.equal(other.image_NHWC, whole.image_NHWC)


def test_the_state_that_is_denoised_has_the_smallest_sigma_of_its_stretch(model, posterior):
    drawn = generate(model, None, range(8), config_of(skip=5), 2, posterior=posterior).chains
    assert drawn is not None
    # The state before the stretch, the last of the one before, is among those to choose from.
    later = torch.tensor([place for place in range(8) if place % 4])
    window_NT = torch.cat((drawn.trace_NT[later - 1, -1:], drawn.trace_NT[later]), dim=1)
    assert torch.equal(drawn.sigma_N[later], window_NT.min(1).values)
    last = generate(model, None, range(8), config_of(skip=5, select="last"), 2, posterior=posterior).chains
    assert last is not None and torch.equal(last.sigma_N, last.trace_NT[:, -1])
    levels_N = posterior.level_N.float()
    assert torch.isin(drawn.trace_NT, levels_N).all()


def test_chains_stay_in_their_range(model, posterior):
    config = config_of(skip=5, sigma_min=0.5, sigma_max=2.0, level_rule="sample")
    drawn = generate(model, None, range(8), config, 2, posterior=posterior).chains
    assert drawn is not None
    level_N = posterior.level_N.float()
    inside_N = level_N[(level_N >= 0.5) & (level_N <= 2.0)]
    assert torch.isin(drawn.trace_NT, inside_N).all()
    free = generate(model, None, range(8), config_of(skip=5, level_rule="sample"), 2, posterior=posterior).chains
    assert free is not None and not torch.isin(free.trace_NT, inside_N).all()
    # The posterior of what is left: probabilities in the same ratios.
    x, label = torch.randn(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)
    narrow = LevelRange(posterior, 0.5, 2.0)
    whole = posterior(x, label).exp()[:, (level_N >= 0.5) & (level_N <= 2.0)]
    torch.testing.assert_close(narrow(x, label).exp(), whole / whole.sum(1, keepdim=True))
    with pytest.raises(UserError, match="no level of noise lies between; expected a range within the classifier"):
        generate(model, None, range(8), config_of(sigma_min=30.0), 2, posterior=posterior)
    with pytest.raises(ValueError, match="sigma_min = 3 is above sigma_max = 1"):
        config_of(sigma_min=3, sigma_max=1)


@pytest.mark.parametrize(
    "config",
    [
        config_of(),
        config_of("dlg:euler", 3, thin=2),
        config_of("dlg:dpm-solver++", 3, initial="euler", restart_every=2),
        config_of("dlg:euler-maruyama", 4, restart_every=3, samples_per_chain=8).model_copy(
            update={"tweedie": True}
        ),
    ],
)
def test_every_evaluation_is_counted(model, posterior, config):
    count = 2 * config.dlg.samples_per_chain
    passes: list[int] = []
    hook = model.network.register_forward_pre_hook(lambda network, inputs: passes.append(len(inputs[0])))
    drawn = generate(model, None, range(count), config, 2, posterior=posterior)
    hook.remove()
    assert int(drawn.nfe_N.sum()) == sum(passes)
    assert drawn.nfe == planned_nfe(config.resolved(ObjectiveConfig()))
    # The start is with the sample that it was for.
    starts = drawn.nfe_N > drawn.nfe_N.min()
    every = config.dlg.restart_every or config.dlg.samples_per_chain
    places = torch.arange(count) % config.dlg.samples_per_chain
    assert torch.equal(starts, places % every == 0)


def test_rk45_is_counted_for_each_image(model, posterior):
    config = config_of("dlg:rk45").model_copy(update={"tolerance": 0.01})
    passes: list[int] = []
    hook = model.network.register_forward_pre_hook(lambda network, inputs: passes.append(1))
    drawn = generate(model, None, range(12), config, 3, posterior=posterior)
    hook.remove()
    assert planned_nfe(config.resolved(ObjectiveConfig())) is None
    # A batch goes on until its last image is done; an image counts what it took itself.
    assert drawn.nfe <= sum(passes) / 4 and len(set(drawn.nfe_N.tolist())) > 1
    alone = generate(model, None, range(4), config, 1, posterior=posterior)
    hook = model.network.register_forward_pre_hook(lambda network, inputs: passes.append(1))
    passes.clear()
    generate(model, None, range(4), config, 1, posterior=posterior)
    hook.remove()
    assert int(alone.nfe_N.sum()) == len(passes)


class Died(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("dies_at", [1, 20, 35, 61, 88])
def test_an_interrupted_call_goes_on(model, posterior, tmp_path, monkeypatch, dies_at):
    config, numbers = config_of(restart_every=3), range(20)
    monkeypatch.setattr(chain_images, "KEEP_SECONDS", 0.0)
    kept = StateFile(tmp_path / "work" / "chains.safetensors", "weights")
    whole = generate(model, None, numbers, config, 2, posterior=posterior)
    passes: list[int] = []

    def die(network, inputs):
        passes.append(1)
        if len(passes) == dies_at:
            raise Died

    hook = model.network.register_forward_pre_hook(die)
    with pytest.raises(Died):
        generate(model, None, numbers, config, 2, posterior=posterior, state_file=kept)
    rest = generate(model, None, numbers, config, 2, posterior=posterior, state_file=kept)
    again = len(passes) - dies_at
    hook.remove()
    assert torch.equal(rest.image_NHWC, whole.image_NHWC) and torch.equal(rest.nfe_N, whole.nfe_N)
    assert rest.chains is not None and whole.chains is not None
    assert torch.equal(rest.chains.trace_NT, whole.chains.trace_NT)
    assert not kept.path.exists()
    everything = int(whole.nfe_N.sum()) // 2 + (len(numbers) // 4 % 2) * int(whole.nfe_N[-4:].sum()) // 2
    # At most the work since the last sample of the batch was lost: one sample and its start.
    lost = dies_at + again - everything
    assert 0 <= lost <= int(whole.nfe_N.max())


def test_what_was_kept_of_other_chains_is_refused(model, posterior, tmp_path, monkeypatch):
    monkeypatch.setattr(chain_images, "KEEP_SECONDS", 0.0)
    kept = StateFile(tmp_path / "chains.safetensors", "weights")
    passes: list[int] = []

    def die(network, inputs):
        passes.append(1)
        if len(passes) == 40:
            raise Died

    hook = model.network.register_forward_pre_hook(die)
    with pytest.raises(Died):
        generate(model, None, range(20), config_of(), 2, posterior=posterior, state_file=kept)
    hook.remove()
    assert kept.path.exists()
    for changed, config, batch in (
        (replace(kept, identity="other weights"), config_of(), 2),
        (kept, config_of(step_size=0.1), 2),
        (kept, config_of(), 3),
    ):
        with pytest.raises(UserError, match="delete it to start them anew"):
            generate(model, None, range(20), config, batch, posterior=posterior, state_file=changed)


def test_chains_that_leave_every_bound_are_told(model, posterior):
    found = generate(model, None, range(4), config_of(step_size=1e30), 1, posterior=posterior)
    assert found.finite_N is not None and not found.finite_N.any() and (found.image_NHWC == 128).all()
    with pytest.raises(UserError, match="image 0 is not finite, and neither are 3 others"):
        check_finite(found.finite_N, range(4))


def test_a_preset_gives_what_is_not_given():
    plain = {"step_rule": "underdamped", "skip": 7, "samples_per_chain": 5}
    found = DlgConfig.model_validate({"preset": "velocity", "skip": 7})
    assert {key: getattr(found, key) for key in plain} == plain
    # The preset itself is not among what images depend on.
    whole = DlgConfig.model_validate(found.model_dump())
    assert whole.model_dump() == found.model_dump() and "preset" not in whole.model_dump()
    assert DlgConfig(preset="published") == DlgConfig()
    with pytest.raises(ValueError, match="'published' or 'velocity'"):
        DlgConfig.model_validate({"preset": "fast"})
    for preset in get_args(ChainPreset):
        DlgConfig.model_validate({"preset": preset})


def test_presets_are_what_they_are():
    """A changed default shows here: `published` in units of −1…1, and `velocity` as it was measured."""
    published = {"step_size": 0.2, "step_rule": "constant", "level_rule": "argmax", "select": "smallest"}
    published |= {"tweedie": True, "initial": "kar2", "initial_steps": 19, "initial_noise": 1.0}
    published |= {"burn_in_step_size": 2.0, "burn_in_first": 10, "burn_in": 10}
    velocity = {"step_size": 1.5, "step_rule": "underdamped", "momentum": 0.98, "skip": 3, "thin": 1}
    velocity |= {"level_rule": "sample", "select": "last", "tweedie": False, "samples_per_chain": 5}
    velocity |= {"initial": "dpm-solver++", "initial_steps": 8, "initial_noise": 0.5}
    velocity |= {"burn_in_first": 0, "burn_in": 2}
    for preset, expected in {"published": published, "velocity": velocity}.items():
        found = DlgConfig.model_validate({"preset": preset}).model_dump()
        assert {key: found[key] for key in expected} == expected


def test_settings_of_chains_belong_to_samplers_of_chains():
    with pytest.raises(ValueError, match="expected a sampler of chains, such as dlg:euler"):
        SamplerConfig.model_validate({"sampler": "euler", "dlg": {"skip": 3}})
    resolved = config_of("dlg:kar1").resolved(ObjectiveConfig())
    assert (resolved.sampler, resolved.integrator, resolved.schedule) == ("dlg:heun", "heun", "karras")
    assert "dlg" in resolved.plain() and "dlg" not in SamplerConfig().plain()
    assert (config_of().images_per_unit, SamplerConfig().images_per_unit) == (4, 1)


@pytest.mark.parametrize("sampler", ["dlg:kar2", "dlg:rk45", "dlg:ddim"])
@pytest.mark.parametrize("select", ["last", "smallest"])
def test_a_chain_that_is_no_longer_finite_is_told_and_changes_no_other(
    model, posterior, tmp_path, monkeypatch, sampler, select
):
    config, numbers = config_of(sampler, select=select, samples_per_chain=6, level_rule="sample"), range(24)
    config = config.model_copy(update={"tolerance": 0.01})
    whole = generate(model, None, numbers, config, 4, posterior=posterior)
    passes: list[int] = []
    fails_after = dies_at = 10**9

    def fail(network, inputs, output):
        """From some pass on the network has nothing but NaN for the chain in the batch's third row."""
        passes.append(1)
        if len(passes) == dies_at:
            raise Died
        if len(passes) > fails_after:
            output = output.clone()
            output[2] = float("nan")
        return output

    hook = model.network.register_forward_hook(fail)
    generate(model, None, [6 * chain for chain in range(4)], config, 4, posterior=posterior)
    fails_after = len(passes)  # the first sample of each is drawn
    passes.clear()
    found = generate(model, None, numbers, config, 4, posterior=posterior)
    lost_N = torch.tensor([13 <= number < 18 for number in numbers])
    others_N = torch.tensor([number // 6 != 2 for number in numbers])
    assert found.finite_N is not None and torch.equal(found.finite_N, ~lost_N)
    assert (found.image_NHWC[lost_N] == 128).all()
    assert found.chains is not None and whole.chains is not None and whole.finite_N is not None
    assert whole.finite_N.all()
    for name in ("image_NHWC", "nfe_N", "trace_NT", "sigma_N"):
        assert torch.equal(getattr(found.chains, name)[others_N], getattr(whole.chains, name)[others_N])

    # Interrupted in the middle it goes on alike: what was lost before is kept, and what is lost stays so.
    monkeypatch.setattr(chain_images, "KEEP_SECONDS", 0.0)
    kept = StateFile(tmp_path / "chains.safetensors", "weights")
    dies_at = fails_after + (len(passes) - fails_after) // 2
    passes.clear()
    with pytest.raises(Died):
        generate(model, None, numbers, config, 4, posterior=posterior, state_file=kept)
    rest = generate(model, None, numbers, config, 4, posterior=posterior, state_file=kept)
    hook.remove()
    assert torch.equal(rest.image_NHWC, found.image_NHWC) and torch.equal(rest.finite_N, found.finite_N)


def test_a_chain_that_was_not_finite_starts_anew_where_chains_do(model, posterior):
    config = config_of(restart_every=2, samples_per_chain=4, select="last")
    passes: list[int] = []
    fails_at = 0

    def fail(network, inputs, output):
        passes.append(1)
        return output * float("nan") if len(passes) == fails_at else output

    hook = model.network.register_forward_hook(fail)
    generate(model, None, [0], config, 1, posterior=posterior)
    fails_at = len(passes) + 1
    passes.clear()
    found = generate(model, None, range(4), config, 1, posterior=posterior)
    hook.remove()
    assert found.finite_N is not None and found.finite_N.tolist() == [True, False, True, True]


@pytest.mark.parametrize("sampler", ["dlg:kar2", "dlg:rk45"])
def test_the_way_to_each_image_is_filmed_and_changes_nothing(model, posterior, sampler):
    config = config_of(sampler)
    plain = generate(model, None, range(10), config, 2, posterior=posterior)
    filmed = generate(model, None, range(10), config, 2, posterior=posterior, frames=5)
    assert plain.frames_NFHWC is None and filmed.frames_NFHWC.shape == (10, 5, 8, 8, 1)
    assert torch.equal(filmed.image_NHWC, plain.image_NHWC) and torch.equal(filmed.nfe_N, plain.nfe_N)
    assert torch.equal(filmed.frames_NFHWC[:, -1], filmed.image_NHWC)
    # The way to the second image of a chain is that of the chain, whatever was asked for before.
    some = generate(model, None, [1, 5], config, 2, posterior=posterior, frames=5)
    assert (some.frames_NFHWC.int() - filmed.frames_NFHWC[[1, 5]].int()).abs().max() <= 1
    # An evaluation of the network is a frame, where each has as many as there are.
    if sampler == "dlg:kar2":
        evaluations = int(plain.nfe_N[1])
        every = generate(model, None, [0, 1], config, 1, posterior=posterior, frames=evaluations).frames_NFHWC
        assert len(torch.unique(every[1].flatten(1), dim=0)) >= evaluations - 1


def test_chains_of_seeds_are_those_of_each_seed_alone(model, posterior):
    config = config_of()
    seeds, numbers, labels = [7, 8, 7, 7, 8], [0, 0, 1, 0, 5], torch.tensor([1, 2, 1, 2, 0])
    mixed = generate(model, labels, numbers, config, 3, posterior=posterior, seeds=seeds)
    for place, seed in enumerate(seeds):
        of_seed = config.model_copy(update={"seed": seed})
        label = labels[place : place + 1]
        alone = generate(model, label, [numbers[place]], of_seed, 3, posterior=posterior)
        assert (alone.image_NHWC[0].int() - mixed.image_NHWC[place].int()).abs().max() <= 1
        torch.testing.assert_close(alone.chains.trace_NT[0], mixed.chains.trace_NT[place])
