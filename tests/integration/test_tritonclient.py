"""The Open Inference Protocol, by Triton's own client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.listening import listening
from tests.support.paths import ROOT
from tests.support.serving import DIGEST, Service

http: Any = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
SHIP = ROOT / "docs" / "ship.png"


def file_input(path: Path) -> Any:
    tensor = http.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([path.read_bytes()], dtype=object))
    return tensor


def pixel_input(path: Path) -> Any:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    tensor = http.InferInput("image", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels)
    return tensor


def test_tritonclient_has_an_answer_with_its_certificate() -> None:
    """Health, metadata, an image's file, its pixels, single outputs, and errors in words."""
    with listening(Service()) as server:
        client = http.InferenceServerClient(server.url.removeprefix("http://"))
        try:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("default", DIGEST)
            assert client.get_model_metadata("default")["versions"] == [DIGEST]
            asked = {"n": 300, "sigma": 0.25}
            answer = client.infer("default", [file_input(SHIP)], parameters=asked)
            assert answer.as_numpy("certified").tolist() == [True]
            assert answer.as_numpy("radius")[0] > 0
            assert len(answer.as_numpy("certificate")[0]) > 10
            wanted = [http.InferRequestedOutput("label", binary_data=False)]
            again = client.infer("default", [pixel_input(SHIP)], outputs=wanted, parameters=asked)
            assert again.as_numpy("label")[0] == answer.as_numpy("label")[0].decode()
            assert again.as_numpy("radius") is None
            with pytest.raises(Exception, match=r"\[422\] sigma: .*less than or equal to 4"):
                client.infer("default", [file_input(SHIP)], parameters={"sigma": 9})
        finally:
            client.close()
