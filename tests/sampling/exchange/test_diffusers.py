"""Networks in and out of diffusers: what each computes, and what each draws, against the other's own classes.

The references are diffusers' own `DiTTransformer2DModel`, `DiTPipeline` and schedulers, with random weights.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
)
from safetensors.torch import load_file

from ditmoe.data.encoding.vae import read_facts
from ditmoe.launcher.commands.convert import command as convert
from ditmoe.model.canonical import canonical_state, load_canonical
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.weights.published import PublishedWeights, load_published, read_published, save_published
from ditmoe.parallel.checkpoint.folder import read_info, write_weights_checkpoint
from ditmoe.sampling.drawing.generate import generate_float
from ditmoe.sampling.drawing.noise import ImageNoise
from ditmoe.sampling.network.load import load_model
from ditmoe.sampling.pipeline import DitmoePipeline, DitmoeTransformer2DModel
from ditmoe.sampling.settings.config import SamplerConfig
from tests.sampling.exchange.test_exports import EXPERTS, SHAPE, make_state

NAMES = ["cat", "dog", "owl"]


def make_stock(folder: Path, most: str = "10GB", **settings: Any) -> DiTTransformer2DModel:
    """diffusers' DiT of random weights, saved by itself; the embedders are the same in all blocks, as in DiT's."""
    defaults = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
        "norm_eps": 1e-6,
    }
    random = torch.Generator().manual_seed(0)
    network = DiTTransformer2DModel(**{**defaults, **settings}).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2, generator=random)
        for block in network.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    network.save_pretrained(folder, max_shard_size=most)
    return network


def inputs(size: int = 8, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    timestep_B = torch.tensor([0, 1, 20, 437, 999])
    return torch.randn(5, channels, size, size, generator=random), timestep_B, torch.tensor([0, 1, 2, 9, 10])


def ours_of(path: Path, **options: Any) -> DiT:
    config, state = load_published(path, **options)
    network = DiT(config)
    load_canonical(network, state, str(path))
    return network.eval()


@pytest.mark.parametrize(
    "settings",
    [{}, {"norm_eps": 1e-5}, {"patch_size": 4, "num_attention_heads": 4, "in_channels": 1, "out_channels": 1}],
    ids=["learned sigma", "the default norm", "patch 4, no sigma"],
)
def test_what_diffusers_computes_is_what_ours_computes(tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = make_stock(tmp_path / "stock", **settings)
    ours = ours_of(tmp_path / "stock")
    x_BCHW, timestep_B, label_B = inputs(channels=theirs.config.in_channels)
    with torch.no_grad():
        expected = theirs(x_BCHW, timestep=timestep_B, class_labels=label_B).sample
        found = ours(x_BCHW, timestep_B.float(), label_B)
        assert expected.std() > 0.1
        # DiT has 1e-6 in every norm, and so have ours; diffusers' default before each MLP makes that difference.
        tolerance = 1e-5 if theirs.config.norm_eps == 1e-6 else 1e-4
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert ours.config.learn_sigma == (theirs.config.out_channels == 2 * theirs.config.in_channels)
    # Weights that were trained by DiT's own code want its frequencies of time, and compute something else.
    trained = ours_of(tmp_path / "stock", config={"timestep_frequencies": "dit"})
    with torch.no_grad():
        assert (trained(x_BCHW, timestep_B.float(), label_B) - expected)[1:].abs().max() > 1e-3


def test_every_way_that_its_weights_lie(tmp_path: Path) -> None:
    """One file, several with an index, a pickle read by `weights_only`, a pipeline's folder, and old names."""
    make_stock(tmp_path / "one")
    make_stock(tmp_path / "several", most="20KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    pickled = tmp_path / "pickled"
    shutil.copytree(tmp_path / "one", pickled)
    weights = pickled / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), pickled / "diffusion_pytorch_model.bin")
    weights.unlink()
    pipeline = tmp_path / "pipeline"
    shutil.copytree(tmp_path / "one", pipeline / "transformer")
    (pipeline / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    shutil.copy(
        pipeline / "transformer" / weights.name,
        pipeline / "transformer" / "diffusion_pytorch_model.fp16.safetensors",
    )
    old = json.loads((pipeline / "transformer" / "config.json").read_text())
    (pipeline / "transformer" / "config.json").write_text(json.dumps({**old, "_class_name": "Transformer2DModel"}))
    expected = load_published(tmp_path / "one")
    for name in ("several", "pickled", "pipeline"):
        config, state = load_published(tmp_path / name)
        assert config == expected[0] and state.keys() == expected[1].keys()
        assert all(torch.equal(state[each], expected[1][each]) for each in state), name


def test_what_is_no_dit_of_ours_is_refused(tmp_path: Path) -> None:
    make_stock(tmp_path / "good")
    config = json.loads((tmp_path / "good" / "config.json").read_text())
    state = load_file(tmp_path / "good" / "diffusion_pytorch_model.safetensors")

    def refused(
        message: str, change: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None
    ) -> None:
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, **(change or {})}))
        torch.save({**state, **(tensors or {})}, folder / "diffusion_pytorch_model.bin")
        with pytest.raises(UserError, match=message):
            read_published(folder)

    refused("_class_name is 'UNet2DModel'; expected DiTTransformer2DModel", {"_class_name": "UNet2DModel"})
    refused("activation_fn = 'geglu'", {"activation_fn": "geglu"})
    refused("norm_eps = 0.001", {"norm_eps": 1e-3})
    refused("attention_bias true", {"attention_bias": False})
    refused("num_layers = 10000000", {"num_layers": 10**7})
    refused(r"transformer_blocks\.2\.attn1\.to_q\.weight is missing", {"num_layers": 3})
    refused(r"is no weight of a DiT", {"num_layers": 1})
    refused("out_channels is 5", {"out_channels": 5})
    other = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    refused("differs from that of block 0", None, {other: state[other] + 1})
    key = "transformer_blocks.1.attn1.to_k.weight"
    refused(r"blocks\.1\.attn\.qkv\.weight cannot be joined from", None, {key: state[key][:, :3].clone()})
    refused("num_classes = 10 in the weights, 11", {"num_embeds_ada_norm": 11})
    (tmp_path / "bad" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(UserError, match="pickled objects"):
        read_published(tmp_path / "bad")
    (tmp_path / "bad" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"has no weights; expected diffusion_pytorch_model.safetensors"):
        read_published(tmp_path / "bad")


def checkpoint_of(folder: Path, config: ModelConfig, kind: str, vae: Path | None = None) -> Path:
    """A checkpoint of ours with random weights, whose VAE is known where there is one."""
    objective = ObjectiveConfig.model_validate({"kind": kind})
    save_published(PublishedWeights(config, make_state(config), None, objective, NAMES), folder / "source.pt")
    convert(folder / "source.pt", folder / "ours", vae=vae)
    return folder / "ours"


STOCK = ModelConfig(**SHAPE, timestep_frequencies="diffusers")


def test_a_dense_network_goes_out_to_stock_diffusers(tmp_path: Path, vae_folder: Path) -> None:
    """`DiTPipeline` loads it, computes what ours computes, and draws the same pictures."""
    ours = checkpoint_of(tmp_path, STOCK, "ddpm", vae_folder)
    assert load_model(ours).vae is not None  # the checkpoint knows its VAE
    convert(ours, tmp_path / "out", to="diffusers")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline) is DiTPipeline and type(pipeline.transformer) is DiTTransformer2DModel
    assert type(pipeline.vae) is AutoencoderKL and type(pipeline.scheduler) is DDIMScheduler
    assert pipeline.get_label_ids(["owl", "cat"]) == [2, 0]
    network = load_model(ours).network
    x_BCHW, timestep_B, _ = inputs()
    label_B = torch.tensor([0, 1, 2, 3, 2])
    theirs_B = torch.where(label_B == 3, 1000, label_B)  # the null label of its pipeline
    with torch.no_grad():
        expected = network(x_BCHW, timestep_B.float(), label_B)
        found = pipeline.transformer(x_BCHW, timestep=timestep_B, class_labels=theirs_B).sample
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    # The same scheduler and noise: its pipeline with its network, and ours with ours.
    pipeline.set_progress_bar_config(disable=True)
    mine = DitmoePipeline(
        wrapped(network, "ddpm"), DDIMScheduler.from_config(pipeline.scheduler.config), pipeline.vae
    )
    mine.set_progress_bar_config(disable=True)
    for scale in (1.0, 3.0):
        settings = {"class_labels": [0, 2], "guidance_scale": scale, "num_inference_steps": 5, "output_type": "np"}
        expected_BHWC = pipeline(**settings, generator=torch.Generator().manual_seed(3)).images
        found_BHWC = mine(**settings, generator=torch.Generator().manual_seed(3)).images
        assert expected_BHWC.shape == (2, 16, 16, 3) and expected_BHWC.std() > 0.01
        np.testing.assert_allclose(found_BHWC, expected_BHWC, atol=1e-4)
    # And back: what diffusers saves again has lost our description, and is read by what it says itself.
    pipeline.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "back")
    info = read_info(tmp_path / "back")
    assert info.objective.kind == "ddpm" and info.model.num_classes == 1000
    assert info.dataset["latents"]["vae_sha256"] == read_facts(vae_folder).sha256
    again = load_model(tmp_path / "back").network
    with torch.no_grad():
        torch.testing.assert_close(again(x_BCHW, timestep_B.float(), theirs_B), expected, rtol=1e-5, atol=1e-5)


def wrapped(network: Any, kind: str, names: list[str] | None = None) -> DitmoeTransformer2DModel:
    config = network.config
    model = DitmoeTransformer2DModel(
        config.model_dump(), kind, names, config.image_size, config.channels, config.out_channels
    )
    load_canonical(model.network, canonical_state(network), "ours")
    return model.eval()


@pytest.mark.parametrize("kind", ["ddpm", "rectified_flow"])
def test_a_mixture_goes_out_with_our_class(tmp_path: Path, vae_folder: Path, kind: str) -> None:
    """diffusers loads it, it computes the same, and draws what `ditmoe sample` draws from the same noise."""
    config = ModelConfig(**{**SHAPE, **EXPERTS, "depth": 1}, attention="qk_norm")
    ours = checkpoint_of(tmp_path, config, kind, vae_folder)
    convert(ours, tmp_path / "out", to="diffusers")
    pipeline = DitmoePipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.transformer) is DitmoeTransformer2DModel
    model = load_model(ours)
    x_BCHW, timestep_B, _ = inputs()
    t_B = timestep_B.float() / (1 if kind == "ddpm" else 1000)
    label_B = torch.tensor([0, 1, 2, 3, 2])
    with torch.no_grad():
        expected = model.network(x_BCHW, t_B, label_B)
        found = pipeline.transformer(x_BCHW, timestep=t_B, class_labels=label_B).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    settings = SamplerConfig(sampler="euler", steps=4, seed=5, cfg_scale=2.0)
    labels, steps = torch.tensor([2, 0]), settings.steps
    drawn = generate_float(model, labels, [0, 1], settings, batch=2).image_NCHW
    noise = ImageNoise(settings.seed, [0, 1], (4, 8, 8), torch.device("cpu")).initial()
    if kind == "ddpm":
        # In four steps both take the levels 999, 666, 333 and 0; theirs starts at σ, ours at √(1 + σ²).
        pipeline.scheduler = EulerDiscreteScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="linspace"
        )
        sigma = pipeline.scheduler.init_noise_sigma
        noise = noise * (1 + sigma**-2) ** 0.5
    images = pipeline(["owl", 0], 2.0, None, steps, "pt", latents=noise).images
    torch.testing.assert_close(images, (drawn / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-4)
    assert images.std() > 0.01
    assert len(pipeline([0], 1.0, num_inference_steps=2).images) == 1
    with pytest.raises(ValueError, match="'cow' is no class of this network; expected one of cat, dog, owl"):
        pipeline(["cow"])
    with pytest.raises(ValueError, match="3 is no class"):
        pipeline([3])


def test_a_network_in_pixels_and_one_with_dit_s_frequencies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither is for stock diffusers: ours are. `--stock` writes the latter for it nevertheless, and says so."""
    config = ModelConfig(**{**SHAPE, "channels": 3})
    ours = checkpoint_of(tmp_path, config, "ddpm")
    convert(ours, tmp_path / "out", to="diffusers")
    pipeline = DitmoePipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.transformer) is DitmoeTransformer2DModel and pipeline.vae is None
    picture = pipeline(["dog"], num_inference_steps=2).images[0]
    assert picture.size == (8, 8) and picture.mode == "RGB"
    assert "stock" in capsys.readouterr().err
    convert(ours, tmp_path / "stock", to="diffusers", stock=True)
    assert "its pictures depart" in capsys.readouterr().err
    assert type(DitmoePipeline.from_pretrained(tmp_path / "stock").transformer) is DiTTransformer2DModel
    back = read_published(tmp_path / "stock")
    assert back.config == config  # our own description says which frequencies it has
    assert all(torch.equal(back.state()[name], tensor) for name, tensor in make_state(config).items())
    mixture = ModelConfig(**{**SHAPE, **EXPERTS})
    write_weights_checkpoint(tmp_path / "mixture", mixture, ObjectiveConfig(), make_state(mixture), None)
    with pytest.raises(UserError, match=r"--stock: .* cannot be a DiTTransformer2DModel: it has experts"):
        convert(tmp_path / "mixture", tmp_path / "new", to="diffusers", stock=True)
    assert not (tmp_path / "new").exists()


def test_schedulers_of_another_objective_are_refused(tmp_path: Path) -> None:
    ours = checkpoint_of(tmp_path, ModelConfig(**SHAPE), "rectified_flow")
    convert(ours, tmp_path / "out", to="diffusers")
    pipeline = DitmoePipeline.from_pretrained(tmp_path / "out")
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler is not for rectified_flow"):
        pipeline([0])
    # A folder of others whose scheduler shows a network other times, or other noise, than ours would.
    make_stock(tmp_path / "flow" / "transformer")
    (tmp_path / "flow" / "model_index.json").write_text("{}")
    (tmp_path / "flow" / "scheduler").mkdir()
    scheduler = tmp_path / "flow" / "scheduler" / "scheduler_config.json"
    for message, settings in (
        ("shows a network t from 0 to 1000", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
        ("prediction_type = 'v_prediction', expected 'epsilon'", {"prediction_type": "v_prediction"}),
        ("beta_schedule = 'scaled_linear'", {"beta_schedule": "scaled_linear"}),
    ):
        scheduler.write_text(json.dumps(settings))
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "flow", tmp_path / "new")
    scheduler.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    convert(tmp_path / "flow", tmp_path / "new")
    assert read_info(tmp_path / "new").objective.kind == "ddpm"


def test_it_is_whole_or_not_there(
    tmp_path: Path, vae_folder: Path, make_vae: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = checkpoint_of(tmp_path, STOCK, "ddpm")
    before = sorted(tmp_path.iterdir())

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ditmoe.sampling.exchange.folder.shutil.copyfile", full)
    with pytest.raises(UserError, match=r"out: could not be written .No space left"):
        convert(ours, tmp_path / "out", to="diffusers", vae=vae_folder)
    assert sorted(tmp_path.iterdir()) == before
    other = make_vae(tmp_path / "vae", latent_channels=2)
    with pytest.raises(UserError, match="decodes latents of 2 channels, and the network"):
        convert(ours, tmp_path / "out", to="diffusers", vae=other)
    save_published(PublishedWeights(STOCK, make_state(STOCK)), tmp_path / "bare.pt", bare=True)
    with pytest.raises(UserError, match=r"--objective: .* does not say it"):
        convert(tmp_path / "bare.pt", tmp_path / "out", ["model.heads=2"], to="diffusers")
