from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.config import SecretError, Settings, load_secret

PRINT_SECRET = (
    "import sys, pathlib; from service.config import load_secret;"
    "sys.stdin.read(); print(load_secret(pathlib.Path(sys.argv[1])).hex())"
)


def test_secret_is_made_once_and_kept(tmp_path: Path) -> None:
    """The first call makes 32 random bytes, every later one reads the same."""
    folder = tmp_path / "state"
    secret = load_secret(folder)
    assert len(secret) == 32
    assert load_secret(folder) == secret
    assert load_secret(tmp_path / "other") != secret


def test_secret_is_private(tmp_path: Path) -> None:
    """The folder has mode 0700, the file 0600, and nothing else is left behind."""
    folder = tmp_path / "a" / "state"
    load_secret(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "noise.secret").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in folder.iterdir()] == ["noise.secret"]


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    """Two processes that both find no secret end with the same one."""
    command = [sys.executable, "-c", PRINT_SECRET, str(tmp_path / "state")]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    secrets = set()
    for process in processes:
        assert process.stdout is not None
        secrets.add(process.stdout.read().strip())
        process.stdout.close()
        assert process.wait() == 0
    assert len(secrets) == 1
    assert len(secrets.pop()) == 64


def test_losing_the_race_takes_the_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another process publishes its secret first, that one is the service's."""
    path = tmp_path / "noise.secret"

    def draw_late(size: int) -> bytes:
        path.write_bytes(b"w" * 32)
        path.chmod(0o600)
        return b"l" * size

    monkeypatch.setattr("service.config.os.urandom", draw_late)
    assert load_secret(tmp_path) == b"w" * 32
    assert [left.name for left in tmp_path.iterdir()] == ["noise.secret"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_secret_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    """A secret open to group or world is refused, and the message says what to run."""
    load_secret(tmp_path)
    (tmp_path / "noise.secret").chmod(mode)
    with pytest.raises(SecretError, match="chmod 600"):
        load_secret(tmp_path)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_secret_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    """A secret that is cut or grown is refused, never replaced."""
    path = tmp_path / "noise.secret"
    path.write_bytes(b"x" * length)
    path.chmod(0o600)
    with pytest.raises(SecretError, match="where a secret has 32"):
        load_secret(tmp_path)
    assert path.read_bytes() == b"x" * length


@pytest.mark.parametrize("target", ["elsewhere", "missing"])
def test_secret_that_is_a_link_is_refused(tmp_path: Path, target: str) -> None:
    """A link in the secret's place is not followed, wherever it points."""
    (tmp_path / "elsewhere").write_bytes(b"x" * 32)
    (tmp_path / "noise.secret").symlink_to(tmp_path / target)
    with pytest.raises(SecretError, match="cannot be read"):
        load_secret(tmp_path)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """VOUCHSAFE_ variables are read, checked and frozen."""
    monkeypatch.setenv("VOUCHSAFE_DATA_DIR", "/srv/vouchsafe")
    monkeypatch.setenv("VOUCHSAFE_SHARD_ROWS", "128")
    settings = Settings()
    assert settings.data_dir == Path("/srv/vouchsafe")
    assert (settings.shard_rows, settings.wait_seconds) == (128, 120)
    with pytest.raises(ValidationError, match="frozen"):
        settings.shard_rows = 1  # type: ignore[misc]
    monkeypatch.setenv("VOUCHSAFE_SHARD_ROWS", "0")
    with pytest.raises(ValidationError, match="shard_rows"):
        Settings()


def test_keys_from_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named and plain keys of both sources are known by hash; a plain key gets its own name."""
    path = tmp_path / "keys"
    path.write_text("# the gateway\n\ngateway:one:two\n")
    monkeypatch.setenv("VOUCHSAFE_API_KEYS", "ann:secret-a, plain,ann:secret-b")
    monkeypatch.setenv("VOUCHSAFE_API_KEYS_FILE", str(path))
    callers = Settings().callers()
    named = {key: callers[hashlib.sha256(key.encode()).digest()] for key in ("secret-a", "plain")}
    assert len(callers) == 4
    assert named["secret-a"] == callers[hashlib.sha256(b"secret-b").digest()] == "ann"
    assert named["plain"].startswith("key-")
    assert "plain" not in named["plain"]
    assert callers[hashlib.sha256(b"one:two").digest()] == "gateway"


def test_no_keys_means_open() -> None:
    """Without any key there is no caller to know."""
    assert Settings().callers() == {}


@pytest.mark.parametrize("keys", ["ann:", ":secret"])
def test_half_a_key_is_refused_without_telling_it(
    keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty key or name stops the start, and the error does not print the keys."""
    monkeypatch.setenv("VOUCHSAFE_API_KEYS", f"bob:hidden-key,{keys}")
    with pytest.raises(ValidationError, match="empty") as refused:
        Settings()
    assert "hidden-key" not in str(refused.value)


def test_empty_keys_file_does_not_open_the_service(tmp_path: Path) -> None:
    """A keys' file without a key, or none at all, stops the start instead of letting all in."""
    path = tmp_path / "keys"
    path.write_text("# nothing yet\n")
    with pytest.raises(ValidationError, match="holds no key"):
        Settings(api_keys_file=path)
    with pytest.raises(FileNotFoundError):
        Settings(api_keys_file=tmp_path / "missing")


def test_keys_are_not_printed() -> None:
    """The settings can be logged without giving the keys away."""
    settings = Settings(api_keys="ann:hidden-key")  # type: ignore[arg-type]
    assert "hidden-key" not in repr(settings)
    assert len(settings.callers()) == 1


def test_redis_url_is_a_secret() -> None:
    """The URL may hold a password, so no representation of the settings shows it."""
    settings = Settings(redis_url="rediss://fleet:hunter2@redis.example:6380/1")
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value().endswith("@redis.example:6380/1")
    assert "hunter2" not in f"{settings!r}{settings}{settings.model_dump_json()}"


@pytest.mark.parametrize("url", ["http://fleet:hunter2@host", "fleet:hunter2@host", ""])
def test_redis_url_of_another_kind_is_refused(url: str) -> None:
    """A URL that is none of Redis is refused without showing what it held."""
    with pytest.raises(ValidationError, match="redis, rediss, unix") as refusal:
        Settings(redis_url=url)
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    ["redis://:hun/ter2@host:6379/0", "redis://:hun#ter2@host", "redis://:12/34@host", "redis://"],
)
def test_redis_url_that_is_cut_short_tells_nothing(url: str) -> None:
    """A password that is not percent-encoded is refused, and no part of it told."""
    with pytest.raises(ValidationError, match="percent-encoded") as raised:
        Settings(redis_url=url)
    assert "hun" not in str(raised.value)
