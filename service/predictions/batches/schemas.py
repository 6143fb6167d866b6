"""Documents of batches over HTTP, and the signed manifest of a batch's certificates."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from service.jobs import State
from service.predictions.document import Issuer, Section, Sha256
from service.predictions.question import AnyMode

TYPE: Final = "urn:vouchsafe:batch-manifest:1"
"""The format's name; another format has another number."""


class BatchResponse(BaseModel):
    """A batch, whether or not it has ended."""

    id: str = Field(description="The batch's id.")
    state: Annotated[State, WithJsonSchema({"enum": [state.value for state in State]})] = Field(
        description="`succeeded` once every image has a line; `failed` where no line is an answer."
    )
    progress: float = Field(description="Share of the images that have a line, from 0 to 1.")
    total: int = Field(description="m: the images, repeats and unusable ones included.")
    done: int = Field(description="Images that have a line in /batches/{id}/results.")
    task: str = Field(description="The requested task.")
    mode: AnyMode = Field(description="The requested mode.")
    family_alpha: float = Field(
        description="Probability that any of the batch's statements is wrong."
    )
    alpha: float = Field(description="The share of one image: `family_alpha` / m.")
    created: float = Field(description="When the batch was accepted, in Unix seconds.")
    finished: float | None = Field(description="When it ended, or null.")
    problem: dict[str, Any] | None = Field(
        description="Why the first image has no answer, where no image has one."
    )


class ListedCertificate(Section):
    """One certificate of a batch."""

    index: int = Field(description="The image's place in the batch, from 0.")
    id: str = Field(description="The certificate's id.")
    sha256: Sha256 = Field(description="SHA-256 of the certificate's document, as signed.")


class ManifestDocument(Section):
    """Everything that a manifest states."""

    type: Literal["urn:vouchsafe:batch-manifest:1"] = Field(description="The format.")
    batch: str = Field(description="The batch's id.")
    statement: str = Field(description="What holds of all certificates, in one sentence.")
    family_alpha: float = Field(description="Probability that any certificate is wrong.")
    alpha: float = Field(description="The alpha of each certificate.")
    m: int = Field(description="The batch's images, fixed as the batch was accepted.")
    certificates: list[ListedCertificate] = Field(description="All certificates of the batch.")
    service: Issuer


class SignedManifest(Section):
    """A manifest: the document, and a signature over its canonical bytes (RFC 8785)."""

    document: ManifestDocument
    jws: str = Field(description="A compact JWS (RFC 7515) whose payload is the document.")
