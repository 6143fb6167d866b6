"""Early-stopping questions over HTTP: as few rows as they need, and no more than they may."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from models.certificates.anytime import Anytime, certify_anytime, largest_target, look_schedule
from models.certificates.evidence import total_variation
from service.engine.protocol import Engine
from service.jobs import Domain, JobStatus
from service.predictions.rounds import look
from tests.support.serving import RESOLUTION, Service, nine_of_ten, problem, serving, split

BLUR = total_variation((3, RESOLUTION, RESOLUTION), 0.25)
ROWS = 50_000


def cats(rows: int) -> list[int]:
    """Votes for the cat alone."""
    return [0, 0, rows, 0]


def likely(rows: int) -> list[int]:
    """Votes: four fifths for the cat, the rest for the ant."""
    return [rows // 5, 0, rows - rows // 5, 0]


async def test_a_target_is_answered_with_the_rows_that_prove_it() -> None:
    """Unanimous rows prove r = sigma in 64, of 10,000 that were reserved and are given back."""
    async with serving(votes=cats, backlog_rows=ROWS) as service:
        answer = (await service.ask(target_radius="0.25")).json()
        assert (await service.engine.capacity()).backlog_rows == 0
    assert (answer["method"], answer["n0"], answer["n"]) == ("anytime", 16, 10_000)
    assert (answer["rows_used"], answer["counts"]) == (16 + 64, [{"label": "cat", "count": 64}])
    assert (answer["label"], answer["certified"], answer["target_reached"]) == ("cat", True, True)
    assert answer["radius"] >= answer["target_radius"] == 0.25
    assert answer["looks"] == list(look_schedule(10_000, 0.25, 0.001, 0.25, BLUR))
    assert set(answer["alpha_shares"]) == {"label", "runner_up", "looks"}
    assert (answer["runner_up"], answer["p_upper"]) == ("ant", None)


@pytest.mark.parametrize(
    ("votes", "label"), [(likely, "cat"), (split, None)], ids=["certified", "abstained"]
)
async def test_a_hopeless_target_ends_the_question(
    votes: Callable[[int], list[int]], label: str | None
) -> None:
    """It ends before all rows are drawn, with the radius proven until then, or an abstention."""
    async with serving(votes=votes, backlog_rows=ROWS) as service:
        answer = (await service.ask(target_radius="0.3")).json()
        drawn = {
            (lease.shard.domain, row)
            for lease in service.voter.leases
            for row in range(lease.shard.start, lease.shard.stop)
        }
    assert len(drawn) == answer["rows_used"] < 2_000
    assert (answer["target_reached"], answer["label"]) == (False, label)
    assert 0.0 <= answer["radius"] < 0.3
    hopeless = {"reason": "hopeless", "rows_needed": None}
    assert answer["abstention"] == (None if label else hopeless)


async def test_without_a_target_all_rows_are_read_and_bounds_are_streamed() -> None:
    """Each look before the last is a `bound` event; the answer is the pure function's."""
    async with serving() as service:
        service.voter.open.clear()
        accepted = await service.ask(
            headers={"Prefer": "respond-async"}, method="anytime", n0="20", n="200"
        )
        location = accepted.headers["location"]
        service.voter.open.set()
        events = (await service.client.get(f"{location}/events")).text.split("\r\n\r\n")
        answer = (await service.until_state(location, "succeeded"))["result"]
        path = _looks(service)
    kinds = [line.removeprefix("event: ") for event in events for line in event.splitlines()[:1]]
    assert kinds[-1] == "result"
    assert set(kinds) <= {"progress", "bound", "result"}
    bounds = [
        json.loads(event.partition("data: ")[2]) for event in events if "event: bound" in event
    ]
    schedule = look_schedule(200, 0.25, 0.001, None, BLUR)
    assert {each["rows"] for each in bounds} <= set(schedule[:-1])
    assert [each["p_lower"] for each in bounds] == sorted(each["p_lower"] for each in bounds)
    question = Anytime(0.25, 0.001, 20, 200, None, schedule, BLUR)
    proven = certify_anytime(question, nine_of_ten(20), path)
    assert (answer["radius"], answer["p_lower"]) == (proven.radius, proven.p_lower)
    assert (answer["rows_used"], answer["target_reached"]) == (220, None)


def _looks(service: Service) -> list[list[int]]:
    """Cumulative votes at each look, from the shards that the voter had."""
    (job,) = {lease.job for lease in service.voter.leases}
    shards = {
        lease.shard.index: lease.shard
        for lease in service.voter.leases
        if lease.shard.domain is Domain.ESTIMATION
    }
    return [
        [
            sum(votes)
            for votes in zip(
                *(nine_of_ten(shard.rows) for shard in shards.values() if shard.stop <= rows),
                strict=True,
            )
        ]
        for rows in job.looks
    ]


def stops_after_first_look(service: Service) -> Callable[[int], list[int]]:
    """Votes for the cat; the voter stops once it has counted a shard of 32 rows."""

    def votes(rows: int) -> list[int]:
        if rows == 32:
            service.voter.open.clear()
        return cats(rows)

    return votes


async def test_a_deadline_ends_it_at_the_last_whole_look() -> None:
    """A caller who waited long enough gets the bound so far; the rest of the rows is dropped."""
    async with serving() as service:
        service.voter.votes = stops_after_first_look(service)
        answer = await service.ask(headers={"Prefer": "wait=1"}, method="anytime", n="2000")
        told = answer.json()
        assert (told["rows_used"], told["label"], told["certified"]) == (132, "cat", True)
        assert 0.0 < told["radius"] < 0.25
        job = (await service.client.get(f"/jobs/{told['id']}")).json()
        assert (job["state"], job["result"]) == ("succeeded", told)
        assert (await service.engine.capacity()).backlog_rows == 0


async def test_a_deadline_before_the_first_look_has_no_bound(service: Service) -> None:
    """It is a 504 with the job's id, and the job goes on to its answer."""
    service.voter.open.clear()
    asked = await service.ask(headers={"Prefer": "wait=1"}, method="anytime", n="200")
    document = problem(asked, 504, "deadline")
    service.voter.open.set()
    job = await service.until_state(f"/jobs/{document['job']}", "succeeded")
    assert job["result"]["rows_used"] == 300


@pytest.mark.parametrize("fields", [{"n0": "32", "n": "150"}, {"target_radius": "0.25"}])
async def test_no_other_question_ends_by_the_deadline(fields: dict[str, str]) -> None:
    """A fixed n, and a target, are a 504 with a job that goes on, whatever is counted."""
    async with serving(backlog_rows=ROWS) as service:
        service.voter.votes = stops_after_first_look(service)
        answer = await service.ask(headers={"Prefer": "wait=1"}, **fields)
        job = (await service.client.get(f"/jobs/{problem(answer, 504, 'deadline')['job']}")).json()
        assert job["state"] == "running"
        assert job["rows_done"] > 0


async def test_looking_twice_changes_nothing() -> None:
    """A look that another process took already neither extends nor ends the job again."""
    async with serving(votes=cats, backlog_rows=ROWS) as service:
        service.voter.open.clear()
        accepted = await service.ask(headers={"Prefer": "respond-async"}, target_radius="0.25")
        stale = await service.engine.status(accepted.json()["id"])
        assert stale is not None
        service.voter.open.set()
        done = await service.until_state(accepted.headers["location"], "succeeded")
        ended = await service.engine.status(stale.job.id)
        assert ended is not None
        await look(service.engine, ended)
        assert await service.engine.status(stale.job.id) == ended
        assert done["result"]["rows_used"] == 80


async def test_a_look_that_fails_leaves_the_others_going(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its job stays due and is logged; a job beside it is answered, and then it is too."""
    failing = ["first"]

    async def fails_once(engine: Engine, status: JobStatus) -> None:
        if failing and failing.pop():
            raise TypeError("a field of a newer release")
        await look(engine, status)

    monkeypatch.setattr("service.predictions.rounds.look", fails_once)
    async with serving(votes=cats, backlog_rows=ROWS) as service:
        answers = await asyncio.gather(
            *(service.ask(target_radius="0.25", n=n) for n in ("5000", "6000"))
        )
    assert [answer.json()["target_reached"] for answer in answers] == [True, True]
    assert "a look at a job failed" in caplog.text


@pytest.mark.parametrize(
    ("fields", "field", "limit"),
    [
        ({"target_radius": "0"}, "target_radius", 0.0),
        ({"target_radius": "-1"}, "target_radius", 0.0),
        ({"target_radius": "nan"}, "target_radius", None),
        ({"target_radius": "0.1", "method": "cohen"}, "target_radius", None),
        ({"target_radius": "0.1", "method": "two-sided"}, "target_radius", None),
        ({"target_radius": "0.1", "mode": "predict"}, "target_radius", None),
        ({"method": "anytime", "mode": "predict"}, "method", None),
        ({"method": "binomial"}, "method", None),
        ({"method": "sison-glaz"}, "method", None),
        (
            {"target_radius": "2", "n": "100"},
            "target_radius",
            largest_target(100, 0.25, 0.001, BLUR),
        ),
    ],
)
async def test_targets_that_cannot_be_are_refused(
    service: Service, fields: dict[str, str], field: str, limit: float | None
) -> None:
    """A 422 names the field, its value and, where there is one, the limit."""
    document = problem(await service.ask(**fields), 422, "invalid-field")
    (error,) = document["errors"]
    assert error["field"] == field
    assert error.get("limit") == limit


async def test_an_unreachable_target_names_the_rows_that_would_do() -> None:
    """The smallest n in the refusal is accepted, one less is not."""
    async with serving(votes=cats, backlog_rows=ROWS) as service:
        refused = problem(await service.ask(target_radius="0.5", n="100"), 422, "invalid-field")
        smallest = int(refused["detail"].rpartition(" ")[2])
        less = await service.ask(target_radius="0.5", n=str(smallest - 1))
        assert less.status_code == 422
        answer = (await service.ask(target_radius="0.5", n=str(smallest))).json()
    assert answer["target_reached"] is True
