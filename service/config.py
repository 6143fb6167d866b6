"""Settings from the environment and from files of secrets."""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

PREFIX = "VOUCHSAFE_"
_OTHER_FIELDS_BYTES = 64 * 2**10
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")
_ORIGIN = re.compile(rf"https?://({_HOST.pattern})(:[0-9]+)?")
_REDIS_SCHEMES = ("redis", "rediss", "unix")


class SecretError(RuntimeError):
    """A secret cannot or must not be used; the message names the file and what to change."""


class Settings(BaseSettings):
    """The settings of an operator, read once in each entry point from `VOUCHSAFE_...`.

    A setting that is not in the environment is read from its file in `secrets_dir`, if any.
    Raises SecretError for a missing folder, and for a file in it that cannot be read.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", hide_input_in_errors=True
    )

    data_dir: Path = Field(
        Path(".vouchsafe"), description="Where secrets, tasks, jobs and batches lie."
    )
    secrets_dir: Path | None = Field(
        None,
        description="A folder of settings as files: `vouchsafe_redis_url` holds the Redis URL. The "
        "environment precedes it.",
    )
    noise_secret_file: Path | None = Field(
        None,
        description="Path of the noise secret; `noise.secret` in the data directory unless given. "
        "For the API of a fleet whose workers share that directory and must not read it.",
    )
    signing_key_file: Path | None = Field(
        None, description="The key that signs certificates; beside the noise secret unless given."
    )
    old_jwks_file: Path | None = Field(
        None,
        description="A copy of an earlier `/.well-known/jwks.json`, whose keys stay published.",
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="Keys that may call, as `name:key` or a plain key, split by commas. The name "
        "owns the jobs, so two keys of one name share them. Without keys, everyone may call.",
    )
    api_keys_file: Path | None = Field(
        None, description="A file of further keys, one a line; empty lines and # lines are skipped."
    )
    redis_url: SecretStr | None = Field(
        None,
        description="Where jobs wait for workers on other machines: a Redis >= 7.0, without "
        "eviction. `redis://host:6379/0`, or `rediss://user:password@host?ssl_ca_certs=FILE`.",
    )
    runtime: Literal["auto", "torch", "openvino"] = Field(
        "auto",
        description="What runs the networks. `auto` is openvino where the CPU has AVX512-BF16 and "
        "the default task runs on it, else torch.",
    )
    max_queue_rows: int = Field(200_000, ge=1, description="Noise rows that may wait at once.")
    max_queue_rows_per_key: int = Field(
        100_000, ge=1, description="Noise rows that one key may have waiting at once."
    )
    shard_rows: int = Field(64, ge=1, description="Most noise rows in one shard.")
    lease_seconds: float = Field(30.0, gt=0, description="Seconds that a worker may hold a shard.")
    retention_seconds: float = Field(
        86_400.0,
        gt=0,
        description="How long ended jobs, their certificates and Idempotency-Keys are kept, and an "
        "open job with its image; an image goes as its job ends.",
    )
    max_finished_jobs: int = Field(
        100_000,
        ge=1,
        description="Most ended jobs that are kept; the oldest go before their time beyond that. "
        "One takes about 3 KB of Redis, 5 KB in one process; an early-stopping one some KB more, "
        "by its looks and the labels that got votes.",
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="How the log is written: lines to read, or one JSON object a line."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="What the log holds; debug adds a worker's device batches."
    )
    default_wait_seconds: int = Field(120, ge=1, le=600, description="Wait without `Prefer: wait`.")
    max_open_requests: int = Field(
        2_000,
        ge=2,
        description="Open requests at once; event streams, probes and /metrics are not counted. "
        "One key may have half.",
    )
    max_event_streams: int = Field(
        500, ge=2, description="Event streams that may be open at once. One key may have half."
    )
    max_body_bytes_in_flight: int = Field(
        256 * 2**20,
        ge=1,
        description="Bytes of request bodies held at once; one key may have half.",
    )
    body_seconds: float = Field(
        60.0, gt=0, description="Longest time for a whole request body to arrive."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Further hosts to answer: names without a port, split by commas; `*` is any. "
        "Unless given, API keys allow any host.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Pages that may call: `https://host[:port]`, split by commas; `*` is any."
    )
    max_image_bytes: int = Field(10 * 2**20, ge=1, description="Largest encoded image.")
    max_image_pixels: int = Field(25_000_000, ge=1, description="Largest decoded image.")
    decode_seconds: float = Field(10.0, gt=0, description="Longest time to decode one image.")
    decode_threads: int = Field(2, ge=1, description="Images decoded at the same time.")
    task_storage_bytes: int = Field(
        20 * 2**30, ge=1, description="Most bytes that tasks and their jobs may take on disk."
    )
    models_dir: Path | None = Field(
        None,
        description="Where fetched networks lie; `models` in the data directory unless given.",
    )
    max_pending_tasks: int = Field(
        20, ge=1, description="Most tasks that may be in the making at once."
    )
    model_cache_size: int = Field(
        4, ge=1, description="Tasks whose networks stay loaded, in addition to the default one."
    )
    run_adaptation_jobs: bool = Field(
        True, description="Whether a worker of a fleet runs adaptation jobs too, in `data_dir`."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments precede the environment, which precedes the files of `secrets_dir`."""
        folder = {**env_settings(), **init_settings()}.get("secrets_dir")
        files = _SecretFiles(settings_cls, folder) if folder else file_secret_settings
        return init_settings, env_settings, files

    @property
    def tasks_folder(self) -> Path:
        """The absolute path of the bundles of made tasks."""
        return self.data_dir.resolve() / "tasks"

    @property
    def models_folder(self) -> Path:
        """The absolute path of fetched networks."""
        return (self.models_dir or self.data_dir / "models").resolve()

    @field_validator("api_keys", "allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts_have_no_port(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if host != "*" and not _HOST.fullmatch(host):
                raise ValueError(
                    f"allowed_hosts has {host!r}: write a name or an address without scheme or "
                    "port, IPv6 in brackets, or *"
                )
        return tuple(host.lower() for host in value)

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_whole(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"cors_origins has {origin!r}: write scheme and host, https://app.example, "
                    "without a path, or *"
                )
        return tuple(origin.lower() for origin in value)

    @field_validator("redis_url")
    @classmethod
    def _redis_is_named(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        url = urlsplit(value.get_secret_value())
        if url.scheme not in _REDIS_SCHEMES:
            raise ValueError(f"redis_url begins with none of {', '.join(_REDIS_SCHEMES)}")
        if url.scheme != "unix" and not _names_a_server(url):
            raise ValueError(
                "redis_url names no host, or no number as its port: / @ # ? in a password are "
                "percent-encoded"
            )
        return value

    @model_validator(mode="after")
    def _keys_are_whole(self) -> Self:
        file = self.api_keys_file
        try:
            if not self.callers() and file is not None:
                raise ValueError(f"{variable('api_keys_file')}: {file} holds no key: all may call")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise SecretError(f"{variable('api_keys_file')}: {file}: {reason}") from error
        return self

    @model_validator(mode="after")
    def _two_bodies_fit(self) -> Self:
        """Check that the largest body fits in the half of all bytes that one key may have."""
        least = 2 * self.max_body_bytes
        if self.max_body_bytes_in_flight < least:
            raise ValueError(
                f"max_body_bytes_in_flight is {self.max_body_bytes_in_flight}; two bodies of the "
                f"largest image (max_image_bytes, as base64) need {least}"
            )
        return self

    @property
    def max_body_bytes(self) -> int:
        """Largest body of a question, in bytes: the largest image as base64, and other fields."""
        return -(-self.max_image_bytes // 3) * 4 + _OTHER_FIELDS_BYTES

    def callers(self) -> dict[bytes, str]:
        """SHA-256 of every key -> the name of its caller; empty if everyone may call.

        Raises ValueError for an empty key, and OSError for a file of keys that cannot be read.
        """
        keys = [key.get_secret_value() for key in self.api_keys]
        callers = dict(_caller(line, "api_keys") for line in keys)
        if self.api_keys_file is not None:
            text = self.api_keys_file.read_text("utf-8").splitlines()
            lines = [line.strip() for line in text if line.strip() and line.strip()[0] != "#"]
            callers |= dict(_caller(line, "api_keys_file") for line in lines)
        return callers


def variable(field: str) -> str:
    """The environment variable of a setting."""
    return f"{PREFIX}{field.upper()}"


def _names_a_server(url: SplitResult) -> bool:
    try:
        return bool(url.hostname) and url.port != 0
    except ValueError:  # Its message quotes the text, which may be a part of the password.
        return False


def _caller(line: str, field: str) -> tuple[bytes, str]:
    named = ":" in line
    name, key = line.split(":", 1) if named else ("", line)
    if not key or (named and not name):
        raise ValueError(
            f"{variable(field)}: an API key is empty or has an empty name: write `name:key` or "
            "`key`"
        )
    digest = hashlib.sha256(key.encode())
    return digest.digest(), name or f"key-{digest.hexdigest()[:12]}"


class _SecretFiles(SecretsSettingsSource):
    """Settings in files; a file that is empty or unreadable is an error."""

    def __call__(self) -> dict[str, Any]:
        folder = Path(str(self.secrets_dir))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                settings = super().__call__()
        except (SettingsError, Warning) as error:
            raise SecretError(
                f"VOUCHSAFE_SECRETS_DIR {folder}: {error.__cause__ or error}"
            ) from error
        for name, value in settings.items():
            if not value:
                raise SecretError(f"{folder / f'vouchsafe_{name}'}: is empty; fill or remove it")
        return settings
