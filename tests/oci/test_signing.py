"""Signatures: what other programs make of ours, and what is refused."""

from __future__ import annotations

import base64
import json
import subprocess
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from gemma_pack.checkpoint import file_sha256
from gemma_pack.errors import InvalidUsageError, RegistryError
from gemma_pack.oci.signing import (
    PASSWORD_VARIABLE,
    PublicKey,
    SigningKey,
    load_public_key,
    load_signing_key,
    read_bundle,
)
from gemma_pack.oci.statement import SIGNATURE_PREDICATE, about_image, model_signature
from gemma_pack.record import FileDigest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DIGEST = "sha256:" + "5d" * 32
STATEMENT = about_image(DIGEST, "gemma", SIGNATURE_PREDICATE, {})


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey(ec.generate_private_key(ec.SECP256R1()))


def pem(key: Any, password: str | None = None) -> bytes:
    encryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))


def public_pem(key: SigningKey) -> bytes:
    return key.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def verifier_of(public_key: Path) -> Any:
    """Return the OpenSSF's own verifier of model signatures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, on import
        from model_signing.verifying import Config
    return Config().use_elliptic_key_verifier(public_key=public_key)


def test_what_was_signed_is_read_back_and_checked(key: SigningKey):
    read = read_bundle(key.sign(STATEMENT))
    assert read.statement == STATEMENT
    assert read.signer == f"key {key.public.key_id}"
    assert read.is_signed_by(key.public)
    assert read.statement.is_about(DIGEST)
    assert not read.statement.is_about("sha256:" + "0" * 64)
    assert not read.is_signed_by(PublicKey(ec.generate_private_key(ec.SECP256R1()).public_key()))


def test_signing_again_gives_the_same_bytes(key: SigningKey):
    assert key.sign(STATEMENT) == key.sign(STATEMENT)


@pytest.mark.parametrize("part", ["payload", "sig"])
def test_one_changed_bit_is_seen(key: SigningKey, part: str):
    bundle = json.loads(key.sign(STATEMENT))
    holder = bundle["dsseEnvelope"] if part == "payload" else bundle["dsseEnvelope"]["signatures"][0]
    data = bytearray(base64.b64decode(holder[part]))
    data[-3 if part == "payload" else 20] ^= 1  # the predicate's closing brace stays
    holder[part] = base64.b64encode(bytes(data)).decode()
    try:
        read = read_bundle(json.dumps(bundle).encode())
    except RegistryError:
        return  # no statement any more
    assert not read.is_signed_by(key.public)


def test_the_format_is_that_of_sigstore(key: SigningKey):
    from sigstore_models.bundle.v1 import Bundle

    bundle = Bundle.from_json(key.sign(STATEMENT))
    assert bundle.dsse_envelope
    assert bundle.verification_material.public_key


def test_another_reader_of_envelopes_accepts_the_signature(key: SigningKey):
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

    envelope = json.loads(key.sign(STATEMENT))["dsseEnvelope"]
    read = Envelope.from_dict({**envelope, "signatures": [{"sig": envelope["signatures"][0]["sig"], "keyid": "ours"}]})
    theirs = SSlibKey("ours", "ecdsa", "ecdsa-sha2-nistp256", {"public": public_pem(key).decode()})
    assert set(read.verify([theirs], 1)) == {"ours"}


def test_model_signing_verifies_a_model_and_sees_a_change(key: SigningKey, tmp_path: Path):
    model = tmp_path / "gemma"
    (model / "sub").mkdir(parents=True)
    for name in ("b.json", "a.safetensors", "sub/c.txt", "Z.md"):
        (model / name).write_text(name)
    files = [
        FileDigest(path=path.relative_to(model).as_posix(), sha256=file_sha256(path), size_bytes=path.stat().st_size)
        for path in model.rglob("*")
        if path.is_file()
    ]
    (tmp_path / "model.sig").write_bytes(key.sign(model_signature("gemma", files)))
    (tmp_path / "key.pub").write_bytes(public_pem(key))
    verifier = verifier_of(tmp_path / "key.pub")
    verifier.verify(model, tmp_path / "model.sig")
    (model / "sub/c.txt").write_text("d")
    with pytest.raises(ValueError, match="Hash mismatch"):
        verifier.verify(model, tmp_path / "model.sig")


def test_openssl_makes_keys_that_are_taken_and_names_them_alike(tmp_path: Path, tool: Callable[[str], str]):
    private, public = tmp_path / "my.key", tmp_path / "my.pub"
    openssl = tool("openssl")
    subprocess.run(
        [openssl, "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private], check=True, timeout=20
    )
    subprocess.run([openssl, "pkey", "-in", private, "-pubout", "-out", public], check=True, timeout=20)
    key = load_signing_key(private)
    assert key.public.key_id == load_public_key(public).key_id == file_sha256(public)


def test_an_encrypted_key_wants_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: SigningKey):
    path = tmp_path / "my.key"
    path.write_bytes(pem(key.key, "open sesame"))
    with pytest.raises(InvalidUsageError, match="is encrypted") as missing:
        load_signing_key(path)
    assert missing.value.hint == f"set {PASSWORD_VARIABLE}"
    monkeypatch.setenv(PASSWORD_VARIABLE, "wrong")
    with pytest.raises(InvalidUsageError, match="no private key in PEM"):
        load_signing_key(path)
    monkeypatch.setenv(PASSWORD_VARIABLE, "open sesame")
    assert load_signing_key(path).public.key_id == key.public.key_id
    path.write_bytes(pem(key.key))
    with pytest.raises(InvalidUsageError, match="is not encrypted"):
        load_signing_key(path)


def test_a_key_is_never_shown(key: SigningKey):
    assert "private" not in repr(key).lower()


def test_other_keys_are_refused(tmp_path: Path, key: SigningKey):
    path = tmp_path / "my.key"
    for wrong in (pem(ec.generate_private_key(ec.SECP384R1())), pem(ed25519.Ed25519PrivateKey.generate()), b"x"):
        path.write_bytes(wrong)
        with pytest.raises(InvalidUsageError):
            load_signing_key(path)
        with pytest.raises(InvalidUsageError):
            load_public_key(path)
    path.write_bytes(pem(key.key))
    with pytest.raises(InvalidUsageError, match="no public key") as error:
        load_public_key(path)
    assert "-pubout" in str(error.value.hint)
    with pytest.raises(InvalidUsageError, match="cannot be read"):
        load_signing_key(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"dsseEnvelope": None},
        {"verificationMaterial": {}, "dsseEnvelope": {"payload": "?", "payloadType": "a", "signatures": [{"sig": ""}]}},
        {"dsseEnvelope": {"payload": "e30=", "payloadType": "text/plain", "signatures": [{"sig": ""}]}},
        {"dsseEnvelope": {"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": []}},
        {
            "dsseEnvelope": {
                "payload": "e30=",
                "payloadType": "application/vnd.in-toto+json",
                "signatures": [{"sig": "AA=="}],
            }
        },
        {"messageSignature": {}, "dsseEnvelope": 3},
    ],
)
def test_a_broken_bundle_is_one_sentence(key: SigningKey, change: dict[str, Any]):
    bundle = {**json.loads(key.sign(STATEMENT)), **change}
    with pytest.raises(RegistryError, match=r"^(the bundle|the statement)"):
        read_bundle(json.dumps(bundle).encode())


def test_a_signer_cannot_write_to_the_terminal(key: SigningKey):
    bundle = json.loads(key.sign(STATEMENT))
    bundle["verificationMaterial"]["publicKey"]["hint"] = "\x1b[2Jme" + "x" * 1000
    signer = read_bundle(json.dumps(bundle).encode()).signer
    assert signer.startswith("key ?[2Jme")
    assert len(signer) < 250


def test_a_certificate_is_named_and_not_believed(key: SigningKey):
    from datetime import UTC, datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    name = x509.Name([])
    certificate = (
        x509.CertificateBuilder(name, name, key.key.public_key(), 1)
        .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2027, 1, 1, tzinfo=UTC))
        .add_extension(x509.SubjectAlternativeName([x509.RFC822Name("emmy@example.com")]), critical=True)
        .sign(key.key, hashes.SHA256())
    )
    bundle = json.loads(key.sign(STATEMENT))
    raw = base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()
    bundle["verificationMaterial"] = {"certificate": {"rawBytes": raw}}
    assert read_bundle(json.dumps(bundle).encode()).signer == "certificate of emmy@example.com"
    bundle["verificationMaterial"] = {"x509CertificateChain": {"certificates": [{"rawBytes": "AAAA"}]}}
    assert read_bundle(json.dumps(bundle).encode()).signer == "a certificate that names nobody"
