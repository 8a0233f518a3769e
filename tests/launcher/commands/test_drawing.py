"""The sampler's options: one for each setting, and the same again for the processes of a job."""

import inspect

import typer
from typer.testing import CliRunner

from ditmoe.launcher.commands.drawing import Drawing, draws_images
from ditmoe.model.config import ObjectiveConfig
from ditmoe.sampling.settings.chains import DlgConfig
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import SAMPLE_STEPS

SEEN: list[tuple[str, bool, Drawing]] = []


@draws_images()
def command(name: str, *, before: bool = False, drawing: Drawing) -> None:
    """A command that draws."""
    SEEN.append((name, before, drawing))


@draws_images(few_steps=True)
def look(*, drawing: Drawing) -> None:
    """A command that leaves the number of steps to the sampler."""
    SEEN.append(("look", False, drawing))


app = typer.Typer()
app.command()(command)


def parsed(*arguments: str) -> tuple[str, bool, Drawing]:
    SEEN.clear()
    result = CliRunner().invoke(app, ["x", *arguments])
    assert result.exit_code == 0, result.output
    return SEEN.pop()


def test_defaults_are_those_of_the_configuration():
    name, before, drawing = parsed()
    assert (name, before) == ("x", False)
    assert drawing.config() == SamplerConfig()
    # ddpm_timestep is for those who write a configuration.
    assert set(drawing.values) == set(SamplerConfig.model_fields) - {"ddpm_timestep"}
    command("x")
    assert SEEN.pop()[2] == drawing
    assert list(inspect.signature(command).parameters)[:4] == ["name", "before", "sampler", "steps"]


def test_steps_that_are_left_to_the_sampler_stay_so_when_passed_on() -> None:
    look()
    drawing = SEEN.pop()[2]
    assert not any(argument.startswith("--steps") for argument in drawing.arguments())
    few = drawing.config().for_a_look(ObjectiveConfig())
    assert few.steps == SAMPLE_STEPS["euler"] != drawing.config().resolved(ObjectiveConfig()).steps
    look(steps=7)
    drawing = SEEN.pop()[2]
    assert "--steps=7" in drawing.arguments() and drawing.config().for_a_look(ObjectiveConfig()).steps == 7


def test_options_survive_being_passed_on():
    changed = {
        "sampler": "euler-maruyama",
        "steps": 3,
        "schedule": "own",
        "ddim_eta": 0.1,
        "churn": 0.3,
        "churn_min": 1e-7,
        "churn_max": 1e9,
        "churn_noise": 1 / 3,
        "tolerance": 2e-7,
        "corrector_steps": 2,
        "corrector_snr": 0.1 + 0.2,
        "diffusion_form": "increasing-decreasing",
        "diffusion_norm": 1 / 9,
        "last_step": "tweedie",
        "last_step_size": 1e-7,
        "tweedie": True,
        "cfg_scale": 1.25,
        "cfg_channels": 2,
        "cfg_sigma_min": 0.1,
        "cfg_sigma_max": 1 / 7,
        "cache_interval": 3,
        "cache_order": 2,
        "precision": "bf16",
        "seed": 5,
    }
    of_chains = {
        "sampler": "dlg:euler-maruyama",
        "dlg": ("skip=3", "step-size=0.125", "class_scales=[1, 2.5]", "restart_every=4"),
    }
    assert Drawing(of_chains).config().dlg == DlgConfig(
        skip=3, step_size=0.125, class_scales=(1, 2.5), restart_every=4
    )
    drawing = parsed(*Drawing(of_chains).arguments())[2]
    assert drawing.config() == Drawing({**drawing.values, **of_chains}).config()
    config = SamplerConfig.model_validate(changed)
    assert all(
        getattr(config, key) != field.default
        for key, field in SamplerConfig.model_fields.items()
        if key in changed
    )
    _, before, drawing = parsed("--before", *Drawing(changed).arguments())
    assert before and drawing.config() == config
    assert parsed(*drawing.arguments())[2] == drawing
