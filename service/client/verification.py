"""Verification of certificates on the caller's machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from .types import CertificateDocument, VerificationResponse

Certificate = str | Path | Mapping[str, Any]
"""The path of a certificate, its document with the signature, or an answer that holds one."""


def verified(
    certificate: Certificate,
    jwks: str | Path | Mapping[str, Any],
    image: bytes | str | Path | None,
) -> VerificationResponse:
    """The checks of a certificate, as `vouchsafe verify` makes them.

    `jwks` are the public keys, a document or its path; with `image` the subject is checked too.

    Raises ValueError for what is no certificate and for a malformed JWKS, OSError for an unreadable
    file, and ImportError where the verifier's libraries are missing.
    """
    try:
        from service.predictions.verification import Verifier
        from service.signing import read_jwks
    except ImportError as error:
        raise ImportError(
            f"verify needs the service's libraries ({error}): pip install . in the checkout"
        ) from error

    picture = Path(image).read_bytes() if isinstance(image, str | Path) else image
    document, checks = Verifier(_text(certificate), read_jwks(_content(jwks)), picture).checks()
    if document is None:
        raise ValueError(f"this is no certificate: {checks[0].detail}")
    return {
        "passed": all(check.passed is not False for check in checks),
        "document": cast(CertificateDocument, document.model_dump()),
        "checks": [
            {"name": check.name, "passed": check.passed, "detail": check.detail} for check in checks
        ],
    }


def _text(certificate: Certificate) -> bytes:
    if isinstance(certificate, Mapping) and "jws" not in certificate:
        certificate = certificate.get("certificate") or {}
        if not certificate:
            raise ValueError("this has no certificate: only a certified answer has one")
    return _content(certificate)


def _content(document: str | Path | Mapping[str, Any]) -> bytes:
    """A file's bytes, or the document's JSON."""
    if isinstance(document, Mapping):
        return json.dumps(document).encode()
    return Path(document).read_bytes()
