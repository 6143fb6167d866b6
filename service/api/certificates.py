"""Endpoints of certificates and of the public keys that verify them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from service import errors
from service.api.auth import caller
from service.api.problems import KEYED, problem_responses
from service.predictions.document import SignedCertificate
from service.predictions.service import Predictions

MEDIA_TYPE = "application/jwk-set+json"

certificates = APIRouter(tags=["certificates"])


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
