"""The commands `verify` and `jwks`: check a certificate, and print the keys that sign here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from models.bundle import DEFAULT_TASK, Bundle, read_bundle
from service.cli.console import read_settings, tell
from service.config import SecretError, Settings, variable
from service.secrets import load_secret, signing_key_file

if TYPE_CHECKING:
    from service.predictions.document import CertificateDocument
    from service.predictions.verification import Check

_URL_SECONDS = 10.0
_MOST_JWKS_BYTES = 2**20
_WORDS = {True: "ok", False: "FAIL", None: "--"}


def verify(
    certificate: Annotated[
        Path, typer.Argument(help="A certificate, or the manifest of a batch: a JSON file.")
    ],
    image: Annotated[
        Path | None, typer.Option(help="The image file that the certificate is about.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The id of a task on this machine, or `default`.")
    ] = None,
    jwks: Annotated[
        str | None, typer.Option(help="The service's public keys: a file, or a URL.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="The results of the manifest's batch: lines of JSON.")
    ] = None,
    replay: Annotated[
        bool, typer.Option(help="Compute the votes again, with --image and the noise secret.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Check a certificate or a manifest, one line a check.

    Exits with 1 if a check fails, and with 2 for a file or an option that cannot be used.
    """
    from service.predictions.verification import MOST_BYTES, Verifier
    from service.signing import read_jwks

    if replay and image is None:
        _fail("--replay needs --image")
    try:
        with certificate.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        keys = None if jwks is None else read_jwks(_fetched(jwks))
        picture = None if image is None else image.read_bytes()
    except ValueError as error:
        _fail(f"{jwks}: {error}")
    if results is not None or _is_manifest(text):
        if image is not None or task is not None:
            _fail("--image and --task are for a certificate, and this is checked as a manifest")
        checks = _manifest_checks(text, keys, results)
    else:
        bundle = None if task is None else _bundle(task, read_settings())
        document, checks = Verifier(text, keys, picture, bundle).checks()
        if replay and picture is not None and document is not None and _passed(checks) is not False:
            checks.append(_replayed(document, picture, bundle, read_settings()))
    if as_json:
        each = [{"check": c.name, "passed": c.passed, "detail": c.detail} for c in checks]
        print(json.dumps({"passed": _passed(checks), "checks": each}, ensure_ascii=False))
    else:
        for check in checks:
            print(f"{_WORDS[check.passed]:5}{check.name:12}{_printable(check.detail)}")
    if _passed(checks) is False:
        raise typer.Exit(1)


def jwks() -> None:
    """Print the public keys that verify this machine's certificates, as the service does.

    Exits with 2 where no service or command has made the secrets yet.
    """
    from service.signing import SigningKeys

    settings = read_settings()
    named = settings.noise_secret_file, settings.signing_key_file
    for file in (_noise_secret(settings), signing_key_file(settings.data_dir, *named)):
        if not file.exists():
            _fail(
                f"{file}: is missing; jwks makes no secrets and needs those of a service that "
                f"issued certificates ({variable('data_dir')} names its directory)"
            )
    secret = load_secret(settings.data_dir, settings.noise_secret_file)
    print(json.dumps(SigningKeys.from_settings(settings, secret).jwks, indent=2))


def _is_manifest(text: bytes) -> bool:
    from service.predictions.batches.schemas import TYPE

    try:
        return bool(json.loads(text)["document"]["type"] == TYPE)
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def _manifest_checks(
    text: bytes, keys: Mapping[str, Any] | None, results: Path | None
) -> list[Check]:
    from service.predictions.batches.verification import ManifestVerifier

    if results is None:
        return ManifestVerifier(text, keys).checks()
    with results.open("rb") as lines:
        return ManifestVerifier(text, keys, lines).checks()


def _passed(checks: list[Check]) -> bool | None:
    """False if a check failed, None if one was not made."""
    found = {check.passed for check in checks}
    return False if False in found else None if None in found else True


def _fail(reason: object) -> NoReturn:
    tell(reason)
    raise typer.Exit(2)


def _printable(text: str) -> str:
    """The text without characters that would move a terminal's cursor."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _fetched(jwks: str) -> bytes:
    """The content of a file or a URL.

    Exits with 2 for a URL that cannot be read. A URL is https, or http on this machine; redirects
    lead to https, or from http to this machine.
    """
    if not jwks.lower().startswith(("http://", "https://")):
        return Path(jwks).read_bytes()
    import httpx

    def check(request: httpx.Request) -> None:
        is_local = first.scheme == "http" and _is_loopback(request.url.host)
        if request.url.scheme != "https" and not is_local:
            _fail(f"{request.url}: keys are fetched over https; http is for this machine alone")

    content = b""
    hooks = {"request": [check]}
    try:
        first = httpx.URL(jwks)
        with (
            httpx.Client(timeout=_URL_SECONDS, follow_redirects=True, event_hooks=hooks) as client,
            client.stream("GET", first) as response,
        ):
            for part in response.raise_for_status().iter_bytes(2**16):
                content += part
                if len(content) > _MOST_JWKS_BYTES:
                    _fail(f"{jwks}: a JWKS has at most {_MOST_JWKS_BYTES} bytes")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        _fail(f"{jwks}: {error}")
    return content


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _noise_secret(settings: Settings) -> Path:
    return settings.noise_secret_file or settings.data_dir / "noise.secret"


def _bundle(task: str, settings: Settings) -> Bundle:
    """The verified bundle of a task here; exits with 2 for an id that no task can have."""
    from service.tasks.task import is_task_id

    if task != "default" and not is_task_id(task):
        _fail(f"{task!r} is no task's id")
    return read_bundle(DEFAULT_TASK if task == "default" else settings.tasks_folder / task)


def _replayed(
    document: CertificateDocument, picture: bytes, bundle: Bundle | None, settings: Settings
) -> Check:
    """The check that the same rows get the same votes on this machine; loads torch."""
    from service.cli.replay import replay
    from service.predictions.verification import Check

    file = _noise_secret(settings)
    if not file.exists():
        raise SecretError(f"{file}: is missing; --replay needs the noise secret of the service")
    secret = load_secret(settings.data_dir, settings.noise_secret_file)
    try:
        found = bundle or _bundle(document.model.task, settings)
        return Check("replay", True, replay(document, picture, found, secret, settings))
    except ValueError as error:
        return Check("replay", False, str(error))
