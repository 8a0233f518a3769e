"""`ditmoe reference make` as a user starts it."""

from pathlib import Path

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.sampling.metrics.references.own import OwnStatistics
from tests.forked import DITMOE, run_forked
from tests.sampling.small_run import images_of


def test_two_processes_make_one_file_and_an_existing_one_stays(tmp_path: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "digits.safetensors"
    pack(open_source("digits", seed=0), shards, PackSettings(count=60))
    program = [*DITMOE, "reference", "make", str(shards), str(out), "--no-recogniser"]
    program += ["--cache", str(tmp_path / "cache")]
    done = run_forked(program, tmp_path / "first", processes=2)
    assert done.returncode == 0, done.stderr
    assert "60 images of digits, in features of classifier" in done.stdout
    assert f"reference  {out}" in done.stdout
    found = OwnStatistics(out)
    assert found.facts(None)["made_of"]["fingerprint"] == images_of(shards).fingerprint
    assert found.has_classifier("features") and not found.has_classifier("recogniser")
    before = out.read_bytes()
    done = run_forked(program, tmp_path / "second")
    assert done.returncode == 2
    assert done.stderr == f"error: {out}: exists already; remove it or choose another name\n"
    assert out.read_bytes() == before
