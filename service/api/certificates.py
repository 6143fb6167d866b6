"""Endpoints of certificates and of the public keys that verify them."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from service import errors
from service.api.auth import caller
from service.api.problems import KEYED, problem_responses
from service.api.requests import read_body
from service.predictions.document import CertificateDocument, SignedCertificate
from service.predictions.service import Predictions
from service.predictions.verification import MOST_BYTES, Verifier

MEDIA_TYPE = "application/jwk-set+json"

certificates = APIRouter(tags=["certificates"])


class CheckResponse(BaseModel):
    """One check of a certificate."""

    name: str = Field(description="The check, as `vouchsafe verify` names it.")
    passed: bool | None = Field(description="Whether it passed; null where it was not made.")
    detail: str = Field(description="What was found.")


class VerificationResponse(BaseModel):
    """The checks of a certificate by the keys of this service."""

    passed: bool = Field(description="Whether no check failed.")
    document: CertificateDocument | None = Field(description="What was signed, where readable.")
    checks: list[CheckResponse] = Field(description="The checks, in order.")


@certificates.post(
    "/certificates/verify",
    responses={
        **KEYED,
        **problem_responses(
            errors.MalformedRequest, errors.TooLarge, errors.UnsupportedMedia, errors.BodyTimeout
        ),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "The certificate, as its file has it.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        }
    },
)
async def verify_certificate(
    request: Request, owner: Annotated[str | None, Depends(caller)]
) -> VerificationResponse:
    """Check a certificate by this service's own keys; `vouchsafe verify` needs no service."""
    text = await read_body(request, MOST_BYTES)
    verifier = Verifier(text, request.app.state.services.keys.jwks)
    document, checks = await asyncio.to_thread(verifier.checks)
    return VerificationResponse(
        passed=all(check.passed is not False for check in checks),
        document=document,
        checks=[CheckResponse(**asdict(check)) for check in checks],
    )


@certificates.get(
    "/certificates/{id}",
    responses={**KEYED, **problem_responses(errors.NotFound)},
)
async def get_certificate(
    id: str, request: Request, owner: Annotated[str | None, Depends(caller)]
) -> SignedCertificate:
    """The certificate of an answer to the same key, for as long as the answer's job is kept."""
    predictions: Predictions = request.app.state.services.predictions
    return await predictions.certificate(id, owner)


@certificates.get(
    "/.well-known/jwks.json",
    response_class=Response,
    responses={
        200: {
            "description": "A JWK Set (RFC 7517), and the commitments to the noise secrets",
            "content": {MEDIA_TYPE: {"schema": {"type": "object"}}},
        }
    },
)
async def get_jwks(request: Request) -> Response:
    """The public keys that verify certificates, today's first; needs no key."""
    return JSONResponse(dict(request.app.state.services.keys.jwks), media_type=MEDIA_TYPE)
