"""A worker process of a fleet: computes on this machine what any machine asks through Redis."""

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
"""How long the batch in hand, and background tasks, may take once the process is told to stop."""
_CLOSING_SECONDS = 2.0


class WorkerProcess:
    """Works until it is told to stop or its device fails; needs no secret of the service.

    Beside it, the fleet's adaptation jobs are run where the settings say so. Raises RedisUnsuitable
    where VOUCHSAFE_REDIS_URL is missing or is no URL, and what `WorkerRuntime` raises.
    """

    def __init__(self, settings: Settings) -> None:
        self._engine, self._url = _engine(settings)
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.serving = WorkerRuntime(settings)
        self._stop = asyncio.Event()
        self._begun = asyncio.Event()
        self._error: Exception | None = None
        self._connection = EngineConnection()
        follow = partial(self.serving.tasks.follow, gone=self._forget)
        background: list[BackgroundTask] = [self._work, follow]
        self._locks = RedisLocks(connect(self._url.get_secret_value()), self._connection)
        if settings.run_adaptation_jobs:
            supervisor = Supervisor(TaskRepository(settings), locks=self._locks)
            logger.info("adaptation jobs are taken from %s", settings.data_dir.resolve())
            background.append(self._once_begun(supervisor.run))
        self._background = BackgroundTasks(background, GRACE_SECONDS)
        self.health = Health(
            self._engine,
            self.serving.tasks,
            self._background,
            self._waiting_for,
            self._connection.state,
        )

    async def run(self, host: str, port: int | None) -> None:
        """Work until SIGTERM or SIGINT; a `port` answers probes and metrics for as long.

        Raises RedisUnsuitable, ModelUnavailable where the default task cannot be loaded,
        DeviceFailed, and OSError where the address cannot be listened on.
        """
        for caught in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(caught, self.stop)
        app = probes_app(self.health, PROBLEM_HANDLERS)
        beside = SideServer(app, host, port) if port is not None else None
        if beside:
            logger.info("probes and metrics are on %s port %d", host, beside.port)
        async with beside.serving() if beside else nullcontext():
            self._background.start()
            await self._stop.wait()
            logger.info("worker %s is stopping", self.id)
            await self._background.stop()
            await self._close()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Finish the batch in hand, hand back the rest, and return from `run`."""
        self._stop.set()
        self._connection.leave()

    async def _work(self, stop: asyncio.Event) -> None:
        """The background task that the process lives for; its error is the process's."""
        try:
            with self.serving.in_use():
                reached = await self._reaches()
                await self.serving.load_default(stop)
                failures = 0
                while not reached and not stop.is_set():
                    await self._connection.pause(failures)
                    failures += 1
                    reached = await self._reaches()
                if not stop.is_set():
                    logger.info("worker %s begins", self.id)
                    self._begun.set()
                await self.serving.work(self._engine, self.id, stop, self._connection.state)
        except Exception as error:
            self._error = error
        finally:
            self.stop()

    def _once_begun(self, task: BackgroundTask) -> BackgroundTask:
        """The task, from when Redis has been found fit for use and the networks are loaded."""

        async def run(stop: asyncio.Event) -> None:
            waiting = {asyncio.create_task(each.wait()) for each in (self._begun, stop)}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for wait in waiting:
                wait.cancel()
            await task(stop)

        return run

    async def _reaches(self) -> bool:
        """Whether Redis answers; raises RedisUnsuitable where it does and cannot be used."""
        try:
            await self._connection.ask(check_server(self._url, self._engine))
        except EngineUnreachable:
            return False
        return True

    def _waiting_for(self) -> str:
        if self._connection.state.is_down:
            return "the engine does not answer"
        return self.serving.waiting_for()

    async def _forget(self, task: str) -> None:
        if task not in self.serving.tasks:
            metrics.delete(task)

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(_CLOSING_SECONDS):
                await self._locks.aclose()
                await self._engine.close()
        except Exception as error:
            logger.debug("Redis was left without a word: %s", error)


def _engine(settings: Settings) -> tuple[RedisEngine, SecretStr]:
    """The engine and the URL it is at; raises RedisUnsuitable for one that is missing or no URL."""
    if settings.redis_url is None:
        raise RedisUnsuitable(
            "VOUCHSAFE_REDIS_URL is not set: a worker takes its work from Redis, for example "
            "redis://host:6379/0"
        )
    try:
        return RedisEngine.from_settings(settings), settings.redis_url
    except (ValueError, TypeError):  # Their words may quote a part of the password.
        raise RedisUnsuitable(
            "VOUCHSAFE_REDIS_URL cannot be read: a port is a number, and / @ # ? in a password are "
            "percent-encoded"
        ) from None
