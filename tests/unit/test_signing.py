"""service/signing.py and the key's file: signatures, the JWKS, rotation, strict JSON."""

from __future__ import annotations

import hashlib
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from service.config import SecretError, Settings
from service.secrets import load_secret, load_signing_key
from service.signing import (
    SigningKeys,
    canonical,
    check_signature,
    read_json,
    read_jwks,
    signed_payload,
)
from tests.support.serving import KEYS, SECRET

NEW = SigningKeys(b"n" * 32, b"t" * 32, KEYS.jwks)


def decoded(text: str) -> bytes:
    return urlsafe_b64decode(text + "==")


def test_a_signature_verifies_without_this_project() -> None:
    """The compact form is RFC 7515's, the key RFC 8037's: `cryptography` alone verifies it."""
    header, payload, signature = KEYS.sign(b'{"a":1}').split(".")
    (key,) = KEYS.jwks["keys"]
    public = Ed25519PublicKey.from_public_bytes(decoded(key["x"]))
    public.verify(decoded(signature), f"{header}.{payload}".encode())
    assert json.loads(decoded(header)) == {"alg": "EdDSA", "kid": key["kid"]}
    assert decoded(payload) == b'{"a":1}'


def test_the_key_id_is_the_thumbprint() -> None:
    """`kid` is RFC 7638's thumbprint of the public key, so that it cannot name another key."""
    (key,) = KEYS.jwks["keys"]
    required = {name: key[name] for name in ("crv", "kty", "x")}
    digest = hashlib.sha256(canonical(required)).digest()
    assert key["kid"] == urlsafe_b64encode(digest).rstrip(b"=").decode()


def test_the_jwks_has_public_members_only() -> None:
    """What is published verifies and cannot sign, and commits to the noise secret."""
    assert set(KEYS.jwks) == {"keys", "secret_commitments"}
    (key,) = KEYS.jwks["keys"]
    assert set(key) == {"kty", "crv", "x", "kid", "use", "alg"}
    stated = hashlib.sha256(b"vouchsafe noise secret commitment\0" + SECRET).hexdigest()
    assert KEYS.jwks["secret_commitments"] == [stated]


def test_after_a_rotation_old_signatures_verify() -> None:
    """The new key signs, and the keys and commitments of the old JWKS stay published."""
    old, new = KEYS.sign(b"x"), NEW.sign(b"x")
    assert check_signature(old, NEW.jwks) == KEYS.kid
    assert check_signature(new, NEW.jwks) == NEW.kid
    assert [key["kid"] for key in NEW.jwks["keys"]] == [NEW.kid, KEYS.kid]
    assert NEW.jwks["secret_commitments"] == [NEW.commitment, KEYS.commitment]
    with pytest.raises(ValueError, match=f"no key {NEW.kid} in the JWKS"):
        check_signature(new, KEYS.jwks)
    again = SigningKeys(b"n" * 32, b"t" * 32, NEW.jwks)
    assert again.jwks == NEW.jwks


def test_a_payload_that_was_not_signed_is_refused() -> None:
    """Header and signature of one payload do not fit another."""
    header, _, signature = KEYS.sign(b"x").split(".")
    with pytest.raises(ValueError, match="did not sign this"):
        check_signature(f"{header}.{urlsafe_b64encode(b'y').decode()[:2]}.{signature}", KEYS.jwks)


@pytest.mark.parametrize(
    "fields",
    [
        {"alg": "EdDSA"},
        {"alg": "EdDSA", "kid": KEYS.kid, "crit": ["b64"], "b64": False},
        {"alg": "EdDSA", "kid": KEYS.kid, "jwk": {}},
        {"alg": "EdDSA", "kid": 1},
        {"alg": "EdDSA", "kid": KEYS.kid[1:]},
        {"alg": "EdDSA", "kid": f"{KEYS.kid}\n"},
        {"alg": "EdDSA", "kid": "é" * 43},
        [],
    ],
)
def test_a_header_holds_alg_and_kid_alone(fields: Any) -> None:
    """A header with a key or an extension of its own is refused."""
    header = urlsafe_b64encode(canonical(fields)).rstrip(b"=").decode()
    with pytest.raises(ValueError, match=r"alg and kid|kid is "):
        signed_payload(f"{header}.e30.AAAA")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "a JWKS is a JSON object"),
        ("{}", "list of objects"),
        ('{"keys":[1]}', "list of objects"),
        ('{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AA"}]}', "is broken"),
        ('{"keys":[{"kty":"OKP","crv":"Ed25519"}]}', "is broken"),
        ('{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AA","d":"AA"}]}', "private key"),
        ('{"keys":[],"secret_commitments":1}', "list of strings"),
        ('{"keys":[],"keys":[]}', "twice"),
    ],
)
def test_what_is_no_jwks_is_refused(text: str, why: str) -> None:
    """A JWKS that cannot be used is refused by name, one with a private key above all."""
    with pytest.raises(ValueError, match=why):
        read_jwks(text.encode())


def test_keys_of_other_kinds_are_skipped() -> None:
    """A JWKS may hold keys for other purposes."""
    (key,) = KEYS.jwks["keys"]
    mixed = {"keys": [{"kty": "EC", "crv": "P-256"}, key]}
    assert check_signature(KEYS.sign(b"x"), read_jwks(canonical(mixed))) == KEYS.kid


@pytest.mark.parametrize(
    "members",
    [{"alg": "Ed25519"}, {"use": "enc"}, {"key_ops": ["encrypt"]}, {"x5c": ["AAAA"]}, {"kid": 1}],
)
def test_other_members_of_a_key_do_not_count(members: dict[str, Any]) -> None:
    """The key is kty, crv and x; what else a JWKS says of it makes no signature false."""
    (key,) = KEYS.jwks["keys"]
    jwks = read_jwks(canonical({"keys": [{**key, **members}]}))
    assert check_signature(KEYS.sign(b"x"), jwks) == KEYS.kid


@pytest.mark.parametrize(
    "text", ['{"a":1,"a":1}', '[{"b":{"a":1,"a":2}}]', "NaN", "1e400", "[" * 10**5]
)
def test_json_is_read_strictly(text: str) -> None:
    """Repeated keys at any depth, numbers that no double holds, and endless nesting are refused."""
    with pytest.raises(ValueError, match=r".+"):
        read_json(text)


def test_what_is_nested_too_deeply_has_no_canonical_form() -> None:
    """A value that was read may still be too deep to be written."""
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        canonical(deep)


def test_the_canonical_form_is_that_of_rfc_8785() -> None:
    """The RFC's own example of numbers, strings and the order of names."""
    value = {
        "numbers": [333333333.33333329, 1e30, 4.50, 2e-3, 0.000000000000000000000000001],
        "string": '€$\x0f\nA\'B"\\\\"/',
        "literals": [None, True, False],
    }
    assert (
        canonical(value)
        == (
            '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
            '"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
        ).encode()
    )
    assert canonical({"\U0001f600": 1, "ﬀ": 2}) == '{"\U0001f600":1,"ﬀ":2}'.encode()


# The key's file


def settings(folder: Path, **fields: Any) -> Settings:
    return Settings(data_dir=folder, **fields)


def test_the_key_is_made_once_beside_the_noise_secret(tmp_path: Path) -> None:
    """The first use makes 32 private bytes, every later one reads the same."""
    load_secret(tmp_path)
    key = load_signing_key(tmp_path)
    assert (tmp_path / "signing.key").read_bytes() == key
    assert (tmp_path / "signing.key").stat().st_mode & 0o777 == 0o600
    assert load_signing_key(tmp_path) == key
    assert len(key) == 32
    shared = tmp_path / "shared"
    shared.mkdir()
    load_signing_key(shared, tmp_path / "mount" / "noise.secret")
    assert (tmp_path / "mount" / "signing.key").exists()


def test_a_key_left_in_a_shared_directory_is_refused(tmp_path: Path) -> None:
    """A key that all who share the folder can read does not lie there in silence."""
    load_signing_key(tmp_path)
    elsewhere = tmp_path / "mount" / "own.key"
    for places in ((None, elsewhere), (elsewhere, None)):
        with pytest.raises(SecretError, match=rf"{tmp_path}/signing\.key: .* move it to "):
            load_signing_key(tmp_path, *places)
    assert not elsewhere.exists()


def test_a_lost_key_is_not_made_again_in_silence(tmp_path: Path) -> None:
    """The shared directory knows its key: a missing or another one is refused."""
    file = tmp_path / "mount" / "signing.key"
    data = tmp_path / "data"
    data.mkdir()
    key = load_signing_key(data, None, file)
    assert load_signing_key(data, None, file) == key
    file.unlink()
    with pytest.raises(SecretError, match=f"{file}: is missing, .* signed by another key"):
        load_signing_key(data, None, file)
    assert not file.exists()
    load_signing_key(tmp_path, None, file)
    with pytest.raises(SecretError, match=f"{file}: is another secret"):
        load_signing_key(data, None, file)
    (data / "signing.sha256").unlink()
    assert load_signing_key(data, None, file) != key


def test_a_named_file_is_the_key(tmp_path: Path) -> None:
    """VOUCHSAFE_SIGNING_KEY_FILE goes before every other place."""
    file = tmp_path / "own.key"
    file.write_bytes(b"f" * 32)
    file.chmod(0o400)
    keys = SigningKeys.from_settings(settings(tmp_path, signing_key_file=file), SECRET)
    assert keys.kid == SigningKeys(b"f" * 32, SECRET).kid
    assert not (tmp_path / "signing.key").exists()


@pytest.mark.parametrize(("mode", "length"), [(0o644, 32), (0o600, 31), (0o600, 0)])
def test_a_key_that_is_open_or_cut_is_refused(tmp_path: Path, mode: int, length: int) -> None:
    """The file is checked as the noise secret's is, and never replaced."""
    file = tmp_path / "signing.key"
    file.write_bytes(b"f" * length)
    file.chmod(mode)
    with pytest.raises(SecretError, match=str(file)):
        load_signing_key(tmp_path)
    assert file.read_bytes() == b"f" * length


def test_a_key_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """In a folder that cannot be written the error says which file is missing."""
    (tmp_path / "file").touch()
    with pytest.raises(SecretError, match=r"signing\.key: is missing and cannot be made"):
        load_signing_key(tmp_path, tmp_path / "file" / "noise.secret")


def test_the_old_jwks_is_a_file(tmp_path: Path) -> None:
    """VOUCHSAFE_OLD_JWKS_FILE keeps what an earlier JWKS published; a bad one is named."""
    file = tmp_path / "old.json"
    file.write_bytes(canonical(KEYS.jwks))
    keys = SigningKeys.from_settings(settings(tmp_path, old_jwks_file=file), SECRET)
    assert KEYS.kid in [key["kid"] for key in keys.jwks["keys"]]
    for text in ("", "{}"):
        file.write_text(text)
        with pytest.raises(SecretError, match=f"VOUCHSAFE_OLD_JWKS_FILE: {file}: "):
            SigningKeys.from_settings(settings(tmp_path, old_jwks_file=file), SECRET)
    file.unlink()
    with pytest.raises(SecretError, match="No such file"):
        SigningKeys.from_settings(settings(tmp_path, old_jwks_file=file), SECRET)
