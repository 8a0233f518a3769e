"""Files in place of real images: ours and those of others give the figures of the images they were made of."""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.data.shards.index import load_index, write_index
from ditmoe.data.shards.sample_table import SampleColumns, read_table, write_table
from ditmoe.data.storage.arrays import Arrays
from ditmoe.data.storage.parts import make_parts
from ditmoe.model.errors import UserError
from ditmoe.sampling.evaluation.make_reference import ReferenceJob, make_reference, prepare_reference
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER
from ditmoe.sampling.metrics.descriptions import ChunkDescriptions
from ditmoe.sampling.metrics.features import Features, describe
from ditmoe.sampling.metrics.networks.resize import BY_THE_FILE
from ditmoe.sampling.metrics.real_statistics import RealStatistics, real_statistics
from ditmoe.sampling.metrics.reference import ReferenceImages
from ditmoe.sampling.metrics.references.files import open_reference_file, reference_statistics
from ditmoe.sampling.metrics.references.image_sets import FolderImages, NpzImages
from ditmoe.sampling.metrics.references.own import OwnStatistics, write_reference
from ditmoe.sampling.metrics.references.statistics import NpzStatistics
from ditmoe.sampling.metrics.scores import score
from tests.sampling.small_run import images_of, write_digits

CPU = torch.device("cpu")


class Projection:
    """A feature network with all that Inception gives, of 12 and 5 numbers."""

    name = "inception"
    dimension = 12
    spatial_dimension: int | None = 5
    fingerprint = "0123456789abcdef"
    description: dict[str, Any] = {}  # as the protocol has it

    def features(self, image_NHWC: np.ndarray) -> Features:
        x_NP = image_NHWC.mean(3).reshape(len(image_NHWC), -1) / 255
        weight_PF = np.random.default_rng(0).normal(size=(x_NP.shape[1], 27))
        y_NF = np.tanh(x_NP @ weight_PF / 4)
        probability_NP = np.exp(y_NF[:, 17:]) / np.exp(y_NF[:, 17:]).sum(1, keepdims=True)
        return {"features": y_NF[:, :12], "spatial": y_NF[:, 12:17], "probabilities": probability_NP}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "shards")


@pytest.fixture(scope="module")
def image_NHWC(shards: Path) -> np.ndarray:
    return np.concatenate([batch.image_NHWC for batch in images_of(shards).read_all(64)])


@pytest.fixture
def drawn(image_NHWC: np.ndarray, tmp_path: Path) -> ChunkDescriptions:
    """Of 90 images that somebody drew: real ones with noise."""
    noise = np.random.default_rng(1).integers(0, 60, (90, 8, 8, 1))
    images = np.clip(image_NHWC[:90] + noise, 0, 255).astype(np.uint8)

    def describe_chunk(chunk: int) -> Arrays:
        return dict(describe(Projection(), images[45 * chunk : 45 * chunk + 45]))

    found = ChunkDescriptions(tmp_path / "described", ["0.npz", "1.npz"], describe_chunk)
    make_parts(found.parts)
    return found


def adm_file(path: Path, statistics: RealStatistics, images: np.ndarray | None = None, **more: Any) -> Path:
    """A file as the tools of ADM write it."""
    arrays: dict[str, Any] = {}
    for kind, names in (("features", ("mu", "sigma")), ("spatial", ("mu_s", "sigma_s"))):
        arrays |= dict(
            zip(names, (statistics.whole(kind).mean_F, statistics.whole(kind).covariance_FF), strict=True)
        )
    if images is not None:
        arrays["arr_0"] = np.repeat(images, 3, axis=3)
    np.savez(path, **{**arrays, **more})
    return path


def test_a_file_of_adm_gives_the_figures_of_its_images(
    shards: Path, image_NHWC: np.ndarray, drawn: ChunkDescriptions, tmp_path: Path
) -> None:
    network, cache = Projection(), tmp_path / "cache"
    statistics = real_statistics(images_of(shards), network, cache)
    expected = score(drawn, statistics)
    assert expected["warnings"] == [] and expected["sfid_floor"] is not None
    path = adm_file(tmp_path / "adm.npz", statistics, image_NHWC)
    reference = open_reference_file(path)
    assert isinstance(reference, NpzStatistics) and reference.form.image_size == 8
    found = score(drawn, reference_statistics(reference, network, cache))
    same = ("fid", "fid_error", "sfid", "sfid_error", "precision", "recall", "inception_score", "drawn_images")
    same += ("kid", "kid_floor", "precision_floor", "recall_floor")
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    assert found["inception_score_real"] == pytest.approx(expected["inception_score_real"], rel=1e-12)
    assert found["fid_floor"] is None and found["sfid_floor"] is None and found["real_images"] is None
    assert (
        "holds moments of all real images and some images; left out: floors of Fréchet distances"
        in found["warnings"][0]
    )
    assert "does not name the network" in found["warnings"][1]
    # Moments alone, as EDM's and pytorch-fid's are: no images are looked for, and what is missing is said.
    alone = tmp_path / "edm.npz"
    whole = statistics.whole("features")
    np.savez(alone, mu=whole.mean_F, sigma=whole.covariance_FF)
    reference = open_reference_file(alone)
    assert reference is not None
    found = score(drawn, reference_statistics(reference, network, cache))
    assert found["fid"] == expected["fid"] and "sfid" not in found
    assert found["precision"] is None and found["recall"] is None and found["inception_score"] is not None
    assert found["kid"] is None and found["inception_score_real"] is None
    assert "left out: floors of Fréchet distances, precision, recall and KID, sFID" in found["warnings"][0]
    # Images alone are as good as the shards, floors included.
    np.savez(tmp_path / "images.npz", arr_0=image_NHWC)
    reference = open_reference_file(tmp_path / "images.npz")
    assert isinstance(reference, NpzImages) and reference.parts == 2
    images = score(drawn, reference_statistics(reference, network, cache))
    for key in (*same, "fid_floor", "sfid_floor"):
        assert images[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-9), key


@pytest.fixture(scope="module")
def own(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our file, with both classifiers."""
    folder = tmp_path_factory.mktemp("own")
    job = ReferenceJob(
        images_of(shards),
        folder / "digits.safetensors",
        folder / "cache",
        feature_classifier=replace(FEATURE_CLASSIFIER, passes=1),
        recogniser_classifier=replace(RECOGNISER, passes=1),
    )
    make_reference(job)
    return job.out


def test_ours_gives_every_figure_again(
    shards: Path, own: Path, drawn: ChunkDescriptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Projection()
    real = images_of(shards)
    statistics = real_statistics(real, network, tmp_path / "cache")
    path = tmp_path / "projected.safetensors"
    write_reference(path, real, network, statistics)
    # The images are looked at no more.
    monkeypatch.setattr(ReferenceImages, "read", lambda *arguments: pytest.fail("an image is read"))
    reference = open_reference_file(path)
    assert isinstance(reference, OwnStatistics) and reference.form == real.form
    assert score(drawn, reference_statistics(reference, network, tmp_path / "none")) == score(drawn, statistics)
    assert [path.name for path in (tmp_path / "none").iterdir()] == [
        f"file-{reference.fingerprint}-{network.fingerprint}"
    ], "but floors are computed once"
    facts = reference.facts(None)
    assert facts["images"] == 300 and facts["made_of"] == {"place": str(shards), "fingerprint": real.fingerprint}
    assert facts["fingerprint"] == reference.fingerprint != real.fingerprint
    with pytest.raises(
        UserError, match="in the features of inception, and not of classifier; give --features inc"
    ):
        reference.check_features("classifier")
    other = Projection()
    other.fingerprint = "f" * 16
    with pytest.raises(UserError, match="features of inception 0123456789abcdef, and not of inception ffff"):
        reference.statistics(other)
    # The classifiers are those of the images, to the bit.
    with_classifiers = OwnStatistics(own)
    batch = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8, 1)
    features, recogniser = (with_classifiers.classifier(role, CPU) for role in ("features", "recogniser"))
    assert features is not None and recogniser is not None
    assert describe(features, batch)["features"].shape == (3, 64)
    found = with_classifiers.statistics(features)
    assert found.features_NF is not None and len(found.features_NF) == 300
    assert features.fingerprint != recogniser.fingerprint


def test_what_has_the_name_stays(shards: Path, own: Path, tmp_path: Path) -> None:
    before = own.read_bytes()
    for there in (own, tmp_path / "link.safetensors"):
        if there != own:
            os.symlink("nowhere", there)
        with pytest.raises(UserError, match="exists already; remove it or choose another name"):
            prepare_reference(str(shards), there, tmp_path)
    # Also where it comes while the images are looked at.
    statistics = real_statistics(images_of(shards), Projection(), tmp_path / "cache")
    with pytest.raises(UserError, match="exists already"):
        write_reference(own, images_of(shards), Projection(), statistics)
    assert own.read_bytes() == before and len(list(own.parent.glob(".ditmoe-*"))) == 0
    with pytest.raises(UserError, match=r"digits\.npz: expected a name that ends in \.safetensors"):
        prepare_reference(str(shards), tmp_path / "digits.npz", tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        prepare_reference(str(shards), tmp_path / "no" / "x.safetensors", tmp_path)


class Program:
    """What a pickle may be: something that is run when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["PICKLED"],))


def test_pickles_are_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICKLED", str(tmp_path / "ran"))
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"fid": Program()}))
    (tmp_path / "renamed.npz").write_bytes(pickle.dumps({"fid": Program()}))
    for name in ("edm2.pkl", "renamed.npz"):
        with pytest.raises(UserError, match=r"a pickle.*never opened.*numpy\.savez\('fid\.npz'"):
            open_reference_file(tmp_path / name)
    np.savez(tmp_path / "objects.npz", mu=np.array([Program()]), sigma=np.eye(1))
    with pytest.raises(UserError, match=r"mu\.npy holds Python objects \(a pickle\), which are never read"):
        open_reference_file(tmp_path / "objects.npz")
    assert not (tmp_path / "ran").exists()


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def cut_short(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-40])
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: zipped(p, {"../../mu.npy": npy(np.zeros(3))}), r"has \.\./\.\./mu; expected mu and sigma"),
        (lambda p: zipped(p, {"mu.npy": npy(np.zeros(3))}), "has no sigma beside its mu"),
        (
            lambda p: zipped(p, {"mu.npy": npy(np.zeros((3, 3))), "sigma.npy": npy(np.eye(3))}),
            r"mu is float64 \[3, ",
        ),
        (lambda p: zipped(p, {"mu.npy": npy(np.zeros(3))[:-8]}), r"mu\.npy has 144 bytes, expected 152"),
        (lambda p: zipped(p, {"mu.npy": b"nonsense"}), "not a readable npz file"),
        (
            lambda p: zipped(p, {"arr_0.npy": npy(np.zeros((2, 8, 8, 3)))}),
            "float64 .*expected images as uint8",
        ),
        (lambda p: zipped(p, {"arr_0.npy": npy(np.zeros((2, 8, 8, 4), np.uint8))}), "4 channels, expected 1"),
        (
            lambda p: zipped(p, {"arr_0.npy": npy(np.zeros((2, 8, 9, 3), np.uint8))}),
            "9×8 pixels, expected sq",
        ),
        (lambda p: zipped(p, {"arr_0.npy": npy(np.zeros((1, 4097, 1, 1), np.uint8))}), "expected 4096 a side"),
        (lambda p: cut_short(zipped(p, {"mu.npy": npy(np.zeros(3))})), "not a readable npz file"),
        (lambda p: p.write_bytes(b"GIF89a, or anything"), "no readable file of statistics"),
        (lambda p: save_file({"mu": torch.zeros(3)}, p), "safetensors of something else"),
        (lambda p: p.mkdir() or os.mkfifo(p / "x"), None),
        (lambda p: None, "could not be read: No such file"),
    ],
)
def test_files_that_are_none_are_one_message(
    make: Callable[[Path], Any], message: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "file.npz"
    make(path)
    if message is None:  # a folder is of shards
        assert open_reference_file(path) is None
        return
    with pytest.raises(UserError, match=message) as raised:
        open_reference_file(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_places_of_shards_are_no_files(tmp_path: Path) -> None:
    for place in (None, "s3://bucket/shards", "pipe:cat {}", tmp_path, tmp_path / "none"):
        assert open_reference_file(place) is None
    with pytest.raises(UserError, match="a file elsewhere; fetch it first"):
        open_reference_file("https://host/VIRTUAL_imagenet256_labeled.npz")


def test_moments_that_are_none_are_refused(shards: Path, tmp_path: Path) -> None:
    statistics = real_statistics(images_of(shards), Projection(), tmp_path / "cache")
    skewed = statistics.whole("features").covariance_FF.copy()
    skewed[0, 1] += 1
    for more, message in (
        ({"sigma": skewed}, "sigma is not symmetric"),
        ({"sigma": np.full((12, 12), np.nan)}, "sigma has values that are not finite"),
        ({"sigma": np.eye(11)}, r"sigma is float64 \[11, 11\], expected float64 \[12, 12\]"),
        ({"mu_s": np.zeros(7), "sigma_s": np.eye(7)}, r"mu_s is of 7 features, .* has 5 \(spatial\)"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "mu is of 9 features, and inception 0123456789abcdef has 12"),
    ):
        reference = open_reference_file(adm_file(tmp_path / "x.npz", statistics, **more))
        assert reference is not None
        with pytest.raises(UserError, match=message):
            reference_statistics(reference, Projection(), tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.update(format=2), "format: Input should be 1"),
        (lambda meta: meta.update(class_names=["\x1b[2J"] * 10), "class name .* cannot be printed"),
        (lambda meta: meta.update(image_size=10**9), "image_size: Input should be less than"),
        (
            lambda meta: meta["real"].update(left_out={"samples": 3, "first": []}),
            "left_out is not what was",
        ),
        (lambda meta: meta["real"].update(name="\x1b[2J"), "name or left_out is no text"),
        (
            lambda meta: meta["classifiers"]["features"]["settings"].update(dimension=10**8),
            "dimension: Input",
        ),
        (lambda meta: meta["classifiers"]["features"]["settings"].update(odd=1), "its classifier is damaged"),
        (lambda meta: meta["counts"].pop("features/rest"), "not all that belong to it"),
        (lambda meta: meta["counts"].update({"features/rest": -1}), r"counts\.features/rest: Input"),
        (lambda meta: meta["class_names"].pop(), r"its last layer is \[10, 64\], expected \[9, 64\]"),
        (lambda meta: meta["classifiers"]["features"].update(fingerprint="0" * 16), "the checksum of its weights"),
    ],
)
def test_ours_from_a_stranger_is_checked(
    own: Path, change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    with safe_open(own, framework="pt") as stored:
        meta = json.loads(stored.metadata()["ditmoe_reference"])
    network = OwnStatistics(own).classifier("features", CPU)
    assert network is not None
    change(meta)
    path = tmp_path / "x.safetensors"
    save_file(load_file(own), path, metadata={"ditmoe_reference": json.dumps(meta)})
    with pytest.raises(UserError, match=message):
        reference = OwnStatistics(path)
        reference.classifier("features", CPU)
        reference.statistics(network)


def test_images_of_npz_files_are_read_a_few_rows_at_a_time(
    image_NHWC: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = np.concatenate([image_NHWC] * 3)
    np.savez(tmp_path / "stored.npz", mu=np.zeros(3), arr_0=many)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=many)
    monkeypatch.setattr(np, "load", lambda *arguments, **options: pytest.fail("the array is loaded"))
    for name, parts in (("stored.npz", 4), ("packed.npz", 1)):
        images = NpzImages(tmp_path / name)
        assert images.parts == parts and images.count == 900
        batches = list(images.read_all(64))
        assert max(len(batch.image_NHWC) for batch in batches) == 64
        assert np.concatenate([batch.number_N for batch in batches]).tolist() == list(range(900))
        assert (np.concatenate([batch.image_NHWC for batch in batches]) == many).all()
        if parts > 1:
            middle = next(images.read(2, 5))
            assert middle.number_N.tolist() == list(range(450, 455))
            assert (middle.image_NHWC == many[450:455]).all()


def test_pictures_below_a_folder(image_NHWC: np.ndarray, tmp_path: Path) -> None:
    folder = tmp_path / "drawn"
    (folder / "000").mkdir(parents=True)
    for number in range(6):
        Image.fromarray(image_NHWC[number, :, :, 0]).save(folder / ("000" if number < 3 else "") / f"{number}.png")
    (folder / "notes.txt").touch()
    os.symlink("/etc", folder / "elsewhere")
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    images = FolderImages(folder)
    assert images.count == 6 and images.parts == 1
    assert (np.concatenate([batch.image_NHWC for batch in images.read_all(4)]) == image_NHWC[:6]).all()
    same = shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    assert FolderImages(same).fingerprint == images.fingerprint
    Image.fromarray(image_NHWC[7, :, :, 0]).save(folder / "4.png")
    assert FolderImages(folder).fingerprint != images.fingerprint
    Image.fromarray(image_NHWC[7, :4, :4, 0]).save(folder / "5.png")
    with pytest.raises(UserError, match=r"5\.png: .* shape \[4, 4, 1\], expected \[8, 8, 1\] as 000/0\.png"):
        list(FolderImages(folder).read_all(4))
    (folder / "5.png").write_bytes((folder / "4.png").read_bytes()[:50])
    with pytest.raises(UserError, match=r"5\.png: (undecodable|not a readable)"):
        list(FolderImages(folder).read_all(4))
    shutil.rmtree(folder / "000")
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="has no picture"):
        FolderImages(folder)


def test_another_index_or_choice_never_meets_an_old_cache(tmp_path: Path) -> None:
    shards, cache, network = tmp_path / "shards", tmp_path / "cache", Projection()
    pack(open_source("digits", seed=0), shards, PackSettings(count=60))
    first = images_of(shards)
    before = real_statistics(first, network, cache)
    index = load_index(shards)
    table = read_table(shards, index)
    assert table is not None
    fewer = SampleColumns(np.where(np.arange(60) % 3 == 0, -1, table.label_N).astype(np.int32), None)
    write_index(shards, index.model_copy(update={"samples": write_table(shards, fewer)}))
    again = images_of(shards)
    after = real_statistics(again, network, cache)
    assert again.fingerprint != first.fingerprint
    assert (before.whole("features").count, after.whole("features").count) == (60, 40)
    assert len(list(cache.glob("real-*"))) == 2
    # The file of the old images is another than that of the new ones, too.
    for real, statistics, name in ((first, before, "a"), (again, after, "b")):
        write_reference(tmp_path / f"{name}.safetensors", real, network, statistics)
    a, b = (OwnStatistics(tmp_path / f"{name}.safetensors") for name in "ab")
    assert a.fingerprint != b.fingerprint and a.statistics(network).whole("features").count == 60


class ByTheFile(Projection):
    """As Inception from a TorchScript file: without spatial features, and with a resize of its own."""

    spatial_dimension = None
    description: dict[str, Any] = {"resize": BY_THE_FILE}

    def features(self, image_NHWC: np.ndarray) -> Features:
        found = super().features(image_NHWC)
        return {key: value for key, value in found.items() if key != "spatial"}


def test_a_network_without_spatial_features_leaves_sfid_out(
    shards: Path, image_NHWC: np.ndarray, tmp_path: Path
) -> None:
    statistics = real_statistics(images_of(shards), Projection(), tmp_path / "cache")
    reference = open_reference_file(adm_file(tmp_path / "adm.npz", statistics, image_NHWC))
    assert reference is not None
    network = ByTheFile()
    drawn = ChunkDescriptions(
        tmp_path / "described", ["0.npz"], lambda chunk: dict(describe(network, image_NHWC[:90]))
    )
    make_parts(drawn.parts)
    found = score(drawn, reference_statistics(reference, network, tmp_path / "cache"))
    assert found["fid"] is not None and "sfid" not in found
    assert "inception 0123456789abcdef: has no spatial features; left out: sFID" in found["warnings"]


def test_what_an_npz_file_is_of_may_be_stated(shards: Path, tmp_path: Path) -> None:
    statistics = real_statistics(images_of(shards), Projection(), tmp_path / "cache")
    path = adm_file(tmp_path / "adm.npz", statistics)
    silent = open_reference_file(path)
    assert isinstance(silent, NpzStatistics) and silent.facts(None)["stated_network"] is None
    told = open_reference_file(path, stated="inception-tensorflow")
    assert isinstance(told, NpzStatistics) and told.facts(None)["stated_network"] == "inception-tensorflow"
    lines = told.statistics(ByTheFile()).missing
    assert lines[-1].endswith("does not name its network: that it is of inception-tensorflow is what you say")
    assert not any("the figures hold only if" in line for line in lines)
    other = Projection()
    other.description = {"resize": "pytorch-fid"}
    silent.check_network(other)
    with pytest.raises(UserError, match=r"--reference-network inception-tensorflow: .* is inception-pytorch-fid"):
        told.check_network(other)
    # Others' statistics in DINOv2's features are used as soon as somebody says what they are.
    dino = open_reference_file(path, stated="dinov2")
    assert isinstance(dino, NpzStatistics)
    dino.check_features("dinov2")
    with pytest.raises(UserError, match="in the features of inception, and not of dinov2"):
        silent.check_features("dinov2")
    for named in (shards, tmp_path / "images.npz"):
        np.savez(tmp_path / "images.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
        with pytest.raises(UserError, match="--reference-network dinov2: goes with an npz file of mu and sigma"):
            open_reference_file(named, stated="dinov2")


@pytest.mark.parametrize("length", [0x4B50, 0x10080], ids=["as a zip", "as a pickle"])
def test_our_file_is_known_by_any_length_of_its_header(tmp_path: Path, length: int) -> None:
    """Its first bytes are that length, and may be those that another kind of file begins with."""
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", {"ditmoe_reference": "{}"})
    data = (tmp_path / "a.safetensors").read_bytes()
    before = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + before].ljust(length)
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header + data[8 + before :])
    with pytest.raises(UserError, match="no statistics that this version reads"):
        open_reference_file(tmp_path / "a.safetensors")
