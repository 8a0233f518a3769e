"""Chains, at once and as jobs: their bits, what they may ask for, and that they go on where they were."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from ditmoe.sampling.batching import engine
from ditmoe.sampling.chains import images as chain_images
from ditmoe.sampling.drawing.generate import generate
from ditmoe.sampling.network.load import load_model
from ditmoe.sampling.service.client import Client, Refused
from ditmoe.sampling.service.jobs.runner import Runner
from ditmoe.sampling.service.requests import DrawJob, ImageRequest, passes_of
from ditmoe.sampling.settings.config import SamplerConfig
from tests.sampling.service.conftest import serving
from tests.sampling.service.test_images import ROUTE, images
from tests.sampling.small_run import write_noise_classifier, write_run

SHORT = {"skip": 2, "burn_in_first": 1, "burn_in": 1, "initial_steps": 3, "samples_per_chain": 4}
CHAINS = {"model": "digits", "sampler": "dlg:euler", "steps": 3, "seed": 2, "dlg": SHORT}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a noise-level classifier, and one without."""
    folder = tmp_path_factory.mktemp("walked") / "runs"
    write_noise_classifier(write_run(folder / "digits"))
    write_run(folder / "bare")
    return folder


@pytest.fixture(scope="module")
def client(walked: Path) -> Iterator[httpx.Client]:
    with serving(walked) as made:
        yield made


def test_images_of_chains_are_the_same_alone_and_in_any_company(client: httpx.Client) -> None:
    """Sample 2 of a chain is what follows on samples 0 and 1, whoever asks for which of them."""
    together = client.post(ROUTE, json={**CHAINS, "n": 10})
    assert together.status_code == 200, together.text
    data = together.json()["data"]
    assert [each["label"] for each in data] == [0] * 4 + [1] * 4 + [2] * 2
    assert len({each["b64_json"] for each in data}) >= 6, "a chain may denoise one state twice"

    def ask(number: int) -> Any:
        reply = client.post(ROUTE, json={**CHAINS, "first": number})
        assert reply.status_code == 200, reply.text
        return reply.json()["data"][0]["b64_json"]

    known = [each["b64_json"] for each in data]
    assert [ask(number) for number in (9, 2)] == [known[9], known[2]]
    others = {"model": "digits", "sampler": "heun", "steps": 9, "n": 6}
    with ThreadPoolExecutor(6) as pool:
        busy = [pool.submit(client.post, ROUTE, json=others) for _ in range(2)]
        assert list(pool.map(ask, range(8))) == known[:8]
        assert {each.result().status_code for each in busy} == {200}


def test_images_of_chains_are_those_of_the_run(client: httpx.Client, walked: Path) -> None:
    """To rounding, which may turn a close choice of a level: most are the same."""
    reply = client.post(ROUTE, json={**CHAINS, "n": 8, "class": 3})
    config = SamplerConfig.model_validate({name: value for name, value in CHAINS.items() if name != "model"})
    expected = generate(load_model(walked / "digits"), torch.full((8,), 3), range(8), config, 2)
    near = [
        np.abs(image.astype(int) - known[:, :, 0].astype(int)).max() <= 1
        for image, known in zip(images(reply), expected.image_NHWC.numpy(), strict=True)
    ]
    assert sum(near) >= 6
    assert [each["nfe"] for each in reply.json()["data"]] == expected.nfe_N.tolist()


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"model": "bare"}, "sampler"),
        ({"labels": [1, 1, 2]}, "labels.2"),
        ({"dlg": {**SHORT, "class_scales": [1.0]}}, "sampler"),
        ({"dlg": {**SHORT, "sigma_min": 1e5}}, "sampler"),
        ({"dlg": {**SHORT, "skip": 0}}, "dlg.skip"),
        ({"dlg": {**SHORT, "path": "/etc"}}, "dlg.path"),
        ({"dlg": {**SHORT, "class_scales": [1.0, "x"]}}, "dlg.class_scales.1"),
        ({"dlg": {**SHORT, "samples_per_chain": 10**6}, "first": 999_999}, "steps"),
    ],
)
def test_what_is_wrong_with_chains_names_the_field(
    client: httpx.Client, asked: dict[str, Any], param: str
) -> None:
    reply = client.post(ROUTE, json={**CHAINS, **asked})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


def test_a_chain_costs_what_comes_before_its_image() -> None:
    config = ImageRequest.model_validate(CHAINS).sampler_config()
    # Each sample takes 2 steps of the chain, 3 of euler and the Tweedie step; the start 5 (kar2 of 3) and 2.
    assert passes_of(config, 1, first=0) == pytest.approx(7 + 6)
    assert passes_of(config, 1, first=3) == pytest.approx(7 + 4 * 6) == passes_of(config, 4, first=0)
    assert passes_of(config, 6, first=2) == pytest.approx(2 * (7 + 4 * 6))
    assert passes_of(config, 9, first=0) == pytest.approx(3 * 7 + 9 * 6)


def test_a_job_draws_whole_chains(client: httpx.Client, tmp_path: Path) -> None:
    ours = Client(str(client.base_url))
    job_id = ours.give("draw", count=70, **CHAINS)
    assert ours.wait(job_id)["progress"] == {"done": 70, "total": 70}
    alone = {number: images(client.post(ROUTE, json={**CHAINS, "first": number}))[0] for number in (0, 63, 64, 69)}
    for number, image in alone.items():
        assert np.array_equal(np.array(ours.image(job_id, number)), image)
    assert set(ours.files(job_id)) == {"chunks/00000.npz", "chunks/00001.npz"}
    ours.fetch(job_id, "chunks/00000.npz", tmp_path / "chunk.npz")
    with np.load(tmp_path / "chunk.npz", allow_pickle=False) as chunk:
        assert chunk["labels"].tolist() == [place // 4 % 10 for place in range(64)]
        assert chunk["sigma"].shape == (64,) and chunk["trace"].shape == (64, 2)
    long = DrawJob.model_validate({**CHAINS, "kind": "draw", "count": 1, "dlg": {"samples_per_chain": 50}})
    assert long.chunk == 50 and long.model_copy(update={"dlg": SamplerConfig().dlg}).chunk == 50
    with pytest.raises(Refused, match="noise-classifier"):
        ours.give("draw", count=1, **{**CHAINS, "model": "bare"})


def test_a_chain_of_a_job_goes_on_where_it_was(
    walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service ends within a chain; the next one has not to draw what was drawn."""
    monkeypatch.setattr(chain_images, "KEEP_SECONDS", 0.0)
    asked = {**CHAINS, "dlg": {**SHORT, "samples_per_chain": 60}, "count": 60}
    state = tmp_path / "state"
    with serving(walked, state=tmp_path / "calm") as client:
        calm = Client(str(client.base_url))
        job_id = calm.give("draw", **asked)
        calm.wait(job_id)
        known = [calm.image(job_id, number).tobytes() for number in range(60)]
    counts: list[int] = []
    reached, closing = Event(), Event()
    draw_chain_images, close = chain_images.draw_chain_images, Runner.close

    def count(drawn: int) -> None:
        counts.append(drawn)
        if drawn == 30 and not closing.is_set():
            reached.set()
            closing.wait(60)

    def closed(runner: Runner) -> None:
        closing.set()
        close(runner)

    monkeypatch.setattr(
        engine, "draw_chain_images", lambda *given, **more: draw_chain_images(*given, **more, progress=count)
    )
    monkeypatch.setattr(Runner, "close", closed)
    with serving(walked, state=state) as client:
        job_id = Client(str(client.base_url)).give("draw", **asked)
        assert reached.wait(60)
    [kept] = (state / "jobs" / job_id / ".chains").iterdir()
    assert kept.name == "00000000.safetensors" and len(counts) < 60
    begun = len(counts)
    with serving(walked, state=state) as client:
        ours = Client(str(client.base_url))
        ours.wait(job_id)
        assert [ours.image(job_id, number).tobytes() for number in range(60)] == known
        assert not (state / "jobs" / job_id / ".chains").exists()
    assert len(counts) - begun <= 31 and counts[-1] == 60
