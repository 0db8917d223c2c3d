"""The database of jobs, on SQLite and on PostgreSQL."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from safelight import SafelightError
from safelight.errors import StorageError
from safelight.server import claims
from safelight.server.claims import Claim, LostError
from safelight.server.jobs import BusyError, Job, Picture, Status
from safelight.server.store import Store, new_id


def submit(store: Store, prompt: str = "a cat", count: int = 1, **how: Any) -> Job:
    given: dict[str, Any] = {"client": "api", "cost": 10, "bound": 100, **how}
    settings = {"prompt": prompt, "count": count, "seed": 2**62 + 1}
    return store.submit(new_id(), settings, **given)[0]


def picture(index: int = 0) -> Picture:
    return Picture(id=new_id(), index=index, seed=2**62 + 1, width=64, height=64, recipe={"a": 1})


def claim(store: Store, worker: str = "w", **how: Any) -> Claim:
    found = store.claim(worker, **how)
    assert found is not None
    return found


def test_a_job_from_submission_to_its_pictures(store: Store) -> None:
    job = submit(store, count=2)
    assert (job.status, job.attempts, job.pictures) == (Status.QUEUED, 0, [])
    mine = claim(store)
    assert (mine.id, mine.done, mine.suspect) == (job.id, frozenset(), False)
    assert store.claim("w") is None
    pictures = [picture(0), picture(1)]
    for each in pictures:
        store.add_picture(job.id, mine.token, each)
    store.finish(job.id, mine.token, warnings=["w"])
    found = store.get(job.id)
    assert found is not None
    assert found.status == Status.SUCCEEDED
    assert found.pictures == pictures
    assert found.warnings == ["w"]
    assert found.settings["seed"] == 2**62 + 1
    assert found.finished_at is not None
    if store.engine.dialect.name == "sqlite":
        with store.engine.connect() as db:
            assert db.execute(text("PRAGMA integrity_check")).scalar_one() == "ok"


def test_a_picture_is_committed_once(store: Store) -> None:
    job = submit(store)
    mine = claim(store)
    store.add_picture(job.id, mine.token, picture())
    with pytest.raises(LostError):
        store.add_picture(job.id, mine.token, picture())
    found = store.get(job.id)
    assert found is not None
    assert len(found.pictures) == 1


def test_a_worker_that_lost_its_job_commits_nothing(store: Store) -> None:
    job = submit(store, count=2)
    old = claim(store, "old")
    store.add_picture(job.id, old.token, picture(0))
    store.release("old")
    new = claim(store, "new", alone=True)
    assert (new.done, new.suspect) == (frozenset({0}), True)
    with pytest.raises(LostError):
        store.add_picture(job.id, old.token, picture(1))
    with pytest.raises(LostError):
        store.finish(job.id, old.token, warnings=[])
    store.finish(job.id, new.token, warnings=[])


def test_a_lease_that_ran_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(store)
    monkeypatch.setattr(claims, "LEASE", -1.0)
    claim(store, "gone")
    claim(store, "here")
    monkeypatch.setattr(claims, "LEASE", 60.0)
    store.renew("here")
    assert store.claim("third", alone=True) is None


def test_a_machine_that_is_gone_is_no_fault_of_a_job(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as an end of the server: three in company, ten alone, without a picture."""
    job = submit(store, count=2)
    monkeypatch.setattr(claims, "LEASE", -1.0)
    for number in range(12):
        mine = claim(store, f"w{number}", alone=True)
        assert (mine.id, mine.suspect) == (job.id, number >= 3)
    mine = claim(store, "gets on", alone=True)
    store.add_picture(job.id, mine.token, picture(0))
    found = store.get(job.id)
    assert found is not None
    assert (found.status, found.attempts) == (Status.RUNNING, 1)
    for number in range(12):
        assert claim(store, f"x{number}", alone=True).suspect == (number >= 2)
    assert store.claim("w", alone=True) is None
    found = store.get(job.id)
    assert found is not None
    assert found.status == Status.FAILED
    assert "the worker's machine ended 13 times" in str(found.error)


def test_a_poison_job_fails_after_three_attempts_and_the_rest_go_on(store: Store) -> None:
    poison = submit(store, cost=1)
    innocent = submit(store, cost=2)
    for i in range(3):
        assert claim(store, f"w{i}", alone=True).id == poison.id
        store.release(f"w{i}")
    found = store.get(poison.id)
    assert found is not None
    assert found.status == Status.FAILED
    assert found.error == "the worker stopped 3 times while it drew this"
    assert claim(store, alone=True).id == innocent.id


def test_a_picture_begins_the_count_of_attempts_anew(store: Store) -> None:
    job = submit(store, count=3)
    for index in range(3):
        mine = claim(store, f"w{index}", alone=True)
        store.add_picture(job.id, mine.token, picture(index))
        store.release(f"w{index}")
    found = store.get(job.id)
    assert found is not None
    assert (found.status, found.attempts) == (Status.QUEUED, 1)


def test_ends_of_the_whole_server_are_no_fault_of_a_job(store: Store) -> None:
    """A job is at fault only after three ends in company and ten alone, without a picture."""
    job = submit(store, count=2)
    for number in range(12):
        mine = claim(store, f"w{number}", alone=True)
        assert (mine.id, mine.suspect) == (job.id, number >= 3)
        store.release(ended=True)
    found = store.get(job.id)
    assert found is not None
    assert (found.status, found.attempts) == (Status.QUEUED, 0)

    mine = claim(store, "gets on", alone=True)
    store.add_picture(job.id, mine.token, picture(0))
    store.release(ended=True)
    for number in range(12):
        mine = claim(store, f"again {number}", alone=True)
        assert mine.suspect == (number >= 2)
        store.release(ended=True)
    found = store.get(job.id)
    assert found is not None
    ended = "the server or the worker's machine ended 13 times"
    assert found.error == f"{ended} while it drew this, 10 times alone"


def test_a_worker_killed_from_outside_now_and_then_is_no_fault_of_a_job(store: Store) -> None:
    job = submit(store, count=2)
    for index in range(2):
        for number in range(4):
            claim(store, f"w{index}{number}", alone=True)
            store.release(f"w{index}{number}", killed=True)
        mine = claim(store, f"w{index}", alone=True)
        store.add_picture(job.id, mine.token, picture(index))
        store.release(f"w{index}", killed=True)
    found = store.get(job.id)
    assert found is not None
    assert found.status == Status.QUEUED


def test_what_was_begun_before_runs_alone_and_is_not_passed_by(store: Store) -> None:
    begun = submit(store, cost=1)
    claim(store, "dead")
    store.release("dead")
    submit(store, cost=5)
    assert store.claim("w", alone=False) is None
    assert claim(store, "w", alone=True).id == begun.id


def test_put_back_is_no_attempt(store: Store) -> None:
    job = submit(store)
    mine = claim(store)
    store.put_back(job.id, mine.token)
    again = claim(store)
    assert not again.suspect


def test_a_claim_that_the_worker_never_heard_of_waits_again(store: Store) -> None:
    """The database went away between its commit and its answer."""
    known, lost = (submit(store) for _ in range(2))
    mine = store.claim("w")
    assert mine is not None
    assert store.claim("w") is not None  # the worker never received this claim
    again = store.claim("w", known=[mine.token])
    assert again is not None
    assert {mine.id, again.id} == {known.id, lost.id}
    assert not again.suspect  # the lost claim was no attempt
    assert store.holds(mine.id, mine.token)


def test_short_ones_first_until_they_have_waited(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(store, "now", lambda: now[0])
    long = submit(store, cost=100)
    now[0] += 10
    short = submit(store, cost=10)
    assert claim(store, "a", ageing=2.0).id == short.id
    now[0] += 50
    newer = submit(store, cost=10)
    assert claim(store, "b", ageing=2.0).id == long.id
    assert claim(store, "c", ageing=2.0).id == newer.id


def test_the_queue_is_bounded_all_or_nothing(store: Store) -> None:
    submit(store, count=3, bound=5)
    with pytest.raises(BusyError, match="queue of 5 pictures is full: try again in 5 s"):
        submit(store, count=3, bound=5)
    submit(store, count=2, bound=5)
    assert store.counts() == {"queued": 2}


def test_many_at_once_stay_within_the_bound(store: Store) -> None:
    refused = 0

    def one(_: int) -> None:
        nonlocal refused
        try:
            submit(store, bound=10)
        except BusyError:
            with lock:
                refused += 1

    lock = threading.Lock()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(40)))
    assert refused == 30
    assert store.counts() == {"queued": 10}


def test_one_key_is_one_job(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: submit(store, key="k", digest="d"), range(100)))
    assert len({job.id for job in jobs}) == 1
    with pytest.raises(SafelightError, match="came with another request before: use a new one"):
        submit(store, key="k", digest="other")


def test_no_two_workers_get_one_job(store: Store) -> None:
    ids = {submit(store).id for _ in range(20)}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: store.claim(f"w{i}"), range(24)))
    assert sorted(c.id for c in found if c) == sorted(ids)


def test_cancel_retry_delete(store: Store) -> None:
    job = submit(store)
    mine = claim(store)
    cancelled = store.cancel(job.id)
    assert cancelled is not None
    assert cancelled.status == Status.CANCELLED
    with pytest.raises(LostError):
        store.add_picture(job.id, mine.token, picture())
    again = store.retry(job.id, 1)
    assert again is not None
    assert (again.status, again.attempts, again.finished_at) == (Status.QUEUED, 0, None)
    mine = claim(store)
    drawn = picture()
    store.add_picture(job.id, mine.token, drawn)
    store.finish(job.id, mine.token, warnings=[])
    finished = store.cancel(job.id)
    assert finished is not None
    assert finished.status == Status.SUCCEEDED
    assert store.has_picture(drawn.id)
    assert store.delete(job.id)
    assert store.get(job.id) is None
    assert store.list()[0] == []
    assert store.gone() == {job.id: [drawn.id]}
    store.forget([job.id])
    assert not store.has_picture(drawn.id)
    assert not store.delete(job.id)
    assert store.cancel(job.id) is None


def test_the_list_is_searched_and_paged(store: Store) -> None:
    for prompt in ("a red Apple", "a cat", "an apple 100% red", "a_b"):
        submit(store, prompt)
    prompts = [job.settings["prompt"] for job in store.list()[0]]
    assert prompts == ["a_b", "an apple 100% red", "a cat", "a red Apple"]
    assert len(store.list(search="apple RED")[0]) == 2
    assert [j.settings["prompt"] for j in store.list(search="100%")[0]] == ["an apple 100% red"]
    assert [j.settings["prompt"] for j in store.list(search="a_b")[0]] == ["a_b"]
    newest = store.list(limit=1)[0][0]
    rest = store.list(before=newest.created_at.timestamp())[0]
    assert [job.settings["prompt"] for job in rest] == prompts[1:]
    assert store.list(status=Status.FAILED)[0] == []


def test_the_list_is_searched_in_all_languages(tmp_path: Path) -> None:
    """PostgreSQL lowers letters by its own locale."""
    store = Store(f"sqlite:///{tmp_path / 'jobs.sqlite3'}")
    store.migrate()
    for prompt in ("Ein Korb voll Äpfel", "Красное яблоко"):
        submit(store, prompt)
    for words, count in (("Äpfel", 1), ("korb äPFEL", 1), ("КРАСНОЕ Яблоко", 1), ("apfel", 0)):
        assert len(store.list(search=words)[0]) == count, words
    store.close()


def test_a_list_says_whether_it_was_cut(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        submit(store, "я" * 1000)
    assert store.list()[1] is False
    assert store.list(limit=3)[1] is True
    monkeypatch.setattr("safelight.server.store.MAX_LISTED", 15_000)
    jobs, more = store.list()
    assert (len(jobs), more) == (2, True)
    assert store.list(before=jobs[-1].created_at.timestamp())[1] is False


def test_a_retry_begins_anew(store: Store) -> None:
    job = submit(store)
    mine = claim(store)
    store.finish(job.id, mine.token, warnings=["of the first time"], error="broken")
    again = store.retry(job.id, 100)
    assert again is not None
    assert (again.started_at, again.finished_at, again.error, again.warnings) == (None,) * 3 + ([],)
    claim(store)
    begun = store.get(job.id)
    assert begun is not None
    assert begun.started_at is not None
    assert begun.started_at >= begun.created_at


def test_more_than_may_ever_wait_is_refused_for_good(store: Store) -> None:
    with pytest.raises(SafelightError, match="count must be at most 3") as refused:
        submit(store, count=4, bound=3)
    assert (type(refused.value), refused.value.field) == (SafelightError, "count")
    submit(store, count=3, bound=3)


def test_an_idle_worker_takes_no_lock_for_what_it_cannot_draw(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(store, model="another")

    def locked() -> Any:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", locked)
        assert store.claim("w", models=["mine"]) is None
    assert claim(store, models=["another"])


@pytest.mark.parametrize("url", ["postgresql://me:secret@host:port/x", "me:secret@host"])
def test_a_bad_url_is_one_line_without_its_password(url: str) -> None:
    with pytest.raises(StorageError, match="the database of jobs cannot be used: ") as refused:
        Store(url)
    assert "secret" not in str(refused.value)


def test_a_database_that_cannot_be_opened() -> None:
    with pytest.raises(SafelightError, match="database of jobs cannot be opened"):
        Store("sqlite:////nowhere/at/all/jobs.sqlite3").migrate()
