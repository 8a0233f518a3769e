"""A job has its folder for itself from its start to its end."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ditmoe.data.storage.claims import Claims
from ditmoe.model.errors import UserError
from ditmoe.sampling.jobs.alone import alone_at
from ditmoe.sampling.jobs.workers import Workers


def test_the_first_process_begins_and_nobody_else_gets_in(tmp_path: Path) -> None:
    claims, begun = Claims(tmp_path / "job"), list[int]()
    with alone_at(claims, "job", Workers(), "busy", lambda: begun.append(1)) as check:
        check()
        assert begun == [1]
        other = alone_at(claims, "job", Workers(), "job: another process is at it", lambda: begun.append(2))
        with pytest.raises(UserError, match=r"another process is at it \(process \d+ on .*\); wait for it"), other:
            pass
    assert begun == [1] and not list((tmp_path / "job").iterdir())
    with pytest.raises(UserError, match="no"), alone_at(claims, "job", Workers(), "busy", fail("no")):
        pass
    assert claims.holder("job") is None


def fail(message: str) -> Callable[[], None]:
    def begin() -> None:
        raise UserError(message)

    return begin


def test_the_others_need_no_claim_and_end_with_the_first(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    with claims.taken("job"), alone_at(claims, "job", Workers(1, 2), "busy", fail("not here")):
        pass
    stopped = Workers(1, 2, _all_well=lambda well: False)
    with pytest.raises(SystemExit), alone_at(claims, "job", stopped, "busy", fail("not here")):
        pass


def test_one_that_was_taken_for_dead_does_not_write_results(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    with alone_at(claims, "job", Workers(), "busy", lambda: None) as check:
        (tmp_path / "job.0").unlink()
        with pytest.raises(UserError, match="taken for dead"):
            check()
