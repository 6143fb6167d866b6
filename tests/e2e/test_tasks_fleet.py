"""Adaptation jobs of a fleet on a real redis-server: one volume, runners on several machines.

Runners are processes where they must be killed, and run without file locks where machines would
not share them. Where a lock must expire, it is deleted, unless the runner's own clock matters.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.redis_server import RedisServer
from models.adaptation.plan import Status
from models.bundle import read_bundle
from service.config import Settings
from service.engine.redis.client import connect
from service.tasks.catalog import Catalog
from service.tasks.lock import HeldLock, RedisLocks
from service.tasks.process import ATTEMPTS, Run
from service.tasks.repository import TaskRepository
from service.tasks.schemas import TaskRequest
from service.tasks.service import TaskService
from service.tasks.supervisor import Supervisor
from service.tasks.task import Task
from tests.support.adapting import (
    FAKE,
    FAST,
    PATIENT,
    PETS,
    create,
    make_plan,
    make_store,
    starts,
    until,
)
from tests.support.fake_adaptation import GO, OVERLAPS, publish, works
from tests.support.metrics import counted
from tests.support.paths import ROOT

pytestmark = [  # A connection that is cut while the client makes it is left to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Fleet:
    """A shared volume and a prefix of Redis, an API's task service, and runners."""

    def __init__(self, url: str, data_dir: Path, seconds: float = 30) -> None:
        self.url, self.data_dir, self.seconds = url, data_dir, seconds
        self.prefix = f"{{{secrets.token_hex(8)}}}:"
        self.store = make_store(data_dir, redis_url=url)
        self.redis = connect(url)
        self.service = TaskService(self.store, Catalog({}, self.store.tasks))
        self.processes: list[subprocess.Popen[bytes]] = []

    def locks(self) -> RedisLocks:
        return RedisLocks(connect(self.url), seconds=self.seconds, prefix=self.prefix)

    async def post(self, ways: str = "plain", **settings: Any) -> Task:
        """A job made as POST /tasks does."""
        fields = {"labels": PETS, "template": f"{ways} {{}}", "shots": 1, **settings}
        asked = TaskRequest.model_validate(fields)
        return self.store.get((await self.service.create(asked, None)).id)

    @asynccontextmanager
    async def running(self, data_dir: Path | None = None) -> AsyncIterator[asyncio.Event]:
        """A runner in this process; the event stops it."""
        stop, locks = asyncio.Event(), self.locks()
        settings = Settings(data_dir=data_dir or self.data_dir, redis_url=self.url)
        supervisor = Supervisor(TaskRepository(settings), FAKE, FAST, locks)
        task = asyncio.create_task(supervisor.run(stop))
        try:
            yield stop
        finally:
            stop.set()
            await task
            await locks.aclose()

    def launch(self, way: str = "unlocked") -> subprocess.Popen[bytes]:
        """A runner in a process of its own, by default one that shares no file locks."""
        words = [str(self.data_dir), self.url, self.prefix, str(self.seconds), way]
        command = [sys.executable, "-m", "tests.support.adapt_runner", *words]
        self.processes.append(process := subprocess.Popen(command, cwd=ROOT))  # noqa: S603
        return process

    def lock_of(self, task: Task) -> str:
        return f"{self.prefix}adaptation:{task.id}"

    async def expire(self, task: Task) -> None:
        """The job's lock expires now."""
        assert await self.redis.delete(self.lock_of(task)) == 1

    async def until_ready(self, task: Task) -> None:
        await until(lambda: self.status(task).state == "ready")

    async def until_working(self, task: Task, times: int = 1) -> int:
        """The process of the job's last start of `times`, once it is in its third stage."""

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
        """Redis keeps no lock of a job that has ended."""
        async with asyncio.timeout(PATIENT):
            while [key async for key in self.redis.scan_iter(match=f"{self.prefix}*")]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        await self.redis.aclose()


@pytest.fixture
async def fleet(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[Fleet]:
    built = Fleet(redis_server.url, tmp_path / "data")
    yield built
    await built.close()


@pytest.fixture
async def hasty(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[Fleet]:
    """A fleet whose locks expire in seconds."""
    built = Fleet(redis_server.url, tmp_path / "data", seconds=12)
    yield built
    await built.close()


@pytest.fixture
async def own_fleet(own_server: RedisServer, tmp_path: Path) -> AsyncIterator[Fleet]:
    """A fleet on a server that a test may kill, with locks that expire soon."""
    built = Fleet(own_server.url, tmp_path / "data", seconds=10)
    yield built
    await built.close()


# Two runners


async def test_each_job_is_made_once_in_order(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runners make many jobs, each once, begun in the order they were posted; the process that
    ran a job counts it; Redis keeps nothing."""
    run, begun = Supervisor._run, []

    async def spied(runner: Supervisor, task: Task, lock: HeldLock, stop: asyncio.Event) -> bool:
        begun.append((id(runner), task.id))
        return await run(runner, task, lock, stop)

    monkeypatch.setattr(Supervisor, "_run", spied)
    before = counted("vouchsafe_adaptations_total", outcome="ready")
    tasks = [await fleet.post(seed=seed) for seed in range(7)]
    async with fleet.running(), fleet.running():
        for task in tasks:
            await fleet.until_ready(task)
    await fleet.assert_nothing_left()
    order = [task.id for task in tasks]
    for runner in {runner for runner, _ in begun}:
        own = [order.index(task_id) for runner_id, task_id in begun if runner_id == runner]
        assert own == sorted(own)
    for task in tasks:
        assert len(starts(fleet.store, task)) == 1
        fleet.assert_made_once(task)
    assert counted("vouchsafe_adaptations_total", outcome="ready") == before + 7


async def test_runners_take_different_jobs(fleet: Fleet) -> None:
    """While one job runs, the next goes to another runner and the one after that waits."""
    first, second, third = [await fleet.post("wait", seed=seed) for seed in range(3)]
    async with fleet.running():
        await fleet.until_working(first)
        async with fleet.running():
            await fleet.until_working(second)
            assert starts(fleet.store, third) == []
            for task in (first, second, third):
                fleet.let_go_on(task)
                await fleet.until_ready(task)


async def test_killed_runner(fleet: Fleet) -> None:
    """kill -9 of a runner in the middle of a job: once its lock has expired another goes on, and
    publishes one bundle."""
    task, later = await fleet.post("wait"), await fleet.post(seed=1)
    runner = fleet.launch()
    process = await fleet.until_working(task)
    runner.kill()
    await until(lambda: not works(process))
    fleet.launch()
    await fleet.until_ready(later)
    assert len(starts(fleet.store, task)) == 1
    await fleet.expire(task)
    await fleet.until_working(task, times=2)
    fleet.let_go_on(task)
    await fleet.until_ready(task)
    await fleet.assert_nothing_left()
    fleet.assert_made_once(task)


async def test_runner_that_stops_hands_back(fleet: Fleet) -> None:
    """Told to stop, a runner ends its job's process and hands the job to others at once."""
    task = await fleet.post("wait")
    runner = fleet.launch()
    process = await fleet.until_working(task)
    runner.terminate()
    assert await asyncio.to_thread(runner.wait, PATIENT) == 0
    assert not works(process)
    assert not await fleet.redis.exists(fleet.lock_of(task))
    assert fleet.status(task).state == "queued"
    async with fleet.running():
        await fleet.until_working(task, times=2)
        assert fleet.status(task).attempts == 0
        fleet.let_go_on(task)
        await fleet.until_ready(task)
    fleet.assert_made_once(task)


async def test_stopped_runner(hasty: Fleet) -> None:
    """SIGSTOP of a runner past its lock: its job's process has ended before another's begins, and
    once it goes on it spoils nothing and takes other jobs."""
    task = await hasty.post("wait")
    runner = hasty.launch()
    process = await hasty.until_working(task)
    os.kill(runner.pid, signal.SIGSTOP)
    other = hasty.launch()
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
    after = manifest.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(starts(hasty.store, task)) == 2
    hasty.assert_made_once(task)


async def test_stopped_machine(hasty: Fleet) -> None:
    """A machine that stands still with runner and process: back again, both leave the job alone."""
    task = await hasty.post("wait")
    runner = hasty.launch()
    process = await hasty.until_working(task)
    for stopped in (runner.pid, process):
        os.kill(stopped, signal.SIGSTOP)
    async with hasty.running():
        await hasty.until_working(task, times=2)
        for stopped in (process, runner.pid):  # The runner would end the process at once.
            os.kill(stopped, signal.SIGCONT)
        await until(lambda: not works(process))
        hasty.let_go_on(task)
        await hasty.until_ready(task)
        await hasty.assert_nothing_left()
    assert len(starts(hasty.store, task)) == 2
    assert read_bundle(hasty.store.tasks / task.id).labels == task.labels


async def test_job_that_kills_its_runners(hasty: Fleet) -> None:
    """A job whose runners all die over it fails after its attempts and says so; others go on."""
    poison = await hasty.post("poison")
    for death in range(1, ATTEMPTS + 1):
        runner = hasty.launch()
        assert await asyncio.to_thread(runner.wait, PATIENT) == -signal.SIGKILL
        assert len(starts(hasty.store, poison)) == death
        await hasty.expire(poison)
    other = await hasty.post()
    async with hasty.running():
        await hasty.until_ready(other)
    await hasty.assert_nothing_left()
    status = hasty.status(poison)
    assert (status.state, len(starts(hasty.store, poison))) == ("failed", ATTEMPTS)
    assert status.problem is not None
    assert status.problem["kind"] == "died"
    assert "at last because its worker was lost" in status.problem["detail"]
    assert status.finished is not None


async def test_claimed_on_this_machine(fleet: Fleet) -> None:
    """A job that `vouchsafe adapt` runs in the same folder is passed over, and taken up later."""
    held, other = await fleet.post(), await fleet.post(seed=1)
    elsewhere = Run(fleet.store.jobs / held.id, fleet.store.tasks, ("sleep", "600"), FAST)
    elsewhere.step()
    assert elsewhere.is_mine
    async with fleet.running():
        await fleet.until_ready(other)
        assert starts(fleet.store, held) == []
        elsewhere.stop()
        await fleet.until_ready(held)


# Redis goes away


async def test_redis_killed_and_started(
    own_server: RedisServer, own_fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """While Redis is down a runner ends its job's process before the lock expires, and logs it
    once; when Redis is back the job goes on and is published once."""
    fleet = own_fleet
    task = await fleet.post("wait")
    async with fleet.running():
        process = await fleet.until_working(task)
        own_server.kill()
        await until(lambda: not works(process))
        await until(lambda: "the engine is out of reach" in caplog.text)
        await asyncio.to_thread(own_server.start)
        await fleet.until_working(task, times=2)
        fleet.let_go_on(task)
        await fleet.until_ready(task)
        await fleet.assert_nothing_left()
    fleet.assert_made_once(task)
    assert caplog.text.count("the engine is out of reach") == 1
    assert "cannot be run" not in caplog.text


async def test_short_outage(own_server: RedisServer, tmp_path: Path) -> None:
    """A job goes on through an outage that is shorter than its lock."""
    fleet = Fleet(own_server.url, tmp_path / "data", seconds=120)
    task = await fleet.post("wait")
    async with fleet.running():
        await fleet.until_working(task)
        own_server.kill()
        await asyncio.to_thread(own_server.start)
        fleet.let_go_on(task)
        await fleet.until_ready(task)
        await fleet.assert_nothing_left()
    assert len(starts(fleet.store, task)) == 1
    await fleet.close()


async def test_flushed(hasty: Fleet) -> None:
    """A Redis that forgets every lock in the middle of a job: its runner ends the process, and the
    job goes on from there, once."""
    task = await hasty.post("wait")
    async with hasty.running(), hasty.running():
        process = await hasty.until_working(task)
        await hasty.expire(task)
        await until(lambda: not works(process))
        await hasty.until_working(task, times=2)
        hasty.let_go_on(task)
        await hasty.until_ready(task)
        await hasty.assert_nothing_left()
    hasty.assert_made_once(task)


async def test_posted_while_redis_is_away(own_server: RedisServer, own_fleet: Fleet) -> None:
    """POST succeeds without Redis; the job is made once Redis is back."""
    own_server.kill()
    async with own_fleet.running():
        task = await own_fleet.post()
        assert task.status.state == "queued"
        await asyncio.to_thread(own_server.start)
        await own_fleet.until_ready(task)
    await own_fleet.assert_nothing_left()
    assert len(starts(own_fleet.store, task)) == 1


# Removal


async def test_removed_while_it_runs_elsewhere(fleet: Fleet) -> None:
    """DELETE of a job that another machine runs ends its process, and nothing of it is left."""
    task = await fleet.post("wait")
    fleet.launch()
    process = await fleet.until_working(task)
    await fleet.service.delete(task.id, None)
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
    async with fleet.running():
        await fleet.until_working(task)
        fleet.store.delete(task.id)
        publish(Path(task.id), fleet.store.tasks, make_plan("wait"))
        await until(lambda: fleet.store.find(task.id) is None)
        await fleet.assert_nothing_left()
    assert [path.name for path in fleet.store.tasks.iterdir()] == [".lock"]
    assert counted("vouchsafe_adaptations_total", outcome="cancelled") == before + 1


async def test_failed_job_posted_again(fleet: Fleet) -> None:
    """A job that failed is run again as soon as it is posted again, and only then."""
    task = await fleet.post("fail")
    async with fleet.running():
        await until(lambda: fleet.status(task).state == "failed")
        await fleet.assert_nothing_left()
        assert len(starts(fleet.store, task)) == 1
        await fleet.post("fail")
        await until(lambda: len(starts(fleet.store, task)) == 2)
        await until(lambda: fleet.status(task).state == "failed")
        await fleet.assert_nothing_left()


# Folders that are not the fleet's


async def test_machine_that_does_not_share(fleet: Fleet, tmp_path: Path) -> None:
    """A worker with a data directory of its own takes no job and writes nothing; once the fleet's
    directory is mounted there it takes part."""
    task, other = create(fleet.store), tmp_path / "other"
    async with fleet.running(data_dir=other):
        await asyncio.sleep(10 * FAST.poll)
        assert starts(fleet.store, task) == []
        assert not other.exists()
        other.symlink_to(fleet.data_dir)
        await fleet.until_ready(task)
    await fleet.assert_nothing_left()


async def test_volume_that_goes_away_under_a_job(fleet: Fleet) -> None:
    """A runner whose volume vanishes ends its process and hands the job back, and leaves nothing in
    the empty place; with the volume back, the job goes on."""
    before = counted("vouchsafe_adaptations_total", outcome="cancelled")
    task = await fleet.post("wait")
    away = fleet.data_dir.with_name("away")
    async with fleet.running():
        process = await fleet.until_working(task)
        fleet.data_dir.rename(away)
        await until(lambda: not works(process))
        await fleet.assert_nothing_left()
        assert not fleet.data_dir.exists()
        away.rename(fleet.data_dir)
        await fleet.until_working(task, times=2)
        fleet.let_go_on(task)
        await fleet.until_ready(task)
    fleet.assert_made_once(task)
    assert counted("vouchsafe_adaptations_total", outcome="cancelled") == before
