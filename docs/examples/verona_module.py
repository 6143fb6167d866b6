"""A task of a running service as a verification module of VERONA (`ada-verona`).

VERONA's epsilon is an l-infinity radius. The service proves one with every certificate, so one
question answers for each epsilon of a picture.
"""

from __future__ import annotations

import time
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from ada_verona.database.verification_context import VerificationContext
from ada_verona.database.verification_result import CompleteVerificationData, VerificationResult
from ada_verona.verification_module.verification_module import VerificationModule
from PIL import Image
from vouchsafe import Client


class CertifiedModule(VerificationModule):
    """Verifies the task `task` instead of the context's network, whose name VERONA records.

    Pictures are (3,R,R) in [0,1], on the grid of 1/255, at the task's resolution R. Classes are
    indices of its labels. `question` has further fields of `POST /predict`. UNSAT: no change within
    epsilon changes the label, except with probability alpha a picture. SAT: the picture itself has
    another label. TIMEOUT: neither is proven.
    """

    def __init__(self, client: Client, task: str = "default", **question: Any) -> None:
        self.name = f"vouchsafe [{task}]"
        self._answer = lru_cache(1)(lambda png: client.predict(png, task=task, **question))

    def verify(
        self, verification_context: VerificationContext, epsilon: float
    ) -> CompleteVerificationData:
        """The result for one epsilon; raises ValueError for data of another shape or grid."""
        began, point = time.perf_counter(), verification_context.data_point
        answer = self._answer(_png(point.data.numpy()))
        side = answer["resolution"]
        if tuple(point.data.shape[-2:]) != (side, side):
            raise ValueError(f"data has shape {tuple(point.data.shape)}: must be (3,{side},{side})")
        if not answer["certified"]:
            result = VerificationResult.TIMEOUT
        elif answer["label_index"] != point.label:
            result = VerificationResult.SAT
        else:
            proven = epsilon * 255 < answer["attack_norms"]["linf_gray_levels"]
            result = VerificationResult.UNSAT if proven else VerificationResult.TIMEOUT
        return CompleteVerificationData(result=result, took=time.perf_counter() - began)


def _png(data: np.ndarray) -> bytes:
    levels = np.rint(data.clip(0, 1) * 255)
    if np.abs(data * 255 - levels).max() > 1e-3:
        raise ValueError("data is not on the grid of 1/255, on which the radius would hold")
    pixels = levels.reshape(data.shape[-3:]).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(pixels).save(content := BytesIO(), "PNG")
    return content.getvalue()
