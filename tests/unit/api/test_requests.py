from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from service.api import requests as intake
from tests.support.serving import PNG, Service, problem, serving


@pytest.mark.parametrize(
    "path",
    ["/models", "/metrics", "/tasks", "/jobs/x", "/jobs/x/events", "/batches/x/results"],
)
async def test_keys_are_asked_for(path: str) -> None:
    """With keys configured, every route with data needs one."""
    async with serving(api_keys="ann:key-of-ann") as service:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic YTpi"}):
            response = await service.client.get(path, headers=headers)
            problem(response, 401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        assert (
            await service.client.get(path, headers={"Authorization": "Bearer key-of-ann"})
        ).status_code in (200, 404)
        problem(await service.ask(), 401, "unauthorized")


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/startupz", "/", "/docs", "/docs/assets/swagger-ui.css"]
)
async def test_probes_and_pages_need_no_key(path: str) -> None:
    """With keys configured, probes, the page and /docs are answered without one."""
    async with serving(api_keys="ann:key-of-ann") as service:
        assert (await service.client.get(path)).status_code == 200


async def test_the_interface_says_where_keys_are_needed() -> None:
    """/openapi.json loads without a key and declares it on each route but probes and keys."""
    async with serving(api_keys="ann:key-of-ann") as service:
        described = (await service.client.get("/openapi.json")).json()
    free = {
        path
        for path, operations in described["paths"].items()
        if not all(operation.get("security") for operation in operations.values())
    }
    health = {"/v2/health/live", "/v2/health/ready"}
    assert free == {"/livez", "/readyz", "/startupz", "/.well-known/jwks.json"} | health
    (scheme,) = described["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")


async def test_body_is_bounded_without_a_declared_length() -> None:
    """An endless body is cut off at the limit, though it never said how long it would be."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 65_536
            yield b"x" * 65_536

    async with serving(max_image_bytes=65_536) as service:
        headers = {"Content-Type": "application/json"}
        response = await service.client.post("/predict", content=endless(), headers=headers)
    problem(response, 413, "too-large")
    assert sent < 400_000


@pytest.mark.parametrize(
    ("kind", "body", "status", "slug"),
    [
        ("text/plain", b"hello", 415, "unsupported-media-type"),
        ("application/x-www-form-urlencoded", b"n=3", 415, "unsupported-media-type"),
        ("application/json", b"{", 400, "malformed-request"),
        ("application/json", b"[]", 422, "invalid-field"),
        ("application/json", b'{"image": "*"}', 422, "invalid-field"),
        ("multipart/form-data", b"", 400, "malformed-request"),
        ("multipart/form-data; boundary=b", b"hello", 400, "malformed-request"),
    ],
)
async def test_bad_bodies_are_problems(
    service: Service, kind: str, body: bytes, status: int, slug: str
) -> None:
    """A body of another kind, or one that breaks its own format, is a problem document."""
    headers = {"Content-Type": kind}
    problem(await service.client.post("/predict", content=body, headers=headers), status, slug)


@pytest.mark.parametrize("charset", ["undefined", "punycode", "idna", "utf-7", "unicode_escape"])
@pytest.mark.parametrize(("path", "field"), [("/predict", "image"), ("/batches", "images")])
async def test_forms_are_in_utf_8(service: Service, path: str, field: str, charset: str) -> None:
    """Another charset is refused: its file names may not decode, or not be stored as UTF-8."""

    async def sent(name: str, charset: str) -> httpx.Response:
        part = f'Content-Disposition: form-data; name="{field}"; filename="{name}"'
        body = b"\r\n".join((b"--b", part.encode(), b"", PNG, b"--b--", b""))
        kind = f"multipart/form-data; boundary=b; charset={charset}"
        headers = {"Content-Type": kind, "Idempotency-Key": charset}
        return await service.client.post(path, content=body, headers=headers)

    for name in ("+2AA-", "\\ud800", "xn--a-\x80"):
        document = problem(await sent(name, charset), 415, "unsupported-media-type")
        assert charset in document["detail"]
    assert (await sent("a", '"UTF-8"')).is_success


@pytest.mark.parametrize("name", ["file", "picture.png"])
async def test_a_file_under_another_name_is_not_repeated(service: Service, name: str) -> None:
    """A file in a field that does not exist is refused with `image`, and no byte of it."""
    response = await service.client.post("/predict", files={name: ("x.png", PNG)})
    document = problem(response, 422, "invalid-field")
    detail = f"there is no field '{name}'; did you mean image?"
    assert document["detail"] == detail
    assert document["errors"] == [{"field": name, "detail": detail}]


async def test_a_file_beside_the_image_is_named(service: Service) -> None:
    """A second file in a field that does not exist is refused by the field's name."""
    files = {"image": ("x.png", PNG), "masks": ("y.png", PNG)}
    document = problem(await service.client.post("/predict", files=files), 422, "invalid-field")
    assert [error["field"] for error in document["errors"]] == ["masks"]


async def test_a_file_in_a_text_field_is_not_repeated(service: Service) -> None:
    """A file in a field that is text is refused by name, without a byte of it."""
    for content in (PNG, b"of words"):
        response = await service.client.post("/predict", files={"task": ("x.png", content)})
        document = problem(response, 422, "invalid-field")
        assert document["detail"] == "task must be sent as text, without a file name"
        assert document["errors"] == [{"field": "task", "detail": document["detail"]}]


async def test_form_fields_must_be_single_and_images_files(service: Service) -> None:
    """A field given twice, or an image that is a text field, is refused by name."""
    twice = await service.ask(n=["100", "200"])
    assert problem(twice, 422, "invalid-field")["errors"][0]["field"] == "n"
    text = await service.client.post("/predict", files={"image": (None, "text")})
    assert problem(text, 422, "invalid-field")["errors"][0]["field"] == "image"
    absent = await service.client.post("/predict", files={"n": (None, "100")})
    assert problem(absent, 422, "invalid-field")["errors"][0]["field"] == "image"


@pytest.mark.parametrize(
    ("prefer", "status"),
    [("wait=0", 200), ("wait=x", 200), ("wait=" + "9" * 5000, 200), ("RESPOND-ASYNC;a=b", 202)],
)
async def test_odd_preferences_are_no_errors(service: Service, prefer: str, status: int) -> None:
    """A preference that cannot be honoured is ignored or cut to its bounds, never refused."""
    assert (await service.ask(headers={"Prefer": prefer})).status_code == status


async def test_an_upload_that_finds_no_room_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the folder of temporary files is full, a form is a 503 with Retry-After."""

    async def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(intake, "_read_form", full)
    async with serving() as service:
        refused = await service.ask()
    assert "No space left on device" in problem(refused, 503, "overloaded")["detail"]
    assert refused.headers["Retry-After"] == "10"
