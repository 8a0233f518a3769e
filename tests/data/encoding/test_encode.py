"""Images become latents, shard for shard: the same bytes whatever dies, and however many take part."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ditmoe.data.encoding.by_crew import parts_of_stage, request_for
from ditmoe.data.encoding.encode import Work, encode
from ditmoe.data.encoding.folder import ENCODER
from ditmoe.data.encoding.plan import EncodeSettings, prepare_encoding
from ditmoe.data.encoding.vae import Vae, load_vae, read_facts
from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.digits import Digits
from ditmoe.data.making.sources.shapes import Shapes
from ditmoe.data.making.verify import verify
from ditmoe.data.places.reader import Shard
from ditmoe.data.shards.decode import decode_image
from ditmoe.data.shards.index import DatasetIndex, load_index, write_index
from ditmoe.data.shards.latents import decode_latent, latent_extension
from ditmoe.data.shards.sample_table import SampleColumns, read_table, write_table
from ditmoe.data.shards.writer import ShardLimits
from ditmoe.data.storage.parts import make_parts
from ditmoe.launcher.commands.data.group import app
from ditmoe.model.errors import UserError
from tests.forked import DITMOE, run_forked
from tests.mortal import Mortal
from tests.obedient import Obedient

CPU = torch.device("cpu")
runner = CliRunner()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A process that is forked from one that computed in several threads would wait for them for ever."""
    torch.set_num_threads(1)


def run(source: Path, out: Path, vae: Path, settings: EncodeSettings | None = None) -> DatasetIndex:
    settings = settings or EncodeSettings()
    encoding = prepare_encoding(source, out, read_facts(vae), settings)
    if encoding.folder.begin(settings.overwrite):
        encode(encoding, CPU)
    return load_index(out)


def contents(folder: Path) -> dict[str, str]:
    """Checksum of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_moments(folder: Path, index: DatasetIndex, mirrored: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    for entry in index.shards:
        shard = Shard.at(folder / entry.file, entry)
        for member in range(entry.samples):
            extension = latent_extension(shard.extensions(member), index, mirrored)
            found.append(decode_latent(extension, shard.read(member, extension) or b"", index))
        shard.close()
    return found


def read_images(folder: Path, index: DatasetIndex) -> np.ndarray:
    found = []
    for entry in index.shards:
        shard = Shard.at(folder / entry.file, entry)
        found += [decode_image("png", shard.read(member, "png") or b"", index) for member in range(entry.samples)]
        shard.close()
    return np.stack(found)


def test_everything_but_the_images_is_carried_over(shapes: Path, vae_folder: Path, tmp_path: Path) -> None:
    before = load_index(shapes)
    table = read_table(shapes, before)
    assert table is not None
    score_N = np.linspace(0, 1, 30, dtype=np.float32)
    before = before.model_copy(update={"samples": write_table(shapes, SampleColumns(table.label_N, score_N))})
    write_index(shapes, before)
    out = tmp_path / "latents"
    index = run(shapes, out, vae_folder)
    facts = read_facts(vae_folder)
    assert index.version == 2 and (index.image_size, index.channels) == (8, 4)
    assert index.latents is not None
    assert index.latents.model_dump() == {
        "vae": str(vae_folder),
        "vae_sha256": facts.sha256,
        "scale": 0.18215,
        "shift": 0.0,
        "pixels": 16,
        "dtype": "float16",
        "flips": "none",
    }
    assert (index.class_names, index.name, index.label.extension) == (before.class_names, before.name, "cls")
    carried = read_table(out, index)
    assert carried is not None and carried.score_N is not None
    assert np.array_equal(carried.label_N, table.label_N) and np.array_equal(carried.score_N, score_N)
    for old, new in zip(before.shards, index.shards, strict=True):
        assert (old.file, old.samples) == (new.file, new.samples)
        with tarfile.open(shapes / old.file) as images, tarfile.open(out / new.file) as latents:
            names = [name for name in images.getnames() if not name.endswith(".png")]
            stems = [name for name in latents.getnames() if not name.endswith(".safetensors")]
            assert names == stems
            for name in names:
                assert images.extractfile(name).read() == latents.extractfile(name).read()  # type: ignore[union-attr]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(shard.file for shard in index.shards), "encoding.json", "index.json", "preview.png", "samples.npz"]
    )
    with Image.open(out / "preview.png") as sheet:
        assert sheet.height == 5 * 68 + 4  # a row for each class
    assert verify(out).problems == []


@pytest.mark.parametrize(
    ("dtype", "format", "flips"),
    [("float32", "npy", "both"), ("float16", "safetensors", "drawn"), ("bfloat16", "safetensors", "none")],
)
def test_moments_are_those_of_the_vae(
    shapes: Path, vae_folder: Path, tmp_path: Path, dtype: str, format: str, flips: str
) -> None:
    settings = EncodeSettings(dtype, flips, format, seed=5)  # type: ignore[arg-type]
    index = run(shapes, tmp_path / "out", vae_folder, settings)
    images = torch.from_numpy(read_images(shapes, load_index(shapes)))
    vae = load_vae(read_facts(vae_folder))
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]

    def close(found: list[tuple[np.ndarray, np.ndarray]], image_NHWC: torch.Tensor) -> list[bool]:
        mean, logvar = vae.encode_moments(image_NHWC)
        wanted = torch.stack([mean, (0.5 * logvar).exp()], 1).numpy()
        return [
            bool(np.allclose(np.stack(f), w, tolerance, tolerance)) for f, w in zip(found, wanted, strict=True)
        ]

    plain = close(read_moments(tmp_path / "out", index), images)
    if flips == "drawn":
        mirrored = close(read_moments(tmp_path / "out", index), images.flip(2))
        assert all(a != b for a, b in zip(plain, mirrored, strict=True)) and 5 < sum(mirrored) < 25
    else:
        assert all(plain)
    if flips == "both":
        assert all(close(read_moments(tmp_path / "out", index, mirrored=True), images.flip(2)))


def test_batches_are_filled_up_and_cut_again(
    shapes: Path, vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: shards of 10 in batches of 4."""
    one = read_moments(
        tmp_path / "one", run(shapes, tmp_path / "one", vae_folder, EncodeSettings(dtype="float32"))
    )
    sizes = []
    plain = Vae.encode_moments

    def counted(self: Vae, image_BHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(image_BHWC))
        assert torch.get_num_threads() == 1  # with more, a CPU rounds otherwise
        return plain(self, image_BHWC)

    monkeypatch.setattr(Vae, "encode_moments", counted)
    monkeypatch.setattr("ditmoe.data.encoding.encode.images_at_once", lambda settings, device: settings.batch)
    torch.set_num_threads(2)
    settings = EncodeSettings(dtype="float32", batch=4)
    four = read_moments(tmp_path / "four", run(shapes, tmp_path / "four", vae_folder, settings))
    assert torch.get_num_threads() == 2
    assert sizes == [4] * 9 and len(four) == 30
    assert np.allclose(np.array(four), np.array(one), atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_gives_the_moments_of_a_cpu(shapes: Path, vae_folder: Path, tmp_path: Path) -> None:
    settings = EncodeSettings(dtype="float32", batch=4)
    encoding = prepare_encoding(shapes, tmp_path / "gpu", read_facts(vae_folder), settings)
    encoding.folder.begin(False)
    found = read_moments(tmp_path / "gpu", encode(encoding, torch.device("cuda", 0)))
    expected = read_moments(tmp_path / "cpu", run(shapes, tmp_path / "cpu", vae_folder, settings))
    assert np.allclose(np.array(found), np.array(expected), atol=1e-3)


def test_images_that_are_cropped_when_read_can_be_encoded(shapes: Path, vae_folder: Path, tmp_path: Path) -> None:
    write_index(shapes, load_index(shapes).model_copy(update={"image_size": 8, "crop": True}))
    index = run(shapes, tmp_path / "out", vae_folder)
    assert index.image_size == 4 and not index.crop
    assert index.latents is not None and index.latents.pixels == 8


def _encode(source: Path, out: Path, vae: Path, rank: int, dies_at: int) -> None:
    """Encode, and be killed at one of the moments at which something is computed, locked, synced or renamed."""
    mortal = Mortal(dies_at)
    # What a killed process has written stays, synced or not; to sync may take seconds on a busy disk.
    os.fsync = mortal(lambda descriptor: None)
    os.replace, os.open, os.unlink = map(mortal, (os.replace, os.open, os.unlink))
    os.link, os.scandir = map(mortal, (os.link, os.scandir))
    Vae.encode_moments = mortal(Vae.encode_moments)  # type: ignore[method-assign, assignment]
    encoding = prepare_encoding(source, out, read_facts(vae), EncodeSettings())
    if encoding.folder.begin(False):
        encode(encoding, CPU, rank=rank, ranks=2)


def test_whatever_is_killed_the_bytes_are_those_of_an_encode_that_was_not(
    vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "shapes"
    pack(Shapes(40, 3, 16, seed=1), source, PackSettings(limits=ShardLimits(samples=8)))
    run(source, tmp_path / "whole", vae_folder)
    vae = load_vae(read_facts(vae_folder))  # once, for all that are forked
    monkeypatch.setattr("ditmoe.data.encoding.encode.load_vae", lambda *_: vae)
    context = multiprocessing.get_context("fork")
    dice = random.Random(0)
    killed = 0
    for case in range(8):
        out = tmp_path / f"killed-{case}"
        while not (out / "index.json").exists():
            finished = {path: path.stat().st_ino for path in out.glob("*.tar")}
            workers = [
                context.Process(target=_encode, args=(source, out, vae_folder, rank, dice.randint(1, 120)))
                for rank in range(dice.randint(1, 2))
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(60)
                assert worker.exitcode in (0, -signal.SIGKILL)
                killed += worker.exitcode != 0
            assert finished == {path: path.stat().st_ino for path in finished}, "a finished shard was made again"
        run(source, out, vae_folder)  # tidies up where the last one was killed before it could
        assert contents(out) == contents(tmp_path / "whole")
    assert killed > 10


def test_workers_make_shards_and_index_from_what_they_are_told(
    shapes: Path, vae_folder: Path, tmp_path: Path, obedient: Obedient, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = EncodeSettings("float32", "drawn", "npy", seed=3)
    run(shapes, tmp_path / "one", vae_folder, settings)
    # Begun before by one process, and one of its shards is damaged since.
    encoding = prepare_encoding(shapes, tmp_path / "two", read_facts(vae_folder), settings)
    encoding.folder.begin(False)
    make_parts(Work(encoding, CPU).shards, only=[0, 2])
    first = sorted((tmp_path / "two").glob("*.tar"))[0]
    first.write_bytes(first.read_bytes()[:1000])
    arguments = ["encode", "--vae", str(vae_folder), "--dtype", "float32", "--flips", "drawn", "--format", "npy"]
    arguments += ["--seed", "3", "--device", "cpu", "--crew", str(tmp_path / "crew")]
    result = runner.invoke(app, [*arguments, str(shapes), str(tmp_path / "two")])
    assert result.exit_code == 0, result.output
    names = [entry.file for entry in encoding.index.shards]
    assert obedient.made == [("shards", names[0]), ("shards", names[1]), ("index", "index.json")]
    assert f"{first}: " in capfd.readouterr().err + result.output
    assert "encoded 30 images of 16×16×3 into latents of 8×8×4: 3 shards" in result.output
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    again = runner.invoke(app, [*arguments, str(shapes), str(tmp_path / "two")])
    assert again.exit_code == 0 and "was encoded before; --overwrite encodes it again" in again.output


def test_ranks_that_were_started_share_the_shards(shapes: Path, vae_folder: Path, tmp_path: Path) -> None:
    """By torchrun or srun, without anybody who leads."""
    run(shapes, tmp_path / "one", vae_folder)
    program = [*DITMOE, "data", "encode", "--vae", str(vae_folder), "--device", "cpu"]
    done = run_forked([*program, str(shapes), str(tmp_path / "two")], tmp_path / "output", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("encoded 30 images") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_worker_that_sees_other_images_or_no_gpu_is_refused(
    shapes: Path, vae_folder: Path, tmp_path: Path
) -> None:
    encoding = prepare_encoding(shapes, tmp_path / "out", read_facts(vae_folder), EncodeSettings())
    request = {**request_for(encoding, None, "cpu"), "stage": "shards"}
    pack(Shapes(12, 3, 16, seed=9), tmp_path / "others", PackSettings())
    with pytest.raises(UserError, match="workers must see the files of whoever leads them"):
        parts_of_stage({**request, "source": str(tmp_path / "others")})
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: the machine of a worker shows no GPU"):
            parts_of_stage({**request, "device": "cuda"})


def test_one_rank_of_several_replaces_no_dataset(
    shapes: Path, vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one has removed, another may have begun to write."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    arguments = ["encode", "--vae", str(vae_folder), "--overwrite", str(shapes), str(tmp_path / "out")]
    result = runner.invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert "--overwrite under torchrun or srun: expected it left out" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused_and_replaced_only_on_request(
    shapes: Path, vae_folder: Path, make_vae: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plain = EncodeSettings()
    begun = prepare_encoding(shapes, out, read_facts(vae_folder), plain)
    assert begun.folder.begin(False)
    with pytest.raises(
        UserError, match=r"begun here \(dtype was 'float16', now 'float32'\); --overwrite begins anew"
    ):
        run(shapes, out, vae_folder, replace(plain, dtype="float32"))
    with pytest.raises(UserError, match=r"begun here \(flips was 'none', now 'drawn'; seed was None, now 7\)"):
        run(shapes, out, vae_folder, replace(plain, flips="drawn", seed=7))
    other = make_vae(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"begun here \(vae_sha256 was "):
        run(shapes, out, other)
    index = run(shapes, out, vae_folder)
    with pytest.raises(
        UserError, match=r"already holds a packed dataset \(format was .*; --overwrite replaces it"
    ):
        run(shapes, out, vae_folder, replace(plain, format="npy"))
    assert load_index(out) == index
    with begun.folder.claims.taken(f"{ENCODER}another") as claim:  # as another process that is at it
        assert claim is not None
        with pytest.raises(UserError, match="other processes are encoding into it"):
            run(shapes, out, vae_folder, replace(plain, format="npy", overwrite=True))
    assert run(shapes, out, vae_folder, replace(plain, format="npy", overwrite=True)) != index
    assert verify(out).problems == []


def test_a_shard_of_other_settings_is_not_taken_over(shapes: Path, vae_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encoding = prepare_encoding(shapes, out, read_facts(vae_folder), EncodeSettings())
    encoding.folder.begin(False)
    shard = load_index(shapes).shards[1].file
    (out / shard).write_bytes(b"x")
    with pytest.raises(
        UserError, match=f"{shard}.json: could not be read .*; delete .*{shard}, it is encoded again"
    ):
        encode(encoding, CPU)
    (out / shard).unlink()
    run(shapes, tmp_path / "other", vae_folder, EncodeSettings(dtype="float32"))
    encode(encoding, CPU)


def test_damaged_shards_and_marks_of_an_unfinished_encode_are_made_anew(
    shapes: Path, vae_folder: Path, tmp_path: Path
) -> None:
    run(shapes, tmp_path / "whole", vae_folder)
    out = tmp_path / "out"
    encoding = prepare_encoding(shapes, out, read_facts(vae_folder), EncodeSettings())
    encoding.folder.begin(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ditmoe.data.encoding.encode.finish", lambda *arguments: pytest.fail("stop here"))
        with pytest.raises(pytest.fail.Exception):
            encode(encoding, CPU)
    first, second, _ = sorted(out.glob("*.tar"))
    first.write_bytes(first.read_bytes()[:1000])
    (out / "encoding" / f"{second.name}.json").write_text("{")
    encode(encoding, CPU)
    assert contents(out) == contents(tmp_path / "whole")


def test_progress_counts_images_by_whole_looks(shapes: Path, vae_folder: Path, tmp_path: Path) -> None:
    encoding = prepare_encoding(shapes, tmp_path / "out", read_facts(vae_folder), EncodeSettings())
    encoding.folder.begin(False)
    told: list[int] = []
    encode(encoding, CPU, on_progress=told.append)
    assert told[0] == 0 and told[-1] == 30 and told == sorted(told)


def test_one_that_was_killed_while_clearing_is_begun_anew(shapes: Path, vae_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(shapes, out, vae_folder)
    (out / "encoding.json").write_text(json.dumps({"clearing": True}))
    assert run(shapes, out, vae_folder) == first


def test_what_does_not_fit_is_one_message(
    shapes: Path, vae_folder: Path, tmp_path: Path, rewrite: Callable[..., str]
) -> None:
    pack(Digits(), tmp_path / "digits", PackSettings(count=5))
    with pytest.raises(UserError, match="takes 3: pack them with --channels 3"):
        run(tmp_path / "digits", tmp_path / "o", vae_folder)
    pack(Shapes(6, 2, 17, seed=0), tmp_path / "odd", PackSettings())
    with pytest.raises(UserError, match=r"images of 17 pixels, and the VAE .* takes multiples of 2"):
        run(tmp_path / "odd", tmp_path / "o", vae_folder)
    with pytest.raises(UserError, match="--format npy has no bfloat16"):
        run(shapes, tmp_path / "o", vae_folder, EncodeSettings(dtype="bfloat16", format="npy"))
    with pytest.raises(UserError, match="is where the images are"):
        run(shapes, shapes, vae_folder)
    assert not (tmp_path / "o").exists()
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "x.tar").touch()
    with pytest.raises(UserError, match=r"holds x\.tar, which `ditmoe` did not write there"):
        run(shapes, tmp_path / "strange", vae_folder)
    run(shapes, tmp_path / "latents", vae_folder)
    with pytest.raises(UserError, match="holds latents already, expected images"):
        run(tmp_path / "latents", tmp_path / "o", vae_folder)
    key = rewrite(shapes, 1, 3, lambda members: {**members, "png": b"damaged"})
    with pytest.raises(UserError, match=rf"shapes-00001\.tar, sample {key}: not a readable PNG image"):
        run(shapes, tmp_path / "half", vae_folder)
    assert not (tmp_path / "half" / "index.json").exists()


def test_images_that_cannot_be_used_are_left_out_on_request(
    shapes: Path, vae_folder: Path, tmp_path: Path, rewrite: Callable[..., str]
) -> None:
    index = load_index(shapes)
    table = read_table(shapes, index)
    assert table is not None
    scored = SampleColumns(table.label_N, np.arange(30, dtype=np.float32))
    write_index(shapes, index.model_copy(update={"samples": write_table(shapes, scored)}))
    keys = [
        rewrite(shapes, 1, 3, lambda members: {**members, "png": b"damaged"}),
        rewrite(shapes, 1, 9, lambda members: {**members, "cls": b"x"}),
    ]
    lines: list[str] = []
    settings = EncodeSettings(on_error="skip")
    encoding = prepare_encoding(shapes, tmp_path / "latents", read_facts(vae_folder), settings)
    assert encoding.folder.begin(False)
    found = encode(encoding, torch.device("cpu"), log=lines.append)
    assert [entry.samples for entry in found.shards] == [10, 8, 10] and not verify(tmp_path / "latents").problems
    kept = read_table(tmp_path / "latents", found)
    assert kept is not None and kept.score_N is not None
    used = [number for number in range(30) if number not in (13, 19)]
    assert kept.label_N.tolist() == table.label_N[used].tolist() and kept.score_N.tolist() == used
    assert len(lines) == 2
    assert all(f"shapes-00001.tar, sample {key}: " in line for key, line in zip(keys, lines, strict=True))
    # Of a shard nothing may be left.
    for sample in range(10):
        rewrite(shapes, 0, sample, lambda members: {**members, "png": b"damaged"})
    with pytest.raises(UserError, match=r"shapes-00000\.tar: none of its images can be used, such as "):
        run(shapes, tmp_path / "none", vae_folder, settings)


def test_the_index_of_the_images_may_lie_elsewhere(shapes: Path, vae_folder: Path, tmp_path: Path) -> None:
    run(shapes, tmp_path / "expected", vae_folder)
    index = tmp_path / "elsewhere"
    index.mkdir()
    for name in ("index.json", "samples.npz"):
        (shapes / name).rename(index / name)
    encoding = prepare_encoding(shapes, tmp_path / "latents", read_facts(vae_folder), EncodeSettings(), index)
    assert encoding.folder.begin(False)
    encode(encoding, torch.device("cpu"))
    assert contents(tmp_path / "latents") == contents(tmp_path / "expected")
    with pytest.raises(UserError, match="is where the images are, or their index"):
        prepare_encoding(
            shapes, tmp_path / "elsewhere", read_facts(vae_folder), EncodeSettings(), tmp_path / "elsewhere"
        )


def test_verify_finds_what_is_wrong_with_latents(shapes: Path, vae_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = run(shapes, out, vae_folder, EncodeSettings(flips="both"))
    path = out / index.shards[0].file
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar}
    first, second = list(dict.fromkeys(name.split(".")[0] for name in members))[:2]
    damaged = bytearray(data)
    member = members[f"{first}.moments.safetensors"]
    damaged[member.offset_data + member.size - 2 : member.offset_data + member.size] = b"\x00\x7e"  # NaN
    header = members[f"{second}.mirrored.safetensors"].offset
    damaged[header : header + 512] = damaged[header : header + 512].replace(b".mirrored.", b".mirrored_")
    path.write_bytes(damaged)
    problems = "\n".join(verify(out).problems)
    assert "checksum mismatch" in problems
    assert f"sample {first}: moments.safetensors has NaN or infinity in it" in problems
    assert "damaged tar" in problems  # its header has a checksum of its own
