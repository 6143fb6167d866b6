"""Worker process of a fleet: computes the shards of jobs that API processes queue in Redis."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
from contextlib import nullcontext
from functools import partial

from pydantic import SecretStr

from service.api.problems import PROBLEM_HANDLERS
from service.background import BackgroundTask, BackgroundTasks
from service.config import Settings
from service.engine.connection import EngineConnection, EngineUnreachable
from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine
from service.engine.redis.requirements import RedisUnsuitable, check_server
from service.operations import metrics
from service.operations.health import Health
from service.operations.probes import probes_app
from service.operations.server import SideServer
from service.processes.runtime import WorkerRuntime
from service.tasks.lock import RedisLocks
from service.tasks.repository import TaskRepository
from service.tasks.supervisor import Supervisor

logger = logging.getLogger("vouchsafe")

GRACE_SECONDS = 20.0
"""Seconds that the current batch and background tasks may take after a signal to stop."""
_CLOSING_SECONDS = 2.0


class WorkerProcess:
    """A worker that runs until a signal or a failed device; needs no secret of the service.

    With `run_adaptation_jobs` set, the process also runs the fleet's adaptation jobs.

    Raises RedisUnsuitable where VOUCHSAFE_REDIS_URL is missing or is no URL, and what
    `WorkerRuntime` raises.
    """

    def __init__(self, settings: Settings) -> None:
        self._engine, self._url = _engine(settings)
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.serving = WorkerRuntime(settings)
        self._stop = asyncio.Event()
        self._ready = asyncio.Event()
        self._error: Exception | None = None
        self._connection = EngineConnection()
        follow = partial(self.serving.tasks.follow, gone=self._delete_metrics)
        background: list[BackgroundTask] = [self._work, follow]
        self._locks = RedisLocks(connect(self._url.get_secret_value()), self._connection)
        if settings.run_adaptation_jobs:
            supervisor = Supervisor(TaskRepository(settings), locks=self._locks)
            logger.info("adaptation jobs are taken from %s", settings.data_dir.resolve())
            background.append(self._once_ready(supervisor.run))
        self._background = BackgroundTasks(background, GRACE_SECONDS)
        self.health = Health(
            self._engine,
            self.serving.tasks,
            self._background,
            self._waiting_for,
            self._connection.state,
        )

    async def run(self, host: str, port: int | None) -> None:
        """Work until SIGTERM or SIGINT; expose probes and metrics on `host` and `port` meanwhile.

        Raises RedisUnsuitable; ModelUnavailable where the default task cannot be loaded;
        DeviceFailed; OSError where the process cannot listen on the address.
        """
        for caught in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(caught, self.stop)
        app = probes_app(self.health, PROBLEM_HANDLERS)
        side_server = SideServer(app, host, port) if port is not None else None
        if side_server:
            logger.info("probes and metrics are on %s port %d", host, side_server.port)
        async with side_server.serving() if side_server else nullcontext():
            self._background.start()
            await self._stop.wait()
            logger.info("worker %s is stopping", self.id)
            await self._background.stop()
            await self._close()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Finish the current batch, release the other leases, and return from `run`."""
        self._stop.set()
        self._connection.leave()

    async def _work(self, stop: asyncio.Event) -> None:
        """The main background task; `run` raises its error."""
        try:
            with self.serving.in_use():
                is_reachable = await self._is_reachable()
                await self.serving.load_default(stop)
                failures = 0
                while not is_reachable and not stop.is_set():
                    await self._connection.pause(failures)
                    failures += 1
                    is_reachable = await self._is_reachable()
                if not stop.is_set():
                    logger.info("worker %s begins", self.id)
                    self._ready.set()
                await self.serving.work(self._engine, self.id, stop, self._connection.state)
        except Exception as error:
            self._error = error
        finally:
            self.stop()

    def _once_ready(self, task: BackgroundTask) -> BackgroundTask:
        """The task, delayed until Redis has passed its check and the networks are loaded."""

        async def run(stop: asyncio.Event) -> None:
            waiting = {asyncio.create_task(each.wait()) for each in (self._ready, stop)}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for wait in waiting:
                wait.cancel()
            await task(stop)

        return run

    async def _is_reachable(self) -> bool:
        """Whether Redis is reachable.

        Raises RedisUnsuitable where Redis is reachable and cannot serve the engine.
        """
        try:
            await self._connection.ask(check_server(self._url, self._engine))
        except EngineUnreachable:
            return False
        return True

    def _waiting_for(self) -> str:
        if self._connection.state.is_down:
            return "the engine does not answer"
        return self.serving.waiting_for()

    async def _delete_metrics(self, task: str) -> None:
        if task not in self.serving.tasks:
            metrics.delete(task)

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(_CLOSING_SECONDS):
                await self._locks.aclose()
                await self._engine.close()
        except Exception as error:
            logger.debug("the connections to Redis were not closed cleanly: %s", error)


def _engine(settings: Settings) -> tuple[RedisEngine, SecretStr]:
    """The engine and its URL.

    Raises RedisUnsuitable where VOUCHSAFE_REDIS_URL is missing or is no URL.
    """
    if settings.redis_url is None:
        raise RedisUnsuitable(
            "VOUCHSAFE_REDIS_URL is not set: a worker takes its work from Redis, for example "
            "redis://host:6379/0"
        )
    try:
        return RedisEngine.from_settings(settings), settings.redis_url
    except (ValueError, TypeError):  # Their messages may quote a part of the password.
        raise RedisUnsuitable(
            "VOUCHSAFE_REDIS_URL cannot be read: a port is a number, and / @ # ? in a password are "
            "percent-encoded"
        ) from None
