"""A claim is held by one process that lives, whatever locks, clocks and killed processes do."""

import fcntl
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ditmoe.data.storage import claims as claims_module
from ditmoe.data.storage.claims import Claims
from ditmoe.model.errors import UserError
from tests.mortal import Mortal

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, ready: object, go_on: object) -> None:
    with Claims(folder).taken("work") as claim:
        assert claim is not None and claim.held()
        ready.set()  # type: ignore[attr-defined]
        go_on.wait(60)  # type: ignore[attr-defined]


def holder_in(folder: Path) -> tuple[multiprocessing.context.ForkProcess, object]:
    ready, go_on = FORK.Event(), FORK.Event()
    process = FORK.Process(target=hold, args=(folder, ready, go_on))
    process.start()
    assert ready.wait(30)
    return process, go_on


def no_locks(*args: object) -> None:
    raise OSError(38, "Function not implemented")


@pytest.fixture(params=["refused", "of no effect"])
def broken_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems without locks answer in two ways."""
    answer: Callable[..., None] = no_locks if request.param == "refused" else lambda *args: None
    monkeypatch.setattr(fcntl, "flock", answer)
    monkeypatch.setattr(fcntl, "lockf", answer)


@pytest.mark.usefixtures("broken_locks")
def test_one_holds_it_and_what_a_killed_process_held_is_free_at_once(tmp_path: Path) -> None:
    process, _ = holder_in(tmp_path)
    claims = Claims(tmp_path)
    with claims.taken("work") as claim:
        assert claim is None
    assert claims.holder("work") == f"process {process.pid} on {os.uname().nodename}"
    with claims.taken("other") as claim:
        assert claim is not None
    os.kill(process.pid or 0, signal.SIGKILL)
    while claims.holder("work") is not None:  # it is not waited for, so it stays as a zombie
        time.sleep(0.01)
    with claims.taken("work") as claim:
        assert claim is not None and claim.held()
    process.join(30)
    assert claims.holder("work") is None and not list(tmp_path.iterdir())


def test_the_number_of_a_process_alone_does_not_make_a_holder(tmp_path: Path) -> None:
    with Claims(tmp_path).taken("work") as claim:
        assert claim is not None
        path = tmp_path / "work.0"
        values = json.loads(path.read_bytes())
        path.write_text(
            json.dumps({**values, "started": values["started"] - 1})
        )  # an earlier process of this number
        with Claims(tmp_path).taken("work") as second:
            assert second is not None
            assert not claim.held() and second.held()
        claim.release()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def another_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on this process is on another machine than before."""

    def move() -> None:
        monkeypatch.setattr(claims_module, "_here", lambda: claims_module._Machine("another", "another"))

    return move


def test_on_another_machine_beats_decide_by_the_file_servers_clock(
    tmp_path: Path, another_machine: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this machine's clock says nothing
    claims = Claims(tmp_path)
    expiry = claims_module.BEAT_SECONDS * claims_module.MISSED_BEATS
    with claims.taken("work") as first:
        assert first is not None
        another_machine()
        now = os.stat(tmp_path / "work.0").st_mtime
        os.utime(tmp_path / "work.0", (now, now - expiry + 5))
        with claims.taken("work") as second:
            assert second is None
        os.utime(tmp_path / "work.0", (now, now - expiry - 1))
        with claims.taken("work") as second:
            assert second is not None and second.held() and not first.held()
            first.release()  # the loser's end leaves the winner's claim alone
            assert second.held()
    assert not list(tmp_path.iterdir())


def test_a_holder_shows_that_it_lives(
    tmp_path: Path, another_machine: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "BEAT_SECONDS", 0.02)
    with Claims(tmp_path).taken("work") as claim:
        assert claim is not None
        path = tmp_path / "work.0"
        os.utime(path, (0, 0))
        while os.stat(path).st_mtime == 0:
            time.sleep(0.01)
        path.unlink()
        assert not claim.held()  # somebody removed it


def test_of_many_that_find_it_over_one_gets_it(tmp_path: Path) -> None:
    """Also when they looked long ago: those who came and went since, and those who are there, stay untouched."""
    process, _ = holder_in(tmp_path)
    process.kill()
    process.join(30)
    claims = Claims(tmp_path)
    old = claims.listing()
    with claims.taken("work", old) as first, claims.taken("work", old) as second:
        assert first is not None and second is None
    nothing = claims.listing()
    with claims.taken("work", nothing) as first:
        assert first is not None
        # One that saw the dead holder before, and was asleep since.
        (tmp_path / "work.0").rename(tmp_path / "kept")
        (tmp_path / "work.0").write_text((tmp_path / "kept").read_text())
        with claims.taken("work", old) as second:
            assert second is None and first.held()
        with claims.taken("work", nothing) as second:
            assert second is None and first.held()


def test_one_that_slept_between_looking_and_taking_does_not_get_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, _ = holder_in(tmp_path)
    process.kill()
    process.join(30)
    sleeper, others = Claims(tmp_path), Claims(tmp_path)
    create = Claims._create
    held = []

    def asleep(self: Claims, path: Path, token: str, after: str) -> bool:
        monkeypatch.setattr(Claims, "_create", create)
        with others.taken("work") as one:  # takes what the dead one held, and is done with it
            assert one is not None
        held.append(others._take("work", others.listing()))  # then one begins anew
        return create(self, path, token, after)

    monkeypatch.setattr(Claims, "_create", asleep)
    with sleeper.taken("work") as claim:
        assert claim is None
    assert held[0] is not None and held[0].held()
    held[0].release()


def take_and_die(folder: Path, dies_at: int) -> None:
    """Be killed while a claim is taken, at one of the moments at which a file is listed, linked or removed."""
    mortal = Mortal(dies_at)
    os.scandir, os.link, os.unlink = map(mortal, (os.scandir, os.link, os.unlink))
    with Claims(folder).taken("work") as claim:
        assert claim is not None
        os._exit(mortal.moments)  # it is over with the process


def die_at_all_moments(parent: Path) -> None:
    last = 9  # moments of a takeover: two looks, the link, its draft, up to three claims before it, two drafts
    for case, (first, second) in enumerate(itertools.product(range(1, last + 2), repeat=2)):
        folder = parent / str(case)
        for dies_at in (100, first, second, 100):
            process = FORK.Process(target=take_and_die, args=(folder, dies_at))
            process.start()
            process.join(30)
            assert process.exitcode == -signal.SIGKILL or 0 < (process.exitcode or 0) < dies_at
        assert process.exitcode is not None and process.exitcode > 0
        assert process.exitcode <= last
        with Claims(folder).taken("work") as claim:
            assert claim is not None and claim.held()
            assert len([*folder.iterdir()]) == 1
        assert not [*folder.iterdir()]  # the drafts of the killed are gone too


def test_killed_at_any_moments_of_several_takeovers_it_is_free(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Out of a small process: the tests' own, with all that it has imported, takes long to be forked 400 times."""
    small = multiprocessing.get_context("spawn").Process(target=die_at_all_moments, args=(tmp_path,))
    small.start()
    small.join(120)
    assert small.exitcode == 0, capfd.readouterr().err
    assert len([*tmp_path.iterdir()]) == 100


def test_drafts_are_removed_when_nobody_can_be_at_them(
    tmp_path: Path, another_machine: Callable[[], None]
) -> None:
    claims = Claims(tmp_path)
    there = claims._draft("a" * 32)
    another_machine()
    here = claims._draft("b" * 32)
    for path in (there, here, tmp_path / "000.npz.x.draft", tmp_path / ".hidden"):
        path.touch()
    expiry = claims_module.BEAT_SECONDS * claims_module.MISSED_BEATS
    kept = {*tmp_path.iterdir()}
    now = time.time()
    for path in kept:
        os.utime(path, (now - expiry + 30, now - expiry + 30))
    claims.remove_drafts(claims.listing())
    assert {*tmp_path.iterdir()} == kept
    for path in kept:
        os.utime(path, (now - expiry - 30, now - expiry - 30))
    claims.remove_drafts(claims.listing())
    assert {*tmp_path.iterdir()} == kept - {there}  # the process of the other one is seen to live


def race(folder: Path, start: object, log: Path) -> None:
    start.wait(30)  # type: ignore[attr-defined]
    for _ in range(60):
        with Claims(folder).taken("work") as claim:
            if claim is not None:
                inside = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL)  # fails where another is inside
                os.close(inside)
                assert claim.held()
                os.unlink(log)


def test_no_two_are_inside_at_once(tmp_path: Path) -> None:
    start = FORK.Barrier(4)
    processes = [FORK.Process(target=race, args=(tmp_path / "claims", start, tmp_path / "in")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert not list((tmp_path / "claims").iterdir())


def test_without_hard_links_creation_is_exclusive_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    process, _ = holder_in(tmp_path)
    with Claims(tmp_path).taken("work") as claim:
        assert claim is None
    process.kill()
    process.join(30)
    with Claims(tmp_path).taken("work") as claim:
        assert claim is not None and claim.held()
    (tmp_path / "work.0").touch()  # one that is being created
    with Claims(tmp_path).taken("work") as claim:
        assert claim is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"token": 1}', b'{"pid": "x"}', b"[" * 100_000, b"\xff\x00"]
)
def test_what_cannot_be_made_out_is_left_alone_until_it_is_old(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "work.0").write_bytes(content)
    claims = Claims(tmp_path)
    with claims.taken("work") as claim:
        assert claim is None
    assert claims.holder("work") == "process 0 on an unknown machine"
    os.utime(tmp_path / "work.0", (0, 0))
    with claims.taken("work") as claim:
        assert claim is not None


def test_a_file_system_that_refuses_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"), Claims(tmp_path / "file").taken("work"):
        pass

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    message = r"work\.0: could not be written: No space left"
    with pytest.raises(UserError, match=message), Claims(tmp_path).taken("work"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_forked_process_does_not_let_go_of_its_parents_claim(tmp_path: Path) -> None:
    with Claims(tmp_path).taken("work") as claim:
        assert claim is not None
        child = FORK.Process(target=claim.release)
        child.start()
        child.join(30)
        assert child.exitcode == 0 and claim.held()
