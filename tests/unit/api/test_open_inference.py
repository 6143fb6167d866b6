"""The Open Inference Protocol by hand: metadata, health, tensors in JSON and binary, errors."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.serving import DIGEST, PNG, Service, serving

INFER = "/v2/models/default/infer"
LENGTH = "Inference-Header-Content-Length"


def bytes_input(**parameters: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": "BYTES", "shape": [1], **parameters}


def uint8_input(shape: list[int], **more: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": "UINT8", "shape": shape, **more}


def outputs(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return {each["name"]: each["data"][0] for each in response.json()["outputs"]}


async def infer(service: Service, tensor: dict[str, Any], **more: Any) -> httpx.Response:
    return await service.client.post(INFER, json={"inputs": [tensor], **more})


async def infer_binary(
    service: Service, document: dict[str, Any], binary: bytes, length: int | None = None
) -> httpx.Response:
    header = json.dumps(document).encode()
    headers = {LENGTH: str(len(header) if length is None else length)}
    return await service.client.post(INFER, content=header + binary, headers=headers)


def error(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    found: str = response.json()["error"]
    return found


async def test_server_and_models_are_described() -> None:
    """A task is a model, and the digests that live workers serve are its versions."""
    async with serving() as service:
        about = (await service.client.get("/v2")).json()
        assert about["name"] == "vouchsafe"
        assert about["extensions"] == ["binary_tensor_data"]
        model = (await service.client.get("/v2/models/default")).json()
        assert (model["name"], model["versions"]) == ("default", [DIGEST])
        assert {each["datatype"] for each in model["inputs"]} == {"BYTES", "UINT8"}
        assert "radius" in [each["name"] for each in model["outputs"]]
        version = f"/v2/models/default/versions/{DIGEST}"
        assert (await service.client.get(version)).json() == model
        for path in ("/v2/models/default/ready", f"{version}/ready"):
            assert (await service.client.get(path)).status_code == 200
        other = await service.client.get("/v2/models/default/versions/0")
        assert error(other, 404) == "No live worker serves version 0 of task default"
        absent = await service.client.get("/v2/models/pets")
        assert "There is no task" in error(absent, 404)


async def test_health_is_ready_where_a_worker_computes_only() -> None:
    """/readyz is well without workers, since ended jobs can be requested; v2 is not."""

    async def idle(stop: asyncio.Event) -> None:
        await stop.wait()

    async with serving() as service:
        assert (await service.client.get("/v2/health/live")).json() == {"live": True}
        assert (await service.client.get("/v2/health/ready")).status_code == 200
    async with serving(background_tasks=[idle]) as service:
        assert (await service.client.get("/v2/health/live")).status_code == 200
        response = await service.client.get("/v2/health/ready")
        assert response.status_code == 503
        assert response.json()["ready"] is False
        assert (await service.client.get("/v2/models/default/ready")).status_code == 503


async def test_an_image_file_is_answered_as_by_predict() -> None:
    """In JSON as base64, and binary with its length before it; parameters are fields."""
    async with serving() as service:
        asked = {"n": 300, "n0": 40, "sigma": 0.5}
        expected = (await service.ask(**asked)).json()
        found = await infer(
            service, bytes_input(data=[b64encode(PNG).decode()]), parameters=asked, id="mine"
        )
        got = outputs(found)
        for name in ("label", "label_index", "certified", "abstained", "radius", "p_lower"):
            assert got[name] == expected[name]
        assert got["certificate"] == expected["certificate"]["document"]["id"]
        document = found.json()
        assert (document["id"], document["model_name"]) == ("mine", "default")
        assert document["model_version"] == DIGEST
        element = len(PNG).to_bytes(4, "little") + PNG
        tensor = bytes_input(parameters={"binary_data_size": len(element)})
        binary = await infer_binary(service, {"inputs": [tensor], "parameters": asked}, element)
        assert outputs(binary) == got


async def test_pixels_are_answered_whatever_their_layout() -> None:
    """[H,W,3] or [3,H,W], with a leading 1, in JSON or binary: the same certificate as the PNG."""
    with Image.open(BytesIO(PNG)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    async with serving() as service:
        label = (await service.ask(n=300)).json()["certificate"]["document"]["id"]
        for array in (pixels, pixels.transpose(2, 0, 1), pixels[None]):
            listed = uint8_input(list(array.shape), data=array.ravel().tolist())
            got = outputs(await infer(service, listed, parameters={"n": 300}))
            assert got["certified"] is True
            assert got["label"]
            size = {"binary_data_size": array.size}
            tensor = uint8_input(list(array.shape), parameters=size)
            document = {"inputs": [tensor], "parameters": {"n": 300}}
            binary = await infer_binary(service, document, array.tobytes())
            assert outputs(binary) == got
        assert label


async def test_outputs_are_binary_where_wanted() -> None:
    """Those of the whole request, or one by one; the JSON's length is in the response's header."""
    async with serving() as service:
        tensor = bytes_input(data=[b64encode(PNG).decode()])
        plain = outputs(await infer(service, tensor, parameters={"n": 300}))
        whole = await infer(service, tensor, parameters={"n": 300, "binary_data_output": True})
        length = int(whole.headers[LENGTH])
        described, rest = json.loads(whole.content[:length])["outputs"], whole.content[length:]
        read: dict[str, Any] = {}
        for each in described:
            size = each["parameters"]["binary_data_size"]
            value, rest = rest[:size], rest[size:]
            kind = {"BYTES": None, "INT32": "<i4", "BOOL": "?", "FP64": "<f8"}[each["datatype"]]
            read[each["name"]] = (
                value[4:].decode() if kind is None else np.frombuffer(value, kind)[0].item()
            )
        assert rest == b""
        assert read == plain
        wanted = [{"name": "radius", "parameters": {"binary_data": True}}, {"name": "label"}]
        some = await infer(service, tensor, parameters={"n": 300}, outputs=wanted)
        document = json.loads(some.content[: int(some.headers[LENGTH])])
        assert [each["name"] for each in document["outputs"]] == ["radius", "label"]
        assert "data" in document["outputs"][1]
        assert some.content[int(some.headers[LENGTH]) :] == np.float64(plain["radius"]).tobytes()


async def test_a_label_without_a_certificate_says_so() -> None:
    """In predict mode nothing is certified, and radius, bound and certificate are empty."""
    async with serving() as service:
        tensor = bytes_input(data=b64encode(PNG).decode())
        got = outputs(await infer(service, tensor, parameters={"mode": "predict"}))
    assert got["label"]
    assert (got["certified"], got["radius"], got["p_lower"]) == (False, 0.0, 0.0)
    assert got["certificate"] == ""


@pytest.mark.parametrize(
    ("tensor", "more", "reason"),
    [
        (bytes_input(data=["*"]), {}, "image: data must be one image's file in base64"),
        (bytes_input(data=["", ""]), {}, "image: data must be one image's file in base64"),
        (bytes_input(shape=[2], data=[]), {}, "image: shape is [2]: send one image a request"),
        (
            {"name": "image", "datatype": "FP32", "shape": [1]},
            {},
            "image: datatype is FP32: send BYTES",
        ),
        (
            {"name": "x", "datatype": "BYTES", "shape": [1]},
            {},
            "inputs: they are x; send one, image",
        ),
        (uint8_input([2, 2], data=[0] * 4), {}, "shape is [2, 2]: it must be [H, W, 3]"),
        (uint8_input([1, 1, 3], data=[0, 0]), {}, "data must be 3 whole numbers from 0 to 255"),
        (uint8_input([1, 1, 3], data=[0, 0, 256]), {}, "data has 256; the values must be from 0"),
        (uint8_input([1, 1, 3], data=[0, 0, 0.5]), {}, "data must be 3 whole numbers"),
        (
            uint8_input([1, 1, 3], parameters={"binary_data_size": 3}),
            {},
            "binary_data_size is 3, and 0 bytes follow the JSON",
        ),
        (
            bytes_input(data=[b64encode(PNG).decode()]),
            {"outputs": [{"name": "logits"}]},
            "outputs: there is no logits; there are label, label_index",
        ),
        (
            bytes_input(data=[b64encode(PNG).decode()]),
            {"parameters": {"sigma": -1}},
            "sigma: Input should be greater than or equal to 0.02",
        ),
        (
            bytes_input(data=[b64encode(PNG).decode()]),
            {"parameters": {"sigmas": 1}},
            "there is no field 'sigmas'; did you mean sigma?",
        ),
        (
            bytes_input(data=[b64encode(PNG).decode()]),
            {"parameters": {"task": "pets"}},
            "parameters.task: the address names the task",
        ),
        (
            bytes_input(data=[b64encode(PNG).decode()]),
            {"parameters": {"binary_data_output": "false"}},
            'parameters.binary_data_output: it is "false", and must be true or false',
        ),
        (
            bytes_input(data=[b64encode(PNG).decode()]),
            {"outputs": [{"name": "label", "parameters": {"binary_data": "false"}}]},
            "outputs.0.parameters.binary_data: Input should be a valid boolean",
        ),
        (
            bytes_input(data=[b64encode(PNG).decode()]),
            {"parameters": {f"p{index}": 1 for index in range(21)}},
            "parameters: Dictionary should have at most 20 items",
        ),
        (
            bytes_input(parameters={"binary_data_size": -1}),
            {},
            "inputs.0.parameters.binary_data_size: Input should be greater than or equal to 0",
        ),
    ],
)
async def test_bad_requests_name_the_field_and_the_limit(
    tensor: dict[str, Any], more: dict[str, Any], reason: str
) -> None:
    """In the protocol's form."""
    async with serving() as service:
        assert reason in error(await infer(service, tensor, **more), 422)


async def test_broken_bodies_are_refused() -> None:
    """No image, no JSON, a header longer than the body, an element of another length."""
    async with serving() as service:
        gif = await infer(service, bytes_input(data=[b64encode(b"GIF89a").decode()]))
        assert error(gif, 415) == "The image is not a JPEG, PNG or WebP"
        broken = await service.client.post(INFER, content=b"{")
        assert error(broken, 400)
        longer = await infer_binary(service, {"inputs": []}, b"", length=99)
        assert error(longer, 400) == f"{LENGTH} is 99, and the body has 14 bytes"
        tensor = bytes_input(parameters={"binary_data_size": 6})
        short = await infer_binary(service, {"inputs": [tensor]}, b"\x09\x00\x00\x00ab")
        assert "the element's length is 9, and 2 bytes follow it" in error(short, 422)
        packed = {"Content-Encoding": "gzip"}
        zipped = await service.client.post(INFER, content=b"\x1f\x8b", headers=packed)
        expected = 'Content-Encoding is "gzip": send the body uncompressed'
        assert error(zipped, 415) == expected
        flat = uint8_input([1, 2, 3], parameters={"binary_data_size": 3})
        few = await infer_binary(service, {"inputs": [flat]}, b"abc")
        assert "of 6 bytes, and 3 came" in error(few, 422)


async def test_every_address_has_the_errors_of_the_protocol() -> None:
    """Also /v2 itself, and addresses that do not exist; /v2x is none of the protocol's."""
    async with serving() as service:
        assert error(await service.client.delete("/v2"), 405)
        assert error(await service.client.get("/v2/nothing"), 404) == "Not Found"
        assert "type" in (await service.client.get("/v2x")).json()


async def test_keys_are_needed_but_for_health() -> None:
    """As for every route with data."""
    async with serving(api_keys="ann:key-of-ann") as service:
        assert (await service.client.get("/v2/health/live")).status_code == 200
        assert (await service.client.get("/v2/health/ready")).status_code == 200
        for path in ("/v2", "/v2/models/default", "/v2/models/default/ready"):
            assert (await service.client.get(path)).status_code == 401
        keyed = {"Authorization": "Bearer key-of-ann"}
        assert (await service.client.get("/v2", headers=keyed)).status_code == 200
