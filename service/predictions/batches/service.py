"""Batches without HTTP: one question about many images, whose statements hold together."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import IO

from models.certificates.alpha import family_share
from service.background import sleep_or_stop
from service.config import Settings
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

    `acquire` holds the lock of a batch.
    """

    def __init__(
        self, settings: Settings, predictions: Predictions, keys: SigningKeys, acquire: Acquire
    ) -> None:
        self._settings, self._predictions, self._keys = settings, predictions, keys
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
    ) -> BatchResponse:
        """The new batch of the question about each image, with one of `names` each.

        The question's alpha is that of the whole batch. Each image's question gets an equal share,
        repeats counted; the share of an image without an answer goes to no other.

        Raises InvalidField for a question that its share of alpha cannot answer, Overloaded where
        the disk is full, and all that `Predictions.resolved` and `BatchStore.create` raise.
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
        try:
            await asyncio.to_thread(self._store.create, batch, images)
        except OSError as error:
            detail = f"The batch cannot be stored: {error.strerror}"
            raise Overloaded(detail, retry_after=RETRY_SECONDS) from error
        return _to_response(batch, 0, has_begun=False)

    async def get(self, batch_id: str, owner: str | None) -> BatchResponse:
        """The batch; raises NotFound for an unknown one and for another owner's."""
        batch = await self._owned(batch_id, owner)
        try:
            done = await asyncio.to_thread(self._store.done, batch_id)
        except FileNotFoundError as error:
            raise _gone() from error
        return _to_response(batch, len(done), has_begun=self._store.has_begun(batch_id))

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
        while True:
            try:
                batch = await asyncio.to_thread(self._store.get, batch_id)
                lines = await asyncio.to_thread(self._store.lines, batch_id, sent)
            except (FileNotFoundError, NotFound):
                return
            for line in lines.values():
                yield line
            sent.update(lines)
            if batch.state.ended or self._predictions.draining.is_set():
                return
            await sleep_or_stop(self._predictions.draining, FOLLOW_SECONDS)

    async def manifest(self, batch_id: str, owner: str | None) -> SignedManifest:
        """The signed list of an ended batch's certificates; raises NotFound for an open one."""
        batch = await self._owned(batch_id, owner)
        if batch.finished is None:
            raise NotFound("The batch has not ended; its manifest is made at its end")
        try:
            certificates = await asyncio.to_thread(self._certificates, batch_id)
        except FileNotFoundError as error:
            raise _gone() from error
        document = _manifest(batch, certificates)
        jws = self._keys.sign(canonical(document.model_dump()))
        return SignedManifest(document=document, jws=jws)

    def _certificates(self, batch_id: str) -> list[ListedCertificate]:
        """The entries of all certificates; takes about a second for 1,000."""
        found = [_listed(line) for line in self._store.lines(batch_id).values()]
        return [each for each in found if each is not None]

    async def _owned(self, batch_id: str, owner: str | None) -> Batch:
        batch = await asyncio.to_thread(self._store.get, batch_id)
        if batch.owner != owner:
            raise _gone()
        return batch


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
