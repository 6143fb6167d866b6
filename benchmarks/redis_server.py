"""A real redis-server on a socket in a temporary folder, which no other process can take."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from asyncio import StreamReader, StreamWriter
from pathlib import Path
from typing import Self

import redis
from redis.asyncio import Redis

GROUP = "workers"


class RedisServer:
    """A server that tests start, kill and start again on the same append-only file."""

    def __init__(self, folder: Path, appendfsync: str = "everysec") -> None:
        # The path of a socket has 107 bytes at most, so it is not in the server's folder.
        folder_of_socket = tempfile.mkdtemp(prefix="redis-")
        weakref.finalize(self, shutil.rmtree, folder_of_socket, ignore_errors=True)
        self.socket = f"{folder_of_socket}/redis.sock"
        self.url = self.url_for("")
        self._folder = folder
        self._appendfsync = appendfsync
        self._process: subprocess.Popen[bytes] | None = None

    def url_for(self, user: str, database: int = 0) -> str:
        """Its URL for a user, as `name:password`."""
        return f"unix://{user and user + '@'}{self.socket}?db={database}"

    def start(self, **more: str | int) -> None:
        """Returns once the server answers, with its data loaded; `more` are its options."""
        self.launch(**more)
        deadline = time.monotonic() + 20
        with redis.Redis.from_url(self.url, retry=None) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)

    def launch(self, **more: str | int) -> None:
        """Start the server without waiting for it."""
        if (program := shutil.which("redis-server")) is None:
            raise RuntimeError("redis-server is not installed")
        options = {
            "port": 0,
            "unixsocket": self.socket,
            "dir": self._folder,
            "save": "",
            "appendonly": "yes",
            "appendfsync": self._appendfsync,
            "logfile": self._folder / "redis.log",
            **{name.replace("_", "-"): value for name, value in more.items()},
        }
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        self._process = subprocess.Popen([program, *flags])  # noqa: S603

    def send(self, signal: int) -> None:
        """Send its process a signal."""
        if self._process is not None:
            self._process.send_signal(signal)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """Stop its responses, with every connection open."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue after `pause`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)


class LosingReplies:
    """A proxy between clients and a server that drops the reply to the next request with `marker`.

    The request is executed, and its connection cut. `lost` counts these.
    """

    def __init__(self, socket: str) -> None:
        self.marker = b""
        self.lost = 0
        self._socket = socket

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, client: StreamReader, to_client: StreamWriter) -> None:
        server, to_server = await asyncio.open_unix_connection(self._socket)
        marked = asyncio.Event()

        async def requests() -> None:
            while request := await client.read(1 << 20):
                if self.marker and self.marker in request:
                    self.marker = b""
                    marked.set()
                to_server.write(request)

        async def replies() -> None:
            while reply := await server.read(1 << 20):
                if marked.is_set():
                    self.lost += 1
                    return
                to_client.write(reply)

        ways = {asyncio.create_task(requests()), asyncio.create_task(replies())}
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            to_client.close()
            to_server.close()


async def written(client: Redis) -> None:
    """Returns once all acknowledged writes are in the file, which a busy disk delays."""
    while (await client.info("persistence"))["aof_buffer_length"]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def age(client: Redis, prefix: str, milliseconds: int) -> None:
    """Make every lease and every TTL below the prefix older, as if this time had passed."""
    async for key in client.scan_iter(match=f"{prefix}*"):
        left = await client.pttl(key)
        if 0 <= left <= milliseconds:
            await client.delete(key)
        elif left > 0:
            await client.pexpire(key, left - milliseconds)
    async for stream in client.scan_iter(match=f"{prefix}lane:*"):
        for held in await client.xpending_range(stream, GROUP, "-", "+", 10_000):
            entry, idle = held["message_id"], held["time_since_delivered"] + milliseconds
            await client.xclaim(stream, GROUP, held["consumer"], 0, [entry], idle=idle, justid=True)


async def stored_bytes(client: Redis, key: bytes) -> bytes:
    """Everything that a key holds, in one string."""
    reads = {b"string": "GET {}", b"hash": "HGETALL {}", b"set": "SMEMBERS {}"}
    reads |= {b"zset": "ZRANGE {} 0 -1", b"stream": "XRANGE {} - +", b"none": "GET {}"}
    command = reads[await client.type(key)].split()
    return repr(await client.execute_command(*[key if w == "{}" else w for w in command])).encode()
