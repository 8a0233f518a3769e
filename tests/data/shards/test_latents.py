"""Moments in shards: they come back as they were stored, and nothing else comes back."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from ditmoe.data.shards.decode import IMAGE_EXTENSIONS, BadSample
from ditmoe.data.shards.index import DatasetIndex, LatentFacts, ShardEntry
from ditmoe.data.shards.latents import FORMATS, decode_latent, draw_latents, encode_latent, latent_extension
from ditmoe.data.shards.tar_scan import split_name

C, S = 4, 8
RELATIVE_ERROR = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}
WAYS = [
    (dtype, format) for dtype in RELATIVE_ERROR for format in FORMATS if (dtype, format) != ("bfloat16", "npy")
]


def index_of(dtype: str = "float16", flips: str = "none", scale: float = 0.5, shift: float = 0.25) -> DatasetIndex:
    return DatasetIndex(
        name="x",
        image_size=S,
        channels=C,
        num_classes=1,
        class_names=("a",),
        latents=LatentFacts(
            vae="v", vae_sha256="0" * 64, scale=scale, shift=shift, pixels=64, dtype=dtype, flips=flips
        ),
        shards=(ShardEntry(file="x.tar", samples=1, bytes=1, sha256="0" * 64),),
    )


def moments(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(C, S, S, generator=generator) * 3
    return mean, (torch.randn(C, S, S, generator=generator) * 4 - 6).exp()


@pytest.mark.parametrize(("dtype", "format"), WAYS)
def test_moments_come_back(dtype: str, format: str) -> None:
    mean, std = moments()
    data = encode_latent(mean, std, dtype, format)  # type: ignore[arg-type]
    found = decode_latent(f"moments.{format}", data, index_of(dtype))
    for stored, value in zip(found, (mean, std), strict=True):
        assert stored.dtype == np.float32 and stored.shape == (C, S, S)
        tolerance = RELATIVE_ERROR[dtype] * value.abs().numpy() + (2**-25 if dtype == "float16" else 0)
        assert (np.abs(stored - value.numpy()) <= tolerance).all()


def test_a_deviation_of_minus_20_in_log_variance_survives_bfloat16() -> None:
    std = torch.full((C, S, S), np.exp(-10.03))
    data = encode_latent(torch.zeros(C, S, S), std, "bfloat16", "safetensors")
    found = decode_latent("moments.safetensors", data, index_of("bfloat16"))[1]
    assert np.abs(found / std.numpy() - 1).max() < 0.004
    by_log_variance = (0.5 * (2 * std.log()).bfloat16().float()).exp()
    assert (by_log_variance / std - 1).abs().max() > 0.015


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_what_a_dtype_cannot_hold_is_refused(value: float) -> None:
    mean, std = moments()
    mean[1, 2, 3] = value
    with pytest.raises(BadSample, match=r"the largest moment is .*, which float16 cannot hold"):
        encode_latent(mean, std, "float16", "npy")


def test_views_are_members_of_their_own() -> None:
    for name, expected in (("a/7.moments.npy", "moments.npy"), ("7.MIRRORED.safetensors", "mirrored.safetensors")):
        assert split_name(name)[1] == expected and expected not in IMAGE_EXTENSIONS
    both = index_of(flips="both")
    members = ["cls", "moments.npy", "mirrored.npy"]
    assert latent_extension(members, both, mirrored=False) == "moments.npy"
    assert latent_extension(members, both, mirrored=True) == "mirrored.npy"
    with pytest.raises(BadSample, match=r"no latent: expected one of mirrored\.safetensors.*, found cls, npy"):
        latent_extension(["cls", "npy"], both, mirrored=True)
    with pytest.raises(BadSample, match="2 latents: expected one of"):
        latent_extension(["moments.npy", "moments.safetensors"], both, mirrored=False)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def filled(value: float) -> np.ndarray:
    array = np.ones((2, C, S, S), np.float16)
    array[1, 0, 0, 0] = value
    return array


def test_what_is_not_as_the_index_says_is_refused() -> None:
    good = torch.ones(2, C, S, S, dtype=torch.float16)
    huge = npy(np.empty((0,), np.float16)).replace(b"(0,), }  ", b"(2, 9999999, 9999, 9999), }"[:9])
    for extension, data, message in (
        ("moments.npy", npy(np.ones((2, C, S, S), np.float32)), "of float32, expected float16"),
        ("moments.npy", npy(np.ones((2, C, S, 9), np.float16)), r"wrong size .* \[2, 4, 8, 9\], expected"),
        ("moments.npy", npy(filled(np.nan)), "NaN or infinity"),
        ("moments.npy", npy(filled(np.inf)), "NaN or infinity"),
        ("moments.npy", npy(filled(-0.5)), "negative standard deviation, -0.5"),
        ("moments.npy", npy(filled(1))[:-2], "has 1,022 bytes of numbers, expected 1,024"),
        ("moments.npy", npy(filled(1)) + b"..", "has 1,026 bytes of numbers"),
        ("moments.npy", npy(np.asfortranarray(filled(1))), "Fortran"),
        ("moments.npy", npy(filled(1).astype(">f2")), "byte order"),
        ("moments.npy", npy(np.array([print], dtype=object)), "a pickle"),
        ("moments.npy", huge, "undecodable|wrong size"),
        ("moments.npy", b"", "does not begin as an npy"),
        ("moments.safetensors", b"", "undecodable|header"),
        ("moments.safetensors", (2**63).to_bytes(8, "little") + b"{}", "its header claims"),
        ("moments.safetensors", (2).to_bytes(8, "little") + b"{}", "has the tensors none, expected moments alone"),
        ("moments.safetensors", (9).to_bytes(8, "little") + b"[[[[[[[[[", "undecodable moments.safetensors"),
        ("moments.safetensors", save({"x": good}), "has the tensors x, expected moments alone"),
        ("moments.safetensors", save({"moments": good, "y": good.clone()}), "has the tensors moments, y"),
        ("moments.safetensors", save({"moments": good.bfloat16()}), "of bfloat16, expected float16"),
        ("moments.safetensors", save({"moments": good.to(torch.uint8)}), "of U8, expected float16"),
        ("moments.safetensors", save({"moments": good})[:-1], "has 1,023 bytes"),
    ):  # fmt: skip
        with pytest.raises(BadSample, match=message):
            decode_latent(extension, data, index_of())


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_damaged_bytes_are_a_bad_sample_or_numbers(format: str, data: st.DataObject) -> None:
    stored = bytearray(encode_latent(*moments(), "float16", format))  # type: ignore[arg-type]
    for _ in range(data.draw(st.integers(1, 3))):
        stored[data.draw(st.integers(0, min(len(stored), 200) - 1))] = data.draw(st.integers(0, 255))
    kept = bytes(stored[: data.draw(st.integers(0, len(stored)))])
    try:
        mean, std = decode_latent(f"moments.{format}", kept, index_of())
    except BadSample:
        return
    assert mean.shape == std.shape == (C, S, S) and np.isfinite(mean).all() and (std >= 0).all()


def test_draws_have_the_mean_and_deviation_and_differ_by_position() -> None:
    facts = index_of(scale=0.5, shift=0.25).latents
    assert facts is not None
    mean, std = (value.numpy() for value in moments())
    std = np.maximum(std, 0.01)  # what is far smaller than the mean is lost in float32
    n = 4000
    stack = (np.broadcast_to(mean, (n, C, S, S)), np.broadcast_to(std, (n, C, S, S)))
    drawn = draw_latents(*stack, seed=3, positions=range(n), latents=facts)
    assert drawn.dtype == np.float32 and drawn.shape == (n, C, S, S)
    error = drawn.mean(0, dtype=np.float64) - (mean - 0.25) * 0.5
    assert np.abs(error / (0.5 * std / np.sqrt(n))).max() < 5
    assert np.abs(drawn.std(0, dtype=np.float64) / (0.5 * std) - 1).max() < 0.08
    # A sample of a batch is a function of (seed, position); in the next epoch it has another position.
    alone = draw_latents(stack[0][:1], stack[1][:1], seed=3, positions=[17], latents=facts)
    assert np.array_equal(alone[0], drawn[17])
    others = draw_latents(stack[0][:2], stack[1][:2], seed=4, positions=[17, 17 + n], latents=facts)
    assert not np.array_equal(others[0], drawn[17]) and not np.array_equal(others[0], others[1])
