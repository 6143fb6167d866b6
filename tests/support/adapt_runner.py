"""A worker that only adapts.

`python -m tests.support.adapt_runner DATA_DIR URL PREFIX SECONDS [WAY]`

Runs the fake adaptation until SIGTERM, under locks of SECONDS. The way `unlocked` takes every file
lock away from it and its jobs, as on a volume that does not share them between machines.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import signal
import sys
from pathlib import Path

from service.config import Settings
from service.engine.redis.client import connect
from service.tasks.lock import RedisLocks
from service.tasks.repository import TaskRepository
from service.tasks.supervisor import Supervisor
from tests.support.adapting import FAKE, FAST

NO_LOCKS = "import fcntl; fcntl.flock = lambda *_: None"
UNLOCKED_FAKE = (
    sys.executable,
    "-c",
    f"{NO_LOCKS}; import runpy, sys; runpy.run_path({FAKE[1]!r}, run_name='__main__')",
)


async def main(data_dir: str, url: str, prefix: str, seconds: str, way: str = "") -> None:
    """Run jobs until SIGTERM."""
    if way == "unlocked":
        fcntl.flock = lambda *_: None  # type: ignore[assignment]
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    settings = Settings(data_dir=Path(data_dir), redis_url=url)
    locks = RedisLocks(connect(url), seconds=float(seconds), prefix=prefix)
    command = UNLOCKED_FAKE if way == "unlocked" else FAKE
    await Supervisor(TaskRepository(settings), command, FAST, locks).run(stop)
    await locks.aclose()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    asyncio.run(main(*sys.argv[1:]))
