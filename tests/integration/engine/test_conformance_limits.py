"""The engine's contract: admission, quotas, Idempotency-Keys."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.engine.protocol import (
    FAILURES_ALLOWED,
    ISOLATED_CRASHES_ALLOWED,
    Engine,
    Worker,
)
from service.errors import Backlog, IdempotencyMismatch, InvalidField, QuotaExceeded
from tests.support.engines import (
    ALPHA,
    BACKLOG_ROWS,
    LEASE,
    OWNER_ROWS,
    PROBLEM,
    RETENTION,
    WORKER_SILENCE,
    Harness,
    assert_exact,
    compute,
    die,
    finish_everything,
    one_shard,
    owned,
    status_of,
)
from tests.support.fakes import make_job
from tests.support.serving import TASKS

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
