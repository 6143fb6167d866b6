"""service/tasks/fleet.py on a real redis-server: jobs of one volume, runners on several machines.

Runners are processes where they must be killed, and run without locks where machines would not
share them. Where a lease must run out, it is aged in Redis, unless the runner's own clock matters.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

from benchmarks.redis_server import GROUP, RedisServer
from models.adaptation.plan import Status
from models.bundle import read_bundle
from service.config import Settings
from service.engine.redis.adaptations import Adaptations, AnotherVolume
from service.engine.redis.client import connect
from service.errors import NotFound
from service.tasks.catalog import Catalog
from service.tasks.fleet import LOSSES_ALLOWED, LeasedJobs, adapting
from service.tasks.notices import FleetNotices, Line, reconcile_if_due
from service.tasks.process import Run
from service.tasks.repository import TaskRepository
from service.tasks.schemas import TaskRequest
from service.tasks.service import TaskService
from service.tasks.task import Task
from tests.adapting import FAKE, FAST, PATIENT, PETS, create, make_plan, make_store, starts, until
from tests.fake_adaptation import GO, OVERLAPS, publish, works
from tests.test_telemetry import counted

pytestmark = [  # A connection that is cut while the client makes it is left to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROOT = Path(__file__).parents[1]


class Fleet:
    """A shared volume and a prefix of Redis, an API's desk, and runners."""

    def __init__(self, url: str, data_dir: Path, lease_seconds: float = 30) -> None:
        self.url, self.data_dir, self.lease_seconds = url, data_dir, lease_seconds
        self.prefix = f"{{{secrets.token_hex(8)}}}:"
        self.stream = f"{self.prefix}adapt"
        self.store = make_store(data_dir, redis_url=url)
        self.volume = self.store.made_volume()
        self.redis = connect(url)
        self.queue = self.adaptations()
        self._told = self.adaptations()
        self.notices = FleetNotices(self.store, self._told)
        self.desk = TaskService(self.store, Catalog({}, self.store.tasks), self.notices)
        self.processes: list[subprocess.Popen[bytes]] = []

    def adaptations(self) -> Adaptations:
        url, prefix = self.url, self.prefix
        return Adaptations(connect(url), lease_seconds=self.lease_seconds, prefix=prefix)

    async def post(self, ways: str = "plain", **settings: Any) -> Task:
        """A job made and announced as POST /tasks does, by an API that has begun."""
        await self.queue.claim(self.volume)
        return await self.post_alone(ways, **settings)

    async def post_alone(self, ways: str = "plain", **settings: Any) -> Task:
        """The same by an API that has not said yet whose folders these are."""
        fields = {"labels": PETS, "template": f"{ways} {{}}", "shots": 1, **settings}
        asked = TaskRequest.model_validate(fields)
        return self.store.get((await self.desk.create(asked, None)).id)

    async def take(self, worker: str) -> str | None:
        return await self.queue.take(self.volume, worker, [])

    @asynccontextmanager
    async def noticing(self) -> AsyncIterator[None]:
        """The companion of an API process."""
        stop = asyncio.Event()
        task = asyncio.create_task(self.notices.run(stop))
        try:
            yield
        finally:
            stop.set()
            await task

    @asynccontextmanager
    async def running(self, name: str) -> AsyncIterator[asyncio.Event]:
        """A runner in this process; the event stops it."""
        stop = asyncio.Event()
        companion = adapting(self.store, self.adaptations(), name, FAKE, FAST)
        task = asyncio.create_task(companion(stop))
        try:
            yield stop
        finally:
            stop.set()
            await task

    def launch(self, name: str, way: str = "unlocked") -> subprocess.Popen[bytes]:
        """A runner in a process of its own, by default one that shares no locks."""
        words = [str(self.data_dir), self.url, self.prefix, name, str(self.lease_seconds), way]
        command = [sys.executable, "-m", "tests.adapt_runner", *words]
        self.processes.append(process := subprocess.Popen(command, cwd=ROOT))  # noqa: S603
        return process

    async def lapse(self) -> None:
        """Every lease, and every time of waiting, runs out now."""
        age = round(self.lease_seconds * 1000) + 1
        for held in await self.redis.xpending_range(self.stream, GROUP, "-", "+", 1_000):
            entry, owner = held["message_id"], held["consumer"]
            await self.redis.xclaim(self.stream, GROUP, owner, 0, [entry], idle=age, justid=True)
        async for removal in self.redis.scan_iter(match=f"{self.stream}:removed:*"):
            await self.redis.delete(removal)

    async def owners(self) -> list[bytes]:
        """Who has the jobs that Redis knows, in order."""
        try:
            held = await self.redis.xpending_range(self.stream, GROUP, "-", "+", 1_000)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            return []  # The stream goes with its last job.
        return [entry["consumer"] for entry in held]

    async def until_owned(self, *owners: bytes) -> None:
        async with asyncio.timeout(PATIENT):
            while await self.owners() != list(owners):  # noqa: ASYNC110 - see adapting.until
                await asyncio.sleep(0.02)

    async def until_ready(self, task: Task) -> None:
        await until(lambda: self.status(task).state == "ready")

    async def until_working(self, task: Task, times: int = 1) -> int:
        """The process of so many starts, once it is in its third stage."""

        def at_it() -> bool:
            begun = starts(self.store, task)
            return len(begun) == times and self.status(task).stage == "finetuning"

        await until(at_it)
        return starts(self.store, task)[-1]

    def status(self, task: Task) -> Status:
        return Status.read(self.store.jobs / task.id)

    def let_go_on(self, task: Task) -> None:
        (self.store.jobs / task.id / GO).touch()

    def assert_made_once(self, task: Task) -> None:
        """One whole bundle, and never two processes at once."""
        assert read_bundle(self.store.tasks / task.id).labels == task.labels
        assert not (self.store.jobs / task.id / OVERLAPS).exists()
        assert not list(self.store.tasks.glob(f".*{task.id}*"))

    async def assert_nothing_left(self) -> None:
        """Redis is as it was, but for whose turn it is, which passes."""
        async with asyncio.timeout(PATIENT):
            while await self.redis.exists(self.stream, f"{self.stream}:record"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        for key in [key async for key in self.redis.scan_iter(match=f"{self.prefix}*")]:
            assert await self.redis.pttl(key) != -1, key

    async def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        await self.queue.close()
        await self._told.close()
        await self.redis.aclose()


@pytest.fixture
async def fleet(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[Fleet]:
    built = Fleet(redis_server.url, tmp_path / "data")
    yield built
    await built.close()


@pytest.fixture
async def hasty(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[Fleet]:
    """A fleet whose leases run out in seconds."""
    built = Fleet(redis_server.url, tmp_path / "data", lease_seconds=12)
    yield built
    await built.close()


@pytest.fixture
async def own_fleet(own_server: RedisServer, tmp_path: Path) -> AsyncIterator[Fleet]:
    """A fleet on a server that a test may kill, with leases that run out soon."""
    built = Fleet(own_server.url, tmp_path / "data", lease_seconds=10)
    yield built
    await built.close()


# Two runners


async def test_each_job_is_made_once_in_order(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runners make many jobs, each once, taken in the order they were posted; the process that
    ran a job counts it; Redis keeps nothing."""
    take, taken = Adaptations.take, []

    async def spied(
        queue: Adaptations, volume: str, worker_id: str, skip: Collection[str]
    ) -> str | None:
        if (task_id := await take(queue, volume, worker_id, skip)) is not None:
            taken.append((worker_id, task_id))
        return task_id

    monkeypatch.setattr(Adaptations, "take", spied)
    before = counted("vouchsafe_adaptations_total", outcome="ready")
    tasks = [await fleet.post(seed=seed) for seed in range(7)]
    assert await fleet.owners() == [b"(free)"] * 7
    async with fleet.running("a"), fleet.running("b"):
        for task in tasks:
            await fleet.until_ready(task)
        await fleet.assert_nothing_left()
    order = [task.id for task in tasks]
    assert sorted(task_id for _, task_id in taken) == sorted(order)
    for name in "ab":
        own = [order.index(task_id) for worker_id, task_id in taken if worker_id == name]
        assert own == sorted(own)
    for task in tasks:
        assert len(starts(fleet.store, task)) == 1
        fleet.assert_made_once(task)
    assert counted("vouchsafe_adaptations_total", outcome="ready") == before + 7


async def test_runners_take_different_jobs(fleet: Fleet) -> None:
    """While one job runs, the next goes to another runner and the one after that waits."""
    first, second, third = [await fleet.post("wait", seed=seed) for seed in range(3)]
    async with fleet.running("a"):
        await fleet.until_working(first)
        async with fleet.running("b"):
            await fleet.until_working(second)
            assert await fleet.owners() == [b"a", b"b", b"(free)"]
            for task in (first, second, third):
                fleet.let_go_on(task)
                await fleet.until_ready(task)


async def test_killed_runner(fleet: Fleet) -> None:
    """kill -9 of a runner in the middle of a job: once its lease has run out another goes on, and
    publishes one bundle."""
    task = await fleet.post("wait")
    runner = fleet.launch("a")
    process = await fleet.until_working(task)
    fleet.launch("b")
    runner.kill()
    await until(lambda: not works(process))
    assert await fleet.owners() == [b"a"]
    await fleet.lapse()
    await fleet.until_working(task, times=2)
    fleet.let_go_on(task)
    await fleet.until_ready(task)
    await fleet.assert_nothing_left()
    fleet.assert_made_once(task)


async def test_runner_that_stops_hands_back(fleet: Fleet) -> None:
    """Told to stop, a runner ends its job's process and hands the job to others at once."""
    task = await fleet.post("wait")
    runner = fleet.launch("a")
    process = await fleet.until_working(task)
    runner.terminate()
    assert await asyncio.to_thread(runner.wait, PATIENT) == 0
    assert not works(process)
    assert await fleet.owners() == [b"(free)"]
    assert fleet.status(task).state == "queued"
    async with fleet.running("b"):
        await fleet.until_working(task, times=2)
        fleet.let_go_on(task)
        await fleet.until_ready(task)
    fleet.assert_made_once(task)


async def test_stopped_runner(hasty: Fleet) -> None:
    """SIGSTOP of a runner past its lease: its job's process has ended before another's begins, and
    once it goes on it spoils nothing and takes other jobs."""
    task = await hasty.post("wait")
    runner = hasty.launch("a")
    process = await hasty.until_working(task)
    os.kill(runner.pid, signal.SIGSTOP)
    other = hasty.launch("b")
    await hasty.until_working(task, times=2)
    assert not works(process)
    hasty.let_go_on(task)
    await hasty.until_ready(task)
    await hasty.assert_nothing_left()
    manifest = hasty.store.tasks / task.id / "manifest.json"
    before = manifest.stat()
    other.terminate()
    await asyncio.to_thread(other.wait, PATIENT)
    os.kill(runner.pid, signal.SIGCONT)
    await hasty.until_ready(await hasty.post(seed=1))
    assert (manifest.stat().st_ino, manifest.stat().st_mtime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
    )
    assert len(starts(hasty.store, task)) == 2
    hasty.assert_made_once(task)


async def test_stopped_machine(hasty: Fleet) -> None:
    """A machine that stands still with runner and process: back again, both leave the job alone."""
    task = await hasty.post("wait")
    runner = hasty.launch("a")
    process = await hasty.until_working(task)
    for stopped in (runner.pid, process):
        os.kill(stopped, signal.SIGSTOP)
    async with hasty.running("b"):
        await hasty.until_working(task, times=2)
        for stopped in (process, runner.pid):  # The runner would end the process at once.
            os.kill(stopped, signal.SIGCONT)
        await until(lambda: not works(process))
        hasty.let_go_on(task)
        await hasty.until_ready(task)
        await hasty.assert_nothing_left()
    assert len(starts(hasty.store, task)) == 2
    assert read_bundle(hasty.store.tasks / task.id).labels == task.labels


async def test_job_that_kills_its_runners(fleet: Fleet) -> None:
    """A job whose runners all die over it fails after five losses and says so; others go on."""
    poison = await fleet.post("poison")
    deaths = 0
    for _ in range(2 * LOSSES_ALLOWED):
        runner = fleet.launch(f"runner-{deaths}")
        await until(
            lambda runner=runner: (
                runner.poll() is not None or fleet.status(poison).state == "failed"
            )
        )
        if fleet.status(poison).state == "failed":
            break
        deaths += 1
        await fleet.lapse()
    assert deaths == LOSSES_ALLOWED + 1  # The first one came with progress.
    problem = fleet.status(poison).problem
    assert problem is not None
    assert problem["kind"] == "died"
    assert problem["detail"].startswith("5 workers went away")
    assert fleet.status(poison).finished is not None
    await fleet.until_ready(await fleet.post())
    await fleet.assert_nothing_left()


async def test_claimed_on_this_machine(fleet: Fleet) -> None:
    """A job that `vouchsafe adapt` runs in the same folder is passed over, and taken up later."""
    held, other = await fleet.post(), await fleet.post(seed=1)
    elsewhere = Run(fleet.store.jobs / held.id, fleet.store.tasks, ("sleep", "600"), FAST)
    elsewhere.step()
    assert elsewhere.is_mine
    async with fleet.running("a"):
        await fleet.until_ready(other)
        assert starts(fleet.store, held) == []
        elsewhere.stop()
        await fleet.until_ready(held)


# Redis goes away


async def test_redis_killed_and_started(
    own_server: RedisServer, own_fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """While Redis is away a runner ends its job before the lease does and says so once; when Redis
    is back the job goes on and is published once."""
    fleet = own_fleet
    task = await fleet.post("wait")
    async with fleet.running("a"):
        process = await fleet.until_working(task)
        own_server.kill()
        await until(lambda: not works(process))
        await asyncio.to_thread(own_server.start)
        await fleet.until_working(task, times=2)
        fleet.let_go_on(task)
        await fleet.until_ready(task)
        await fleet.assert_nothing_left()
    fleet.assert_made_once(task)
    assert caplog.text.count("Redis does not answer") == 1


async def test_short_outage(own_server: RedisServer, tmp_path: Path) -> None:
    """A job goes on through an outage that is shorter than its lease."""
    fleet = Fleet(own_server.url, tmp_path / "data", lease_seconds=120)
    task = await fleet.post("wait")
    async with fleet.running("a"):
        await fleet.until_working(task)
        own_server.kill()
        await asyncio.to_thread(own_server.start)
        fleet.let_go_on(task)
        await fleet.until_ready(task)
        await fleet.assert_nothing_left()
    assert len(starts(fleet.store, task)) == 1
    await fleet.close()


async def test_flushed(hasty: Fleet) -> None:
    """A Redis that forgets everything in the middle of a job: who runs it keeps it, and another
    job that waits is found in its folder."""
    task, waiting = await hasty.post("wait"), await hasty.post("wait", seed=1)
    (hasty.store.jobs / waiting.id / GO).touch()
    async with hasty.running("a"):
        await hasty.until_working(task)
        await hasty.redis.delete(*[key async for key in hasty.redis.scan_iter(f"{hasty.prefix}*")])
        async with hasty.running("b"), hasty.noticing():
            await hasty.until_ready(waiting)
            await hasty.until_owned(b"a")
            hasty.let_go_on(task)
            await hasty.until_ready(task)
            await hasty.assert_nothing_left()
    for each in (task, waiting):
        assert len(starts(hasty.store, each)) == 1
        hasty.assert_made_once(each)


async def test_lost_group(hasty: Fleet) -> None:
    """Where only the group is lost, nobody takes a job before its runner has renewed the lease."""
    task = await hasty.post("wait")
    async with hasty.running("a"):
        await hasty.until_working(task)
        await hasty.redis.xgroup_destroy(hasty.stream, GROUP)
        assert await hasty.take("b") is None
        await hasty.until_owned(b"a")
        hasty.let_go_on(task)
        await hasty.until_ready(task)
    assert len(starts(hasty.store, task)) == 1


async def test_posted_while_redis_is_away(
    own_server: RedisServer, own_fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """POST succeeds without Redis; the job is made once Redis is back."""
    fleet = own_fleet
    own_server.kill()
    task = await fleet.post_alone()
    assert task.status.state == "queued"
    with pytest.raises(NotFound):
        await fleet.desk.delete("0" * 32, None)
    await fleet._told.close()  # It would still try to tell for some seconds.
    await asyncio.to_thread(own_server.start)
    async with fleet.noticing():
        await fleet.until_owned(b"(held)")
        await fleet.lapse()
        async with fleet.running("a"):
            await fleet.until_ready(task)
            await fleet.assert_nothing_left()
    assert len(starts(fleet.store, task)) == 1
    assert caplog.text.count("Redis does not answer") == 1


@pytest.mark.parametrize("sent", [False, True])
async def test_posted_as_the_api_ends(
    own_server: RedisServer, own_fleet: Fleet, monkeypatch: pytest.MonkeyPatch, sent: bool
) -> None:
    """A POST whose API process lets go of Redis before it is told of the job is answered still."""
    fleet = own_fleet
    reached, written = asyncio.Event(), asyncio.Event()
    announce, write = fleet._told.announce, AbstractConnection.send_packed_command

    async def announced(task_id: str) -> None:
        reached.set()
        await announce(task_id)

    async def wrote(connection: AbstractConnection, *command: Any, **options: Any) -> None:
        await write(connection, *command, **options)
        if reached.is_set():
            written.set()

    await fleet._told.claim(fleet.volume)
    monkeypatch.setattr(fleet._told, "announce", announced)
    monkeypatch.setattr(AbstractConnection, "send_packed_command", wrote)
    own_server.send(signal.SIGSTOP)
    posting = asyncio.create_task(fleet.post_alone())
    async with asyncio.timeout(PATIENT):
        await (written if sent else reached).wait()
    assert bool(fleet._told._scripts._calls) is not sent
    await fleet._told.close()
    task = await posting
    own_server.send(signal.SIGCONT)
    assert task.status.state == "queued"
    async with fleet.noticing():
        await fleet.until_owned(b"(free)" if sent else b"(held)")  # Redis does what was sent.


async def test_least_rights_are_enough(own_server: RedisServer, own_fleet: Fleet) -> None:
    """An ACL user with the rights that the engine needs can announce, run and remove jobs."""
    rights = "-@all +@read +@write +@pubsub +@scripting +@connection +@transaction +time"
    keys = f"~{own_fleet.prefix}*"
    await own_fleet.redis.execute_command(
        "ACL", "SETUSER", "fleet", "on", ">s3cret", keys, *rights.split()
    )
    url = own_server.url.replace("redis://", "redis://fleet:s3cret@")
    fleet = Fleet(url, own_fleet.data_dir)
    fleet.prefix, fleet.stream = own_fleet.prefix, own_fleet.stream
    notices = FleetNotices(fleet.store, fleet.adaptations())
    done, waiting = create(fleet.store), create(fleet.store, seed=1)
    await notices._adaptations.claim(fleet.volume)
    await notices.announce(done.id)
    async with fleet.running("a"):
        await fleet.until_ready(done)
        await fleet.until_owned(b"(held)")
        await fleet.lapse()
        await fleet.until_ready(waiting)
    await notices.retract(done.id)
    await own_fleet.assert_nothing_left()
    for closed in (fleet, notices._adaptations):
        await closed.close()


# Removal


async def test_removed_while_it_runs_elsewhere(fleet: Fleet) -> None:
    """DELETE of a job that another machine runs ends its process, and nothing of it is left."""
    task = await fleet.post("wait")
    fleet.launch("a")
    process = await fleet.until_working(task)
    await fleet.desk.delete(task.id, None)
    await until(lambda: not works(process))
    await fleet.until_ready(other := await fleet.post(seed=1))
    await fleet.assert_nothing_left()
    assert fleet.store.find(task.id) is None
    assert [task.id for task in fleet.store.all()] == [other.id]


async def test_published_too_late(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle that was published while its task was removed, by a machine whose locks are not
    seen, goes again."""
    before = counted("vouchsafe_adaptations_total", outcome="cancelled")
    monkeypatch.setattr("service.tasks.repository.is_running", lambda job: False)
    task = await fleet.post("wait")
    async with fleet.running("a"):
        await fleet.until_working(task)
        fleet.store.delete(task.id)
        publish(Path(task.id), fleet.store.tasks, make_plan("wait"))
        await until(lambda: fleet.store.find(task.id) is None)
        await fleet.assert_nothing_left()
    assert [path.name for path in fleet.store.tasks.iterdir()] == [".lock"]
    assert counted("vouchsafe_adaptations_total", outcome="cancelled") == before + 1


async def test_posted_again_after_its_removal(fleet: Fleet) -> None:
    """A job removed while it ran and posted again waits until its runner must have stopped."""
    task = await fleet.post("wait")
    assert await fleet.take("away") == task.id
    await fleet.desk.delete(task.id, None)
    again = await fleet.post("wait")
    assert again.id == task.id
    assert await fleet.queue.renew(task.id, "away", 0.5) is None
    assert await fleet.owners() == [b"(held)"]
    await fleet.lapse()
    async with fleet.running("a"):
        fleet.let_go_on(again)
        await fleet.until_ready(again)


async def test_failed_job_posted_again(fleet: Fleet) -> None:
    """A job that failed is run again as soon as it is posted again, and only then."""
    task = await fleet.post("fail")
    async with fleet.running("a"):
        await until(lambda: fleet.status(task).state == "failed")
        await fleet.assert_nothing_left()
        assert len(starts(fleet.store, task)) == 1
        await fleet.post("fail")
        await until(lambda: len(starts(fleet.store, task)) == 2)
        await until(lambda: fleet.status(task).state == "failed")
        await fleet.assert_nothing_left()


async def test_reconciled(redis_server: RedisServer, tmp_path: Path) -> None:
    """Redis loses what the folders have not, and gets what they have, whoever made it."""
    fleet = Fleet(redis_server.url, tmp_path / "data", lease_seconds=1)
    await fleet.queue.announce("of-no-folder")
    made = [create(fleet.store, seed=seed) for seed in range(2)]
    ended = await fleet.post(seed=2)
    Status("failed").write(fleet.store.jobs / ended.id)
    async with fleet.noticing():
        await fleet.until_owned(b"(held)", b"(held)")
        entries = await fleet.redis.xrange(fleet.stream)
        assert [fields[b"task"].decode() for _, fields in entries] == [task.id for task in made]
        for task in made:
            await fleet.desk.delete(task.id, None)
        await fleet.assert_nothing_left()
    await fleet.close()


# Folders that are not the fleet's


async def test_machine_that_does_not_share(
    fleet: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker with a data directory of its own takes no job, spoils none, writes nothing and says
    why once; when the fleet's directory is mounted there it takes part."""
    caplog.set_level(logging.INFO, "vouchsafe.tasks")
    task = await fleet.post()
    other = tmp_path / "other"
    alone = TaskRepository(Settings(data_dir=other, redis_url=fleet.url))
    reached = asyncio.Event()
    looks = 0

    async def looked(queue: Adaptations, *asked: Any) -> Any:
        nonlocal looks
        looks += 1
        if looks == 3:
            reached.set()
        return await survey(queue, *asked)

    survey, stop = Adaptations.survey, asyncio.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adaptations, "survey", looked)
        working = asyncio.create_task(adapting(alone, fleet.adaptations(), "a", FAKE, FAST)(stop))
        await reached.wait()
    assert await fleet.owners() == [b"(free)"]
    assert caplog.text.count("does not share the API's data directory") == 1
    assert not other.exists()
    other.symlink_to(fleet.data_dir)
    await fleet.until_ready(task)
    stop.set()
    await working
    assert caplog.text.count("does not share the API's data directory") == 1
    assert caplog.text.count("this machine shares the API's data directory") == 1
    await fleet.assert_nothing_left()


async def test_worker_before_any_api(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """Before an API has told whose folders the jobs lie in, nobody takes one, quietly."""
    task = await fleet.post_alone()
    with pytest.raises(AnotherVolume) as raised:
        await fleet.take("a")
    assert not raised.value.known
    async with fleet.running("a"):
        async with asyncio.timeout(PATIENT):
            while not await fleet.redis.exists(f"{fleet.stream}:volume"):
                await fleet.queue.claim(fleet.volume)
        await fleet.until_ready(task)
    assert "does not share" not in caplog.text


async def test_volume_that_goes_away(fleet: Fleet) -> None:
    """Folders that vanish with their volume are no jobs that were removed: whoever looked at them
    meanwhile hands the job back, and corrects nothing."""
    task = await fleet.post()
    jobs = LeasedJobs(fleet.store, fleet.queue, "a")
    away = fleet.data_dir.with_name("away")
    found = fleet.store.find
    with pytest.MonkeyPatch.context() as patch:

        def unmount(task_id: str) -> Task | None:
            if fleet.data_dir.exists():
                fleet.data_dir.rename(away)
            return found(task_id)

        patch.setattr(fleet.store, "find", unmount)
        assert await jobs.next([]) is None
    assert await fleet.owners() == [b"(free)"]
    await fleet.redis.delete(f"{fleet.stream}:reconciled")
    with pytest.MonkeyPatch.context() as patch:
        away.rename(fleet.data_dir)

        def gone() -> list[Task]:
            fleet.data_dir.rename(away)
            return []

        patch.setattr(fleet.store, "unfinished", gone)
        patch.setattr(fleet.queue, "survey", AsyncMock(return_value=[task.id]))
        await reconcile_if_due(fleet.store, fleet.volume, fleet.queue, Line(PATIENT))
    assert await fleet.owners() == [b"(free)"]
    away.rename(fleet.data_dir)


async def test_volume_that_goes_away_under_a_job(fleet: Fleet) -> None:
    """A runner whose volume vanishes ends its process and hands the job back, and leaves nothing in
    the empty place; with the volume back, the job goes on."""
    task = await fleet.post("wait")
    away = fleet.data_dir.with_name("away")
    async with fleet.running("a"):
        process = await fleet.until_working(task)
        fleet.data_dir.rename(away)
        await until(lambda: not works(process))
        await fleet.until_owned(b"(free)")
        assert not fleet.data_dir.exists()
        away.rename(fleet.data_dir)
        await fleet.until_working(task, times=2)
        fleet.let_go_on(task)
        await fleet.until_ready(task)
    fleet.assert_made_once(task)


async def test_api_with_another_directory(fleet: Fleet, tmp_path: Path) -> None:
    """An API process whose data directory is not the fleet's is told to end, and changes nothing;
    those that share the directory are one fleet."""
    task = await fleet.post()
    told: list[str] = []
    stranger = Fleet(fleet.url, tmp_path / "other")
    stranger.prefix = fleet.prefix
    async with fleet.noticing():
        notices = FleetNotices(stranger.store, stranger.adaptations(), told.append)
        await notices.run(asyncio.Event())
        assert len(told) == 1
        assert str(tmp_path / "other") in told[0]
        assert "noise secret" in told[0]
        same = FleetNotices(make_store(fleet.data_dir), fleet.adaptations(), told.append)
        stop = asyncio.Event()
        running = asyncio.create_task(same.run(stop))
        await fleet.queue.claim(make_store(fleet.data_dir).made_volume())
        stop.set()
        await running
    assert len(told) == 1
    assert await fleet.owners() == [b"(free)"]
    async with fleet.running("a"):
        await fleet.until_ready(task)
    await stranger.close()


async def test_api_process_with_another_directory_ends(
    own_server: RedisServer, tmp_path: Path
) -> None:
    """`vouchsafe serve` ends with 2 and says why where the fleet has another data directory."""
    other = Adaptations(connect(own_server.url))
    await other.claim("0" * 32)
    await other.close()
    chosen = {"VOUCHSAFE_REDIS_URL": own_server.url, "VOUCHSAFE_DATA_DIR": str(tmp_path / "own")}
    command = [
        sys.executable,
        "-c",
        "from service.cli.main import main; main()",
        "serve",
        "--port",
        "0",
    ]
    ended = await asyncio.to_thread(
        subprocess.run,
        command,
        cwd=ROOT,
        env=os.environ | chosen,
        stderr=subprocess.PIPE,
        timeout=PATIENT,
        check=False,
    )
    said = ended.stderr.decode().splitlines()
    assert ended.returncode == 2, said
    assert said[-1].startswith("vouchsafe: other API processes of this Redis have another data dir")


async def test_volume_nobody_asks_for_is_forgotten(fleet: Fleet, tmp_path: Path) -> None:
    """A directory that was given up holds no place for ever; one that is in use keeps its place."""
    key = f"{fleet.stream}:volume"
    await fleet.queue.claim(fleet.volume)
    lasts = await fleet.redis.pttl(key)
    assert 0 < lasts <= 10 * fleet.lease_seconds * 1000
    await fleet.redis.pexpire(key, 60_000)
    with pytest.raises(AnotherVolume):
        await fleet.queue.take("0" * 32, "a", [])
    assert await fleet.redis.pttl(key) <= 60_000
    await fleet.take("a")
    assert await fleet.redis.pttl(key) > 60_000
    await fleet.redis.delete(key)
    await fleet.queue.claim("0" * 32)
    with pytest.raises(AnotherVolume):
        await fleet.take("a")


# The lease by itself


async def test_lost_answer_to_a_take(fleet: Fleet) -> None:
    """A worker whose answer was lost gets the same job, not a second one."""
    first, second = await fleet.post(), await fleet.post(seed=1)
    assert await fleet.take("a") == first.id
    assert await fleet.take("a") == first.id
    assert await fleet.take("b") == second.id
    assert await fleet.take("c") is None


async def test_lease_of_another(fleet: Fleet) -> None:
    """A lease that another has taken is neither renewed, released nor closed."""
    task = await fleet.post()
    await fleet.take("a")
    assert await fleet.queue.renew(task.id, "a", 0.0) == 0
    await fleet.lapse()
    assert await fleet.take("b") == task.id
    assert await fleet.queue.renew(task.id, "a", 0.0) is None
    await fleet.queue.release(task.id, "a")
    await fleet.queue.close_job(task.id, "a")
    assert await fleet.owners() == [b"b"]
    assert len(await fleet.redis.xinfo_consumers(fleet.stream, GROUP)) == 2


async def test_losses_are_counted_without_progress(fleet: Fleet) -> None:
    """Only leases that workers lose count, and progress strikes them."""
    task = await fleet.post()

    async def lose(worker: str, progress: float) -> int | None:
        assert await fleet.take(worker) == task.id
        losses = await fleet.queue.renew(task.id, worker, progress)
        await fleet.lapse()
        return losses

    assert [await lose(name, 0.25) for name in "abc"] == [0, 1, 2]
    assert [await lose("c", 0.25), await lose("c", 0.2)] == [2, 2]
    await fleet.take("c")
    await fleet.queue.release(task.id, "c")
    assert [await lose("d", 0.25), await lose("e", 0.25), await lose("f", 0.3)] == [2, 3, 0]


async def test_forgotten_job_is_held(fleet: Fleet) -> None:
    """Nobody takes a job that Redis had forgotten before a lease has passed, but who runs it."""
    task = await fleet.post()
    await fleet.take("a")
    await fleet.redis.delete(fleet.stream)
    assert await fleet.queue.correct([task.id], []) == 1
    assert await fleet.take("b") is None
    assert await fleet.queue.renew(task.id, "a", 0.0) == 0
    assert await fleet.owners() == [b"a"]
    await fleet.lapse()
    assert await fleet.take("b") == task.id
