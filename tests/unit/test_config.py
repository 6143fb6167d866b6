from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.config import SecretError, Settings
from service.secrets import load_secret

PRINT_SECRET = (
    "import sys, pathlib; from service.secrets import load_secret;"
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

    monkeypatch.setattr("service.secrets.os.urandom", draw_late)
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
    with pytest.raises(SecretError, match="a secret has 32"):
        load_secret(tmp_path)
    assert path.read_bytes() == b"x" * length


@pytest.mark.parametrize("target", ["elsewhere", "missing"])
def test_secret_that_is_a_link_is_refused(tmp_path: Path, target: str) -> None:
    """A link in the secret's place is not followed, wherever it points."""
    (tmp_path / "elsewhere").write_bytes(b"x" * 32)
    (tmp_path / "noise.secret").symlink_to(tmp_path / target)
    with pytest.raises(SecretError, match="cannot be read"):
        load_secret(tmp_path)


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o2770])
@pytest.mark.parametrize("used", [False, True])
def test_an_open_data_directory_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, used: bool
) -> None:
    """An existing directory that others may enter gets mode 0700, which is logged with its path."""
    folder = tmp_path / "data"
    folder.mkdir()
    if used:
        load_secret(folder)
        (folder / "notes").touch()
    caplog.clear()
    folder.chmod(mode)
    load_secret(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (record,) = caplog.records
    assert str(folder) in record.message
    assert f"{mode:04o}" in record.message
    load_secret(folder)
    assert len(caplog.records) == 1


def test_a_directory_of_fetched_networks_alone_is_closed(tmp_path: Path) -> None:
    """Networks may have been fetched before the first start, to a directory open to others."""
    (tmp_path / "data" / "models").mkdir(parents=True)
    load_secret(tmp_path / "data")
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("mode", "name"), [(0o755, "letters.txt"), (0o750, "service"), (0o1777, "noise.secret")]
)
def test_a_directory_of_other_things_is_left_open(tmp_path: Path, mode: int, name: str) -> None:
    """A home, or /tmp, is not closed to others: it is refused, and nothing is written to it."""
    folder = tmp_path / "home"
    (folder / "models").mkdir(parents=True)
    (folder / name).touch()
    folder.chmod(mode)
    with pytest.raises(SecretError, match=f"{folder}: others may enter it .mode {mode:04o}."):
        load_secret(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == mode
    assert {path.name for path in folder.iterdir()} == {"models", name}


def test_another_users_data_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of another user holds no secret: the message names it and both ways out."""
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr("service.secrets.os.geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(SecretError, match="belongs to another user") as refused:
        load_secret(folder)
    assert str(folder) in str(refused.value)
    assert "VOUCHSAFE_DATA_DIR" in str(refused.value)
    assert "VOUCHSAFE_NOISE_SECRET_FILE" in str(refused.value)
    assert list(folder.iterdir()) == []


def test_a_directory_that_cannot_be_closed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system keeps the mode, the directory and the reason are named."""

    def fails(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    tmp_path.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", fails)
    with pytest.raises(SecretError, match=f"{tmp_path}: .* chmod fails: Read-only file system"):
        load_secret(tmp_path)


def test_a_directory_that_is_shared_on_purpose_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the noise secret elsewhere, neither the directory's mode nor its owner matters."""
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o2775)
    load_secret(data, tmp_path / "private" / "noise.secret")
    look = Path.stat

    def another_users(path: Path, **options: bool) -> os.stat_result:
        seen = list(look(path, **options))
        seen[4] += path == data
        return os.stat_result(seen)

    monkeypatch.setattr(Path, "stat", another_users)
    load_secret(data, tmp_path / "private" / "noise.secret")
    assert stat.S_IMODE(look(data).st_mode) == 0o2775


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """A secret as Kubernetes mounts it: behind two links, root's or one's own, its group's too."""
    version = tmp_path / "mount" / "..2026_11_21"
    version.mkdir(parents=True)
    (version / "noise.secret").write_bytes(b"m" * 32)
    (version / "noise.secret").chmod(0o440)
    (tmp_path / "mount" / "..data").symlink_to(version.name)
    (tmp_path / "mount" / "noise.secret").symlink_to("..data/noise.secret")
    return tmp_path / "mount" / "noise.secret"


def test_secret_file_lies_outside_the_data_directory(tmp_path: Path) -> None:
    """A named file is made on first use, 0600, and nothing in the shared directory tells it."""
    data, file = tmp_path / "data", tmp_path / "private" / "noise.secret"
    secret = load_secret(data, file)
    assert load_secret(data, file) == secret == file.read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert all(secret not in path.read_bytes() for path in data.iterdir())


def test_mounted_secret_is_taken(tmp_path: Path, mounted: Path) -> None:
    """Links and a group that reads are let pass where the file is named, and only there."""
    assert load_secret(tmp_path / "data", mounted) == b"m" * 32
    with pytest.raises(SecretError, match="cannot be read"):
        load_secret(mounted.parent)


@pytest.mark.parametrize("mode", [0o444, 0o441, 0o460, 0o620, 0o644])
def test_mounted_secret_that_others_may_read_is_refused(
    tmp_path: Path, mounted: Path, mode: int
) -> None:
    """A named file that others may read, or its group may write, is refused by name."""
    mounted.chmod(mode)
    with pytest.raises(SecretError, match=f"{mounted}: .*mode {mode:04o}"):
        load_secret(tmp_path / "data", mounted)


@pytest.mark.parametrize(("owner", "taken"), [("self", True), ("root", True), ("other", False)])
def test_mounted_secret_is_roots_or_ones_own(
    tmp_path: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch, owner: str, taken: bool
) -> None:
    """A named file may belong to root, as mounted secrets do, but to no third user."""
    owners = {"self": 4242, "root": 0, "other": 4243}
    look: Callable[[int], os.stat_result] = os.fstat

    def as_if(descriptor: int) -> os.stat_result:
        seen = list(look(descriptor))
        seen[4] = owners[owner]
        return os.stat_result(seen)

    monkeypatch.setattr("service.secrets.os.fstat", as_if)
    monkeypatch.setattr("service.secrets.os.geteuid", lambda: 4242)
    if taken:
        assert load_secret(tmp_path / "data", mounted) == b"m" * 32
    else:
        with pytest.raises(SecretError, match="belongs to another user"):
            load_secret(tmp_path / "data", mounted)


def test_two_secrets_are_refused(tmp_path: Path, mounted: Path) -> None:
    """One in the shared directory beside the named one is told, and which to move where."""
    load_secret(tmp_path)
    with pytest.raises(SecretError, match=f"{tmp_path}/noise.secret: .* move it to {mounted}"):
        load_secret(tmp_path, mounted)


def test_processes_with_other_secrets_do_not_share_a_directory(
    tmp_path: Path, mounted: Path
) -> None:
    """The directory knows which secret it was used with, without telling it."""
    load_secret(tmp_path / "data", mounted)
    other = tmp_path / "other.secret"
    with pytest.raises(SecretError, match=f"{other}: is missing, and {tmp_path}/data was used"):
        load_secret(tmp_path / "data", other)
    assert not other.exists()
    load_secret(tmp_path / "elsewhere", other)
    with pytest.raises(SecretError, match="another secret than the one"):
        load_secret(tmp_path / "data", other)
    (tmp_path / "data" / "noise.sha256").unlink()
    load_secret(tmp_path / "data", other)


def test_secret_file_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    """A folder in its place, or none where one could be made, is an error that names the file."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").touch()
    with pytest.raises(SecretError, match=f"{tmp_path}/folder: cannot be read: Is a directory"):
        load_secret(tmp_path / "data", tmp_path / "folder")
    with pytest.raises(SecretError, match=r"plain/noise\.secret: is missing and cannot be made"):
        load_secret(tmp_path / "data", tmp_path / "plain" / "noise.secret")


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """VOUCHSAFE_ variables are read, checked and frozen."""
    monkeypatch.setenv("VOUCHSAFE_DATA_DIR", "/srv/vouchsafe")
    monkeypatch.setenv("VOUCHSAFE_SHARD_ROWS", "128")
    settings = Settings()
    assert settings.data_dir == Path("/srv/vouchsafe")
    assert (settings.shard_rows, settings.default_wait_seconds) == (128, 120)
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
    with pytest.raises(SecretError, match=r"VOUCHSAFE_API_KEYS_FILE: .*/missing: No such file"):
        Settings(api_keys_file=tmp_path / "missing")
    path.write_bytes(b"caf\xe9")
    with pytest.raises(
        SecretError, match=r"VOUCHSAFE_API_KEYS_FILE: .*/keys: it is not UTF-8 text"
    ):
        Settings(api_keys_file=path)


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


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of settings as files, with the URL of a Redis in it."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "vouchsafe_redis_url").write_text("redis://:from-file@redis:6379/0\n")
    monkeypatch.setenv("VOUCHSAFE_SECRETS_DIR", str(folder))
    return folder


def redis_url() -> str:
    url = Settings().redis_url
    assert url is not None
    return url.get_secret_value()


def test_settings_may_be_files(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument goes before the environment, the environment before a file."""
    (secrets / "vouchsafe_api_keys").write_text("ann:secret-a,bob:secret-b\n")
    (secrets / "noise.secret").write_bytes(b"\xff" * 32)
    assert redis_url() == "redis://:from-file@redis:6379/0"
    assert set(Settings().callers().values()) == {"ann", "bob"}
    monkeypatch.setenv("VOUCHSAFE_REDIS_URL", "redis://from-environment")
    assert redis_url() == "redis://from-environment"
    given = Settings(redis_url="redis://given").redis_url
    assert given is not None
    assert given.get_secret_value() == "redis://given"


def test_files_may_be_links_within_their_folder(secrets: Path) -> None:
    """As Kubernetes mounts them: each a link into a folder that is exchanged as a whole."""
    (secrets / "..2026_11_21").mkdir()
    (secrets / "vouchsafe_redis_url").rename(secrets / "..2026_11_21" / "vouchsafe_redis_url")
    (secrets / "..data").symlink_to("..2026_11_21")
    (secrets / "vouchsafe_redis_url").symlink_to("..data/vouchsafe_redis_url")
    assert redis_url() == "redis://:from-file@redis:6379/0"


@pytest.mark.parametrize("state", ["missing", "a file", "empty", "binary", "a link out"])
def test_files_that_cannot_be_used_stop_the_start(
    secrets: Path, tmp_path: Path, state: str
) -> None:
    """No secret is passed over in silence: its folder, or it, is named instead."""
    file = secrets / "vouchsafe_api_keys"
    if state in ("missing", "a file"):
        (secrets / "vouchsafe_redis_url").unlink()
        secrets.rmdir()
    if state == "a file":
        secrets.touch()
    elif state == "empty":
        file.write_text("\n")
    elif state == "binary":
        file.write_bytes(b"\xff" * 32)
    elif state == "a link out":
        (tmp_path / "elsewhere").write_text("ann:secret-a")
        file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SecretError, match=str(secrets)) as refused:
        Settings()
    assert "from-file" not in str(refused.value)


def test_file_that_cannot_be_read_is_told_in_one_line(secrets: Path, tmp_path: Path) -> None:
    """A command ends with 2 and names the folder of a secret that is no text."""
    (secrets / "vouchsafe_redis_url").write_bytes(b"\xff")
    start = "from service.cli.main import main; main()"
    command = [sys.executable, "-c", start, "models", "list"]
    ended = subprocess.run(  # noqa: S603
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    told = "".join(ended.stderr.splitlines())
    assert told.startswith(f"vouchsafe: VOUCHSAFE_SECRETS_DIR {secrets}: ")
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("allowed_hosts", "http://a.example", "allowed_hosts has 'http://a.example'"),
        ("allowed_hosts", "a.example,b.example:80", "allowed_hosts has 'b.example:80'"),
        ("allowed_hosts", "::1", "IPv6 in brackets"),
        ("cors_origins", "a.example", "cors_origins has 'a.example'"),
        ("cors_origins", "https://a.example/", "without a path"),
        ("cors_origins", "null", "cors_origins has 'null'"),
        ("max_body_bytes_in_flight", "28000000", "need 28"),
        ("max_open_requests", "1", "greater than or equal to 2"),
        ("max_event_streams", "1", "greater than or equal to 2"),
        ("body_seconds", "0", "greater than 0"),
    ],
)
def test_bounds_at_the_door_are_checked(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host or origin in another form, and a bound that lets nobody in, are refused by name."""
    monkeypatch.setenv(f"VOUCHSAFE_{name.upper()}", value)
    with pytest.raises(ValidationError, match=message):
        Settings()


def test_the_largest_image_fits_in_what_one_key_may_hold() -> None:
    """A larger image needs a larger bound on bodies, for a key may have half of it."""
    largest = Settings(max_image_bytes=90_000_000, max_body_bytes_in_flight=241_000_000)
    assert 2 * largest.max_body_bytes <= 241_000_000
    with pytest.raises(ValidationError, match="max_image_bytes, as base64"):
        Settings(max_image_bytes=90_000_000, max_body_bytes_in_flight=240_000_000)
