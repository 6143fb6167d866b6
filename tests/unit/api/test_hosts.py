"""service/api/middleware.py: which hosts and origins are answered, without keys and with them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.support.metrics import counted
from tests.support.serving import Service, problem, serving

FOREIGN = "http://evil.example"


async def get(service: Service, host: str, path: str = "/models") -> httpx.Response:
    return await service.client.get(path, headers={"Host": host})


async def post(service: Service, host: str, origin: str) -> httpx.Response:
    return await service.ask(headers={"Host": host, "Origin": origin})


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST:8000",
        "127.0.0.1",
        "127.0.0.1:80",
        "127.8.9.1:8000",
        "[::1]",
        "[::1]:8000",
    ],
)
async def test_local_hosts_are_answered(service: Service, host: str) -> None:
    """Without keys this machine's own names are answered, whatever the port."""
    assert (await get(service, host)).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example#localhost",
        "evil@localhost",
        "192.168.1.5:8000",
        "[::2]",
        "",
    ],
)
async def test_other_hosts_are_refused(service: Service, host: str) -> None:
    """Without keys a page whose name leads here (DNS rebinding) gets a 421 that names the setting,
    while probes and metrics answer."""
    before = counted("vouchsafe_rejections_total", reason="host-refused")
    for path in ("/models", "/", "/docs/assets/favicon.png", "/nowhere"):
        refused = problem(await get(service, host, path), 421, "host-refused")
        assert "VOUCHSAFE_ALLOWED_HOSTS" in refused["detail"]
        assert json.dumps(host) in refused["detail"]
    assert counted("vouchsafe_rejections_total", reason="host-refused") == before + 4
    for probe in ("/livez", "/readyz", "/startupz", "/metrics"):
        assert (await get(service, host, probe)).status_code == 200


async def test_two_hosts_are_no_local_host(service: Service) -> None:
    """A second Host header does not hide the first."""
    request = service.client.build_request("GET", "/models")
    request.headers = httpx.Headers([("Host", "localhost"), ("Host", "evil.example")])
    problem(await service.client.send(request), 421, "host-refused")


async def test_named_hosts_are_answered_too() -> None:
    """VOUCHSAFE_ALLOWED_HOSTS adds hosts, in any case and with any port; `*` is any host."""
    async with serving(allowed_hosts="Cat.example, [fd00::1]") as service:
        for host in ("cat.example", "CAT.example:8000", "[fd00::1]:80", "localhost"):
            assert (await get(service, host)).status_code == 200
        problem(await get(service, "dog.example"), 421, "host-refused")
    async with serving(allowed_hosts="*") as service:
        assert (await get(service, "dog.example")).status_code == 200


async def test_keys_answer_any_host_unless_hosts_are_named() -> None:
    """With keys any host is answered, for a page cannot know one; named hosts hold all the same."""
    keys = {"api_keys": "ann:key-of-ann"}
    bearer = {"Authorization": "Bearer key-of-ann", "Origin": FOREIGN, "Host": "dog.example"}
    async with serving(**keys) as service:
        assert (await service.ask(headers=bearer)).status_code == 200
    async with serving(**keys, allowed_hosts="cat.example") as service:
        problem(await service.ask(headers=bearer), 421, "host-refused")


@pytest.mark.parametrize(
    "origin",
    [FOREIGN, "null", "http://localhost:9000", "http://localhost", "http://[x", "http://[x]y"],
)
async def test_forms_of_other_origins_are_refused(service: Service, origin: str) -> None:
    """A POST or DELETE that another origin's page sends is a 403 that names the setting; its GET,
    whose answer that page cannot read, is answered."""
    refused = problem(await post(service, "localhost:8000", origin), 403, "origin-refused")
    assert "VOUCHSAFE_CORS_ORIGINS" in refused["detail"]
    headers = {"Host": "localhost:8000", "Origin": origin}
    deleted = await service.client.delete("/jobs/x", headers=headers)
    problem(deleted, 403, "origin-refused")
    listed = await service.client.get("/models", headers=headers)
    assert listed.status_code == 200
    assert "access-control-allow-origin" not in listed.headers


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000"])
async def test_forms_of_the_same_origin_are_answered(service: Service, host: str) -> None:
    """The service's own page may send what it likes, behind a proxy that ends TLS too."""
    for scheme in ("http", "https"):
        assert (await post(service, host, f"{scheme}://{host}")).status_code == 200


async def preflight(service: Service, origin: str) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    return await service.client.options("/predict", headers=headers)


@pytest.mark.parametrize("keys", [{}, {"api_keys": "ann:key-of-ann"}])
async def test_named_origins_may_call_and_read(keys: dict[str, Any]) -> None:
    """VOUCHSAFE_CORS_ORIGINS lets the pages of those origins ask and read answers, with keys and
    without, and no other page."""
    origin = "https://app.example"
    async with serving(**keys, cors_origins=f"{origin}, http://b.example:3000") as service:
        asked = await preflight(service, origin)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == origin
        bearer = {"Authorization": "Bearer key-of-ann", "Origin": origin}
        answer = await service.ask(headers=bearer)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "Retry-After" in answer.headers["access-control-expose-headers"]
        assert (await preflight(service, FOREIGN)).status_code == 400
        other = await service.ask(headers={**bearer, "Origin": FOREIGN})
        assert "access-control-allow-origin" not in other.headers
        assert other.status_code == (200 if keys else 403)


async def test_no_origin_is_named_by_default() -> None:
    """Without the setting a preflight finds no permission."""
    async with serving(api_keys="ann:key-of-ann") as service:
        asked = await preflight(service, "https://app.example")
    assert "access-control-allow-origin" not in asked.headers
