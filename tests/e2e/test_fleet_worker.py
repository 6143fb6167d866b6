"""`vouchsafe worker`: real processes, real weights, a real Redis."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from redis.asyncio import Redis

from benchmarks.fleet import (
    LONG,
    ROOT,
    SERVED,
    RunningWorker,
    default_model,
    engine_at,
    question,
    worker_process,
)
from benchmarks.redis_server import GROUP, RedisServer
from models.bundle import read_bundle
from models.runtime import Torch
from models.smoothing import SmoothedModel, numerics
from service.config import Settings
from service.engine.protocol import Worker
from service.engine.redis.client import connect
from service.engine.redis.engine import PREFIX, RedisEngine
from service.jobs import State
from service.processes.embedded import Embedded
from service.processes.runtime import WorkerRuntime
from tests.support.fleet import assert_counted_exactly, last_status, rows_done
from tests.support.http import TRACE, VALID
from tests.support.task_bundles import put

pytestmark = [  # A connection that is cut while the client makes it is left to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def server(redis_program: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis of this module's own: workers cannot keep to a prefix."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


class Workers:
    """A worker with leases that do not run out: a new one where a test has ended the last."""

    def __init__(self, folder: Path, url: str, stack: ExitStack) -> None:
        self._folder, self._url, self._stack = folder, url, stack
        self._last: RunningWorker | None = None

    def one(self) -> RunningWorker:
        """A worker that is ready."""
        if self._last is None or self._last.process.poll() is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            options = {"lease_seconds": LONG, "log_format": "json", "log_level": "debug"}
            starting = worker_process(self._folder, self._url, **options)  # type: ignore[arg-type]
            self._last = self._stack.enter_context(starting)
        self._last.until(self._last.ready)
        return self._last


@pytest.fixture(scope="module")
def workers(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """What starts the module's worker, for starting takes most of these tests' time."""
    with ExitStack() as stack:
        yield Workers(tmp_path_factory.mktemp("worker") / "worker", server.url, stack)


@pytest.fixture
def worker(workers: Workers) -> RunningWorker:
    """A worker that is ready and idle."""
    return workers.one()


@pytest.fixture
async def engine(server: RedisServer) -> AsyncIterator[RedisEngine]:
    built = engine_at(server.url)
    yield built
    await built.close()


@pytest.fixture
async def own_engine(own_server: RedisServer) -> AsyncIterator[RedisEngine]:
    """An engine there."""
    built = engine_at(own_server.url)
    yield built
    await built.close()


@pytest.fixture(scope="module")
def model() -> SmoothedModel:
    return default_model()


# Good times


async def test_answers_are_the_embedded_engines(
    worker: RunningWorker, engine: RedisEngine, tmp_path: Path
) -> None:
    """The same job, under the same key, has the same votes from a fleet as from one process."""
    embedded, stop = Embedded(Settings(data_dir=tmp_path)), asyncio.Event()
    working = asyncio.create_task(embedded.worker(on_failure=stop.set)(stop))
    await embedded.ready()
    for index in range(3):
        job = question(f"same-{index}", index=index)
        await engine.submit(job)
        await embedded.engine.submit(job)
        far, here = await last_status(engine, job.id), await last_status(embedded.engine, job.id)
        assert far.state is State.SUCCEEDED
        assert (far.selection, far.estimation) == (here.selection, here.estimation)
    stop.set()
    await working


async def test_rows_are_counted_in_its_metrics(worker: RunningWorker, engine: RedisEngine) -> None:
    """/metrics counts the rows that this process computed, and tells how the queue stands."""
    series = 'vouchsafe_rows_total{task="default"}'
    before = worker.metric(series)
    await engine.submit(question("measured", n=50, n0=10))
    assert (await last_status(engine, "measured")).state is State.SUCCEEDED
    assert worker.metric(series) == before + 60
    for lane in ("hi", "lo"):
        assert worker.metric(f'vouchsafe_queue_rows{{priority="{lane}"}}') == 0
        assert worker.metric(f'vouchsafe_queue_oldest_seconds{{priority="{lane}"}}') == 0
    assert worker.metric("vouchsafe_queue_rows_per_second") > 0
    assert worker.metric("vouchsafe_workers") >= 1
    for name in ("vouchsafe_engine_up", "vouchsafe_redis_persistence_up"):
        assert worker.metric(name) == 1


async def test_its_log_names_jobs_and_traces(worker: RunningWorker, engine: RedisEngine) -> None:
    """Every line is a JSON object, and batches are found by the trace of the request."""
    await engine.submit(replace(question("traced"), traceparent=VALID))
    assert (await last_status(engine, "traced")).state is State.SUCCEEDED
    records = [json.loads(line) for line in worker.said().splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, records))
    batches = [record for record in records if record.get("trace_id") == TRACE]
    assert {record["job_id"] for record in batches} == {"traced"}
    assert {record["level"] for record in batches} == {"DEBUG"}


def test_probes_tell_how_it_is(worker: RunningWorker) -> None:
    """The process lives, has started, and is ready; what is no probe is a problem document."""
    for path in ("/livez", "/startupz", "/readyz"):
        assert worker.probe(path) == {"status": "ok", "detail": ""}
    assert worker.probe("/predict")["type"] == "urn:vouchsafe:problem:not-found"


async def test_tasks_come_and_go_while_it_runs(
    worker: RunningWorker, engine: RedisEngine, model: SmoothedModel
) -> None:
    """A task that is published is served without a restart, and one that is removed is dropped."""
    tasks = worker.log.parent / "data" / "tasks"
    folder = put(tasks, "pets")
    bundle = read_bundle(folder).served_digest(numerics(Torch())[0].described())
    await _until_served(engine, "pets", bundle)
    await engine.submit(question("a-pet", task="pets", bundle=bundle))
    assert_counted_exactly(await last_status(engine, "a-pet"), model)
    series = 'vouchsafe_rows_total{task="pets"}'
    assert worker.metric(series) == 80

    await engine.submit(question("big", n=30_000))
    await _until_rows(engine, "big")
    await engine.submit(question("small", n=40, task="pets", bundle=bundle))
    assert_counted_exactly(await last_status(engine, "small"), model)
    status = await engine.status("big")
    assert status is not None
    assert status.state is State.RUNNING
    await engine.cancel("big")

    shutil.rmtree(folder)
    await _until_served(engine, "pets", None)
    await asyncio.to_thread(worker.until, lambda: worker.metric(series) == 0)


async def test_work_under_other_numerics_is_left_to_others(
    worker: RunningWorker, engine: RedisEngine
) -> None:
    """A job keyed for another digest waits for a worker that announces it, however idle others."""
    other = Worker("another-machine", {"default": "e" * 64})
    assert await engine.pull(other, 1) == []
    await engine.submit(question("theirs", bundle=other.bundles["default"]))
    await engine.submit(question("ours"))
    assert (await last_status(engine, "ours")).state is State.SUCCEEDED
    assert await rows_done(engine, "theirs") == 0
    leases = await engine.pull(other, 1_000)
    assert {lease.job.id for lease in leases} == {"theirs"}
    assert sum(lease.shard.rows for lease in leases) == 80
    await engine.cancel("theirs")


def test_it_has_no_secret(worker: RunningWorker) -> None:
    """Whatever it computed, the worker made no noise secret and wrote nothing."""
    data = worker.log.parent / "data"
    assert [path for path in data.rglob("*") if path.is_file()] == []


# The ends of workers


async def test_work_outlives_its_workers(
    server: RedisServer,
    worker: RunningWorker,
    engine: RedisEngine,
    tmp_path: Path,
    model: SmoothedModel,
) -> None:
    """What a killed worker held is computed by another, once its leases run out."""
    redis = connect(server.url)
    with worker_process(tmp_path, server.url, lease_seconds=LONG) as doomed:
        await asyncio.to_thread(doomed.until, doomed.ready)
        job = question("long", n=640)
        await engine.submit(job)
        its_own = f"-{doomed.process.pid}-"
        while True:
            doomed.process.send_signal(signal.SIGSTOP)
            held = [one for one in await _held(redis) if its_own in one.worker]
            if held:
                break
            doomed.process.send_signal(signal.SIGCONT)
            assert await rows_done(engine, "long") < job.rows
            await asyncio.sleep(0.02)
        doomed.process.kill()
        for one in held:
            name, entry, idle = one.worker, one.entry, round(LONG * 1000) + 1
            await redis.xclaim(one.stream, GROUP, name, 0, [entry], idle=idle, justid=True)
        assert_counted_exactly(await last_status(engine, "long"), model)
    await redis.aclose()


async def test_told_to_stop_it_hands_back(worker: RunningWorker, engine: RedisEngine) -> None:
    """SIGTERM in the middle of a job: exit 0, and all that is not counted is there to be taken."""
    await engine.submit(question("longer", n=50_000))
    await _until_rows(engine, "longer")
    worker.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(worker.ends) == 0
    done = await rows_done(engine, "longer")
    assert 0 < done < 50_020
    leases = await engine.pull(Worker("next", {"default": SERVED}), 100_000)
    assert sum(lease.shard.rows for lease in leases) == 50_020 - done  # No lease has run out here.
    await engine.cancel("longer")


async def test_outages_are_waited_out(
    own_server: RedisServer, tmp_path: Path, model: SmoothedModel
) -> None:
    """Without Redis, at the start or later, it waits and says so once; told to stop it exits 0."""
    own_server.kill()
    with worker_process(tmp_path / "worker", own_server.url) as worker:
        lost, back = "the engine is out of reach", "the engine answers again"
        waits = lambda: worker.probe("/readyz").get("detail") == "the engine does not answer"  # noqa: E731
        await asyncio.to_thread(worker.until, waits)
        assert worker.probe("/livez")["status"] == "ok"
        for outage in (1, 2):
            own_server.start()
            await asyncio.to_thread(worker.until, worker.ready)
            engine = engine_at(own_server.url)
            await engine.submit(question(f"after-{outage}"))
            assert_counted_exactly(await last_status(engine, f"after-{outage}"), model)
            await engine.close()
            assert (worker.said().count(lost), worker.said().count(back)) == (
                outage,
                outage,
            )
            own_server.kill()
            told = lambda: worker.said().count(lost) > outage  # noqa: B023, E731
            await asyncio.to_thread(worker.until, told)
            assert waits()
        worker.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.ends) == 0
        assert worker.said().count(lost) == 3
        assert "Traceback" not in worker.said()


async def test_hung_device_ends_the_process(
    own_server: RedisServer,
    own_engine: RedisEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch past its limit: exit 1, with nothing renewed, and what was only held handed back."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # One lane: a batch is one shard, on any machine.
    stall, engine = tmp_path / "stall", own_engine
    command = (sys.executable, "-m", "benchmarks.stalling_worker")
    with worker_process(
        tmp_path / "worker", own_server.url, command, lease_seconds=3, stall=stall
    ) as worker:
        await asyncio.to_thread(worker.until, worker.ready)
        stall.touch()
        await engine.submit(question("hung", n0=0, n=640))
        assert await asyncio.to_thread(worker.ends) == 1
        assert "vouchsafe: a device batch has run past its limit" in worker.said()
    leases = await engine.pull(Worker("next", {"default": SERVED}), 640)
    assert [lease.shard.index for lease in leases] == list(range(1, 10))


def test_stopped_while_it_starts_it_exits_0(server: RedisServer, tmp_path: Path) -> None:
    """SIGTERM before the networks are loaded ends the process with 0."""
    with worker_process(tmp_path, server.url) as worker:
        worker.until(lambda: worker.probe("/livez"))
        worker.process.send_signal(signal.SIGTERM)
        assert worker.ends() == 0


# What is refused


FORKED = """
import json, os, sys
import service.processes.worker
from service.cli.main import main
urls, folder = json.loads(sys.argv[1]), sys.argv[2]
sys.argv[1:] = ["worker"]
children = {}
for name, url in urls.items():
    if not (child := os.fork()):
        log = os.open(f"{folder}/{name}.log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        if url:
            os.environ["VOUCHSAFE_REDIS_URL"] = url
        os.environ["VOUCHSAFE_DATA_DIR"] = f"{folder}/{name}"
        main()
    children[child] = name
ended = (os.wait() for _ in urls)
print(json.dumps({children[child]: os.waitstatus_to_exitcode(status) for child, status in ended}))
"""
"""Workers that share the time that it takes to load their code."""


def test_what_it_cannot_work_with_is_told(server: RedisServer, tmp_path: Path) -> None:
    """No URL, a wrong password and damaged networks: a status that is not 0, and why in a line."""
    copy = tmp_path / "copy"
    for package in ("models", "service"):
        shutil.copytree(ROOT / package, copy / package)
    weights = next((copy / "models" / "nano" / "weights" / "stage2").rglob("*.safetensors"))
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    wrong = server.url_for(":s3cret")
    urls = {"no-url": None, "password": wrong, "damaged": server.url}
    ended = subprocess.run(  # noqa: S603
        [sys.executable, "-c", FORKED, json.dumps(urls), str(tmp_path)],
        cwd=copy,
        env={n: v for n, v in os.environ.items() if not n.startswith("VOUCHSAFE_")},
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    assert json.loads(ended.stdout) == {"no-url": 2, "password": 2, "damaged": 1}
    reasons = {
        "no-url": "VOUCHSAFE_REDIS_URL is not set",
        "password": "the Redis of VOUCHSAFE_REDIS_URL refuses:",
        "damaged": "does not have the hash",
    }
    for name, reason in reasons.items():
        said = (tmp_path / f"{name}.log").read_text()
        told = [line for line in said.splitlines() if not line.startswith("INFO")]
        assert len(told) == 1, said
        assert told[0].startswith("vouchsafe: ")
        assert reason in told[0]
        assert "s3cret" not in said


def test_ill_device_is_not_ready(tmp_path: Path) -> None:
    """Readiness names a device that is broken, and networks that are not loaded."""
    serving = WorkerRuntime(Settings(data_dir=tmp_path))
    assert serving.waiting_for() == "the default task's networks are not loaded yet"
    serving.thread.declare_broken()
    assert serving.waiting_for() == "the device hangs or is broken"
    serving.thread.close()


async def _until_served(engine: RedisEngine, task: str, digest: str | None) -> None:
    async with asyncio.timeout(120):
        while (await engine.capacity()).digests.get(task, (None,))[0] != digest:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def _until_rows(engine: RedisEngine, job_id: str) -> None:
    async with asyncio.timeout(120):
        while not await rows_done(engine, job_id):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def _held(redis: Redis) -> list[_Held]:
    """Every lease there is."""
    return [
        _Held(stream, one["message_id"], one["consumer"].decode())
        async for stream in redis.scan_iter(match=f"{PREFIX}lane:*")
        for one in await redis.xpending_range(stream, GROUP, "-", "+", 10_000)
    ]


class _Held(NamedTuple):
    stream: bytes
    entry: bytes
    worker: str
