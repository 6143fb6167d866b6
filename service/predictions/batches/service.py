"""Batches without HTTP: one question about many images, whose statements hold together."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import IO

from models.certificates.alpha import family_share
from service.background import sleep_or_stop
from service.config import Settings
from service.engine.limits import another_request
from service.engine.protocol import RETRY_SECONDS
from service.errors import NotFound, Overloaded
from service.jobs import State
from service.operations.metrics import VERSION
from service.predictions.admission import check_rows
from service.predictions.batches.runner import Acquire, BatchRunner
from service.predictions.batches.schemas import (
    TYPE,
    BatchResponse,
    ListedCertificate,
    ManifestDocument,
    SignedManifest,
)
from service.predictions.batches.store import Batch, BatchStore
from service.predictions.certificate import rfc3339
from service.predictions.checks import check_question
from service.predictions.document import Issuer
from service.predictions.question import PredictRequest
from service.predictions.service import Predictions
from service.signing import SigningKeys, canonical

FOLLOW_SECONDS = 0.2
"""Seconds between two looks for new lines of a batch that is being read."""


class Batches:
    """Accepts batches, and reads what has become of them; `run` works on them.

    `acquire` holds the lock of a batch. The `secret` makes the ids of batches with an
    Idempotency-Key, the same in every process.
    """

    def __init__(
        self,
        settings: Settings,
        predictions: Predictions,
        keys: SigningKeys,
        secret: bytes,
        acquire: Acquire,
    ) -> None:
        self._settings, self._predictions, self._keys = settings, predictions, keys
        self._secret = secret
        self._store = BatchStore(settings)
        self._runner = BatchRunner(predictions, self._store, acquire)

    async def run(self, stop: asyncio.Event) -> None:
        """Background task: works on open batches until `stop`."""
        await self._runner.run(stop)

    async def create(
        self,
        question: PredictRequest,
        images: Sequence[IO[bytes]],
        names: Sequence[str],
        owner: str | None,
        idempotency_key: str | None = None,
    ) -> BatchResponse:
        """The new batch of the question about each image, with one of `names` each.

        The question's alpha is that of the whole batch. Each image's question gets an equal share,
        repeats counted; the share of an image without an answer goes to no other. A batch of the
        same `idempotency_key` and request is returned as it is.

        Raises InvalidField for a question that its share of alpha cannot answer, Overloaded where
        the disk is full, IdempotencyMismatch where the key came with another request, and all that
        `Predictions.resolved` and `BatchStore.create` raise.
        """
        family_alpha, share = question.alpha, family_share(question.alpha, len(images))
        question = await self._predictions.resolved(question.model_copy(update={"alpha": share}))
        check_question(question, self._predictions.bundle(question.task))
        check_rows(question, owner, self._settings)
        batch = Batch(
            id=secrets.token_urlsafe(16),
            owner=owner,
            created=time.time(),
            family_alpha=family_alpha,
            fields=question.model_dump(mode="json", exclude={"image"}),
            names=names,
        )
        if idempotency_key is not None:
            fingerprint = await asyncio.to_thread(_fingerprint, batch, images)
            batch_id = self._id(owner, idempotency_key)
            batch = replace(batch, id=batch_id, fingerprint=fingerprint)
        try:
            await asyncio.to_thread(self._store.create, batch, images)
        except FileExistsError:
            if (await self._owned(batch.id, owner)).fingerprint != batch.fingerprint:
                raise another_request() from None
            return await self.get(batch.id, owner)
        except OSError as error:
            detail = f"The batch cannot be stored: {error.strerror}"
            raise Overloaded(detail, retry_after=RETRY_SECONDS) from error
        return _to_response(batch, 0, has_begun=False)

    def _id(self, owner: str | None, idempotency_key: str) -> str:
        named = canonical(["batch", owner, idempotency_key])
        digest = hmac.digest(self._secret, named, "sha256")
        return urlsafe_b64encode(digest[:16]).rstrip(b"=").decode()

    async def get(self, batch_id: str, owner: str | None) -> BatchResponse:
        """The batch; raises NotFound for an unknown one and for another owner's."""
        batch = await self._owned(batch_id, owner)
        try:
            done = await asyncio.to_thread(self._store.done, batch)
        except FileNotFoundError as error:
            raise _gone() from error
        return _to_response(batch, len(done), has_begun=self._store.has_begun(batch))

    async def delete(self, batch_id: str, owner: str | None) -> None:
        """Erase the batch, and its jobs as soon as the engine is reachable; raises NotFound."""
        await self._owned(batch_id, owner)
        try:
            await asyncio.to_thread(self._store.discard, batch_id)
        except FileNotFoundError as error:
            raise _gone() from error
        await self._runner.erase_discarded()

    async def results(self, batch_id: str) -> AsyncIterator[bytes]:
        """The batch's lines so far, and each further one as it comes, up to the batch's end.

        Ends early where the batch is deleted or the process stops.
        """
        sent: set[int] = set()
        try:
            first = batch = await asyncio.to_thread(self._store.get, batch_id)
            while batch.run == first.run:
                for index in sorted(await asyncio.to_thread(self._store.done, batch) - sent):
                    yield await asyncio.to_thread(self._store.line, batch, index)
                    sent.add(index)
                if batch.state.ended or self._predictions.draining.is_set():
                    return
                await sleep_or_stop(self._predictions.draining, FOLLOW_SECONDS)
                batch = await asyncio.to_thread(self._store.get, batch_id)
        except (FileNotFoundError, NotFound):
            return

    async def manifest(self, batch_id: str, owner: str | None) -> SignedManifest:
        """The signed list of an ended batch's certificates; raises NotFound for an open one."""
        batch = await self._owned(batch_id, owner)
        if batch.finished is None:
            raise NotFound("The batch has not ended; its manifest is made at its end")
        try:
            certificates = await asyncio.to_thread(self._certificates, batch)
        except FileNotFoundError as error:
            raise _gone() from error
        document = _manifest(batch, certificates)
        jws = self._keys.sign(canonical(document.model_dump()))
        return SignedManifest(document=document, jws=jws)

    def _certificates(self, batch: Batch) -> list[ListedCertificate]:
        """The entries of all certificates; takes about a second for 1,000."""
        found = map(_listed, self._store.lines(batch))
        return [each for each in found if each is not None]

    async def _owned(self, batch_id: str, owner: str | None) -> Batch:
        batch = await asyncio.to_thread(self._store.get, batch_id)
        if batch.owner != owner:
            raise _gone()
        return batch


def _fingerprint(batch: Batch, images: Sequence[IO[bytes]]) -> str:
    """SHA-256 (hex) of the request; the files are at their beginning again."""
    hashes = []
    for image in images:
        hashes.append(hashlib.file_digest(image, "sha256").hexdigest())  # type: ignore[arg-type]
        image.seek(0)
    named = [dict(batch.fields), batch.family_alpha, list(batch.names), hashes]
    return hashlib.sha256(canonical(named)).hexdigest()


def _gone() -> NotFound:
    return NotFound("There is no such batch, or no longer")


def _to_response(batch: Batch, done: int, *, has_begun: bool) -> BatchResponse:
    state = State.RUNNING if has_begun and not batch.state.ended else batch.state
    return BatchResponse(
        id=batch.id,
        state=state,
        progress=done / len(batch.names),
        total=len(batch.names),
        done=done,
        task=batch.fields["task"],
        mode=batch.fields["mode"],
        family_alpha=batch.family_alpha,
        alpha=batch.fields["alpha"],
        created=batch.created,
        finished=batch.finished,
        problem=None if batch.problem is None else dict(batch.problem),
    )


def _listed(line: bytes) -> ListedCertificate | None:
    """The entry of a line's certificate, or None for a line without one."""
    read = json.loads(line)
    signed = read.get("result", {}).get("certificate")
    if signed is None:
        return None
    document = signed["document"]
    digest = hashlib.sha256(canonical(document)).hexdigest()
    return ListedCertificate(index=read["index"], id=document["id"], sha256=digest)


def manifest_statement(family_alpha: float, alpha: float, m: int, certificates: int) -> str:
    """The sentence that says what holds of a manifest's certificates (their number)."""
    return (
        f"With probability at least 1 - {canonical(family_alpha).decode()} over the noise, the "
        f"statements of all {certificates} certificates hold together: each is one of {m} "
        f"questions, of which each spends alpha {canonical(alpha).decode()}."
    )


def _manifest(batch: Batch, certificates: list[ListedCertificate]) -> ManifestDocument:
    family_alpha, alpha, m = batch.family_alpha, batch.fields["alpha"], len(batch.names)
    return ManifestDocument(
        type=TYPE,
        batch=batch.id,
        statement=manifest_statement(family_alpha, alpha, m, len(certificates)),
        family_alpha=family_alpha,
        alpha=alpha,
        m=m,
        certificates=certificates,
        service=Issuer(version=VERSION, issued_at=rfc3339(batch.finished or 0.0)),
    )
