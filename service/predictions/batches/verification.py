"""Checks a batch's manifest, and that its certificates are those of the batch's results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from models.certificates.alpha import family_share
from service.predictions.batches.schemas import ListedCertificate, ManifestDocument
from service.predictions.batches.service import manifest_statement
from service.predictions.verification import (
    MOST_BYTES,
    Check,
    Refused,
    Verifier,
    check,
    check_copy,
    check_signer,
    parsed,
)
from service.signing import canonical, read_json, read_signed


@dataclass(frozen=True, slots=True)
class ManifestVerifier:
    """The checks of one manifest, given as the text of its JSON.

    `jwks` adds the check of the signatures. `results` are the lines of the batch's results: one an
    image, and each answer that is certified has its certificate, which is checked too.
    """

    text: bytes
    jwks: Mapping[str, Any] | None = None
    results: Iterable[bytes] | None = None

    def checks(self) -> list[Check]:
        """Every check in order; a manifest that cannot be read has only the first."""
        try:
            signed = read_signed(self.text, MOST_BYTES)
            manifest = parsed(ManifestDocument, signed.payload)
        except ValueError as error:
            return [Check("format", False, str(error))]
        done = [
            Check("format", True, manifest.type),
            check("document", lambda: check_copy(signed)),
            check_signer(signed, self.jwks),
            check("alpha", lambda: _check_alpha(manifest)),
        ]
        if (results := self.results) is not None:
            done.append(check("results", lambda: self._check_results(manifest, results)))
        return done

    def _check_results(self, manifest: ManifestDocument, lines: Iterable[bytes]) -> str:
        listed = {each.index: each for each in manifest.certificates}
        indexes = []
        for line in lines:
            index, result = _indexed(read_json(line))
            indexes.append(index)
            if result.get("certificate") is not None:
                if index not in listed:
                    raise Refused(f"index {index}: the manifest lists no certificate of it")
                self._check_certificate(manifest, listed.pop(index), result)
            elif result.get("certified"):
                raise Refused(f"index {index}: its answer is certified without a certificate")
        if listed:
            raise Refused(f"index {min(listed)}: the results have no certificate of it")
        if len(indexes) != manifest.m or sorted(indexes) != [*range(len(indexes))]:
            raise Refused(f"the results have {len(indexes)} lines: must be one of each of m images")
        return f"have exactly its {len(manifest.certificates)} certificates, each with its alpha"

    def _check_certificate(
        self, manifest: ManifestDocument, listed: ListedCertificate, result: Mapping[str, Any]
    ) -> None:
        certificate = result["certificate"]
        document, checks = Verifier(canonical(certificate), self.jwks).checks()
        for failed in (each for each in checks if each.passed is False):
            raise Refused(f"index {listed.index}: {failed.name}: {failed.detail}")
        found = hashlib.sha256(canonical(certificate["document"])).hexdigest()
        if found != listed.sha256:
            raise Refused(f"index {listed.index}: its document has the SHA-256 {found}")
        if document is None or (document.id, document.question.alpha) != (
            listed.id,
            manifest.alpha,
        ):
            raise Refused(f"index {listed.index}: its certificate has another id or alpha")
        for name in ("label", "label_index", "radius"):
            stated, proven = result.get(name), getattr(document.result, name)
            if canonical(stated) != canonical(proven):
                raise Refused(f"index {listed.index}: {name} = {stated}: certified is {proven}")


def _indexed(line: Any) -> tuple[int, Mapping[str, Any]]:
    """Index and result of a line, {} where it has none; raises Refused for another line."""
    if not isinstance(line, dict) or type(line.get("index")) is not int:
        raise Refused("a line of the results has no index")
    result = line.get("result")
    return line["index"], result if isinstance(result, dict) else {}


def _check_alpha(manifest: ManifestDocument) -> str:
    """The statement, once m shares sum to the family's alpha; raises Refused and ValueError."""
    share = family_share(manifest.family_alpha, manifest.m)
    if manifest.alpha != share:
        raise Refused(f"alpha = {manifest.alpha}: the share of each of m questions is {share}")
    indexes = [each.index for each in manifest.certificates]
    if indexes != sorted({*indexes}) or not all(0 <= index < manifest.m for index in indexes):
        raise Refused(f"index = {indexes}: must ascend from 0 to at most {manifest.m - 1}")
    meant = manifest_statement(
        manifest.family_alpha, manifest.alpha, manifest.m, len(manifest.certificates)
    )
    if manifest.statement != meant:
        raise Refused(f"statement: must be {meant}")
    return manifest.statement
