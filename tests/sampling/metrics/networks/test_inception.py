"""Both Inception files, as files of the same form with random weights; nothing is downloaded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ditmoe.model.errors import UserError
from ditmoe.sampling.metrics.networks.inception import (
    CLASSES,
    FEATURES,
    FidInception,
    StateDictInception,
    TorchScriptInception,
    load_inception,
)
from ditmoe.sampling.metrics.networks.resize import half_pixel_bilinear, tensorflow_bilinear

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> FidInception:
    torch.manual_seed(0)
    network = FidInception().eval()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "bn.bias")):
                tensor.normal_(0, 0.1)
    return network


@pytest.fixture(scope="module")
def state_path(network: FidInception, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "state.pth"
    # The published file has no batch counters.
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, path)
    return path


class Scripted(nn.Module):
    """Called as NVIDIA's file is."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(3, 1008)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        mean = img.float().mean(dim=[2, 3])
        if return_features:
            return mean.repeat(1, 683)[:, :2048]
        logits = functional.linear(mean, self.output.weight)
        if not no_output_bias:
            logits = logits + self.output.bias
        return logits.softmax(dim=1)


def images(count: int, channels: int, size: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def test_the_network_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = FidInception()
    # Inception-v3 without its auxiliary head has 23,834,568 with 1000 classes; this one has 1008.
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 + 8 * (FEATURES + 1)


def test_keys_are_those_of_the_published_file(network: FidInception) -> None:
    keys = set(network.state_dict())
    for key in (
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_5b.branch1x1.conv.weight",
        "Mixed_5d.branch3x3dbl_3.bn.running_var",
        "Mixed_6a.branch3x3.conv.weight",
        "Mixed_6e.branch7x7dbl_5.bn.bias",
        "Mixed_7a.branch7x7x3_4.conv.weight",
        "Mixed_7c.branch3x3dbl_3b.conv.weight",
        "Mixed_7c.branch_pool.bn.weight",
        "fc.weight",
        "fc.bias",
    ):
        assert key in keys


def test_state_dict_gives_features_of_grey_and_colour_images(state_path: Path) -> None:
    network = load_inception(state_path, CPU)
    assert isinstance(network, StateDictInception)
    grey = images(2, 1)
    found = network.features(grey)
    assert found["features"].shape == (2, FEATURES)
    assert found["spatial"].shape == (2, 7 * 17 * 17)
    assert found["probabilities"].shape == (2, CLASSES)
    np.testing.assert_allclose(found["probabilities"].sum(1), 1, rtol=1e-5)
    assert np.isfinite(found["features"]).all() and found["features"].std() > 0
    again = network.features(np.repeat(grey, 3, axis=3))
    np.testing.assert_array_equal(found["features"], again["features"])
    assert network.fingerprint == load_inception(state_path, CPU).fingerprint


def test_probabilities_leave_out_the_bias(state_path: Path, network: FidInception) -> None:
    found = load_inception(state_path, CPU).features(images(1, 3))
    weight = network.fc.weight.detach().numpy()
    logits = found["features"] @ weight.T
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(found["probabilities"], expected, rtol=1e-3)


def test_mean_pools_leave_out_the_padding_and_the_last_block_takes_the_maximum(network: FidInception) -> None:
    # On a constant map a mean that counts the padding would fall at the edges.
    ones = torch.ones(1, 192, 5, 5)
    pooled = network.Mixed_5b(ones)[:, -32:]
    inner = network.Mixed_5b.branch_pool(ones)
    torch.testing.assert_close(pooled, inner)
    x = torch.randn(1, 2048, 4, 4)
    maximum = functional.max_pool2d(x, 3, stride=1, padding=1)
    torch.testing.assert_close(network.Mixed_7c(x)[:, -192:], network.Mixed_7c.branch_pool(maximum))
    assert network.Mixed_7c(x).shape[1] == FEATURES


def test_torchscript_file(tmp_path: Path) -> None:
    module = Scripted()
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(module).save(str(path))
    network = load_inception(path, CPU)
    assert isinstance(network, TorchScriptInception)
    found = network.features(images(3, 1))
    assert found["features"].shape == (3, FEATURES)
    assert set(found) == {"features", "probabilities"}
    x = torch.from_numpy(images(3, 1)).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
    expected = module(x, no_output_bias=True).detach().numpy()
    np.testing.assert_allclose(found["probabilities"], expected, rtol=1e-5)


def test_another_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.jit.script(nn.Conv2d(3, 4, 3)).save(str(path))
    with pytest.raises(UserError, match=r"other\.pt: cannot be called"):
        load_inception(path, CPU).features(images(1, 3))


def test_each_resize_is_a_network_of_its_own(state_path: Path, tmp_path: Path) -> None:
    image_NHWC = images(2, 3)
    plain, published = (load_inception(state_path, CPU, resize) for resize in ("pytorch-fid", "tensorflow"))  # type: ignore[arg-type]
    assert load_inception(state_path, CPU).fingerprint == plain.fingerprint != published.fingerprint
    assert (plain.description["resize"], published.description["resize"]) == ("pytorch-fid", "tensorflow")
    pixels = torch.from_numpy(image_NHWC).permute(0, 3, 1, 2)
    for network, resize in ((plain, half_pixel_bilinear), (published, tensorflow_bilinear)):
        assert isinstance(network, StateDictInception)
        seen: list[Tensor] = []
        network._network.Conv2d_1a_3x3.register_forward_pre_hook(
            lambda module, given, seen=seen: seen.append(*given)
        )
        network.features(image_NHWC)
        torch.testing.assert_close(seen[0], resize(pixels, 299), rtol=0, atol=0)
    assert (tensorflow_bilinear(pixels, 299) - half_pixel_bilinear(pixels, 299)).abs().max() > 0.1
    torch.jit.script(Scripted()).save(str(tmp_path / "scripted.pt"))
    with pytest.raises(UserError, match=r"--resize pytorch-fid: .* resizes by itself"):
        load_inception(tmp_path / "scripted.pt", CPU, "pytorch-fid")
    assert load_inception(tmp_path / "scripted.pt", CPU, "tensorflow").description["resize"] == "by the file"


@pytest.mark.parametrize("path", [None, Path("/nowhere/inception.pt")])
def test_a_missing_file_tells_which_are_accepted(path: Path | None) -> None:
    with pytest.raises(UserError) as caught:
        load_inception(path, CPU)
    for part in ("inception-2015-12-05.pt", "pt_inception-2015-12-05-6726825d.pth", "--features-path", "StyleGAN"):
        assert part in str(caught.value)


def test_wrong_files_are_one_message(state_path: Path, tmp_path: Path) -> None:
    state = torch.load(state_path, weights_only=True)
    path = tmp_path / "wrong.pth"
    moved = dict(state)
    moved["extra.weight"] = moved.pop("fc.weight")
    moved["fc.bias"] = torch.zeros(1000)
    torch.save(moved, path)
    with pytest.raises(
        UserError, match=r"missing: fc\.weight; unexpected: extra\.weight; wrong shape: fc\.bias is"
    ):
        load_inception(path, CPU)
    path.write_bytes(state_path.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"wrong\.pth: neither TorchScript nor a state dict"):
        load_inception(path, CPU)
    path.write_text("run: {dir: runs/my}")
    with pytest.raises(UserError, match=r"wrong\.pth: neither TorchScript nor a state dict"):
        load_inception(path, CPU)
    torch.save(nn.Linear(1, 1), path)  # a pickled module is not read
    with pytest.raises(UserError, match=r"wrong\.pth"):
        load_inception(path, CPU)
