"""An AutoencoderKL is read from the local disk, whole and of the right kind, or refused with one message."""

import ast
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ditmoe.data.encoding.vae import CONFIG_FILE, WEIGHTS_FILE, find_vae, load_vae, read_facts
from ditmoe.data.shards.images import to_network_range
from ditmoe.data.shards.index import LatentFacts
from ditmoe.model.errors import UserError


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | values))


def test_moments_and_images_are_those_of_diffusers(make_vae: Callable[..., Path], tmp_path: Path) -> None:
    vae = load_vae(read_facts(make_vae(tmp_path, scaling_factor=0.5, shift_factor=0.25)))
    image_BHWC = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8))
    mean_BCHW, logvar_BCHW = vae.encode_moments(image_BHWC)
    assert mean_BCHW.shape == logvar_BCHW.shape == (3, 4, 8, 8)
    assert (vae.facts.pixel_channels, vae.facts.latent_channels, vae.facts.reduction) == (3, 4, 2)
    with torch.no_grad():
        expected = vae.network.encode(to_network_range(image_BHWC.permute(0, 3, 1, 2))).latent_dist
        assert torch.allclose(mean_BCHW, expected.mean, atol=1e-5)
        assert torch.allclose(logvar_BCHW, expected.logvar, atol=1e-5)
        images = vae.decode((mean_BCHW - 0.25) * 0.5)
        assert torch.allclose(images, vae.network.decode(mean_BCHW).sample, atol=1e-5)
    assert images.shape == (3, 3, 16, 16)
    alone = vae.decode((mean_BCHW[1:2] - 0.25) * 0.5)
    assert torch.equal(alone[0], images[1])  # not even by rounding does the batch change an image


def test_the_checksum_is_of_what_it_computes(make_vae: Callable[..., Path], tmp_path: Path) -> None:
    first = read_facts(make_vae(tmp_path / "a")).sha256
    change_config(tmp_path / "a", _diffusers_version="0.1", _name_or_path="elsewhere")
    assert read_facts(tmp_path / "a").sha256 == first
    assert read_facts(make_vae(tmp_path / "b")).sha256 == first
    assert read_facts(make_vae(tmp_path / "c", seed=1)).sha256 != first
    change_config(tmp_path / "a", scaling_factor=0.3)
    assert read_facts(tmp_path / "a").sha256 != first


def test_what_is_no_vae_is_refused(make_vae: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder; expected the local folder of a diffusers"):
        read_facts(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config\.json; expected"):
        read_facts(tmp_path)
    folder = make_vae(tmp_path / "vae")
    with pytest.raises(UserError, match=r"has no config\.json.*; .*/vae has one"):
        read_facts(tmp_path)
    change_config(folder, _class_name="AutoencoderTiny")
    with pytest.raises(UserError, match="_class_name is 'AutoencoderTiny'"):
        read_facts(folder)
    change_config(folder, _class_name="AutoencoderKL", scaling_factor=None)
    with pytest.raises(UserError, match="scaling_factor is None"):
        read_facts(folder)
    (folder / CONFIG_FILE).write_text("[" * 100_000)
    with pytest.raises(UserError, match="could not be read"):
        read_facts(folder)


def test_weights_come_from_safetensors_alone(make_vae: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_vae(tmp_path)
    weights = folder / WEIGHTS_FILE
    weights.rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"has diffusion_pytorch_model\.bin \(a pickle is never read\); expected"):
        read_facts(folder)
    (folder / "diffusion_pytorch_model.bin").rename(weights)
    tensors = load_file(weights)
    removed = tensors.pop(next(iter(tensors)))
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"weights do not fit config\.json: missing: "):
        load_vae(read_facts(folder))
    save_file({**tensors, "stranger": removed}, weights)
    with pytest.raises(UserError, match=r"missing: .*; unexpected: stranger"):
        load_vae(read_facts(folder))
    weights.write_bytes(b"damaged")
    with pytest.raises(UserError, match="could not be loaded as an AutoencoderKL"):
        load_vae(read_facts(folder))


def test_a_list_of_weights_beside_the_one_file_is_refused(make_vae: Callable[..., Path], tmp_path: Path) -> None:
    """diffusers would load what it lists, and the checksum is of the one file."""
    folder, other = make_vae(tmp_path / "a"), make_vae(tmp_path / "b", seed=1)
    (folder / "other.safetensors").write_bytes((other / WEIGHTS_FILE).read_bytes())
    names = dict.fromkeys(load_file(other / WEIGHTS_FILE), "other.safetensors")
    (folder / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(UserError, match=r"has diffusion_pytorch_model.safetensors.index.json beside diffusion_"):
        load_vae(read_facts(folder))


def test_another_vae_than_that_of_the_data_is_refused(
    vae_folder: Path, make_vae: Callable[..., Path], tmp_path: Path
) -> None:
    facts = read_facts(vae_folder)
    latents = LatentFacts(vae=str(vae_folder), vae_sha256=facts.sha256, scale=facts.scale, pixels=16)
    assert find_vae(latents) == facts
    other = make_vae(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=f"other: checksum is {read_facts(other).sha256}; expected {facts.sha256}"):
        find_vae(latents, other)
    gone = latents.model_copy(update={"vae": str(tmp_path / "gone")})
    with pytest.raises(UserError, match=r"gone: no such folder.*say where it lies now with --vae FOLDER"):
        find_vae(gone)
    assert find_vae(gone, vae_folder) == facts


def test_diffusers_is_imported_only_to_load_one() -> None:
    """It takes seconds, which training on images need not wait; and by what diffusers itself is given."""
    root = Path(__file__).resolve().parents[3]
    for floor in ("launcher", "slurm", "sampling", "parallel", "data", "model"):
        for path in (root / floor).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert "ditmoe.sampling.pipeline" not in names, path
                if path != root / "sampling" / "pipeline.py":
                    assert not any(name.split(".")[0] == "diffusers" for name in names), path


def test_every_odd_value_of_a_configuration_is_one_message(tmp_path: Path, make_vae: Callable[..., Path]) -> None:
    folder = make_vae(tmp_path)
    file = folder / CONFIG_FILE
    config = json.loads(file.read_text())
    odd = (None, True, "x", "", -1, 0, 0.5, 10**9, 10**400, [], {}, [[1]], [10**12], ["DownEncoderBlock2D"] * 3)
    changed = [{**config, key: value} for key in config for value in odd]
    changed += [{name: value for name, value in config.items() if name != key} for key in config]
    refused = 0
    for each in random.Random(0).sample(changed, 120):
        file.write_text(json.dumps(each))
        try:
            load_vae(read_facts(folder))
        except UserError as error:
            refused += 1
            assert str(folder) in str(error) and len(str(error)) < 1500
    assert refused > 40
    for text in ("", "[]", "[" * 10**5, "9" * 10**5, "{}"):
        file.write_text(text)
        with pytest.raises(UserError, match=CONFIG_FILE):
            read_facts(folder)
