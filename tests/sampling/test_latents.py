"""A network of latents: what it draws is decoded by the VAE that encoded its data, and by no other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from typer.testing import CliRunner

from ditmoe.data.encoding.encode import encode
from ditmoe.data.encoding.plan import EncodeSettings, prepare_encoding
from ditmoe.data.encoding.vae import read_facts
from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.shapes import Shapes
from ditmoe.data.shards.index import DatasetIndex, load_index
from ditmoe.data.stream.stream import dealing_of, open_stream
from ditmoe.launcher.commands.data.group import app
from ditmoe.launcher.commands.sample import command
from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import checkpoint_path, read_info, write_weights_checkpoint
from ditmoe.sampling.batching.models import ModelKey, Models
from ditmoe.sampling.drawing.generate import generate, generate_float
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, evaluate_run, prepare_job
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER
from ditmoe.sampling.metrics.networks import opening
from ditmoe.sampling.network.load import load_model
from ditmoe.sampling.noise_level import training as noise_training
from ditmoe.sampling.noise_level.classifier import load_noise_classifier, space_of
from ditmoe.sampling.noise_level.training import NoiseTraining, train_noise_classifier, training_dataset
from ditmoe.sampling.service.listing import Listing
from ditmoe.sampling.settings.config import PreviewConfig, SamplerConfig
from tests.markers import change_marker
from tests.sampling.small_run import images_of

MODEL = ModelConfig(
    depth=1, hidden=16, heads=2, patch=4, experts=2, experts_per_token=1, image_size=8, channels=4, num_classes=5
)
SAMPLER = SamplerConfig(steps=2, seed=1, cfg_scale=1.5, cfg_channels=3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "shards"
    pack(Shapes(60, 5, 16, seed=1), folder, PackSettings())
    return folder


@pytest.fixture(scope="module")
def encoded(shards: Path, vae_folder: Path) -> DatasetIndex:
    out = shards.parent / "latents"
    encoding = prepare_encoding(shards, out, read_facts(vae_folder), EncodeSettings())
    assert encoding.folder.begin(False)
    return encode(encoding, torch.device("cpu"))


def write_run(folder: Path, config: ModelConfig = MODEL, dataset: dict[str, object] | None = None) -> Path:
    """A run of random weights that says `dataset` of its data, beside what published weights say."""
    torch.manual_seed(0)
    network = DiT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    path = checkpoint_path(folder, 0)
    write_weights_checkpoint(path, config, ObjectiveConfig(), canonical_state(network), None)
    change_marker(path, lambda facts: facts["dataset"].update(dataset or {}))
    return folder


@pytest.fixture
def run(tmp_path: Path, encoded: DatasetIndex) -> Path:
    return write_run(tmp_path / "run", dataset=encoded.facts)


def test_what_the_network_draws_is_decoded(run: Path) -> None:
    model = load_model(run)
    assert model.vae is not None and model.image_shape == (3, 16, 16)
    numbers = list(range(5))
    images = generate_float(model, None, numbers, SAMPLER, batch=5).image_NCHW
    assert images.shape == (5, 3, 16, 16) and images.dtype == torch.float32
    latents = generate_float(replace(model, vae=None), None, numbers, SAMPLER, batch=5).image_NCHW
    assert latents.shape == (5, 4, 8, 8)
    with torch.no_grad():
        expected = model.vae.network.decode(latents / 0.18215).sample
    assert torch.allclose(images, expected, atol=1e-4)
    # Image i is a function of (seed, i) in pixels too.
    assert torch.allclose(generate_float(model, None, [3, 4], SAMPLER, batch=4).image_NCHW, images[3:], atol=1e-3)
    assert generate(model, None, [], SAMPLER, batch=4).image_NHWC.shape == (0, 16, 16, 3)


def test_sample_makes_a_picture_in_pixels(run: Path, tmp_path: Path) -> None:
    command(run, classes="1", count=3, steps=2, device="cpu", out=tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (2 + 3 * 66, 2 + 66)  # 16 pixels, enlarged by 4
        assert np.asarray(picture)[2:66, 2:66].std() > 0


def test_frames_of_latents_are_decoded_as_the_images_are(run: Path) -> None:
    model = load_model(run)
    images = generate(model, None, range(5), SAMPLER, batch=2, frames=50)
    frames_NFHWC = images.frames_NFHWC
    assert frames_NFHWC is not None and frames_NFHWC.shape == (5, SAMPLER.steps, 16, 16, 3)
    assert torch.equal(frames_NFHWC[:, -1], images.image_NHWC)
    assert not torch.equal(frames_NFHWC[:, 0], images.image_NHWC)


def test_the_vae_may_move_but_not_change(
    tmp_path: Path, encoded: DatasetIndex, vae_folder: Path, make_vae: Callable[..., Path]
) -> None:
    assert encoded.latents is not None
    gone = encoded.latents.model_copy(update={"vae": str(tmp_path / "gone")})
    moved = write_run(tmp_path / "moved", dataset=encoded.model_copy(update={"latents": gone}).facts)
    with pytest.raises(UserError, match=r"gone: no such folder.*say where it lies now with --vae FOLDER"):
        command(moved, steps=1, device="cpu")
    command(moved, steps=1, count=1, device="cpu", vae=vae_folder, out=tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()
    other = make_vae(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=f"checksum is {read_facts(other).sha256}; expected {gone.vae_sha256}"):
        command(moved, steps=1, device="cpu", vae=other)
    damaged = write_run(tmp_path / "damaged", dataset={"latents": {"vae": 3}})
    with pytest.raises(UserError, match=r"dataset\.latents\.vae = 3"):
        load_model(damaged)


def test_one_key_names_the_place_of_a_vae_that_has_moved(
    tmp_path: Path, encoded: DatasetIndex, shards: Path, vae_folder: Path, make_vae: Callable[..., Path]
) -> None:
    """`data.vae` of config.yaml: for sampling, an evaluation, the service, a drawn dataset, and a preview."""
    assert encoded.latents is not None
    gone = encoded.latents.model_copy(update={"vae": str(tmp_path / "gone")})
    index = encoded.model_copy(update={"latents": gone})
    run = write_run(tmp_path / "runs" / "moved", dataset=index.facts)
    with pytest.raises(UserError, match=r"data\.vae in .*config\.yaml"):
        load_model(run)
    with pytest.raises(UserError, match="gone: no such folder"):
        prepare_job(EvaluationOptions(source=run, sampler=SAMPLER, count=4))
    (run / "config.yaml").write_text(f"data: {{vae: {vae_folder}}}\n")
    model = load_model(run)
    assert model.vae is not None and model.vae.facts.path == vae_folder
    command(run, steps=1, count=1, device="cpu", out=tmp_path / "x.png")
    job = prepare_job(EvaluationOptions(source=run, sampler=SAMPLER, count=4, data=str(shards)))
    assert job.vae == vae_folder
    listing = Listing(tmp_path / "runs")
    assert [(found["id"], found["latents"]) for found in listing.described()] == [("moved", True)]
    key = ModelKey(checkpoint_path(run, 0), "ema", "fp32")
    with Models(torch.device("cpu"), 2**30, 4).use(key) as loaded:
        assert loaded.model.vae is not None and loaded.model.vae.facts.path == vae_folder
    arguments = ["synthesize", "--from", str(run), str(tmp_path / "b"), "--count", "2", "--steps", "1"]
    drawn = CliRunner().invoke(app, [*arguments, "--score", "none", "--processes", "1"])
    assert drawn.exit_code == 0, drawn.output
    # What one command is told goes before, another VAE is refused there too, and a key without sense is named.
    other = make_vae(tmp_path / "other", seed=1)
    assert load_model(run, vae=vae_folder).vae is not None
    (run / "config.yaml").write_text(f"data: {{vae: {other}}}\n")
    with pytest.raises(UserError, match=f"checksum is {read_facts(other).sha256}"):
        load_model(run)
    (run / "config.yaml").write_text("data: {vae: [1]}\n")
    with pytest.raises(UserError, match=r"config\.yaml: data\.vae = \[1\]: expected a path"):
        load_model(run)
    # A checkpoint without config.yaml has the key that it was trained with.
    (run / "config.yaml").unlink()
    change_marker(checkpoint_path(run, 0), lambda facts: facts["config"].update(data={"vae": str(vae_folder)}))
    assert load_model(run).vae is not None
    assert PreviewConfig.model_validate({"every": 3, "vae": None}) == PreviewConfig(every=3)
    with pytest.raises(ValidationError, match=r"write data\.vae"):
        PreviewConfig.model_validate({"vae": "sd-vae"})


def test_a_network_of_latents_makes_a_dataset_of_images(
    tmp_path: Path, run: Path, encoded: DatasetIndex, shards: Path, vae_folder: Path
) -> None:
    assert encoded.latents is not None
    gone = encoded.latents.model_copy(update={"vae": str(tmp_path / "gone")})
    moved = write_run(tmp_path / "moved", dataset=encoded.model_copy(update={"latents": gone}).facts)
    common = ["--count", "10", "--steps", "2", "--score", "none", "--processes", "1", "--seed", "1"]
    synthesize = CliRunner().invoke(app, ["synthesize", "--from", str(run), str(tmp_path / "a"), *common])
    assert synthesize.exit_code == 0, synthesize.output
    index = load_index(tmp_path / "a")
    assert (index.image_size, index.channels, index.latents, index.total) == (16, 3, None, 10)
    expected = generate(load_model(run), None, list(range(10)), SamplerConfig(steps=2, seed=1), batch=10)
    found = np.concatenate([batch.image_NHWC for batch in images_of(tmp_path / "a").read_all(10)])
    # Another number of threads may round otherwise.
    assert np.abs(found.astype(int) - expected.image_NHWC.numpy()).max() <= 1
    arguments = ["synthesize", "--from", str(moved), str(tmp_path / "b"), *common]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, UserError) and "with --vae" in str(refused.exception)
    assert CliRunner().invoke(app, [*arguments, "--vae", str(vae_folder)]).exit_code == 0
    assert load_index(tmp_path / "b").shards[0].samples == 10


def test_published_weights_take_a_vae_that_fits(tmp_path: Path, vae_folder: Path) -> None:
    published = write_run(tmp_path / "published")
    with pytest.raises(UserError, match=r"the network draws 4 channels, .* give their VAE with --vae"):
        command(published, steps=1, device="cpu")
    assert load_model(published, vae=vae_folder).image_shape == (3, 16, 16)
    pixels = write_run(tmp_path / "pixels", MODEL.model_copy(update={"channels": 3}))
    with pytest.raises(UserError, match=r"latents of 4 channels, .* draws 3; expected --vae left out"):
        command(pixels, steps=1, device="cpu", vae=vae_folder)


def test_an_evaluation_compares_pixels(
    run: Path, shards: Path, encoded: DatasetIndex, vae_folder: Path, tmp_path: Path
) -> None:
    options = EvaluationOptions(
        source=run, sampler=SAMPLER, count=10, batch=5, data=shards, recogniser=False, cache=tmp_path / "cache"
    )
    latents = shards.parent / "latents"
    with pytest.raises(UserError, match=r"latents: holds latents; expected the 16×16 images .* with --reference"):
        prepare_job(replace(options, data=latents))
    job = replace(prepare_job(options), feature_classifier=replace(FEATURE_CLASSIFIER, passes=1))
    metrics = evaluate_run(job)
    assert encoded.latents is not None and metrics["evaluation"]["vae"] == encoded.latents.vae_sha256
    with np.load(job.folder / "samples.npz") as samples:
        assert samples["arr_0"].shape == (10, 16, 16, 3)
    # Published weights, and a file of others in place of the images: nothing says what they were trained on.
    file = tmp_path / "VIRTUAL.npz"
    images = np.zeros((9, 16, 16, 3), np.uint8)
    np.savez(file, mu=np.zeros(2048), sigma=np.eye(2048), arr_0=images)
    adm = replace(options, source=write_run(tmp_path / "adm"), data=file, features="inception", vae=vae_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "load_inception", lambda path, device, resize: None)
        assert prepare_job(adm).class_names == tuple("01234")
        np.savez(file, mu=np.zeros(2048), sigma=np.eye(2048), arr_0=images[:, :8, :8])
        with pytest.raises(UserError, match=r"VIRTUAL\.npz: .* image_size is 8, expected 16"):
            prepare_job(adm)
    small = tmp_path / "small"
    pack(Shapes(10, 5, 8, seed=1), small, PackSettings())
    with pytest.raises(UserError, match="image_size is 8, expected 16"):
        prepare_job(replace(options, data=small))
    published = write_run(tmp_path / "published")
    with pytest.raises(UserError, match=r"channels is 3, expected 4.* give their VAE with --vae"):
        prepare_job(replace(options, source=published))
    assert load_index(latents).latents is not None
    with_vae = prepare_job(replace(options, source=published, vae=Path(encoded.latents.vae)))
    assert with_vae.evaluation.vae == encoded.latents.vae_sha256


def test_the_noise_classifier_is_of_latents(
    run: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It sees the latents as the network does, and refuses the pixels that they were encoded from."""
    monkeypatch.setattr(noise_training, "CALIBRATION_DRAWS", 20)
    info = read_info(checkpoint_path(run, 0))
    space, settings = space_of(info), NoiseTraining(steps=2, batch=10)
    assert space.shape == (4, 8, 8)
    dataset = training_dataset(info, [str(shards.parent / "latents")], 0)
    train_noise_classifier(tmp_path / "out", dataset, space, settings, torch.device("cpu"))
    batch = next(noise_training.noisy_batches(dataset, space._replace(sigma_max=space.sigma_min), settings, 0))
    latent = next(open_stream(dataset, dealing_of(dataset.config, start=0, micro_batch=10, ranks=1))).image_BCHW
    torch.testing.assert_close(batch.x_BCHW, latent, rtol=0, atol=6 * space.sigma_min)
    classifier = load_noise_classifier(tmp_path / "out", space)
    assert classifier(batch.x_BCHW, torch.zeros(10, dtype=torch.int64)).shape == (10, 1000)
    with pytest.raises(UserError, match=r"holds samples of \[3, 16, 16\].*the network draws \[4, 8, 8\]"):
        pixels = training_dataset(info, [str(shards)], 0)
        train_noise_classifier(tmp_path / "no", pixels, space, settings, torch.device("cpu"))
