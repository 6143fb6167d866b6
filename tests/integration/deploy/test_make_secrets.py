"""The secrets that docker/make_secrets.py makes, and a Redis that starts with them."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError

from benchmarks.server import free_port
from service.config import Settings
from service.engine.protocol import Worker
from service.engine.redis.client import connect
from service.engine.redis.engine import PREFIX, RedisEngine
from service.engine.redis.requirements import check_server
from service.jobs import State
from service.processes import api
from service.secrets import load_secret, load_signing_key
from service.tasks.lock import RedisLocks
from tests.support.adapting import until_extended, wait_until
from tests.support.deployment import SECRETS, make_secrets
from tests.support.fakes import fake_votes, make_job
from tests.support.paths import ROOT

ALPHA = Worker("alpha", {"default": "bundle-a"})


def test_secrets_are_made_once(tmp_path: Path) -> None:
    """All are made, for their owner's eyes, no two alike; a second run leaves them be."""
    folder = tmp_path / "secrets"
    assert make_secrets(folder).returncode == 0
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert made.keys() == SECRETS
    assert len(set(made.values())) == len(made)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    again = make_secrets(folder)
    assert (again.returncode, "none was made" in again.stdout) == (0, True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made
    assert not any(secret.decode("latin-1") in again.stdout for secret in made.values())


def test_secret_that_is_missing_is_made_unless_others_belong_to_it(tmp_path: Path) -> None:
    """One that stands alone is made anew; half a pair is told and left as it is."""
    make_secrets(tmp_path)
    (tmp_path / "grafana_admin_password").unlink()
    assert "made grafana_admin_password\n" in make_secrets(tmp_path).stdout
    (tmp_path / "redis_users.acl").unlink()
    half = make_secrets(tmp_path)
    assert half.returncode == 1
    assert "redis_users.acl is missing" in half.stderr
    assert not (tmp_path / "redis_users.acl").exists()


def test_secrets_are_what_the_service_reads(tmp_path: Path) -> None:
    """The noise secret is one, and the scraper's key is among those of the callers."""
    make_secrets(tmp_path / "secrets", "--redis", "redis.example:6380")
    settings = Settings.model_validate(
        {"secrets_dir": tmp_path / "secrets", "api_keys_file": tmp_path / "secrets" / "api_keys"}
    )
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value().endswith("@redis.example:6380/0")
    assert sorted(settings.callers().values()) == ["first", "prometheus"]
    key = (tmp_path / "secrets" / "prometheus_api_key").read_text()
    assert f"prometheus:{key}\n" in (tmp_path / "secrets" / "api_keys").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_secrets_belong_to_those_who_read_them(tmp_path: Path) -> None:
    """Run as root, it gives each file to the user that its container runs as."""
    make_secrets(tmp_path)
    owners = {path.name: path.stat().st_uid for path in tmp_path.iterdir()}
    for name in ("noise.secret", "signing.key", "api_keys", "vouchsafe_redis_url"):
        assert owners[name] == 10001
    assert owners["redis_users.acl"] == owners["redis_admin_password"] == 999
    assert owners["prometheus_api_key"] == 65534
    assert owners["grafana_admin_password"] == 472


def test_noise_secret_and_signing_key_are_ones(tmp_path: Path) -> None:
    """The user that they were given to takes them as they were made."""
    make_secrets(tmp_path / "secrets")
    path, key = (tmp_path / "secrets" / name for name in ("noise.secret", "signing.key"))
    for each in (path, key):
        os.chown(each, os.geteuid(), -1)
    assert load_secret(tmp_path / "data", path) == path.read_bytes()
    assert load_signing_key(tmp_path / "data", path) == key.read_bytes()
    assert path.read_bytes() != key.read_bytes()


@pytest.fixture
def secured(redis_program: None, tmp_path: Path) -> Iterator[Path]:
    """The secrets' folder, beside a Redis that was started with them as the compose file does."""
    port, folder, data = free_port(), tmp_path / "secrets", tmp_path / "redis"
    assert make_secrets(folder, "--redis", f"127.0.0.1:{port}").returncode == 0
    data.mkdir()
    command = ["redis-server", str(ROOT / "docker" / "redis.conf"), "--port", str(port)]
    command += ["--dir", str(data), "--aclfile", str(folder / "redis_users.acl")]
    server = subprocess.Popen(  # noqa: S603
        [*command, "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: healthy(port) or server.poll() is not None)
        assert server.poll() is None
        yield folder
    finally:
        server.kill()
        server.wait()


def healthy(port: int) -> bool:
    """What the health check of the compose file says."""
    command = [shutil.which("redis-cli") or "redis-cli", "-p", str(port)]
    command += ["-e", "--no-auth-warning", "--user", "health", "--pass", "health", "ping"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603


def url_of(folder: Path) -> str:
    return (folder / "vouchsafe_redis_url").read_text().strip()


async def test_service_can_do_its_work(secured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its user may do all that predictions, adaptation jobs and the start of a worker need."""
    settings = Settings.model_validate({"secrets_dir": secured, "shard_rows": 10})
    assert settings.redis_url is not None
    engine = RedisEngine.from_settings(settings)
    await check_server(settings.redis_url, engine)
    monkeypatch.setattr(engine, "_poll_seconds", 60.0)
    pulling = asyncio.create_task(engine.pull(ALPHA, 100))
    while not (await engine.capacity()).digests:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    await engine.submit(make_job("a"), idempotency_key="once")
    leases = await pulling
    await engine.start(leases)
    for lease in leases:
        key, rows = lease.job.domain_key(lease.shard.domain), (lease.shard.start, lease.shard.stop)
        assert await engine.commit(lease, fake_votes(key, range(*rows), lease.job.classes))
    ended = [status async for status in engine.watch("a")][-1]
    assert ended.state is State.SUCCEEDED
    await engine.reconcile()
    assert await engine.delete("a")
    await engine.close()
    redis = connect(url_of(secured))
    async with RedisLocks(redis, seconds=6).acquire("task") as lock:
        assert lock is not None
        await until_extended(redis, f"{PREFIX}adaptation:task")
    assert not await redis.exists(f"{PREFIX}adaptation:task")
    assert await api.is_shared(redis, "volume")
    await redis.aclose()


async def test_service_can_do_nothing_else(secured: Path) -> None:
    """Others' keys, Redis' own settings and whatever empties it are closed to its user."""
    async with aclosing(connect(url_of(secured))) as redis:
        assert (await redis.info("persistence"))["aof_enabled"] == 1
        for forbidden in (
            ("SET", "other", "1"),
            ("KEYS", "*"),
            ("FLUSHALL",),
            ("CONFIG", "GET", "*"),
            ("ACL", "LIST"),
            ("SHUTDOWN",),
        ):
            with pytest.raises(NoPermissionError):
                await redis.execute_command(*forbidden)  # type: ignore[no-untyped-call]


async def test_nobody_else_gets_in(secured: Path) -> None:
    """Without a password, or with a wrong one, Redis does nothing; who asks for health may PING."""
    address = url_of(secured).rpartition("@")[2]
    for stranger in ("", "default:@", "vouchsafe:wrong@"):
        async with aclosing(Redis.from_url(f"redis://{stranger}{address}")) as redis:
            with pytest.raises(AuthenticationError):
                await redis.ping()
    async with aclosing(Redis.from_url(f"redis://health:health@{address}")) as redis:
        assert await redis.ping()
        with pytest.raises(NoPermissionError):
            await redis.get("{vouchsafe}:jobs")


async def test_operator_sees_what_holds_for_redis(secured: Path) -> None:
    """The admin's password opens everything; nothing is evicted, and all is written down."""
    admin = (secured / "redis_admin_password").read_text()
    address = url_of(secured).rpartition("@")[2]
    async with aclosing(Redis.from_url(f"redis://admin:{admin}@{address}")) as redis:
        told = await redis.config_get("*")
        assert told["maxmemory-policy"] == "noeviction"
        assert (told["appendonly"], told["appendfsync"], told["save"]) == ("yes", "everysec", "")
        assert int(told["maxmemory"]) > 0
