"""An evaluation that the service was asked for, by workers that nobody of it started, in the field's networks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.sampling.evaluation.of_run import prepare_job
from ditmoe.sampling.metrics.networks.inception import FidInception
from ditmoe.sampling.service.client import Client
from ditmoe.sampling.service.jobs.evaluators import Evaluators
from ditmoe.sampling.service.listing import Listing
from ditmoe.sampling.service.requests import EvaluationJob
from tests.forked import DITMOE
from tests.sampling.metrics.networks.test_dinov2 import random_network
from tests.sampling.service.conftest import until
from tests.sampling.service.served import Served, processes_of
from tests.sampling.small_run import write_run

COUNT = 16


def network_files(folder: Path) -> tuple[Path, Path]:
    """Inception-v3 as pytorch-fid's file has it, and DINOv2 ViT-S/14 as its authors' has it; of random weights."""
    folder.mkdir()
    torch.manual_seed(0)
    inception, dinov2 = folder / "pt_inception.pth", folder / "dinov2_vits14.safetensors"
    state = FidInception().eval().state_dict()
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    torch.save({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}, inception)
    save_file(random_network(37, 384, 12).state_dict(), dinov2)
    return inception, dinov2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_workers_from_outside_score_in_the_networks_of_the_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inception, dinov2 = network_files(tmp_path / "networks")
    runs, digits, crew = tmp_path / "runs", tmp_path / "digits", tmp_path / "crew"
    write_run(runs / "digits")
    pack(open_source("digits", count=None, seed=0), digits, PackSettings(count=36))
    options = ("--inception", inception, "--dinov2", dinov2, "--reference", f"digits={digits}")
    served = Served(runs, tmp_path / "state", *options, "--processes", 0, "--crew", crew)
    worker = [sys.executable, *DITMOE, "worker", str(crew), "--processes", "2", "--idle", "5"]
    asked = {"model": "digits", "count": COUNT, "sampler": "euler", "steps": 4, "recogniser": False}
    with Client(served.start()) as client:
        job_id = client.give("evaluate", features=["inception", "dinov2"], reference="digits", **asked)
        until(lambda: client.job(job_id)["status"] == "in_progress" and len(processes_of(job_id)) > 0)
        assert client.job(job_id)["progress"]["done"] == 0, "without workers nothing is drawn"
        with subprocess.Popen(worker) as outside:
            assert client.wait(job_id)["progress"] == {"done": COUNT, "total": COUNT}
            outside.terminate()
        figures = client.figures(job_id)["results"]
    served.kill()
    # The same by one process of the command, of a run of the same weights.
    write_run(runs / "copy")
    evaluators = Evaluators({"inception": inception, "dinov2": dinov2}, {"digits": str(digits)})
    fields = {**asked, "model": "copy", "features": ["inception", "dinov2"], "reference": "digits"}
    request = EvaluationJob.model_validate({"kind": "evaluate", **fields})
    alone = evaluators.options(request, Listing(runs).find("copy", None))
    subprocess.run([sys.executable, *DITMOE, *evaluators.arguments(alone)], check=True, timeout=600)
    known = json.loads((prepare_job(alone).folder / "metrics.json").read_text())["results"]
    assert set(known) == {"inception", "dinov2"} and known["inception"]["precision"] is not None
    assert json.dumps(figures, sort_keys=True) == json.dumps(known, sort_keys=True)
