"""Demonstrations by a real server in one process: nano's networks, its worker, and HTTP."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.runtime import Torch
from service.api.app import create_app
from service.config import Settings
from service.processes.embedded import Embedded
from tests.support.paths import ROOT
from tests.support.pictures import l2

FILE = (ROOT / "docs" / "ship.png").read_bytes()
SHIP = np.array(Image.open(BytesIO(FILE)).convert("RGB"))


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the embedded service, once its worker serves the default task."""
    embedded, failed = Embedded(Settings(data_dir=tmp_path), Torch()), asyncio.Event()
    app = create_app(embedded.services([embedded.worker(on_failure=failed.set)]))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service", timeout=120) as found,
    ):
        async with asyncio.timeout(120):
            await embedded.ready()
        yield found
        assert not failed.is_set()


def pixels(address: str) -> NDArray[np.uint8]:
    """The pixels (H,W,3) of a PNG's data address."""
    return np.array(Image.open(BytesIO(b64decode(address.partition(",")[2]))))


async def ask(client: httpx.AsyncClient, **fields: str) -> Any:
    response = await client.post("/demonstrations", files={"image": FILE}, data=fields)
    assert response.status_code == 200, response.text
    return response.json()


async def test_rows_and_an_attack_beside_a_certificate(client: httpx.AsyncClient) -> None:
    """All are computed; each demonstration has rows of its own, the answer those of its key."""
    certifying = asyncio.create_task(client.post("/predict", files={"image": FILE}))
    rows, again, attack = [
        await ask(client),
        await ask(client),
        await ask(client, kind="attack", epsilon="0.5"),
    ]
    answer = (await certifying).json()
    assert (answer["label"], answer["certified"]) == ("ship", True)
    assert (await client.post("/predict", files={"image": FILE})).json()["p_lower"] == (
        answer["p_lower"]
    )

    assert len(rows["samples"]) == 6
    assert np.array_equal(pixels(rows["seen"]), SHIP)
    for sample in rows["samples"]:
        assert sample["label"] in answer["labels"]
        noisy, denoised = pixels(sample["noisy"]), pixels(sample["denoised"])
        assert noisy.shape == denoised.shape == SHIP.shape
        # Cutting to 8 bits only shortens noise, whose length is .25 sqrt(3072) = 13.86 +- 5 * .18.
        assert l2(denoised, SHIP) < l2(noisy, SHIP) < 14.8
        assert l2(noisy, SHIP) > 10
    noises = {sample["noisy"] for each in (rows, again) for sample in each["samples"]}
    assert len(noises) == 12

    attacked = pixels(attack["image"])
    assert l2(attacked, SHIP) == pytest.approx(attack["l2"], abs=1e-12)
    assert 0.45 < attack["l2"] <= attack["epsilon"] == 0.5
    for each in (rows, attack):
        assert not {"certificate", "radius", "label", "p_lower"} & each.keys()
    metrics = (await client.get("/metrics")).text
    assert 'vouchsafe_demonstrations_total{kind="attack",outcome="succeeded"}' in metrics


async def test_attacked_picture_is_asked_again(client: httpx.AsyncClient) -> None:
    """It is not touched on its way back: at its resolution, it is what is certified."""
    attack = await ask(client, kind="attack", epsilon="0.25")
    sent = b64decode(attack["image"].partition(",")[2])
    first = (await client.post("/demonstrations", files={"image": sent})).json()
    assert np.array_equal(pixels(first["seen"]), pixels(attack["image"]))
    clean = (await client.post("/predict", files={"image": FILE})).json()
    answer = (await client.post("/predict", files={"image": sent})).json()
    assert answer["label"] in (clean["label"], None)  # 0.25 is within the radius.
    assert clean["radius"] > attack["l2"]
