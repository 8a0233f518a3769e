"""What the page is served: its files to all, and the runs and evaluations by the rules of the other routes."""

import base64
import io
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from ditmoe.sampling.service.access import Tokens
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import sample_steps
from tests.sampling.service.conftest import MARKUP, serving
from tests.sampling.service.page.conftest import CHAINS, SAMPLES, STEPS, write_evaluation

TOKEN = "0123456789abcdef0123"
EVALUATIONS = "/v1/runs/digits/evaluations"


@pytest.fixture(scope="module")
def page(trained: Path) -> Iterator[httpx.Client]:
    with serving(trained) as client:
        yield client


def pixels(b64: str) -> np.ndarray:  # type: ignore[type-arg]
    return np.array(Image.open(io.BytesIO(base64.b64decode(b64))))


def test_the_page_brings_all_that_it_needs(page: httpx.Client) -> None:
    """Each file that another one names is there, in the package, and none is elsewhere."""
    reply = page.get("/")
    assert reply.status_code == 200 and reply.headers["Content-Type"].startswith("text/html")
    policy = reply.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    seen: set[str] = set()
    waiting = {f"/{name}" for name in re.findall(r'(?:src|href)="([^"#]+)"', reply.text)}
    assert "/page/main.js" in waiting
    while waiting:
        path = waiting.pop()
        seen.add(path)
        reply = page.get(path)
        assert reply.status_code == 200, path
        kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
        assert reply.headers["Content-Type"].startswith(kinds[path.rpartition(".")[2]])
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", reply.text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", reply.text), path
        waiting |= {f"/page/{name}" for name in re.findall(r'from "\./([^"]+)"', reply.text)} - seen
    shipped = {entry.name for entry in files("ditmoe.sampling.service.page").joinpath("static").iterdir()}
    assert {f"/page/{name}" for name in shipped - {"index.html"}} == seen


def test_an_installed_package_has_the_files_of_the_page() -> None:
    """As pyproject.toml tells setuptools, which takes along nothing else but modules."""
    with (Path(__file__).resolve().parents[4] / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["ditmoe.sampling.service.page"]
    shipped = list(files("ditmoe.sampling.service.page").joinpath("static").iterdir())
    assert len(shipped) > 10
    for entry in shipped:
        assert any(fnmatch(f"static/{entry.name}", pattern) for pattern in patterns), entry.name


def test_with_a_token_the_files_are_open_and_the_runs_are_not(trained: Path) -> None:
    with serving(trained, tokens=Tokens({TOKEN: ""}), loopback=False) as client:
        assert client.get("/").status_code == 200 and client.get("/page/main.js").status_code == 200
        wanted = ["/v1/runs", "/v1/runs/digits", "/v1/samplers", "/v1/runs/digits/previews/10", EVALUATIONS]
        wanted += [f"{EVALUATIONS}/chains{rest}" for rest in ("", "/images", "/traces")]
        for path in wanted:
            assert client.get(path).status_code == 401, path
            assert client.get(path, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200, path
        for path in ("/page/none.js", "/page/../v1/runs", "/page/%2e%2e/v1/runs", "/page/"):
            assert client.get(path).status_code == 401, path


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", "../other", "%2e%2e%2fother", "/etc", "%2fetc", ".", "digits%00", "x" * 300, "none"]
)
def test_no_name_leads_out_of_the_runs(page: httpx.Client, name: str) -> None:
    paths = [f"/v1/runs/{name}", f"/v1/runs/{name}/evaluations", f"/v1/runs/{name}/previews/10"]
    paths += [f"{EVALUATIONS}/{name}{rest}" for rest in ("", "/images", "/traces")]
    paths += [f"/v1/runs/digits/previews/{name}", f"/page/{name}"]
    for path in paths:
        reply = page.get(path)
        listed = str(reply.url.path) in ("/v1/runs", "/v1/runs/digits", EVALUATIONS, "/v1/runs/other", "/")
        assert reply.status_code in (400, 404) or listed, path


def test_samplers_are_told_with_their_settings(page: httpx.Client) -> None:
    told = page.get("/v1/samplers").json()
    assert "heun" in told["samplers"] and "dlg:heun" in told["chains"] and told["schedules"] == ["own", "karras"]
    assert told["steps"] == {name: sample_steps(name) for name in told["samplers"] + told["chains"]}
    assert told["settings"].keys() == SamplerConfig.model_fields.keys()
    assert SamplerConfig.model_validate(told["settings"]) == SamplerConfig()


def test_links_are_not_followed(trained: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained, runs)
    shutil.move(runs / "digits" / "evaluations" / "chains", tmp_path / "elsewhere")
    (runs / "digits" / "evaluations" / "chains").symlink_to(tmp_path / "elsewhere")
    (runs / "digits" / "samples" / "preview-step-00000099.png").symlink_to("/etc/passwd")
    with serving(runs) as client:
        assert client.get(f"{EVALUATIONS}/chains").status_code == 404
        assert client.get("/v1/runs/digits/previews/99").status_code == 404
        assert client.get("/v1/runs/digits").json()["previews"] == [10, 40]


def test_a_run_tells_how_it_trains(page: httpx.Client, trained: Path) -> None:
    listed = {run["id"]: run for run in page.get("/v1/runs").json()["data"]}
    assert set(listed) == {"digits", "other"} and listed["other"]["training"] is None
    assert listed["digits"]["training"]["step"] == 40 and listed["digits"]["evaluations"] == 8
    run = page.get("/v1/runs/digits").json()
    assert run["steps"] == [0, 3] and run["classes"][0] == MARKUP and run["parameters"] > 0
    assert run["curves"]["step"] == list(range(1, 41)) and run["curves"]["every"] == 1
    assert run["curves"]["values"]["loss"][3] == 0.25 and run["curves"]["values"]["grad_norm"][1] is None
    assert "memory_gib" not in run["curves"]["values"] and run["curves"]["expert_load"] == [[0.4, 0.6]]
    preview = page.get("/v1/runs/digits/previews/40")
    assert preview.headers["Content-Type"] == "image/png"
    assert preview.content == (trained / "digits" / "samples" / "preview-step-00000040.png").read_bytes()


def test_curves_follow_a_run_that_goes_on_and_goes_back(trained: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained, runs)
    file = runs / "digits" / "stats.jsonl"

    def steps(client: httpx.Client) -> list[int]:
        return client.get("/v1/runs/digits").json()["curves"]["step"]

    with serving(runs) as client:
        assert steps(client)[-1] == 40
        with file.open("a") as records:
            records.write(json.dumps({"step": 41, "loss": 0.5}) + "\n" + '{"step": 42, "lo')
        assert steps(client)[-1] == 41, "a line that is being written waits"
        with file.open("a") as records:
            records.write('ss": 0.4}\nno json\n[1]\n' + json.dumps({"step": 30, "loss": 9.0}) + "\n")
        assert steps(client)[-2:] == [29, 30], "what was trained again is there once"
        file.with_suffix(".new").write_text(
            "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 2001))
        )
        file.with_suffix(".new").replace(file)
        curves = client.get("/v1/runs/digits").json()["curves"]
        assert curves["records"] == 2000 and len(curves["step"]) <= 600 and curves["step"][-1] == 2000


def test_evaluations_have_their_figures(page: httpx.Client) -> None:
    listed = {each["id"]: each for each in page.get(EVALUATIONS).json()["data"]}
    euler = listed["euler-10-1"]
    assert (euler["nfe"], euler["step"], euler["seed"], euler["kept"], euler["chains"]) == (10, 3, 1, True, False)
    figures = euler["figures"]["classifier"]
    expected = {
        "title": "FID",
        "value": 2.5,
        "floor": 0.5,
        "interval": [2.25, 2.75],
        "interval_is": "95% interval",
    }
    assert figures["fid"] == expected
    assert figures["kid"]["interval"] == pytest.approx([0.008, 0.012])
    found = page.get(f"{EVALUATIONS}/chains").json()
    assert found["chains"] and found["results"]["classifier"]["chains"]["sigma"]["split_r_hat"] == 1.2


def test_images_by_class_are_those_of_the_chunks(page: httpx.Client) -> None:
    """Image i is a plain of grey i."""
    numbers, first = [], 0
    while True:
        reply = page.get(
            f"{EVALUATIONS}/euler-10-0/images", params={"class": 3, "first": first, "limit": 3}
        ).json()
        assert all((pixels(each["b64_json"]) == each["number"]).all() for each in reply["images"])
        assert {each["class"] for each in reply["images"]} <= {"3"}
        numbers += [each["number"] for each in reply["images"]]
        if reply["next"] is None:
            break
        first = reply["next"]
    assert numbers == [3, 13, 23, 33]
    named = page.get(f"{EVALUATIONS}/euler-10-0/images", params={"limit": 60}).json()
    assert [each["number"] for each in named["images"]] == list(range(40)) and named["next"] is None
    assert named["images"][0]["class"] == MARKUP
    for query in ("limit=0", "limit=61", "class=-1", "first=-1", "class=x", f"first={10**30}"):
        assert page.get(f"{EVALUATIONS}/euler-10-0/images?{query}").status_code == 400, query
    assert page.get(f"{EVALUATIONS}/euler-10-0/images?class=77").json() == {"images": [], "next": None}


def test_traces_are_those_of_the_chunks(page: httpx.Client, trained: Path) -> None:
    reply = page.get(f"{EVALUATIONS}/chains/traces?first=3&limit=2").json()
    assert (reply["samples_per_chain"], reply["steps_per_sample"], reply["chains"]) == (SAMPLES, STEPS, CHAINS)
    chunks = sorted((trained / "digits" / "evaluations" / "chains" / "chunks").iterdir())
    trace_NT = np.concatenate([np.load(chunk)["trace"] for chunk in chunks])
    assert [each["chain"] for each in reply["traces"]] == [3, 4], "across two chunks"
    for each in reply["traces"]:
        rows = trace_NT[each["chain"] * SAMPLES :][:SAMPLES]
        assert np.allclose(each["trace"], rows.reshape(-1)) and each["label"] == each["chain"]
        assert [step for step, _ in each["denoised"]] == [STEPS * (sample + 1) for sample in range(SAMPLES)]
    assert page.get(f"{EVALUATIONS}/euler-10-0/traces").status_code == 404


def test_what_is_damaged_or_gone_is_said(trained: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained / "other", runs / "digits")
    run = runs / "digits"
    euler = {"sampler": "euler", "steps": 5}
    (write_evaluation(run, "a-damaged", euler, 1.0, 5.0) / "metrics.json").write_text("{")
    gone = write_evaluation(run, "b-gone", euler, 1.0, 5.0)
    shutil.rmtree(gone / "chunks")
    sheet = io.BytesIO()
    Image.new("L", (40, 20), 7).save(sheet, "PNG")
    (gone / "gallery").mkdir()
    (gone / "gallery" / "class-00003.png").write_bytes(sheet.getvalue())
    (gone / "gallery" / "class-00004.png").symlink_to("/etc/passwd")
    (write_evaluation(run, "c-cut", euler, 1.0, 5.0) / "chunks" / "00000.npz").write_bytes(b"PK")
    (write_evaluation(run, "d-endless", euler, float("nan"), 5.0) / "chunks" / "00000.npz").unlink()
    (write_evaluation(run, "e-begun", euler, 1.0, 5.0) / "metrics.json").unlink()
    (write_evaluation(run, "f-odd", euler, 1.0, 5.0) / "metrics.json").write_text('{"evaluation": {}}')
    with serving(runs) as client:
        run_facts = client.get("/v1/runs").json()["data"][0]
        assert (run_facts["evaluations"], run_facts["finished"], run_facts["problem"]) == (6, 5, None)
        listed = {each["id"]: each for each in client.get(EVALUATIONS).json()["data"]}
        assert "problem" in listed["a-damaged"] and "problem" in listed["f-odd"]
        assert client.get(f"{EVALUATIONS}/a-damaged").status_code == 503
        assert client.get(f"{EVALUATIONS}/b-gone").json()["sheets"] == [3]
        assert client.get(f"{EVALUATIONS}/b-gone/sheets/3").content == sheet.getvalue()
        for label in ("4", "-1", "%2e%2e", "00003", "3.png", "99999999999"):
            reply = client.get(f"{EVALUATIONS}/b-gone/sheets/{label}")
            assert reply.status_code in (400, 404) or (label == "00003" and reply.status_code == 200), label
        assert not listed["b-gone"]["kept"] and client.get(f"{EVALUATIONS}/b-gone/images").status_code == 404
        assert client.get(f"{EVALUATIONS}/c-cut/images").status_code == 503
        assert "fid" not in listed["d-endless"]["figures"]["classifier"]
        assert client.get(f"{EVALUATIONS}/d-endless").status_code == 200
        there = client.get(f"{EVALUATIONS}/d-endless/images?limit=1").json()["images"]
        assert [each["number"] for each in there] == [16], "of a chunk that is not drawn yet, none"
        assert not listed["e-begun"]["finished"] and client.get(f"{EVALUATIONS}/e-begun/images").status_code == 200


def test_a_run_whose_checkpoint_cannot_be_read_says_so(trained: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained / "other", runs / "broken")
    (runs / "young" / "checkpoints").mkdir(parents=True)
    for marker in (runs / "broken" / "checkpoints").glob("*/checkpoint.json"):
        marker.write_text("{}")
    with serving(runs) as client:
        listed = {run["id"]: run for run in client.get("/v1/runs").json()["data"]}
        assert "cannot be read" in listed["broken"]["problem"] and listed["young"]["problem"] is None
        assert client.get("/v1/runs/young").json()["classes"] is None
