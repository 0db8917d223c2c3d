"""Owners share the queue: whose job comes next."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from test_store import claim, submit

from safelight.server.store import Store


def whose(store: Store, count: int) -> str:
    """Return the owners of the next jobs, one letter each."""
    return "".join(claim(store, alone=True).owner for _ in range(count))


def test_many_of_one_do_not_hold_up_another_s_one(store: Store) -> None:
    for _ in range(100):
        submit(store, owner="a", bound=2000, cost=10)
    assert whose(store, 3) == "aaa"
    one = submit(store, owner="b", bound=2000, cost=10)
    assert claim(store).id == one.id
    assert whose(store, 3) == "aaa"


def test_owners_take_turns_by_cost(store: Store) -> None:
    for _ in range(60):
        submit(store, owner="a", cost=10)
    for _ in range(20):
        submit(store, owner="b", cost=30)
    assert Counter(whose(store, 40)) == {"a": 30, "b": 10}


def test_who_was_away_has_saved_up_nothing(store: Store) -> None:
    submit(store, owner="b")
    assert whose(store, 1) == "b"
    for _ in range(60):
        submit(store, owner="a")
    assert whose(store, 40) == "a" * 40
    for _ in range(30):
        submit(store, owner="b")
    assert sorted(Counter(whose(store, 20)).values()) == [10, 10]


def test_a_worker_with_full_hands_takes_a_job_of_who_has_none(store: Store) -> None:
    for owner in "aabb":
        submit(store, owner=owner, cost=10)
    assert claim(store, held={"a"}, cheaper_than=5).owner == "b"
    assert store.claim("w", held={"a", "b"}, cheaper_than=5) is None
    submit(store, owner="a", cost=4)
    assert claim(store, held={"a", "b"}, cheaper_than=5).cost == 4


def test_an_owner_s_short_jobs_come_first_and_old_ones_do_not_starve(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(store, "now", lambda: now[0])
    old = submit(store, owner="a", cost=100)
    for _ in range(9):
        submit(store, owner="a", cost=10)
    found = []
    for _ in range(15):
        now[0] += 10
        submit(store, owner="a", cost=10)
        found.append(claim(store, ageing=2.0).id)
    assert found.index(old.id) == 13  # one of 10 that came 45 s later is as urgent


def test_the_next_job_is_found_by_indexes_alone(tmp_path: Path) -> None:
    """No part of SQLite's plan scans the jobs. docs/scale.md has PostgreSQL's plan."""
    store = Store(f"sqlite:///{tmp_path / 'jobs.sqlite3'}")
    store.migrate()
    submit(store, owner="a")
    plans: list[str] = []

    @event.listens_for(store.engine, "before_cursor_execute")
    def _(_: object, cursor: Any, statement: str, parameters: Any, *__: object) -> None:
        if statement.startswith(("SELECT", "UPDATE")):
            rows = cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            plans.extend(row[3] for row in rows if "jobs" in row[3])

    claim(store)
    store.close()
    assert len(plans) >= 8
    assert [plan for plan in plans if "INDEX" not in plan] == []
