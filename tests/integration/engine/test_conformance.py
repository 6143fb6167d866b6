"""The engine's contract: one suite, run on every implementation.

An implementation joins with one line in HARNESSES. Times are in ticks, which a harness makes as
short as its engine can tell apart, or passes on a clock of its own.
"""

from __future__ import annotations

import asyncio
import gc
import random
import secrets
from base64 import b64encode
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

import pytest

from benchmarks.redis_server import age, stored_bytes
from service.engine.memory import MemoryEngine
from service.engine.options import EngineOptions
from service.engine.protocol import (
    FAILURES_ALLOWED,
    ISOLATED_CRASHES_ALLOWED,
    Engine,
    Lease,
    PriorityState,
    Worker,
)
from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine
from service.errors import Backlog, IdempotencyMismatch, InvalidField, QuotaExceeded
from service.jobs import Domain, Job, JobStatus, Mode, State
from tests.support.fakes import FakeClock, fake_votes, make_job, true_votes
from tests.support.serving import TASKS

SHARD_ROWS = 10
LEASE = 20  # ticks, as are the next three
RETENTION = 1000
STARVATION = 5
WORKER_SILENCE = 50
BACKLOG_ROWS = 400
OWNER_ROWS = 120
CONTAINERS = (dict, list, tuple, set, deque, Counter)
PROBLEM = {"type": "urn:vouchsafe:problem:shard-dead", "status": 500, "detail": "as reported"}
ALPHA = Worker("alpha", {"default": "bundle-a"})
BETA = Worker("beta", {"default": "bundle-a"})
BOTH = Worker("both", {"default": "bundle-a", "birds": "bundle-b"})
NEWER = Worker("newer", {"default": "bundle-n"})


class Harness(Protocol):
    """An engine under test, with its time and what it stores."""

    engine: Engine
    tick: float

    async def wait(self, ticks: float) -> None:
        """Let time pass."""

    async def look(self, *alive: Worker, ticks: float) -> None:
        """Let time pass in which these workers alone announce themselves, every LEASE ticks."""

    async def stores(self, content: bytes) -> bool:
        """Whether the content still lies anywhere in the engine."""

    async def close(self) -> None:
        """Leave nothing behind."""


class MemoryHarness:
    """MemoryEngine on a clock of its own, one second a tick."""

    tick = 1.0

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.engine = MemoryEngine(
            EngineOptions(
                shard_rows=SHARD_ROWS,
                lease_seconds=LEASE,
                max_queue_rows=BACKLOG_ROWS,
                max_queue_rows_per_key=OWNER_ROWS,
                retention_seconds=RETENTION,
                starvation_seconds=STARVATION,
                worker_seconds=WORKER_SILENCE,
            ),
            poll_seconds=0.02,
            clock=self.clock,
        )

    async def wait(self, ticks: float) -> None:
        self.clock.advance(ticks)

    async def look(self, *alive: Worker, ticks: float) -> None:
        for _ in range(round(ticks / LEASE)):
            await self.wait(LEASE)
            for worker in alive:
                await self.engine.pull(worker, 0)

    async def stores(self, content: bytes) -> bool:
        seen: set[int] = set()
        queue: deque[Any] = deque([self.engine])
        while queue:
            thing = queue.popleft()
            if type(thing) is bytes and content in thing:
                return True
            own = type(thing).__module__.startswith("service.")
            if id(thing) not in seen and (own or type(thing) in CONTAINERS):
                seen.add(id(thing))
                queue.extend(gc.get_referents(thing))
        return False

    async def close(self) -> None:
        pass


class RedisHarness:
    """RedisEngine under a prefix of its own, one second a tick.

    What the scripts write down is on a fake clock. Redis keeps the time of leases and of keys to
    expire by itself, so `wait` moves these on: every idle time grows, every TTL shrinks.
    """

    tick = 1.0

    def __init__(self, url: str) -> None:
        self.clock = FakeClock()
        self.prefix = f"{{{secrets.token_hex(8)}}}:"
        self.redis = connect(url)
        self.engine = RedisEngine(
            self.redis,
            EngineOptions(
                shard_rows=SHARD_ROWS,
                lease_seconds=LEASE,
                max_queue_rows=BACKLOG_ROWS,
                max_queue_rows_per_key=OWNER_ROWS,
                retention_seconds=RETENTION,
                starvation_seconds=STARVATION,
                worker_seconds=WORKER_SILENCE,
            ),
            poll_seconds=0.05,
            sweep_seconds=0.001,
            prefix=self.prefix,
            clock=self.clock,
        )

    async def wait(self, ticks: float) -> None:
        self.clock.advance(ticks)
        await age(self.redis, self.prefix, round(1000 * ticks))

    async def look(self, *alive: Worker, ticks: float) -> None:
        for _ in range(round(ticks / LEASE)):
            await self.wait(LEASE)
            for worker in alive:
                await self.engine.pull(worker, 0)
            await self.engine.reconcile()

    async def stores(self, content: bytes) -> bool:
        stored = [await stored_bytes(self.redis, key) async for key in self._keys()]
        return any(content in text or b64encode(content) in text for text in stored)

    async def close(self) -> None:
        if keys := [key async for key in self._keys()]:
            await self.redis.delete(*keys)
        await self.engine.close()

    def _keys(self) -> AsyncIterator[bytes]:
        return self.redis.scan_iter(match=f"{self.prefix}*")


HARNESSES: dict[str, Callable[[pytest.FixtureRequest], Harness]] = {
    "memory": lambda request: MemoryHarness(),
    "redis": lambda request: RedisHarness(request.getfixturevalue("redis_server").url),
}


@pytest.fixture(params=HARNESSES)
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """A fresh engine with the workers `alpha` and `both` alive."""
    built = HARNESSES[request.param](request)
    await built.engine.pull(ALPHA, 1)
    await built.engine.pull(BOTH, 1)
    yield built
    await built.close()


@pytest.fixture
def engine(harness: Harness) -> Engine:
    return harness.engine


def votes(lease: Lease) -> list[int]:
    """The true votes of a leased shard."""
    shard = lease.shard
    key = lease.job.domain_key(shard.domain)
    return fake_votes(key, range(shard.start, shard.stop), lease.job.classes)


async def compute(engine: Engine, leases: Sequence[Lease]) -> list[bool]:
    """Start and commit, as a worker does."""
    await engine.start(leases)
    return [await engine.commit(lease, votes(lease)) for lease in leases]


async def open_rows(engine: Engine, jobs: Sequence[Job]) -> int:
    """The rows that are left of these jobs."""
    statuses = [await status_of(engine, job.id) for job in jobs]
    return sum(s.job.rows - s.rows_done for s in statuses if not s.state.ended)


async def finish_everything(engine: Engine, worker: Worker = ALPHA) -> None:
    while leases := await engine.pull(worker, 50):
        await compute(engine, leases)


async def status_of(engine: Engine, job_id: str) -> JobStatus:
    status = await engine.status(job_id)
    assert status is not None
    return status


def assert_exact(status: JobStatus) -> None:
    """The job succeeded with every row counted once."""
    assert status.state is State.SUCCEEDED
    assert status.rows_done == status.job.rows
    assert status.selection == true_votes(status.job, Domain.SELECTION)
    assert status.estimation == true_votes(status.job, Domain.ESTIMATION)


def one_shard(identity: str, **fields: Any) -> Job:
    """A job of a single shard."""
    return make_job(identity, mode=Mode.PREDICT, n=SHARD_ROWS, **fields)


async def die(harness: Harness, worker: Worker = ALPHA) -> list[Lease]:
    """Pull one shard, start it, and never be heard of again."""
    leases = await harness.engine.pull(worker, 1)
    await harness.engine.start(leases)
    await harness.wait(LEASE + 1)
    return leases


# One job's way


async def test_votes_of_all_shards_add_up(engine: Engine) -> None:
    """A job goes from queued through running to succeeded, with exactly its rows' votes."""
    await engine.submit(make_job("a"))
    assert (await status_of(engine, "a")).state is State.QUEUED
    await finish_everything(engine)
    assert_exact(await status_of(engine, "a"))


async def test_running_job_shows_its_tally(engine: Engine) -> None:
    """While a job runs, its status holds the votes so far and the time it started."""
    await engine.submit(make_job("a"))
    (lease,) = await engine.pull(ALPHA, 1)
    await compute(engine, [lease])
    status = await status_of(engine, "a")
    assert (status.state, status.rows_done, status.finished) == (State.RUNNING, 10, None)
    assert status.started is not None
    assert sum(status.selection) + sum(status.estimation) == 10


async def test_job_runs_once_a_shard_is_started(engine: Engine) -> None:
    """A prefetched shard leaves its job queued; a started one makes it running."""
    await engine.submit(make_job("a"))
    leases = await engine.pull(ALPHA, 1)
    assert (await status_of(engine, "a")).state is State.QUEUED
    await engine.start(leases)
    assert (await status_of(engine, "a")).state is State.RUNNING


async def test_pull_stops_at_the_rows_asked_for(engine: Engine) -> None:
    """A pull takes whole shards until the rows asked for are reached, and no more."""
    await engine.submit(make_job("a"))
    leases = await engine.pull(ALPHA, 15)
    assert [lease.shard.index for lease in leases] == [0, 1]


async def test_pull_of_nothing_is_nothing(engine: Engine) -> None:
    """A worker that only announces itself asks for no rows and gets none."""
    await engine.submit(make_job("a"))
    assert await engine.pull(BETA, 0) == []
    assert len(await engine.pull(ALPHA, 100)) == 4


async def test_pull_takes_from_many_jobs(engine: Engine) -> None:
    """One pull fills up with shards of several jobs of the task, oldest first."""
    for identity in "abc":
        await engine.submit(one_shard(identity))
    assert [lease.job.id for lease in await engine.pull(ALPHA, 100)] == ["a", "b", "c"]


async def test_leased_shards_are_not_pulled_again(engine: Engine) -> None:
    """While a lease lives nobody else gets its shard."""
    await engine.submit(make_job("a"))
    assert len(await engine.pull(ALPHA, 100)) == 4
    assert await engine.pull(BETA, 100) == []


async def test_waiting_pull_wakes_on_submit(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull that found nothing returns as soon as work comes."""
    monkeypatch.setattr(engine, "_poll_seconds", 60.0)
    pulling = asyncio.create_task(engine.pull(ALPHA, 1))
    await asyncio.sleep(0.001)
    await engine.submit(one_shard("a"))
    assert [lease.job.id for lease in await pulling] == ["a"]


async def test_unknown_jobs_are_nothing(engine: Engine) -> None:
    """Asking after, watching, cancelling or forgetting an unknown job is no error."""
    assert await engine.status("x") is None
    assert [status async for status in engine.watch("x")] == []
    assert (await engine.cancel("x"), await engine.delete("x")) == (False, False)


@pytest.mark.parametrize("counts", [[10, 0], [10, 0, 0, 0], [11, -1, 0], [4, 4, 1], []], ids=str)
async def test_impossible_counts_are_refused(engine: Engine, counts: list[int]) -> None:
    """Counts of the wrong length, sign or sum raise, and the shard can still be counted."""
    await engine.submit(one_shard("a"))
    (lease,) = await engine.pull(ALPHA, 1)
    with pytest.raises(ValueError, match="count"):
        await engine.commit(lease, counts)
    await compute(engine, [lease])
    assert_exact(await status_of(engine, "a"))


# Leases and deliveries


async def test_expired_lease_is_pulled_again_and_counted_once(harness: Harness) -> None:
    """A shard whose worker vanished goes to another, and is in the votes once."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    lost = await engine.pull(ALPHA, 100)
    await harness.wait(LEASE + 1)
    again = await engine.pull(BETA, 100)
    assert [lease.shard for lease in again] == [lease.shard for lease in lost]
    assert {lease.token for lease in again}.isdisjoint(lease.token for lease in lost)
    assert all(await compute(engine, again))
    assert not any([await engine.commit(lease, votes(lease)) for lease in lost])
    assert_exact(await status_of(engine, "a"))


async def test_stale_owner_may_commit_first(harness: Harness) -> None:
    """Whoever commits a shard first is counted, and then the other one is refused."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    (stale,) = await engine.pull(ALPHA, 1)
    await harness.wait(LEASE + 1)
    (current,) = await engine.pull(BETA, 1)
    assert current.shard == stale.shard
    assert await engine.commit(stale, votes(stale)) is True
    assert await engine.renew([current]) == []
    assert await engine.commit(current, votes(current)) is False
    await finish_everything(engine)
    assert_exact(await status_of(engine, "a"))


async def test_late_commit_before_the_next_pull_counts(harness: Harness) -> None:
    """A commit after the lease ran out, but before anyone took the shard, is counted once."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    (lease,) = await engine.pull(ALPHA, 1)
    await harness.wait(LEASE + 1)
    assert await engine.commit(lease, votes(lease)) is True
    assert await engine.pull(BETA, 1) == []
    assert_exact(await status_of(engine, "a"))


async def test_stale_commit_takes_a_waiting_shard_off_the_line(harness: Harness) -> None:
    """A shard that a stale owner commits while it waits again is not handed out any more."""
    engine = harness.engine
    await engine.submit(make_job("a", n0=0, n=2 * SHARD_ROWS))
    (stale,) = await engine.pull(ALPHA, 1)
    await harness.wait(LEASE + 1)
    await status_of(engine, "a")
    assert await engine.commit(stale, votes(stale)) is True
    assert [lease.shard.index for lease in await engine.pull(BETA, 100)] == [1]


async def test_second_commit_of_a_shard_is_refused(engine: Engine) -> None:
    """Committing the same lease twice counts it once."""
    await engine.submit(make_job("a"))
    (lease,) = await engine.pull(ALPHA, 1)
    assert await compute(engine, [lease]) == [True]
    assert await compute(engine, [lease]) == [False]
    assert (await status_of(engine, "a")).rows_done == 10


async def test_commit_after_the_end_is_refused(engine: Engine) -> None:
    """A job that has ended, or is gone, counts nothing more."""
    await engine.submit(make_job("a"))
    leases = await engine.pull(ALPHA, 100)
    await engine.cancel("a")
    assert await compute(engine, leases[:1]) == [False]
    await engine.delete("a")
    assert await compute(engine, leases[1:2]) == [False]


async def test_renewed_lease_outlives_its_first_term(harness: Harness) -> None:
    """A renewed lease is kept for a whole term from the renewal on."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    leases = await engine.pull(ALPHA, 1)
    for _ in range(3):
        await harness.wait(LEASE * 0.7)
        assert await engine.renew(leases) == leases
        assert await engine.pull(BETA, 1) == []


async def test_started_lease_begins_anew(harness: Harness) -> None:
    """Starting a shard renews its lease, and says which leases are lost, as renew does."""
    engine = harness.engine
    await engine.submit(make_job("a", n0=0, n=2 * SHARD_ROWS))
    (lost,) = await engine.pull(ALPHA, 1)
    await harness.wait(LEASE + 1)
    held = await engine.pull(ALPHA, 100)
    for _ in range(3):
        await harness.wait(LEASE * 0.7)
        assert await engine.start([lost, *held]) == held
        assert await engine.pull(BETA, 100) == []
    assert await engine.start([]) == []


async def test_lost_lease_is_not_renewed(harness: Harness) -> None:
    """Once another holds the shard the first holder learns it from renew."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    lost = await engine.pull(ALPHA, 1)
    await harness.wait(LEASE + 1)
    held = await engine.pull(BETA, 1)
    assert await engine.renew([*lost, *held]) == held


async def test_released_shards_are_pulled_again_unharmed(engine: Engine) -> None:
    """Handing a shard back any number of times, started or not, never counts against it."""
    await engine.submit(one_shard("a"))
    for _ in range(FAILURES_ALLOWED + ISOLATED_CRASHES_ALLOWED + 2):
        leases = await engine.pull(ALPHA, 1)
        await engine.start(leases)
        await engine.release(leases)
    (lease,) = await engine.pull(BETA, 1)
    assert not lease.isolated
    await compute(engine, [lease])
    assert_exact(await status_of(engine, "a"))


async def test_lost_leases_release_nothing(harness: Harness) -> None:
    """Releasing or failing a lost lease does not touch its new holder."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    (lost,) = await engine.pull(ALPHA, 1)
    await harness.wait(LEASE + 1)
    held = await engine.pull(BETA, 1)
    await engine.release([lost])
    for _ in range(FAILURES_ALLOWED):
        await engine.fail(lost, PROBLEM)
    assert await engine.renew(held) == held
    assert await engine.pull(ALPHA, 1) == []


# Poison


async def test_third_failure_ends_the_job(engine: Engine) -> None:
    """A shard may fail twice; the third report ends its job with the problem reported."""
    await engine.submit(make_job("a"))
    for attempt in range(FAILURES_ALLOWED):
        assert not (await status_of(engine, "a")).state.ended, attempt
        (lease,) = await engine.pull(ALPHA, 1)
        await engine.start([lease])
        await engine.fail(lease, PROBLEM)
    status = await status_of(engine, "a")
    assert (status.state, status.problem) == (State.FAILED, PROBLEM)
    assert status.finished is not None
    assert await engine.pull(ALPHA, 100) == []
    assert (await engine.capacity()).backlog_rows == 0


async def test_failures_are_counted_by_shard(engine: Engine) -> None:
    """Two failures of each of several shards end nothing."""
    await engine.submit(make_job("a"))
    for _ in range(FAILURES_ALLOWED - 1):
        for lease in await engine.pull(ALPHA, 100):
            await engine.fail(lease, PROBLEM)
    await finish_everything(engine)
    assert_exact(await status_of(engine, "a"))


async def test_one_report_counts_once(engine: Engine) -> None:
    """The same failure reported again and again is one failure."""
    await engine.submit(one_shard("a"))
    (lease,) = await engine.pull(ALPHA, 1)
    for _ in range(FAILURES_ALLOWED):
        await engine.fail(lease, PROBLEM)
    await finish_everything(engine)
    assert_exact(await status_of(engine, "a"))


async def test_prefetched_shards_do_not_die(harness: Harness) -> None:
    """A lease that runs out without `start` counts neither as a death nor as a failure."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    for _ in range(FAILURES_ALLOWED + ISOLATED_CRASHES_ALLOWED + 2):
        (lease,) = await engine.pull(ALPHA, 1)
        assert not lease.isolated
        await harness.wait(LEASE + 1)
    await finish_everything(engine)
    assert_exact(await status_of(engine, "a"))


@pytest.mark.parametrize("deadly", [0, 2])
async def test_after_a_death_a_shard_runs_alone(harness: Harness, deadly: int) -> None:
    """A shard that a worker died over is isolated from then on, and pulled by itself."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    others = await engine.pull(ALPHA, 100)
    dead = others.pop(deadly)
    await engine.start([dead])
    await harness.wait(LEASE + 1)
    pulls = [await engine.pull(BETA, 100), await engine.pull(BETA, 100)]
    (alone,) = next(pull for pull in pulls if len(pull) == 1)
    (*together,) = next(pull for pull in pulls if len(pull) == len(others))
    assert (alone.shard, alone.isolated) == (dead.shard, True)
    assert [lease.shard for lease in together] == [lease.shard for lease in others]
    assert not any(lease.isolated for lease in together)
    await compute(engine, [alone, *together])
    assert_exact(await status_of(engine, "a"))


async def test_every_shard_of_a_deadly_batch_runs_alone(harness: Harness) -> None:
    """When a worker dies over a batch all its shards are suspects, and none is dead yet."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    await engine.start(await engine.pull(ALPHA, 100))
    await harness.wait(LEASE + 1)
    for _ in range(4):
        (lease,) = await engine.pull(BETA, 100)
        assert lease.isolated
        await compute(engine, [lease])
    assert_exact(await status_of(engine, "a"))


async def test_fifth_isolated_death_ends_the_job(harness: Harness) -> None:
    """One death in company and four alone are survived; the fifth alone ends the job."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    for _ in range(1 + ISOLATED_CRASHES_ALLOWED):
        assert not (await status_of(engine, "a")).state.ended
        assert len(await die(harness)) == 1
    status = await status_of(engine, "a")
    assert status.state is State.FAILED
    assert status.problem is not None
    assert status.problem["type"] == "urn:vouchsafe:problem:shard-dead"
    assert (status.problem["job"], status.problem["status"]) == ("a", 500)
    assert await engine.pull(BETA, 100) == []


async def test_shard_survives_the_deaths_allowed(harness: Harness) -> None:
    """A shard that is computed after its last allowed death is counted like any other."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    for _ in range(ISOLATED_CRASHES_ALLOWED):
        await die(harness)
    await finish_everything(engine)
    assert_exact(await status_of(engine, "a"))


async def test_innocent_jobs_finish_beside_a_poisonous_one(harness: Harness) -> None:
    """A job that kills every worker ends by itself, and all others are answered exactly."""
    engine = harness.engine
    for identity in ("a", "poison", "b"):
        await engine.submit(make_job(identity))
    while (await engine.capacity()).backlog_rows:
        leases = await engine.pull(ALPHA, 20)
        await engine.start(leases)
        if any(lease.job.id == "poison" for lease in leases):
            await harness.wait(LEASE + 1)
        else:
            await compute(engine, leases)
    assert (await status_of(engine, "poison")).state is State.FAILED
    assert_exact(await status_of(engine, "a"))
    assert_exact(await status_of(engine, "b"))


@pytest.mark.parametrize("seed", range(5))
async def test_counts_are_exact_under_injected_faults(harness: Harness, seed: int) -> None:
    """Deaths, failures, releases, double and late commits in any order never change a vote."""
    chance, engine = random.Random(seed), harness.engine
    modes = [Mode.CERTIFY, Mode.CERTIFY, Mode.PREDICT]
    jobs = [
        make_job(f"job-{number}", mode=modes[number % 3], owner="ada" if number < 3 else None)
        for number in range(8)
    ]
    lanes = {lane: [job for job in jobs if job.mode.priority == lane] for lane in ("hi", "lo")}
    for job in jobs:
        await engine.submit(job)
    forgotten: list[Lease] = []
    for _ in range(800):
        leases = await engine.pull(chance.choice([ALPHA, BETA]), chance.randrange(1, 40))
        await engine.start([lease for lease in leases if chance.random() < 0.3])
        for lease in leases:
            match chance.choices(["commit", "twice", "late", "fail", "release"], [6, 2, 2, 0.2, 1]):
                case ["commit"]:
                    await engine.commit(lease, votes(lease))
                case ["twice"]:
                    assert not (await compute(engine, [lease, lease]))[1]
                case ["late"]:
                    forgotten.append(lease)
                case ["fail"]:
                    await engine.fail(lease, PROBLEM)
                case ["release"]:
                    await engine.release([lease])
        if chance.random() < 0.1:
            await harness.wait(LEASE + 1)
        if forgotten and chance.random() < 0.3:
            late = forgotten.pop(chance.randrange(len(forgotten)))
            await engine.commit(late, votes(late))
        capacity = await engine.capacity("ada")
        assert capacity.owner_rows == await open_rows(engine, jobs[:3])
        assert capacity.backlog_rows == await open_rows(engine, jobs)
        queue = await engine.stats()
        for lane, its_own in lanes.items():
            assert queue.priorities[lane].rows == await open_rows(engine, its_own)
        if capacity.backlog_rows == 0:
            break
    statuses = [await status_of(engine, job.id) for job in jobs]
    failed = [status for status in statuses if status.state is State.FAILED]
    for status in statuses:
        if status not in failed:
            assert_exact(status)
    assert (await engine.stats()).dead_letters == len(failed)


# Jobs of no worker


async def test_jobs_that_no_worker_serves_any_more_fail(harness: Harness) -> None:
    """After five minutes in which only other digests were announced, with a problem that says so;
    their rows leave the backlog, and jobs of the other digest are computed."""
    engine = harness.engine
    await engine.submit(make_job("old", owner="ada"))
    await engine.pull(NEWER, 0)
    await engine.submit(make_job("new", bundle="bundle-n"))
    await harness.look(ALPHA, NEWER, ticks=600)
    assert (await status_of(engine, "old")).state is State.QUEUED
    await harness.look(NEWER, ticks=280)
    assert (await status_of(engine, "old")).state is State.QUEUED
    await harness.look(NEWER, ticks=100)
    status = await status_of(engine, "old")
    assert status.state is State.FAILED
    assert status.problem is not None
    assert status.problem["job"] == "old"
    assert "ask again" in status.problem["detail"]
    capacity = await engine.capacity("ada")
    assert (capacity.backlog_rows, capacity.owner_rows) == (40, 0)
    await finish_everything(engine, NEWER)
    assert_exact(await status_of(engine, "new"))


async def test_a_digest_that_comes_back_keeps_its_jobs(harness: Harness) -> None:
    """Where its own workers are away for less than five minutes, or all workers for longer."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    await harness.look(NEWER, ticks=240)
    await engine.pull(ALPHA, 0)
    await harness.look(NEWER, ticks=200)
    await harness.look(ticks=320)
    await harness.look(NEWER, ticks=200)
    await engine.pull(ALPHA, 0)
    await finish_everything(engine, ALPHA)
    assert_exact(await status_of(engine, "a"))


async def test_a_pull_of_no_rows_only_announces(engine: Engine) -> None:
    """It takes nothing, whatever waits, in one line or in several, and keeps the worker alive."""
    jobs = [make_job("a"), make_job("b", task="birds", bundle="bundle-b")]
    await engine.pull(BOTH, 0)
    for job in jobs:
        await engine.submit(job)
        assert await engine.pull(BOTH, 0) == []
    assert (await engine.capacity()).digests["birds"] == ("bundle-b",)
    assert len(await engine.pull(BOTH, 1_000)) == 4


# The door


async def test_full_backlog_refuses_with_a_measured_wait(harness: Harness) -> None:
    """Past its bound in rows the engine refuses, and says how long the rows waiting will take."""
    engine = harness.engine
    await engine.submit(make_job("measured"))
    await harness.wait(2)
    await finish_everything(engine)
    for number in range(10):
        await engine.submit(make_job(f"job-{number}"))
    with pytest.raises(Backlog) as refusal:
        await engine.submit(make_job("one-too-many"))
    capacity = await engine.capacity()
    assert capacity.backlog_rows == BACKLOG_ROWS
    assert capacity.rows_per_second > 0
    assert refusal.value.status == 503
    assert refusal.value.retry_after is not None
    wanted = max(1, capacity.backlog_rows / capacity.rows_per_second)
    assert abs(refusal.value.retry_after - wanted) <= 1
    assert await engine.status("one-too-many") is None


async def test_speed_is_measured_over_work_alone(harness: Harness) -> None:
    """Rows per second are those of the time with work; idle hours do not slow the estimate."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    await harness.wait(4)
    await finish_everything(engine)
    speed = (await engine.capacity()).rows_per_second
    assert 0 < speed <= 40 / (4 * harness.tick)
    await harness.wait(WORKER_SILENCE / 2)
    await engine.submit(make_job("b"))
    await harness.wait(4)
    await finish_everything(engine)
    assert (await engine.capacity()).rows_per_second == pytest.approx(speed, rel=0.3)


async def test_unmeasured_backlog_names_some_wait(engine: Engine) -> None:
    """Before anything was computed a refusal still carries a Retry-After."""
    for number in range(10):
        await engine.submit(make_job(f"job-{number}"))
    with pytest.raises(Backlog) as refusal:
        await engine.submit(make_job("one-too-many"))
    assert (await engine.capacity()).rows_per_second == 0.0
    assert refusal.value.retry_after is not None
    assert refusal.value.retry_after >= 1


async def test_backlog_has_room_again_after_work(engine: Engine) -> None:
    """Rows that are counted, cancelled or forgotten make room."""
    for number in range(10):
        await engine.submit(make_job(f"job-{number}"))
    await compute(engine, await engine.pull(ALPHA, 40))
    await engine.submit(make_job("after-work"))
    await engine.cancel("job-1")
    await engine.submit(make_job("after-cancel"))
    await engine.delete("job-2")
    await engine.submit(make_job("after-forget"))
    assert (await engine.capacity()).backlog_rows == BACKLOG_ROWS


async def test_job_beyond_the_bound_is_an_error_of_the_caller(engine: Engine) -> None:
    """A job that could never be queued is not asked to come again later."""
    with pytest.raises(InvalidField, match=str(BACKLOG_ROWS)) as refusal:
        await engine.submit(make_job("a", n=BACKLOG_ROWS))
    assert refusal.value.retry_after is None


async def test_no_worker_for_the_bundle_refuses(engine: Engine) -> None:
    """A job whose task or bundle no live worker serves is refused at the door."""
    for job in (make_job("a", task="cats"), make_job("b", bundle="bundle-z")):
        with pytest.raises(Backlog) as refusal:
            await engine.submit(job)
        assert refusal.value.retry_after is not None


async def test_silent_workers_do_not_live(harness: Harness) -> None:
    """Workers not heard from for long enough serve nothing, until they pull again."""
    engine = harness.engine
    await harness.wait(WORKER_SILENCE + 1)
    assert (await engine.capacity()).digests == {}
    with pytest.raises(Backlog):
        await engine.submit(make_job("a"))
    await engine.pull(ALPHA, 1)
    assert (await engine.capacity()).digests == {"default": ("bundle-a",)}
    await engine.submit(make_job("a"))


async def test_renewing_worker_is_alive(harness: Harness) -> None:
    """A worker busy with one long batch is alive as long as it renews its leases."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    leases = await engine.pull(ALPHA, 1)
    for _ in range(6):
        await harness.wait(LEASE * 0.7)
        await engine.renew(leases)
    await engine.submit(one_shard("b"))


async def test_capacity_names_what_is_served(engine: Engine) -> None:
    """Every task of a live worker is served, first under the digest that most workers have."""
    await engine.pull(Worker("old", {"birds": "bundle-z"}), 1)
    await engine.pull(Worker("new", {"birds": "bundle-b"}), 1)
    digests = (await engine.capacity()).digests
    assert digests == {"default": ("bundle-a",), "birds": ("bundle-b", "bundle-z")}


async def test_capacity_has_the_numerics_of_live_workers(engine: Engine) -> None:
    """All that live workers announce, each once; they tell a bundle's own digests from others'."""
    bundle, bf16, wide = TASKS["default"], {"dtype": "bf16"}, {"dtype": "bf16", "batch_rows": 64}
    mine, other = (each.served_digest(bf16) for each in (bundle, replace(bundle, k=2.0)))
    await engine.pull(Worker("one", {"birds": other}, [bf16]), 1)
    await engine.pull(Worker("two", {"birds": other}, [bf16, wide]), 1)
    capacity = await engine.capacity()
    assert len(capacity.numerics) == 2
    assert all(numerics in capacity.numerics for numerics in (bf16, wide))
    assert capacity.digests_of("birds", bundle) == ()
    await engine.pull(Worker("three", {"birds": mine}, [bf16]), 1)
    capacity = await engine.capacity()
    assert capacity.digests["birds"][0] == other
    assert capacity.digests_of("birds", bundle) == (mine,)


# Quotas


async def owned(engine: Engine, owner: str | None) -> int:
    return (await engine.capacity(owner)).owner_rows


async def test_owner_beyond_its_quota_is_refused(harness: Harness) -> None:
    """A key's rows are bounded; the refusal says for how long, and holds back nobody else."""
    engine = harness.engine
    await engine.submit(make_job("measured", owner="bob"))
    await harness.wait(2)
    await finish_everything(engine)
    for number in range(3):
        await engine.submit(make_job(f"ada-{number}", owner="ada"))
    with pytest.raises(QuotaExceeded) as refusal:
        await engine.submit(one_shard("one-too-many", owner="ada"))
    speed = (await engine.capacity()).rows_per_second
    assert refusal.value.status == 429
    assert refusal.value.extra == {"limit": OWNER_ROWS}
    assert refusal.value.retry_after is not None
    assert abs(refusal.value.retry_after - max(1, OWNER_ROWS / speed)) <= 1
    assert await engine.status("one-too-many") is None
    for owner in ("bob", None):
        await engine.submit(make_job(f"of-{owner}", owner=owner))


async def test_what_preparing_a_job_costs_is_charged_while_it_is_open(engine: Engine) -> None:
    """Setup rows count against backlog and quota until the job ends, and are never computed."""
    job = replace(make_job("a", owner="ada"), setup_rows=25)
    await engine.submit(job)
    assert (await engine.capacity("ada")).backlog_rows == await owned(engine, "ada") == 65
    with pytest.raises(QuotaExceeded):
        await engine.submit(make_job("b", owner="ada", n=OWNER_ROWS - 10 - 65 + 1))
    await compute(engine, await engine.pull(ALPHA, 30))
    assert await owned(engine, "ada") == 35
    await finish_everything(engine)
    assert_exact(await status_of(engine, "a"))
    assert (await engine.capacity("ada")).backlog_rows == await owned(engine, "ada") == 0


async def test_rows_without_an_owner_have_no_quota(engine: Engine) -> None:
    """Where everyone may call only the backlog bounds the rows."""
    for number in range(BACKLOG_ROWS // 40):
        await engine.submit(make_job(f"job-{number}"))
    capacity = await engine.capacity(None)
    assert (capacity.backlog_rows, capacity.owner_rows) == (BACKLOG_ROWS, 0)


async def test_job_beyond_the_quota_is_an_error_of_the_caller(engine: Engine) -> None:
    """A job that its key could never queue is not asked to come again later."""
    with pytest.raises(InvalidField, match=str(OWNER_ROWS)) as refusal:
        await engine.submit(make_job("a", n=OWNER_ROWS, owner="ada"))
    assert refusal.value.retry_after is None
    await engine.submit(make_job("b", n=OWNER_ROWS))


async def test_known_keys_are_answered_beyond_the_quota(engine: Engine) -> None:
    """A repeated request gets its job though its owner's quota is used up."""
    for number in range(3):
        job = make_job(f"ada-{number}", owner="ada")
        await engine.submit(job, idempotency_key=f"k-{number}")
    again = make_job("again", owner="ada")
    assert await engine.submit(again, idempotency_key="k-1") == "ada-1"


async def test_quota_has_room_again_after_work(harness: Harness) -> None:
    """Rows that are counted, cancelled, failed, forgotten or too old are the owner's no more."""
    engine = harness.engine
    for name in ("ada-1", "ada-2", "bob-1"):
        await engine.submit(make_job(name, owner=name[:3]))
    assert (await owned(engine, "ada"), await owned(engine, "bob")) == (80, 40)
    leases = await engine.pull(ALPHA, 30)
    assert await owned(engine, "ada") == 80
    await compute(engine, leases)
    assert (await owned(engine, "ada"), await owned(engine, "bob")) == (50, 40)
    await engine.cancel("ada-1")
    assert await owned(engine, "ada") == 40
    for _ in range(FAILURES_ALLOWED):
        (lease,) = await engine.pull(ALPHA, 1)
        await engine.fail(lease, PROBLEM)
    assert await owned(engine, "ada") == 0
    await engine.submit(make_job("ada-3", owner="ada"))
    await engine.delete("ada-3")
    assert (await owned(engine, "ada"), await owned(engine, "bob")) == (0, 40)
    await harness.wait(RETENTION + 1)
    capacity = await engine.capacity("bob")
    assert (capacity.owner_rows, capacity.backlog_rows) == (0, 0)


async def test_last_rows_of_a_poisonous_job_are_its_owners_no_more(harness: Harness) -> None:
    """A job that ends by the deaths of its workers leaves its owner's quota free."""
    engine = harness.engine
    await engine.submit(make_job("a", owner="ada"))
    for _ in range(1 + ISOLATED_CRASHES_ALLOWED):
        assert await owned(engine, "ada") == 40
        await die(harness)
    assert await owned(engine, "ada") == 0


# Lanes and tasks


async def test_wrong_bundle_is_never_pulled(engine: Engine) -> None:
    """A worker whose numerics changed gets no shard of a job asked under the old ones."""
    await engine.submit(make_job("a"))
    assert await engine.pull(Worker("gamma", {"default": "bundle-new"}), 100) == []
    assert await engine.pull(Worker("delta", {}), 100) == []
    assert len(await engine.pull(ALPHA, 100)) == 4


async def test_every_lease_has_a_token_of_its_own(engine: Engine) -> None:
    """Jobs of either lane that come in the same moment share a worker, but never a token."""
    await engine.pull(ALPHA, 1)
    jobs = [make_job(f"{mode.value}-{at}", mode=mode, n=20) for at in range(6) for mode in Mode]
    await asyncio.gather(*map(engine.submit, jobs))
    leases = []
    while found := await engine.pull(ALPHA, 50):
        leases += found
    rows = sum(lease.shard.rows for lease in leases)
    assert rows == sum(job.rows for job in jobs)
    assert len({lease.token for lease in leases}) == len(leases)


async def test_fast_lane_goes_first(engine: Engine) -> None:
    """A PREDICT job overtakes CERTIFY jobs of its task; within a lane the older goes first."""
    await engine.submit(make_job("slow", n0=0, n=SHARD_ROWS))
    await engine.submit(one_shard("fast-1"))
    await engine.submit(one_shard("fast-2"))
    leases = await engine.pull(ALPHA, 100)
    assert [lease.job.id for lease in leases] == ["fast-1", "fast-2", "slow"]


async def test_fast_lane_leaves_a_quarter(engine: Engine) -> None:
    """However much PREDICT comes, every fourth pull of a task begins with its CERTIFY."""
    await engine.submit(make_job("slow", n0=0, n=3 * SHARD_ROWS))
    served = []
    for at in range(12):
        await engine.submit(one_shard(f"fast-{at}"))
        (lease,) = await engine.pull(ALPHA, 1)
        served.append(lease.job.id[:4])
    assert served == 3 * ["fast", "fast", "fast", "slow"]


async def test_slow_lane_saves_no_turns(engine: Engine) -> None:
    """A CERTIFY job that comes late waits its three pulls; one that was served begins anew."""
    for at in range(4):
        await engine.submit(one_shard(f"fast-{at}"))
    for _ in range(4):
        await engine.pull(ALPHA, 1)
    await engine.submit(make_job("slow", n0=0, n=2 * SHARD_ROWS))
    (lease,) = await engine.pull(ALPHA, 1)
    assert lease.job.id == "slow"
    for at in range(4, 8):
        await engine.submit(one_shard(f"fast-{at}"))
    pulls = [await engine.pull(ALPHA, 1) for _ in range(5)]
    assert [lease.job.id for (lease,) in pulls] == ["fast-4", "fast-5", "fast-6", "slow", "fast-7"]


async def test_shards_put_back_keep_their_place(engine: Engine) -> None:
    """A shard handed back goes before younger jobs, not behind them."""
    await engine.submit(one_shard("a"))
    await engine.submit(one_shard("b"))
    (lease,) = await engine.pull(ALPHA, 1)
    await engine.release([lease])
    assert [lease.job.id for lease in await engine.pull(ALPHA, 100)] == ["a", "b"]


async def test_a_pull_is_of_one_task(engine: Engine) -> None:
    """Shards of two tasks never come in one pull."""
    await engine.submit(one_shard("a"))
    await engine.submit(one_shard("b", task="birds", bundle="bundle-b"))
    pulls = [await engine.pull(BOTH, 100), await engine.pull(BOTH, 100)]
    assert sorted([lease.job.id for lease in pull] for pull in pulls) == [["a"], ["b"]]


async def test_preferred_task_goes_first(harness: Harness) -> None:
    """The task that a worker prefers is served before an older job of another."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    await harness.wait(1)
    await engine.submit(one_shard("b", task="birds", bundle="bundle-b"))
    (lease,) = await engine.pull(BOTH, 1, prefer_task="birds")
    assert lease.job.id == "b"


async def test_preference_falls_back_to_what_there_is(engine: Engine) -> None:
    """A preferred task without work does not keep a worker idle."""
    await engine.submit(one_shard("a"))
    (lease,) = await engine.pull(BOTH, 1, prefer_task="birds")
    assert lease.job.id == "a"


async def test_preference_starves_nobody(harness: Harness) -> None:
    """Under a steady load of the preferred task the other is served within its bound, and back."""
    engine = harness.engine
    await engine.submit(make_job("a", n=190))
    await engine.submit(make_job("b", n=190, task="birds", bundle="bundle-b"))
    served = []
    for _ in range(3 * (STARVATION + 2)):
        (lease,) = await engine.pull(BOTH, 1, prefer_task="default")
        await compute(engine, [lease])
        served.append(lease.job.id)
        await harness.wait(1)
    gaps = [len(gap) for gap in "".join(served).split("b")]
    assert max(gaps) <= STARVATION + 1
    assert served.count("a") > served.count("b") > 1


# Ends


async def test_cancel_drops_what_is_left(engine: Engine) -> None:
    """A cancelled job hands out nothing more, and its holders learn it at the next renewal."""
    await engine.submit(make_job("a"))
    await engine.submit(make_job("b"))
    leases = await engine.pull(ALPHA, 60)
    assert await engine.cancel("a") is True
    assert {lease.job.id for lease in await engine.renew(leases)} == {"b"}
    assert {lease.job.id for lease in await engine.pull(BETA, 100)} == {"b"}
    status = await status_of(engine, "a")
    assert status.state is State.CANCELLED
    assert status.finished is not None
    assert (await engine.capacity()).backlog_rows == 40


async def test_ended_jobs_cannot_be_cancelled(engine: Engine) -> None:
    """Cancelling twice, or after success, changes nothing."""
    await engine.submit(make_job("a"))
    await engine.submit(make_job("b"))
    await engine.cancel("a")
    await finish_everything(engine)
    assert (await engine.cancel("a"), await engine.cancel("b")) == (False, False)
    assert_exact(await status_of(engine, "b"))


@pytest.mark.parametrize("stage", ["queued", "leased", "running", "ended"])
async def test_forget_erases_everything(harness: Harness, stage: str) -> None:
    """After forget no trace is left: no status, no image, no noise key, no Idempotency-Key."""
    engine = harness.engine
    job = make_job("a")
    await engine.submit(job, idempotency_key="once")
    leases = await engine.pull(ALPHA, 100) if stage != "queued" else []
    if stage in ("running", "ended"):
        await engine.start(leases)
    if stage == "ended":
        await compute(engine, leases)
    assert await harness.stores(job.pixels) is (stage != "ended")
    assert await harness.stores(job.key)
    assert await engine.delete("a") is True
    assert await engine.delete("a") is False
    assert await engine.status("a") is None
    assert await engine.renew(leases) == []
    assert await engine.pull(ALPHA, 100) == []
    assert not await harness.stores(job.pixels)
    assert not await harness.stores(job.key)
    assert await engine.submit(make_job("b"), idempotency_key="once") == "b"


async def test_finished_jobs_vanish_after_the_retention(harness: Harness) -> None:
    """An ended job is kept for the retention and then erased, image, key and all."""
    engine = harness.engine
    job = make_job("a")
    await engine.submit(job, idempotency_key="once")
    await finish_everything(engine)
    await harness.wait(RETENTION * 0.9)
    assert_exact(await status_of(engine, "a"))
    await harness.wait(RETENTION * 0.2)
    assert await engine.status("a") is None
    assert not await harness.stores(job.pixels)
    await engine.pull(ALPHA, 1)
    assert await engine.submit(make_job("b"), idempotency_key="once") == "b"


async def test_unfinished_jobs_vanish_too(harness: Harness) -> None:
    """A job that nobody computes does not keep its image beyond the retention."""
    engine = harness.engine
    job = make_job("a")
    await engine.submit(job)
    await harness.wait(RETENTION + 1)
    assert await engine.status("a") is None
    assert not await harness.stores(job.pixels)
    assert (await engine.capacity()).backlog_rows == 0


# Idempotency-Keys


async def test_same_key_is_the_same_job(engine: Engine) -> None:
    """A repeated request under one key gets the first job's id and queues nothing."""
    assert await engine.submit(make_job("a"), idempotency_key="k", fingerprint="f") == "a"
    assert await engine.submit(make_job("b"), idempotency_key="k", fingerprint="f") == "a"
    assert await engine.status("b") is None
    assert (await engine.capacity()).backlog_rows == 40


async def test_same_key_is_answered_though_the_door_is_shut(harness: Harness) -> None:
    """A repeated request gets its job also when no new one would be let in."""
    engine = harness.engine
    await engine.submit(make_job("a"), idempotency_key="k")
    await harness.wait(WORKER_SILENCE + 1)
    assert await engine.submit(make_job("b"), idempotency_key="k") == "a"


async def test_key_with_another_request_is_refused(engine: Engine) -> None:
    """The same key with another fingerprint is an error, and makes no job."""
    await engine.submit(make_job("a"), idempotency_key="k", fingerprint="f")
    with pytest.raises(IdempotencyMismatch):
        await engine.submit(make_job("b"), idempotency_key="k", fingerprint="g")
    assert await engine.status("b") is None


async def test_keys_belong_to_their_owner(engine: Engine) -> None:
    """Two callers may use the same key without meeting."""
    for owner in ("ada", "bob", None):
        job = make_job(f"of-{owner}", owner=owner)
        assert await engine.submit(job, idempotency_key="k") == job.id


async def test_refused_submission_leaves_its_key_free(engine: Engine) -> None:
    """A key whose request was turned away can be used again."""
    with pytest.raises(Backlog):
        await engine.submit(make_job("a", task="cats"), idempotency_key="k")
    assert await engine.submit(make_job("b"), idempotency_key="k", fingerprint="g") == "b"


async def test_known_id_is_not_queued_twice(engine: Engine) -> None:
    """Submitting a job again, as after a lost reply, changes nothing."""
    await engine.submit(make_job("a"))
    await engine.submit(make_job("a"))
    assert (await engine.capacity()).backlog_rows == 40


# Watching


async def watched(engine: Engine, job_id: str, into: list[JobStatus]) -> None:
    async for status in engine.watch(job_id):
        into.append(status)


async def soon(condition: Callable[[], bool]) -> None:
    """Let other tasks run until the condition holds, failing after half a minute."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the engine under test has nothing to wait on.
            await asyncio.sleep(0.001)


async def test_watch_shows_every_change_to_a_fast_reader(engine: Engine) -> None:
    """Rows done only grow, and the last status watched is the final one."""
    await engine.submit(make_job("a"))
    seen: list[JobStatus] = []
    watching = asyncio.create_task(watched(engine, "a", seen))
    await soon(lambda: len(seen) == 1)
    for done, lease in enumerate(await engine.pull(ALPHA, 100), start=1):
        await compute(engine, [lease])
        await soon(lambda done=done: seen[-1].rows_done == 10 * done)
    await watching
    assert seen[0].state is State.QUEUED
    assert [s.rows_done for s in seen] == sorted(s.rows_done for s in seen)
    assert_exact(seen[-1])


async def test_slow_watcher_sees_the_latest(engine: Engine) -> None:
    """Changes between two looks are one change: nothing piles up for a slow reader."""
    await engine.submit(make_job("a"))
    async with aclosing(engine.watch("a")) as watching:
        assert (await anext(watching)).rows_done == 0
        await compute(engine, (await engine.pull(ALPHA, 100))[:3])
        assert (await anext(watching)).rows_done == 30


async def test_watch_of_an_ended_job_is_its_end(engine: Engine) -> None:
    """Whoever comes after the end gets the one final status."""
    await engine.submit(make_job("a"))
    await finish_everything(engine)
    (status,) = [status async for status in engine.watch("a")]
    assert_exact(status)


@pytest.mark.parametrize("end", ["cancel", "delete"])
async def test_watchers_see_a_job_dropped(engine: Engine, end: str) -> None:
    """All watchers of a job that is cancelled or forgotten see it cancelled, and end."""
    await engine.submit(make_job("a"))
    seen: list[list[JobStatus]] = [[], []]
    watching = [asyncio.create_task(watched(engine, "a", into)) for into in seen]
    await soon(lambda: all(seen))
    await (engine.cancel("a") if end == "cancel" else engine.delete("a"))
    async with asyncio.timeout(30):
        await asyncio.gather(*watching)
    assert [into[-1].state for into in seen] == [State.CANCELLED] * 2


async def test_watchers_see_a_death_through_others_pulls(harness: Harness) -> None:
    """A job that dies of expired leases ends for its watchers as soon as any worker pulls."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    seen: list[JobStatus] = []
    watching = asyncio.create_task(watched(engine, "a", seen))
    for _ in range(1 + ISOLATED_CRASHES_ALLOWED):
        await die(harness)
    await engine.pull(BETA, 1)
    async with asyncio.timeout(30):
        await watching
    assert seen[-1].state is State.FAILED


# What operators watch


async def test_an_idle_queue_says_so(engine: Engine) -> None:
    """Without work no lane has rows or an age, and no speed has been measured."""
    queue = await engine.stats()
    assert queue.priorities == {"hi": PriorityState(0, 0.0), "lo": PriorityState(0, 0.0)}
    assert (queue.rows_per_second, queue.dead_letters) == (0.0, 0)


async def test_the_queue_is_told_by_lane(harness: Harness) -> None:
    """Rows wait or are leased; ages are those of what nobody holds, since it was accepted."""
    engine, tick = harness.engine, harness.tick

    async def told() -> list[tuple[int, float]]:
        lanes = (await engine.stats()).priorities
        return [(lanes[name].rows, lanes[name].oldest_seconds) for name in ("hi", "lo")]

    await engine.submit(make_job("slow"))
    await harness.wait(3)
    await engine.submit(make_job("fast", mode=Mode.PREDICT))
    await harness.wait(2)
    await engine.submit(make_job("young", task="birds", bundle="bundle-b"))
    assert await told() == [(30, pytest.approx(2 * tick)), (80, pytest.approx(5 * tick))]

    fast = await engine.pull(ALPHA, 30)
    assert await told() == [(30, 0.0), (80, pytest.approx(5 * tick))]
    await engine.release(fast[:1])
    assert await told() == [(30, pytest.approx(2 * tick)), (80, pytest.approx(5 * tick))]
    fast += await engine.pull(ALPHA, 10)
    assert (await compute(engine, fast)).count(True) == 3
    assert await told() == [(0, 0.0), (80, pytest.approx(5 * tick))]

    slow = await engine.pull(ALPHA, 40)
    await harness.wait(1)
    assert await told() == [(0, 0.0), (80, pytest.approx(1 * tick))]
    await engine.cancel("young")
    assert await told() == [(0, 0.0), (40, 0.0)]
    await engine.start(slow)
    await harness.wait(LEASE + 1)
    assert await told() == [(0, 0.0), (40, pytest.approx((LEASE + 7) * tick))]
    await engine.delete("slow")
    assert await told() == [(0, 0.0), (0, 0.0)]


async def test_the_queue_tells_the_speed_that_retry_after_is_made_from(harness: Harness) -> None:
    """The measured speed is the one that capacity tells."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    leases = await engine.pull(ALPHA, 20)
    await harness.wait(2)
    await compute(engine, leases)
    speed = (await engine.stats()).rows_per_second
    assert speed == (await engine.capacity()).rows_per_second > 0


async def test_workers_are_alive_until_they_fall_silent(harness: Harness) -> None:
    """A worker is counted while it is heard from, whatever it serves and however many times."""
    engine = harness.engine
    for _ in range(2):
        await engine.pull(BETA, 1)
    assert (await engine.stats()).workers == 3
    await harness.wait(WORKER_SILENCE - 5)
    await engine.pull(BETA, 1)
    await harness.wait(10)
    assert (await engine.stats()).workers == 1
    await harness.wait(WORKER_SILENCE)
    assert (await engine.stats()).workers == 0


async def test_shards_that_end_their_jobs_are_counted(harness: Harness) -> None:
    """By their failures or the deaths of their workers; what ends otherwise is no dead letter."""
    engine = harness.engine
    for name in ("failing", "good", "cancelled"):
        await engine.submit(one_shard(name))
        if name == "failing":
            for told in range(FAILURES_ALLOWED):
                assert (await engine.stats()).dead_letters == 0, told
                (lease,) = await engine.pull(ALPHA, 1)
                await engine.fail(lease, PROBLEM)
            assert (await engine.stats()).dead_letters == 1
    await engine.cancel("cancelled")
    await finish_everything(engine)
    assert (await engine.stats()).dead_letters == 1
    await engine.submit(one_shard("deadly"))
    for _ in range(1 + ISOLATED_CRASHES_ALLOWED):
        await die(harness)
    assert (await engine.stats()).dead_letters == 2
