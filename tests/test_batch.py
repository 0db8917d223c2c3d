"""Many pictures at once: each is as if drawn alone, and short ones do not wait for long ones."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import safelight
from safelight import Request, SafelightError
from safelight.engine import Engine, Job, Ticket, core
from safelight.engine.capacity import FEWEST, MOST, TRIES, Capacity
from safelight.engine.job import advance, prepare
from safelight.engine.turns import Turns
from safelight.model import Model
from tests.guiding import controlnet, edges


@pytest.fixture(scope="module")
def model() -> Model:
    return safelight.load(device="cpu", dtype="float32")


def photo(side: int = 64) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


SMALL: dict[str, Any] = {"prompt": "a cat", "sampler": "euler", "width": 64, "height": 64}


def drain(engine: Engine) -> list[Ticket]:
    finished: list[Ticket] = []
    while engine.busy:
        finished += engine.step()[1]
    return finished


def mixed(n: int) -> list[Request]:
    """Return requests with random samplers, steps, tasks and guidance."""
    chance = random.Random(0)
    requests = []
    for i in range(n):
        settings: dict[str, Any] = {
            "prompt": chance.choice(["a cat", "a red apple", "a dog"]),
            "sampler": chance.choice(["euler_a", "dpmpp_2m", "heun", "pndm"]),
            "steps": chance.randint(2, 6),
            "guidance_scale": chance.choice([1.0, 4.0, 7.5]),
            "seed": i,
            "width": 64,
            "height": 64,
        }
        if chance.random() < 0.3:
            settings |= {"image": photo(), "strength": 0.7}
        requests.append(Request(**settings))
    return requests


@pytest.mark.parametrize("exact", [True, False])
def test_pictures_are_what_they_are_alone(model: Model, exact: bool) -> None:
    """Pictures join and leave at random steps."""
    requests = mixed(6)
    alone = [np.asarray(model.generate(r).images[0]).astype(int) for r in requests]
    chance = random.Random(1)
    engine = Engine(model, rows=7, exact=exact)
    finished: list[Ticket] = []
    coming = list(enumerate(requests))
    while coming or engine.busy:
        while coming and chance.random() < 0.5:
            i, request = coming.pop(0)
            engine.add(request, i)
        finished += engine.step()[1]
    assert sorted(ticket.tag for ticket in finished) == list(range(6))
    for ticket in finished:
        assert ticket.image is not None
        apart = np.abs(np.asarray(ticket.image).astype(int) - alone[ticket.tag]).max()
        assert apart <= (0 if exact else 1)


def test_noise_is_the_same_in_any_company(model: Model) -> None:
    def noise(neighbours: int) -> torch.Tensor:
        engine = Engine(model, exact=False, rows=4)
        for i in range(neighbours):
            engine.add(Request(prompt="a dog", seed=i), "other")
        engine.add(Request(prompt="a cat", seed=9), "mine")
        return engine.tickets[-1].job.state

    assert torch.equal(noise(0), noise(3))


def test_several_pictures_of_one_request(model: Model) -> None:
    request = Request(**SMALL, seed=5, count=3, steps=2)
    engine = Engine(model, exact=False, rows=6)
    result = engine.add(request, "job", done=[1])
    assert result.seeds == [5, 6, 7]
    assert sorted((t.index, t.seed) for t in drain(engine)) == [(0, 5), (2, 7)]


def test_a_short_one_does_not_wait_for_a_long_one(model: Model) -> None:
    engine = Engine(model, exact=False, rows=2)
    engine.add(Request(**SMALL, steps=30), "long")
    for _ in range(3):
        engine.step()
    engine.add(Request(**SMALL, steps=3), "short")
    order = [ticket.tag for ticket in drain(engine)]
    assert order == ["short", "long"]


def test_a_long_one_has_its_turn(model: Model) -> None:
    engine = Engine(model, exact=False, rows=2)
    engine.add(Request(**SMALL, steps=10), "long")
    done: list[Any] = []
    for i in range(60):  # there is always a shorter one
        engine.add(Request(**SMALL, steps=3), i)
        done += [ticket.tag for ticket in engine.step()[1]]
    assert "long" in done


@pytest.mark.parametrize("rows", [1, 4])
def test_many_of_one_share_do_not_hold_up_another_s_one(model: Model, rows: int) -> None:
    engine = Engine(model, exact=rows == 1, rows=rows)
    few = {**SMALL, "steps": 3, "guidance_scale": 1.0}
    for i in range(12):
        engine.add(Request(**few), i, share="a")
    for _ in range(2):
        engine.step()
    engine.add(Request(**few), "b", share="b")
    assert [ticket.tag for ticket in drain(engine)].index("b") <= 2 * rows


def test_no_other_share_has_more_of_a_call(model: Model) -> None:
    """Pictures with equal steps share calls, also if many shares have one picture each."""
    engine = Engine(model, exact=False, rows=16)
    few = {**SMALL, "steps": 6, "guidance_scale": 1.0}
    engine.add(Request(count=12, **few), share="a")
    stepped, _ = engine.step()
    assert len(stepped) == 12
    engine.add(Request(count=2, **few), share="b")
    engine.add(Request(**few), share="c")
    while {"b", "c"} & {ticket.share for ticket in engine.tickets}:
        stepped, _ = engine.step()
        shares = [ticket.share for ticket in stepped]
        if shares:  # it took a step, and decoded no picture
            assert max(Counter(shares).values()) == shares.count(shares[0])
            assert "a" in shares
    for share in "defghi":
        engine.add(Request(**few), share=share)
    while not (stepped := engine.step()[0]):
        pass  # it decodes
    assert set("defghi") <= {ticket.share for ticket in stepped}


class Tagged:
    """A ticket, with the attributes that decide its turn."""

    def __init__(self, share: str, left: int) -> None:
        self.share, self.tag, self.work_left, self.arrived = share, self, left, 0.0


def test_shares_have_the_same_time() -> None:
    turns, had = Turns(), {"a": 0.0, "b": 0.0, "c": 0.0}
    tickets: list[Any] = [Tagged("a", 5) for _ in range(10)]
    for i in range(300):
        if i == 100:
            tickets.append(Tagged("b", 5))
            had["a"] = 0.0
        if i == 200:
            tickets.append(Tagged("c", 5))
            had = dict.fromkeys("abc", 0.0)
        first = turns.first(tickets)
        seconds = 3.0 if first.share == "b" else 1.0
        turns.note([(first.share, 1.0)], seconds)
        had[first.share] += seconds
    assert max(had.values()) - min(had.values()) <= 3
    turns.note([("a", 1.0), ("a", 1.0), ("b", 1.0)], 9.0)
    assert turns.first(tickets).share == "c"


def test_large_pictures_to_start_from_hold_nobody_up(model: Model) -> None:
    """Each is encoded in its own turn; pictures are decoded one by one, small ones first."""
    engine = Engine(model, exact=False, rows=4, background=True)
    large = Request(prompt="a cat", image=photo(512), count=6, steps=2, sampler="euler")
    engine.add(large, "large")
    assert not any(ticket.prepared for ticket in engine.tickets)
    engine.step()
    assert sum(ticket.prepared for ticket in engine.tickets) == 1
    for tag, image in (("small", None), ("picture", photo(64))):
        engine.add(Request(prompt="a dog", image=image, steps=2, sampler="euler"), tag)
    order = [ticket.tag for ticket in drain(engine)]
    assert len(order) == 8
    assert max(order.index("small"), order.index("picture")) <= 4


def test_a_late_short_one_does_not_wait_for_all_of_an_old_one(model: Model) -> None:
    """The old one has waited very long; the new one still comes early."""
    engine = Engine(model, exact=False, rows=2)
    engine.add(Request(**SMALL, steps=5, count=4), "old")
    for ticket in engine.tickets:
        ticket.arrived -= 10_000
    for _ in range(3):
        engine.step()
    engine.add(Request(**SMALL, steps=2), "new")
    order = [ticket.tag for ticket in drain(engine)]
    assert order.index("new") <= 1


def test_dropped_before_its_turn(model: Model) -> None:
    """Pictures that were not encoded yet never are."""
    engine = Engine(model, exact=False, rows=2, background=True)
    engine.add(Request(prompt="a cat", image=photo(256), count=20, steps=2), "large")
    engine.step()
    engine.drop("large")
    assert not engine.busy


def test_a_request_that_is_refused_leaves_no_picture(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each picture of a dynamic prompt has its own prompt, and a later one may be refused."""
    real: Any = core.with_drawn

    def with_drawn(request: Request, result: Any, seed: int) -> Request:
        if seed == 8:
            raise SafelightError("too many words")
        return real(request, result, seed)

    monkeypatch.setattr(core, "with_drawn", with_drawn)
    engine = Engine(model)
    with pytest.raises(SafelightError, match="too many words"):
        engine.add(Request(prompt="a cat", seed=7, count=2))
    assert not engine.busy


def test_a_dropped_picture_keeps_its_engine_busy_while_it_is_decoded(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(core, "finish", lambda *_: go_on.wait(20))
    engine = Engine(model, background=True)
    engine.add(Request(**SMALL, steps=1), "job")
    while engine.tickets:
        engine.step()
    engine.drop("job")
    assert engine.busy
    began = time.monotonic()
    assert engine.step(listen=0.1) == ([], [])
    assert 0.1 <= time.monotonic() - began < 10  # it does not loop at full load
    engine.close()  # does not wait: a process that waits counts as hung
    assert engine.busy
    go_on.set()
    assert drain(engine) == []


def test_the_same_picture_whether_it_is_encoded_at_once_or_in_turn(model: Model) -> None:
    request = Request(prompt="a cat", image=photo(64), seed=3, count=2, steps=3, sampler="euler")
    alone = [image.tobytes() for image in model.generate(request).images]
    engine = Engine(model, exact=True, background=True)
    engine.add(request, "job")
    tickets = sorted(drain(engine), key=lambda ticket: ticket.index)
    assert [t.image.tobytes() for t in tickets if t.image is not None] == alone


def test_no_memory_to_encode_fails_that_job_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short_of_memory(*_: Any, **how: Any) -> Any:
        if how["image"] is not None:
            raise MemoryError
        return prepare(*_, **how)

    monkeypatch.setattr("safelight.engine.requests.prepare", short_of_memory)
    engine = Engine(model, exact=False, rows=2, background=True)
    engine.add(Request(prompt="a cat", image=photo(64), steps=2, sampler="euler"), "large")
    engine.add(Request(**SMALL, steps=2), "small")
    finished = {ticket.tag: ticket for ticket in drain(engine)}
    assert "out of memory" in str(finished["large"].error)
    assert finished["small"].image is not None


def test_no_call_has_more_rows_than_asked_for(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(model: Model, jobs: list[Job]) -> None:
        calls.append(sum(job.conditioning.evaluations for job in jobs))
        advance(model, jobs)

    monkeypatch.setattr(core, "advance", counted)
    engine = Engine(model, exact=False, rows=5)
    for i in range(4):
        asked = {"guidance_scale": 1.0 if i == 3 else 7.5, "guidance_start": 0}
        engine.add(Request(**SMALL, steps=2, **asked), i)
    drain(engine)
    assert max(calls) == 5


def test_only_pictures_of_one_size_share_a_call(model: Model) -> None:
    engine = Engine(model, exact=False, rows=8)
    engine.add(Request(prompt="a cat", steps=2, sampler="euler", width=64, height=64), "small")
    engine.add(Request(prompt="a cat", steps=2, sampler="euler", width=128, height=64), "wide")
    sizes = {t.tag: t.image.size for t in drain(engine) if t.image is not None}
    assert sizes == {"small": (64, 64), "wide": (128, 64)}


def test_dropped_within_a_step(model: Model) -> None:
    engine = Engine(model, exact=False, rows=4)
    engine.add(Request(**SMALL, steps=30), "a")
    engine.add(Request(**SMALL, steps=2), "b")
    engine.step()
    engine.drop("a")
    assert [ticket.tag for ticket in drain(engine)] == ["b"]


def test_one_prompt_is_encoded_once(model: Model) -> None:
    engine = Engine(model, exact=False, rows=4)
    for seed in (1, 2):
        engine.add(Request(prompt="a cat", seed=seed), seed)
    engine.add(Request(prompt="a dog"), 3)
    contexts = [ticket.job.conditioning.tokens for ticket in engine.tickets]
    assert contexts[0] is contexts[1]
    assert contexts[2] is not contexts[0]


def test_the_cache_of_prompts_keeps_no_warnings() -> None:
    """Each request has its own warnings, even if its prompt was encoded for an earlier one."""
    fast = safelight.load("embedded-fast", device="cpu", dtype="float32")
    engine = Engine(fast, exact=False, rows=4)

    def warnings(**settings: Any) -> list[str]:
        return engine.add(Request(prompt="a cat", seed=1, **settings)).warnings

    assert warnings() == []
    (unfit,) = warnings(steps=9)
    assert "was taught to draw with sampler ddim, steps 4" in unfit
    assert warnings() == []
    wide, unfit = warnings(width=128, sampler="euler")
    assert "trained on 256x256" in wide
    assert "was taught to draw with" in unfit
    assert len({id(t.job.conditioning.tokens) for t in engine.tickets}) == 1


def test_a_ticket_says_its_precision(model: Model) -> None:
    engine = Engine(model)
    engine.add(Request(**SMALL, steps=1))
    assert [ticket.dtype for ticket in drain(engine)] == ["float32"]


@pytest.mark.parametrize("background", [False, True])
def test_decoding_beside_the_steps_changes_no_picture(model: Model, background: bool) -> None:
    engine = Engine(model, background=background)
    request = Request(**SMALL, steps=2, seed=3, count=2)
    engine.add(request)
    drawn = [ticket.image for ticket in sorted(drain(engine), key=lambda t: t.index)]
    alone = model.generate(request).images
    assert [image and image.tobytes() for image in drawn] == [image.tobytes() for image in alone]


def test_a_nan_fails_its_own_picture_alone(model: Model) -> None:
    engine = Engine(model, exact=False, rows=8)
    for tag in ("good", "bad", "fine"):
        engine.add(Request(**SMALL, steps=3, seed=1), tag)
    engine.step()
    state = engine.tickets[1].job.state.clone()
    state[0, 0, 0, 0] = float("nan")
    engine.tickets[1].job.state = state
    finished = {ticket.tag: ticket for ticket in drain(engine)}
    assert "NaN at step 2 of 3" in str(finished["bad"].error)
    assert getattr(finished["bad"].error, "code", None) == "not_finite"
    assert finished["bad"].image is None
    alone = model.generate(**SMALL, steps=3, seed=1).images[0]
    for tag in ("good", "fine"):
        image = finished[tag].image
        assert image is not None
        assert safelight.picture.largest_difference(image, alone) <= 1


def test_a_nan_in_the_decoder_fails_its_own_picture_alone(model: Model) -> None:
    engine = Engine(model, exact=False, rows=8)
    for tag in ("good", "bad"):
        engine.add(Request(**SMALL, steps=1), tag)
    finish = engine._finish

    def poisoned(job: Job) -> Image.Image:
        if job is bad:
            job.state = job.state * float("inf")
        return finish(job)

    bad = next(t.job for t in engine.tickets if t.tag == "bad")
    engine._finish = poisoned  # type: ignore[method-assign]
    finished = {ticket.tag: ticket for ticket in drain(engine)}
    assert "NaN" in str(finished["bad"].error)
    assert finished["good"].image is not None


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you ...")])
def test_out_of_memory_splits_the_batch_and_then_fails_that_job_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def short_of_memory(model: Model, jobs: list[Job]) -> None:
        if len(jobs) > 2 or jobs[0].state.shape[-1] > 16:
            raise error
        advance(model, jobs)

    monkeypatch.setattr(core, "advance", short_of_memory)
    engine = Engine(model, exact=False, rows=16)
    for i in range(5):
        engine.add(Request(**SMALL, steps=2, seed=i), i)
    engine.add(Request(**{**SMALL, "width": 512}, steps=2), "large")
    finished = {ticket.tag: ticket for ticket in drain(engine)}
    large = finished.pop("large").error
    assert isinstance(large, SafelightError)
    assert large.code == "out_of_memory"
    assert "out of memory: ask for a smaller picture" in str(large)
    assert len(finished) == 5
    assert all(ticket.image is not None for ticket in finished.values())


def test_other_faults_are_not_hidden(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(core, "advance", broken)
    engine = Engine(model, exact=False, rows=2)
    engine.add(Request(prompt="a cat"), 1)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        engine.step()


def test_what_does_not_fit_the_model_is_refused_at_once(model: Model) -> None:
    engine = Engine(model, exact=False, rows=2)
    with pytest.raises(SafelightError, match="leave out unconditional"):
        engine.add(Request(unconditional=True), 1)
    assert not engine.busy


def test_it_checks_the_network(model: Model) -> None:
    assert Engine(model, exact=False, rows=2).check()


@pytest.mark.parametrize("best", [2, 4, 16, 64])
def test_the_rows_of_a_call_are_learned_from_calls(best: int) -> None:
    capacity = Capacity()
    for _ in range(100):
        cost = 1 / min(best, capacity.rows)  # a call of more rows takes as much longer
        capacity.note(capacity.rows, 3 * cost * capacity.rows)  # others have the processor as well
        capacity.note(capacity.rows, cost * capacity.rows)
    assert capacity.rows == best


def test_calls_that_say_nothing_of_the_rows_are_not_counted() -> None:
    capacity = Capacity()
    for _ in range(100):
        capacity.note(1, 1.0)  # half empty
        capacity.note(16, 1.0)  # one large picture
    assert capacity.rows == FEWEST


def test_rows_are_learned_from_the_load_that_ran(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step where guidance begins or ends has another load than the next one."""
    engine = Engine(model, exact=False)
    noted: list[float] = []
    shared: list[float] = []
    monkeypatch.setattr(engine.capacity, "note", lambda load, seconds: noted.append(load))
    note = engine._turns.note
    monkeypatch.setattr(
        engine._turns, "note", lambda loads, seconds: (shared.append(loads[0][1]), note(loads, 1.0))
    )
    where = {"guidance_start": 0.25, "guidance_end": 0.75}
    engine.add(Request(prompt="a cat", steps=4, sampler="euler", **where))
    drain(engine)
    assert noted == shared == [1, 2, 2, 1]


def test_rows_are_not_learned_from_calls_with_a_controlnet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its calls takes longer, and holds one picture."""
    engine = Engine(safelight.load(controlnet=controlnet(tmp_path / "net")), exact=False)
    noted: list[float] = []
    monkeypatch.setattr(engine.capacity, "note", lambda load, seconds: noted.append(load))
    asked = Request(prompt="a cat", steps=4, sampler="ddim", guidance_start=0.0)
    engine.add(asked.replace(control_image=edges(), control_end=0.5, width=128, height=128))
    drain(engine)
    assert len(noted) == 2


def test_rows_that_were_given_stay() -> None:
    for rows in (1, 8, MOST):
        capacity = Capacity(rows)
        for _ in range(3 * TRIES):
            capacity.note(rows, 0.1)
        assert capacity.rows == rows


def test_an_engine_learns_and_one_after_it_knows(model: Model) -> None:
    engine = Engine(model, exact=False)
    assert engine.rows == FEWEST
    engine.add(Request(prompt="a cat", steps=2 * TRIES, sampler="euler"))
    while engine.busy:
        engine.step()
    assert engine.rows == 2 * FEWEST  # no call of 4 rows was there to learn from
    assert Engine(model, exact=False, rows=engine.capacity).rows == engine.rows
    assert Engine(model, exact=True).rows == 1
