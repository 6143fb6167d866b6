"""Signs certificates, publishes the public keys as a JWKS, and checks signatures against one."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from joserfc import jws
from joserfc.errors import JoseError, SecurityWarning
from joserfc.jwk import OKPKey

from service.config import SecretError, Settings, variable
from service.secrets import load_signing_key

ALGORITHM = "EdDSA"
"""The only accepted `alg` (RFC 8037). RFC 9864 has the name Ed25519 for it, which few can read."""

COMMITMENTS = "secret_commitments"
"""The member of the JWKS that holds the commitments to the noise secrets of the service."""

_REGISTRY = jws.JWSRegistry(algorithms=[ALGORITHM])
_REGISTRY.max_payload_length = 2**22  # A task may have 1,000 labels of 200 characters.


class SigningKeys:
    """Today's private key, and the JWKS of every key that is published.

    `seed` is the private key (32 bytes), `secret` the noise secret. `old` is an earlier JWKS of
    this service. Raises ValueError for an `old` one that is none.
    """

    def __init__(self, seed: bytes, secret: bytes, old: Mapping[str, Any] | None = None) -> None:
        self._key = OKPKey.import_key(Ed25519PrivateKey.from_private_bytes(seed))
        self.kid = self._key.thumbprint()
        self.commitment = commitment(secret)
        own = {"kid": self.kid, "use": "sig", "alg": ALGORITHM}
        keys = {self.kid: self._key.as_dict(private=False) | own}
        commitments = {self.commitment: None}
        if old is not None:
            keys |= {kid: key for kid, key in public_keys(old).items() if kid not in keys}
            commitments |= dict.fromkeys(old.get(COMMITMENTS, ()))
        self.jwks: Mapping[str, Any] = {"keys": [*keys.values()], COMMITMENTS: [*commitments]}

    @classmethod
    def from_settings(cls, settings: Settings, secret: bytes) -> Self:
        """The keys in the files that the settings name; raises SecretError."""
        seed = load_signing_key(
            settings.data_dir, settings.noise_secret_file, settings.signing_key_file
        )
        file = settings.old_jwks_file
        try:
            return cls(seed, secret, None if file is None else read_jwks(file.read_bytes()))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SecretError(f"{variable('old_jwks_file')}: {file}: {reason}") from error

    def sign(self, payload: bytes) -> str:
        """The payload and its signature as a compact JWS (RFC 7515)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SecurityWarning)  # See ALGORITHM.
            header = {"alg": ALGORITHM, "kid": self.kid}
            return jws.serialize_compact(header, payload, self._key, registry=_REGISTRY)


def commitment(secret: bytes) -> str:
    """SHA-256 (hex) that binds a service to its noise secret and reveals nothing of it."""
    return hashlib.sha256(b"vouchsafe noise secret commitment\0" + secret).hexdigest()


class Signed(NamedTuple):
    """A signed document as it was read, before its signature is checked.

    `document` is what stands beside the compact `jws`, `payload` what the JWS holds.
    """

    jws: str
    document: Any
    payload: bytes


def read_signed(text: bytes, most_bytes: int) -> Signed:
    """The parts of a JSON text `{"document": ..., "jws": ...}`.

    Raises ValueError for a longer text, other members, and a payload that is not canonical.
    """
    if len(text) > most_bytes:
        raise ValueError(f"a signed document has at most {most_bytes} bytes")
    outer = read_json(text)
    if not isinstance(outer, dict) or outer.keys() != {"document", "jws"}:
        raise ValueError("a signed document is a JSON object of document and jws, and nothing else")
    if not isinstance(outer["jws"], str):
        raise ValueError("jws: must be a string")
    _, payload = signed_payload(outer["jws"])
    if canonical(read_json(payload)) != payload:
        raise ValueError("the signed payload is not in the canonical form of RFC 8785")
    return Signed(outer["jws"], outer["document"], payload)


def signed_payload(compact: str) -> tuple[str, bytes]:
    """The `kid` and the payload of a compact JWS, whose signature is not checked.

    Raises ValueError for any header but `{"alg": "EdDSA", "kid": THUMBPRINT}`, and for parts that
    are not base64url in its one canonical form.
    """
    parts = compact.split(".")
    if len(parts) != 3:
        raise ValueError(f"a compact JWS has 3 parts, not {len(parts)}")
    header, payload, _ = (_from_base64url(part) for part in parts)
    fields = read_json(header)
    if not isinstance(fields, dict) or fields.keys() != {"alg", "kid"}:
        raise ValueError("the JWS header must hold alg and kid, and nothing else")
    kid = fields["kid"]
    if fields["alg"] != ALGORITHM:
        raise ValueError(f"alg is {fields['alg']!r}: only {ALGORITHM} is accepted")
    if not isinstance(kid, str) or not re.fullmatch("[A-Za-z0-9_-]{43}", kid):
        raise ValueError(f"kid is {kid!r}: must be a thumbprint, 43 characters of base64url")
    return kid, payload


def check_signature(compact: str, jwks: Mapping[str, Any]) -> str:
    """The `kid` of the key in the JWKS that signed the compact JWS.

    Raises ValueError where no key of the JWKS did, and as `signed_payload` does.
    """
    kid, _ = signed_payload(compact)
    keys = public_keys(jwks)
    if kid not in keys:
        raise ValueError(f"no key {kid} in the JWKS; it has {', '.join(keys) or 'none'}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)  # See ALGORITHM.
        try:
            jws.deserialize_compact(compact, _imported(keys[kid]), registry=_REGISTRY)
        except JoseError as error:
            raise ValueError(f"key {kid} did not sign this") from error
    return kid


def public_keys(jwks: Mapping[str, Any]) -> dict[str, Any]:
    """The Ed25519 keys of a JWKS by their thumbprints (RFC 7638), without private members.

    Keys of other kinds are skipped. Raises ValueError for a JWKS without a list of keys, a private
    key, and a broken key.
    """
    listed = jwks.get("keys")
    if not isinstance(listed, list) or not all(isinstance(key, dict) for key in listed):
        raise ValueError("a JWKS has a list of objects as keys")
    found: dict[str, Any] = {}
    for key in listed:
        if "d" in key:
            raise ValueError("a private key (d) is no part of a published JWKS; remove it")
        if (key.get("kty"), key.get("crv")) != ("OKP", "Ed25519"):
            continue
        try:
            kid = _imported(key).thumbprint()
        except (JoseError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"an Ed25519 key of the JWKS is broken: {error!r}") from error
        found[kid] = {**key, "kid": kid}
    return found


def read_jwks(text: bytes) -> dict[str, Any]:
    """The JWKS in a JSON text; raises ValueError as `read_json` and `public_keys` do."""
    jwks = read_json(text)
    if not isinstance(jwks, dict):
        raise ValueError("a JWKS is a JSON object")
    public_keys(jwks)
    listed = jwks.get(COMMITMENTS, [])
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise ValueError(f"{COMMITMENTS} must be a list of strings")
    return jwks


def read_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises ValueError for a malformed text, an object with a repeated key, and a number that is not
    finite.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_distinct, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def canonical(value: Any) -> bytes:
    """The value's JSON in the canonical form of RFC 8785; raises ValueError where it has none."""
    try:
        return rfc8785.dumps(value)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def _imported(key: Mapping[str, Any]) -> OKPKey:
    """The public key alone: members such as `use` and `alg` decide nothing."""
    return OKPKey.import_key({name: key[name] for name in ("kty", "crv", "x")})


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is not finite")
    return number


def _from_base64url(text: str) -> bytes:
    """The bytes; the alphabet's spare bits and padding must be those that an encoder writes."""
    try:
        decoded = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError as error:
        raise ValueError(f"{text[:20]!r} is not base64url") from error
    if urlsafe_b64encode(decoded).rstrip(b"=").decode() != text:
        raise ValueError(f"{text[:20]!r} is not base64url in canonical form")
    return decoded
