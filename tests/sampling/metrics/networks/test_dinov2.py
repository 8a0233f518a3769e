"""DINOv2 against a transformer of torch with equal weights, and files of both namings, made here."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ditmoe.model.errors import UserError
from ditmoe.sampling.metrics.networks.dinov2 import DEVIATION, MEAN, DinoV2, VisionTransformer, load_dinov2

CPU = torch.device("cpu")
FEATURES, DEPTH = 128, 3


def random_network(patches: int, features: int = FEATURES, depth: int = DEPTH) -> VisionTransformer:
    torch.manual_seed(0)
    network = VisionTransformer(features, depth, patches).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(0, 0.05 if parameter.ndim > 1 else 0.2)
            if name.endswith(("gamma", "norm1.weight", "norm2.weight", "norm.weight")):
                parameter.add_(0.7)
    return network


def hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that Hugging Face's files have."""
    found = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": torch.zeros(1, FEATURES),
        "embeddings.position_embeddings": state["pos_embed"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    for kind in ("weight", "bias"):
        found[f"embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
    for block in range(DEPTH):
        ours, theirs = f"blocks.{block}", f"encoder.layer.{block}"
        for kind in ("weight", "bias"):
            parts = state[f"{ours}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                found[f"{theirs}.attention.attention.{name}.{kind}"] = part.clone()
            found[f"{theirs}.attention.output.dense.{kind}"] = state[f"{ours}.attn.proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{theirs}.{name}.{kind}"] = state[f"{ours}.{name}.{kind}"]
        for number in (1, 2):
            found[f"{theirs}.layer_scale{number}.lambda1"] = state[f"{ours}.ls{number}.gamma"]
    return found


def torch_encoder(network: VisionTransformer) -> nn.TransformerEncoder:
    """torch's own pre-norm encoder with the same weights: a LayerScale goes into the layer before it."""
    layer = nn.TransformerEncoderLayer(
        FEATURES,
        FEATURES // 64,
        4 * FEATURES,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
    )
    encoder = nn.TransformerEncoder(
        layer, DEPTH, norm=nn.LayerNorm(FEATURES, eps=1e-6), enable_nested_tensor=False
    ).eval()
    state = network.state_dict()
    with torch.no_grad():
        encoder.norm.weight.copy_(state["norm.weight"])  # type: ignore[union-attr,operator]
        encoder.norm.bias.copy_(state["norm.bias"])  # type: ignore[union-attr,operator]
        for number, theirs in enumerate(encoder.layers):
            ours = {
                key.removeprefix(f"blocks.{number}."): value
                for key, value in state.items()
                if key.startswith(f"blocks.{number}.")
            }
            attention, mlp = ours["ls1.gamma"], ours["ls2.gamma"]
            pairs = {
                "self_attn.in_proj_weight": ours["attn.qkv.weight"],
                "self_attn.in_proj_bias": ours["attn.qkv.bias"],
                "self_attn.out_proj.weight": attention[:, None] * ours["attn.proj.weight"],
                "self_attn.out_proj.bias": attention * ours["attn.proj.bias"],
                "linear1.weight": ours["mlp.fc1.weight"],
                "linear1.bias": ours["mlp.fc1.bias"],
                "linear2.weight": mlp[:, None] * ours["mlp.fc2.weight"],
                "linear2.bias": mlp * ours["mlp.fc2.bias"],
                **{
                    f"{norm}.{kind}": ours[f"{norm}.{kind}"]
                    for norm in ("norm1", "norm2")
                    for kind in ("weight", "bias")
                },
            }
            theirs.load_state_dict(pairs)
    return encoder


def images(count: int, channels: int = 3, size: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


@torch.no_grad()
def test_it_is_the_transformer_of_torch_on_equal_weights() -> None:
    network = random_network(16)
    x_NCHW = torch.randn(3, 3, 224, 224)
    patch_NTD = nn.functional.unfold(x_NCHW, 14, stride=14).transpose(1, 2)
    patch_NTD = patch_NTD @ network.patch_embed.proj.weight.flatten(1).T + network.patch_embed.proj.bias
    token_NTD = torch.cat((network.cls_token.expand(3, -1, -1), patch_NTD), 1) + network.pos_embed
    expected = torch_encoder(network)(token_NTD)[:, 0]
    found = network(x_NCHW)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", [16, 37])
def test_it_is_the_network_of_transformers_on_equal_weights(tmp_path: Path, side: int) -> None:
    network = random_network(side)
    size = side * 14
    config = transformers.Dinov2Config(
        hidden_size=FEATURES,
        num_hidden_layers=DEPTH,
        num_attention_heads=FEATURES // 64,
        image_size=size,
        patch_size=14,
    )
    config.save_pretrained(tmp_path)
    state = {**hugging_face(network.state_dict()), "embeddings.mask_token": torch.zeros(1, FEATURES)}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    theirs, loading = transformers.Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    x_NCHW = torch.randn(2, 3, size, size)
    expected = theirs.eval()(x_NCHW).last_hidden_state[:, 0]
    torch.testing.assert_close(network(x_NCHW), expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "saved")  # what the package writes is read here as well
    read = load_dinov2(tmp_path / "saved" / "model.safetensors", CPU)
    save_file(
        {key: value.contiguous() for key, value in network.state_dict().items()}, tmp_path / "own.safetensors"
    )
    assert read.fingerprint == load_dinov2(tmp_path / "own.safetensors", CPU).fingerprint


@torch.no_grad()
def test_positions_of_another_grid_are_between_those_of_the_weights() -> None:
    network = random_network(37)
    found = network.positions(16)[0]
    torch.testing.assert_close(found[0], network.pos_embed[0, 0])
    grid = network.pos_embed[0, 1:].reshape(37, 37, FEATURES).double().numpy()

    def cubic(t: float) -> float:
        t, a = abs(t), -0.75
        return (
            (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0
        )

    # The scale is that of 16.1 patches, as in the published network.
    for row, column in ((0, 0), (3, 9), (15, 15)):
        y, x = ((place + 0.5) * 37 / 16.1 - 0.5 for place in (row, column))
        expected = np.zeros(FEATURES)
        for i in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
            for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                expected += cubic(y - i) * cubic(x - j) * grid[np.clip(i, 0, 36), np.clip(j, 0, 36)]
        np.testing.assert_allclose(found[1 + 16 * row + column].numpy(), expected, atol=1e-5)


def test_files_of_both_namings_give_the_same_features_of_prepared_images(tmp_path: Path) -> None:
    network = random_network(37)
    state = {key: value.detach().contiguous() for key, value in network.state_dict().items()}
    save_file({**state, "mask_token": torch.zeros(1, FEATURES)}, tmp_path / "own.safetensors")
    save_file(hugging_face(state), tmp_path / "hf.safetensors")
    prefixed = {f"dinov2.{key}": value for key, value in hugging_face(state).items()}
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    own, theirs, third = (load_dinov2(tmp_path / f"{name}.safetensors", CPU) for name in ("own", "hf", "prefixed"))
    assert own.fingerprint == theirs.fingerprint == third.fingerprint and own.dimension == FEATURES
    image_NHWC = images(2)
    found = own.features(image_NHWC)["features"]
    np.testing.assert_array_equal(found, theirs.features(image_NHWC)["features"])
    for row, image_HWC in zip(found, image_NHWC, strict=True):
        resized = Image.fromarray(image_HWC).resize((224, 224), Image.Resampling.BICUBIC)
        x_HWC = (np.asarray(resized, dtype=np.float32) / 255 - np.float32(MEAN)) / np.float32(DEVIATION)
        with torch.no_grad():
            expected = network(torch.from_numpy(x_HWC).permute(2, 0, 1)[None])[0]
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
    grey = images(2, channels=1)
    np.testing.assert_array_equal(
        own.features(grey)["features"], own.features(np.repeat(grey, 3, axis=3))["features"]
    )


@pytest.mark.parametrize(
    ("features", "depth", "count"), [(384, 12, 22_056_576), (768, 12, 86_580_480), (1024, 24, 304_368_640)]
)
def test_sizes_have_the_published_numbers_of_parameters(features: int, depth: int, count: int) -> None:
    with torch.device("meta"):
        network = VisionTransformer(features, depth, 37)
    assert (
        sum(parameter.numel() for parameter in network.parameters()) == count - features
    )  # without the mask token


def test_other_files_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--features dinov2: no file given; .*dinov2-large"):
        load_dinov2(None, CPU)
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="no such file"):
        load_dinov2(path, CPU)
    path.write_bytes(b"{" * 30)
    with pytest.raises(UserError, match="no safetensors file"):
        load_dinov2(path, CPU)
    state = {key: value.detach() for key, value in random_network(4).state_dict().items()}
    wrongs = {
        "holds no DINOv2": {"a": torch.zeros(1)},
        r"its pos_embed is \(1, 18, 128\)": {**state, "pos_embed": torch.zeros(1, 18, FEATURES)},
        r"blocks\.1\.mlp\.fc1\.weight is missing": {
            k: v for k, v in state.items() if k != "blocks.1.mlp.fc1.weight"
        },
        "register_tokens is unexpected": {**state, "register_tokens": torch.zeros(1, 4, FEATURES)},
        r"norm\.weight is \(5,\), expected \(128,\)": {**state, "norm.weight": torch.zeros(5)},
    }
    for message, wrong in wrongs.items():
        with pytest.raises(UserError, match=message):
            DinoV2(wrong, path, CPU)
