"""`vouchsafe serve` over Redis: no torch, no worker, and any number of them are one service."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from operator import itemgetter
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from redis.asyncio import Redis
from redis.exceptions import RedisError

from benchmarks.redis_server import RedisServer
from benchmarks.server import serving as serving_process
from models.bundle import DEFAULT_TASK, read_bundle
from service.config import Settings
from service.engine.options import EngineOptions
from service.engine.protocol import Worker
from service.engine.redis.client import connect
from service.engine.redis.engine import PREFIX, RedisEngine
from service.jobs import JobStatus
from service.predictions.verification import Verifier
from service.processes import api
from service.processes.api import create_api
from tests.support.http import TRACE, VALID
from tests.support.serving import NUMERICS, PNG, problem

pytestmark = [  # A connection that is cut while the client makes it is left to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
LABELS = read_bundle(DEFAULT_TASK).labels
SERVED = read_bundle(DEFAULT_TASK).served_digest(NUMERICS)
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from service.cli.main import main; main()"


def settings(server: RedisServer, tmp_path: Path) -> Settings:
    return Settings(redis_url=server.url, data_dir=tmp_path / "data", shard_rows=50)


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://service")
    async with app.router.lifespan_context(app), client:
        yield client


class Voter:
    """A worker elsewhere without a model: nine rows of ten are for the fourth label."""

    def __init__(self, server: RedisServer) -> None:
        self.engine = RedisEngine(
            connect(server.url), EngineOptions(shard_rows=50), poll_seconds=0.1
        )
        self.open = asyncio.Event()
        self.committed = 0
        self.stops_at: int | None = None  # The number of commits at which `open` is cleared.

    def start(self) -> None:
        self._running = asyncio.create_task(self._run())

    def stop(self) -> None:
        self._running.cancel()

    async def close(self) -> None:
        self.stop()
        await asyncio.gather(self._running, return_exceptions=True)
        await self.engine.close()

    async def waits(self, rows: int) -> bool:
        return (await self.engine.capacity()).backlog_rows == rows

    async def _run(self) -> None:
        while True:
            with suppress(RedisError):
                await self._work()

    async def _work(self) -> None:
        while True:
            leases = await self.engine.pull(
                Worker("elsewhere", {"default": SERVED}, [NUMERICS]), 50
            )
            await self.engine.start(leases)
            if leases:
                await self.open.wait()
            for lease in leases:
                rows, votes = lease.shard.rows, [0] * len(LABELS)
                votes[3], votes[0] = rows - rows // 10, rows // 10
                self.committed += await self.engine.commit(lease, votes)
                if self.committed == self.stops_at:
                    self.open.clear()


@pytest.fixture
def process(own_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The command that serves over the test's own Redis, in a process that has no torch."""
    monkeypatch.setenv("VOUCHSAFE_REDIS_URL", own_server.url)
    monkeypatch.setenv("VOUCHSAFE_SHARD_ROWS", "50")
    return (sys.executable, "-c", WITHOUT_TORCH, "serve")


@pytest.fixture
async def voter(own_server: RedisServer) -> AsyncIterator[Voter]:
    voter = Voter(own_server)
    voter.start()
    yield voter
    await voter.close()


async def ask(client: httpx.AsyncClient, prefer: str = "wait=60", **fields: str) -> httpx.Response:
    image = {"image": ("i.png", PNG)}
    return await client.post(
        "/predict", files=image, data=fields, headers={"Prefer": prefer}, timeout=90
    )


async def answers(client: httpx.AsyncClient) -> bool:
    return (await ask(client)).status_code == 200


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await holds():  # noqa: ASYNC110 - what is waited for is in other processes.
            await asyncio.sleep(0.01)


async def until_served(client: httpx.AsyncClient) -> None:
    async def ready() -> bool:
        return bool((await client.get("/models")).json()["models"][0]["ready"])

    await until(ready)


async def test_a_process_without_torch_answers(
    voter: Voter, tmp_path: Path, process: tuple[str, ...]
) -> None:
    """Where torch cannot be imported, `vouchsafe serve` starts and passes on what workers say."""
    voter.open.set()
    with serving_process(tmp_path / "data", process) as (url, server):
        async with httpx.AsyncClient(base_url=url) as client:
            await until_served(client)
            told = (await ask(client)).json()
            assert (told["label"], told["certified"], told["n"]) == (LABELS[3], True, 1000)
            assert told["counts"][0]["count"] == 900
        server.terminate()
        assert await asyncio.to_thread(server.wait, 30) == 0


async def test_its_log_can_be_json_throughout(
    voter: Voter, tmp_path: Path, process: tuple[str, ...]
) -> None:
    """From its start to its stop every line is an object, and a job is found by its trace."""
    voter.open.set()
    written, json_log = tmp_path / "serve.log", {"log_format": "json"}
    with written.open("wb") as log:
        data = tmp_path / "data"
        with serving_process(data, process, log=log, settings=json_log) as (url, server):
            async with httpx.AsyncClient(base_url=url, headers={"traceparent": VALID}) as client:
                await until_served(client)
                told = (await ask(client)).json()
            server.terminate()
            assert await asyncio.to_thread(server.wait, 30) == 0
    records = [json.loads(line) for line in written.read_text().splitlines()]
    assert {record["logger"] for record in records} == {"vouchsafe.access", "vouchsafe"}
    (ready,) = [record for record in records if "address" in record]
    assert (ready["address"], ready["tasks"], ready["data_dir"]) == (url, ["default"], str(data))
    assert {"time", "level", "message"} <= set.intersection(*map(set, records))
    (asked,) = [record for record in records if record.get("job_id") == told["id"]]
    assert (asked["route"], asked["trace_id"]) == ("/predict", TRACE)


async def test_another_process_knows_the_job(
    own_server: RedisServer, voter: Voter, tmp_path: Path
) -> None:
    """An API that is gone in the middle of a job leaves it to the next one, which answers."""
    first, second = (create_api(settings(own_server, tmp_path)) for _ in range(2))
    async with running(first) as client:
        await until_served(client)
        accepted = await ask(client, "respond-async")
        assert accepted.status_code == 202
    async with running(second) as client:
        job = (await client.get(accepted.headers["Location"])).json()
        assert job["state"] in ("queued", "running")
        voter.open.set()
        again = (await ask(client)).json()
        job = (await client.get(accepted.headers["Location"])).json()
        assert job["result"]["label"] == LABELS[3]
    assert again["counts"] == job["result"]["counts"]


async def test_a_killed_process_leaves_its_rounds_to_the_next(
    voter: Voter, tmp_path: Path, process: tuple[str, ...]
) -> None:
    """After a kill -9 between two rounds the next process looks on; the counts are the same."""
    voter.stops_at = 3  # Selection rows and two looks.
    voter.open.set()
    data = tmp_path / "data"
    with serving_process(data, process) as (url, server):
        async with httpx.AsyncClient(base_url=url) as client:
            await until_served(client)
            accepted = await ask(client, "respond-async", target_radius="0.3")
            job_id = accepted.json()["id"]
            await until(lambda: has(voter, job_id, lambda status: len(status.looks) == 2))
            server.kill()
            server.wait()
    voter.open.set()
    await until(lambda: has(voter, job_id, lambda status: status.due))
    with serving_process(data, process) as (url, _):
        async with httpx.AsyncClient(base_url=url) as client:
            await until(lambda: has(voter, job_id, lambda status: status.state.ended))
            answer = (await client.get(f"/jobs/{job_id}")).json()["result"]
            again = (await ask(client, target_radius="0.3")).json()
    assert answer["target_reached"] is True
    assert answer["rows_used"] < 10_016
    assert (answer["counts"], answer["radius"]) == (again["counts"], again["radius"])


async def has(voter: Voter, job_id: str, holds: Callable[[JobStatus], bool]) -> bool:
    status = await voter.engine.status(job_id)
    return status is not None and holds(status)


async def test_a_killed_process_leaves_its_batches_to_another(
    own_server: RedisServer, voter: Voter, tmp_path: Path, process: tuple[str, ...]
) -> None:
    """After a kill -9 another process of the fleet ends the batch; no row is computed twice."""
    data, lock = tmp_path / "data", f"{PREFIX}batch:*"
    images = [("images", (f"{index}.png", image)) for index, image in enumerate((PNG, b"", PNG))]

    async def has_lines(client: httpx.AsyncClient, path: str, done: int) -> bool:
        return bool((await client.get(path)).json()["done"] == done)

    with serving_process(data, process) as (url, first):
        async with httpx.AsyncClient(base_url=url) as client:
            await until_served(client)
            path = (await client.post("/batches", files=images)).headers["Location"]
            await until(lambda: voter.waits(2200))
        with serving_process(data, process) as (url, _):
            async with httpx.AsyncClient(base_url=url) as client, connect(own_server.url) as redis:
                voter.stops_at = 22  # The first job's shards.
                voter.open.set()
                await until(lambda: has_lines(client, path, 2))
                (held,) = await redis.keys(lock)
                token = await redis.get(held)
                first.kill()
                first.wait()
                assert await redis.get(held) == token  # The second process left it to the first.
                voter.open.set()
                answered = await client.get(f"{path}/results", timeout=90)
                lines = sorted(map(json.loads, answered.iter_lines()), key=itemgetter("index"))
                assert (await client.get(path)).json()["state"] == "succeeded"
                manifest = (await client.get(f"{path}/manifest")).json()
    assert [(line["index"], line["state"]) for line in lines] == [
        (0, "succeeded"), (1, "failed"), (2, "succeeded"),
    ]  # fmt: skip
    assert len(manifest["document"]["certificates"]) == 2
    assert voter.committed == 44


async def test_a_certificate_is_the_same_in_every_process(
    own_server: RedisServer, voter: Voter, tmp_path: Path
) -> None:
    """A certificate of one process is at its address in another, byte by byte, and verifies."""
    voter.open.set()
    first, second = (create_api(settings(own_server, tmp_path)) for _ in range(2))
    async with running(first) as client, running(second) as other:
        await until_served(client)
        answered = (await ask(client)).json()
        path = f"/certificates/{answered['certificate']['document']['id']}"
        texts = [(await each.get(path)).text for each in (client, other)]
        assert texts[0] == texts[1]
        assert json.loads(texts[0]) == answered["certificate"]
        jwks = (await other.get("/.well-known/jwks.json")).json()
        checks = Verifier(texts[1].encode(), jwks, PNG, read_bundle(DEFAULT_TASK)).checks()[1]
        assert all(check.passed for check in checks), checks
        await other.delete(f"/jobs/{answered['id']}")
        problem(await client.get(path), 404, "not-found")


async def test_redis_out_of_reach_is_a_problem(
    own_server: RedisServer, voter: Voter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every route says 503 with Retry-After, readiness goes, and both come back with Redis."""
    voter.open.set()
    async with running(create_api(settings(own_server, tmp_path))) as client:
        await until_served(client)
        own_server.kill()
        refused, models, probed = await asyncio.gather(
            ask(client), client.get("/models"), client.get("/readyz")
        )
        for response in (refused, models):
            problem(response, 503, "engine-unavailable")
            assert int(response.headers["Retry-After"]) >= 1
        assert (probed.status_code, probed.json()["detail"]) == (503, "the engine does not answer")
        assert "Redis does not answer" in caplog.text
        assert "Traceback" not in caplog.text
        assert (await client.get("/livez")).status_code == 200
        own_server.start()
        await until(lambda: answers(client))
        assert (await client.get("/readyz")).status_code == 200


async def test_redis_that_hangs_is_a_problem_soon(
    own_server: RedisServer, voter: Voter, tmp_path: Path
) -> None:
    """A Redis that takes calls and answers none holds callers for some seconds, not for minutes."""
    voter.open.set()
    async with running(create_api(settings(own_server, tmp_path))) as client:
        await until_served(client)
        own_server.send(signal.SIGSTOP)
        async with asyncio.timeout(40):
            refused = await ask(client)
        own_server.send(signal.SIGCONT)
        problem(refused, 503, "engine-unavailable")
        await until(lambda: answers(client))


async def test_api_with_another_directory(own_server: RedisServer, tmp_path: Path) -> None:
    """An API process whose data directory is not the fleet's must end; those that share the
    directory are one fleet."""
    told: list[str] = []
    other = Settings(redis_url=own_server.url, data_dir=tmp_path / "other")
    async with Redis.from_url(own_server.url) as redis:

        async def is_held() -> bool:
            return bool(await redis.exists(api.VOLUME))

        async def is_told() -> bool:
            return bool(told)

        async with running(create_api(settings(own_server, tmp_path), told.append)):
            await until(is_held)
            held = await redis.get(api.VOLUME)
        async with running(create_api(other, told.append)):
            await until(is_told)
        await redis.expire(api.VOLUME, 60)
        async with running(create_api(settings(own_server, tmp_path), told.append)):
            async with asyncio.timeout(60):
                while await redis.ttl(api.VOLUME) <= 60:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        assert await redis.get(api.VOLUME) == held
    assert len(told) == 1
    assert str(tmp_path / "other") in told[0]
    assert "noise secret" in told[0]


async def test_directory_that_was_given_up_is_forgotten(own_server: RedisServer) -> None:
    """The data directory's place in Redis passes with the last API process that shares it."""
    async with Redis.from_url(own_server.url) as redis:
        assert await api.is_shared(redis, "one")
        assert 0 < await redis.ttl(api.VOLUME) <= api.VOLUME_SECONDS
        await redis.expire(api.VOLUME, 60)
        assert not await api.is_shared(redis, "another")
        assert 0 < await redis.ttl(api.VOLUME) <= 60
        await redis.delete(api.VOLUME)
        assert await api.is_shared(redis, "another")
        assert not await api.is_shared(redis, "one")


async def test_api_process_with_another_directory_ends(
    own_server: RedisServer, tmp_path: Path, process: tuple[str, ...]
) -> None:
    """`vouchsafe serve` ends with 2 and says why where the fleet has another data directory."""
    async with Redis.from_url(own_server.url) as redis:
        assert await api.is_shared(redis, "another")
    ended = await asyncio.to_thread(
        subprocess.run,
        [*process, "--port", "0"],
        env=os.environ | {"VOUCHSAFE_DATA_DIR": str(tmp_path / "own")},
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
    )
    said = ended.stderr.decode().splitlines()
    assert ended.returncode == 2, said
    assert said[-1].startswith("vouchsafe: other API processes of this Redis have another data dir")


async def test_answers_are_told_again_without_a_worker(
    own_server: RedisServer, voter: Voter, tmp_path: Path
) -> None:
    """A retry finds its answer though every worker is gone; a new question is refused."""
    voter.open.set()
    retry = {"Idempotency-Key": "once"}
    async with running(create_api(settings(own_server, tmp_path))) as client:
        await until_served(client)
        image = {"image": ("i.png", PNG)}
        first = await client.post("/predict", files=image, headers=retry)
        async with Redis.from_url(own_server.url) as redis:
            voter.stop()
            await redis.delete(f"{PREFIX}workers", f"{PREFIX}announced")
        assert (await client.post("/predict", files=image, headers=retry)).json() == first.json()
        for headers in ({}, {"Idempotency-Key": "new"}):
            refused = await client.post("/predict", files=image, headers=headers)
            problem(refused, 503, "backlog")


async def test_who_hangs_up_takes_no_more_rows(
    voter: Voter, tmp_path: Path, process: tuple[str, ...]
) -> None:
    """A caller who leaves frees his rows at once, and nothing that is computed of them counts."""
    with serving_process(tmp_path / "data", process) as (url, _):
        async with httpx.AsyncClient(base_url=url) as client:
            await until_served(client)
            asking = asyncio.create_task(ask(client))
            await until(lambda: voter.waits(1100))
            asking.cancel()
            await until(lambda: voter.waits(0))
            voter.open.set()
            assert (await ask(client)).status_code == 200
    assert voter.committed == 22  # The second question's, and nothing of the first.
