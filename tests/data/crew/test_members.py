"""Who joins whom: addresses, programs, and crews whose leader has died elsewhere."""

import json
import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from ditmoe import toy_parts  # type: ignore[attr-defined]
from ditmoe.data.crew.certificate import crew_security
from ditmoe.data.crew.leader import SCHEDULER_CLAIM, SCHEDULER_FILE, lead_crew
from ditmoe.data.crew.members import join_crew
from ditmoe.data.crew.program import program_digest
from ditmoe.data.crew.tasks import TALLY_VARIABLE, Task, make_part
from ditmoe.data.storage.claims import Claims
from ditmoe.data.storage.files import read_object
from ditmoe.model.errors import UserError


def no_host(leader: str) -> str:
    raise AssertionError(leader)


def foreign_claim(folder: Path, age: float) -> Path:
    """Of a process of another machine, which gave its last sign so many seconds ago."""
    claim = folder / f"{SCHEDULER_CLAIM}.0"
    facts = {"token": "a" * 32, "after": "", "machine": "elsewhere", "host": "far", "pid": 7, "started": 1}
    claim.write_text(json.dumps({**facts, "beat": 15.0}))
    os.utime(claim, (time.time() - age,) * 2)
    return claim


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"address": "tls://127.0.0.1:1", "host": "far", "program": program_digest()},
            "leads it on far listens on 127.0.0.1, where only its own machine reaches it; expected .*--listen",
        ),
        (
            {"address": "tls://192.0.2.9:1", "host": "far", "program": "0" * 64},
            "leads it on far is another version of this program, or of torch.*expected the same",
        ),
    ],
)
def test_whoever_cannot_be_joined_is_told_and_waited_for(
    tmp_path: Path, facts: dict[str, str], message: str
) -> None:
    folder, told, beats = tmp_path / "crew", list[str](), list[str]()
    crew_security(folder)
    (folder / SCHEDULER_FILE).write_text(json.dumps(facts))
    with Claims(folder).taken(SCHEDULER_CLAIM), pytest.raises(UserError, match=message):
        join_crew(folder, [{}], own_host=no_host, idle_seconds=0.2, log=told.append, beat=beats.append)
    assert len(told) == 1 and set(beats) == {"waits for somebody who leads"}


def test_an_address_without_tls_is_nobodys(tmp_path: Path) -> None:
    folder, told = tmp_path / "crew", list[str]()
    crew_security(folder)
    (folder / SCHEDULER_FILE).write_text('{"address": "tcp://192.0.2.9:1"}')
    with Claims(folder).taken(SCHEDULER_CLAIM):
        join_crew(folder, [{}], own_host=no_host, idle_seconds=0, log=told.append)
    assert told == [f"{folder}: nobody has led this crew for 0 s"]


def test_a_leader_that_died_on_another_machine_is_succeeded_once_that_is_sure(tmp_path: Path) -> None:
    """As when its node's end has put its job back into the queue: the next node has it within seconds."""
    folder, told = tmp_path / "crew", list[str]()
    crew_security(folder)
    foreign_claim(folder, 118.0)
    with lead_crew(folder, [], log=told.append) as crew:
        assert read_object(crew.folder / SCHEDULER_FILE)["program"] == program_digest()
    assert len(told) == 1 and "another process leads this crew (process 7 on far); waiting for a sign" in told[0]
    assert not (folder / SCHEDULER_FILE).exists()


def test_a_leader_of_another_machine_that_lives_is_told_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "crew"
    crew_security(folder)
    foreign_claim(folder, 0.0)
    monkeypatch.setattr("ditmoe.data.crew.leader.MISSED_BEATS", -2)
    with pytest.raises(UserError, match=r"another process leads this crew \(process 7 on far\); wait for it"):
        lead_crew(folder, []).__enter__()


def test_a_leader_that_was_taken_for_dead_leaves_the_next_ones_file_alone(tmp_path: Path) -> None:
    folder = tmp_path / "crew"
    with lead_crew(folder, []):
        for claim in folder.glob(f"{SCHEDULER_CLAIM}.*"):
            claim.unlink()
        (folder / SCHEDULER_FILE).write_text('{"address": "tls://192.0.2.9:1"}')
    assert read_object(folder / SCHEDULER_FILE) == {"address": "tls://192.0.2.9:1"}


def test_a_worker_that_was_stopped_while_it_started_keeps_nobody_from_ending(tmp_path: Path) -> None:
    def workers() -> list[BaseProcess]:
        return [child for child in multiprocessing.active_children() if child.name.startswith("Dask Worker")]

    with lead_crew(tmp_path / "crew", [{"OMP_NUM_THREADS": "1"}]):
        end = time.monotonic() + 60
        while not (found := workers()):
            assert time.monotonic() < end
            time.sleep(0.01)
        [pid] = [child.pid for child in found]
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + 60
    while workers():
        assert time.monotonic() < end, "it would be waited for"
        time.sleep(0.05)


def test_each_part_that_a_worker_made_is_on_its_tally(
    tmp_path: Path, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"folder": str(tmp_path / "out"), "journal": str(journal), "count": 3, "fates": {"2": "refused"}}
    task, tally = Task.of(toy_parts.squares, request), tmp_path / "tally"
    monkeypatch.setenv(TALLY_VARIABLE, str(tally))
    for part in (0, 1, 1, 2):
        make_part(task.builder, task.request, part, 60)
    assert tally.read_bytes() == b".."
    monkeypatch.setenv(TALLY_VARIABLE, str(tmp_path / "absent" / "tally"))
    assert make_part(task.builder, json.dumps({**request, "count": 4}), 3, 60) == (None, None)
