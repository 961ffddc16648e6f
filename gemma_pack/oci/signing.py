"""Signatures by a key, offline: an in-toto statement in a DSSE envelope in a Sigstore bundle.

That is the form in which cosign 3 and the OpenSSF's model-signing write theirs, so `cosign verify --key` and
`model_signing verify key` read ours. Keys are ECDSA over P-256 with SHA-256. The same key and statement give the same
bytes (RFC 6979), so signing again attaches nothing new. Bundles by certificate ("keyless") are read, and
said to be unchecked: that needs Sigstore's own services.

Sources: sigstore protobuf-specs, sigstore_bundle.proto; DSSE protocol.md, "PAE"; cosign specs/BUNDLE_SPEC.md;
model-signing `_signing/sign_ec_key.py` for the hint.
"""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from gemma_pack.errors import InvalidUsageError, RegistryError
from gemma_pack.oci.manifest import encode_json, parse_json
from gemma_pack.oci.statement import Statement

if TYPE_CHECKING:
    from pathlib import Path

BUNDLE_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
PASSWORD_VARIABLE: Final = "GEMMA_PACK_KEY_PASSWORD"  # noqa: S105 - the variable's name
_MAKE_KEY: Final = "openssl ecparam -name prime256v1 -genkey -noout -out KEY makes one"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key to check signatures with."""

    key: ec.EllipticCurvePublicKey

    @property
    def key_id(self) -> str:
        """The sha256, in hex, of the key's PEM: what `openssl pkey -pubin -in KEY | sha256sum` prints."""
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return hashlib.sha256(self.key.public_bytes(serialization.Encoding.PEM, form)).hexdigest()


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key to sign with."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def public(self) -> PublicKey:
        """The key that checks what this one signs."""
        return PublicKey(self.key.public_key())

    def sign(self, statement: Statement) -> bytes:
        """Return the Sigstore bundle that holds `statement`, signed."""
        payload = statement.encode()
        algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
        signature = self.key.sign(_pae(PAYLOAD_TYPE, payload), algorithm)
        return encode_json({
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {"publicKey": {"hint": self.public.key_id}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
            },
        })  # fmt: skip


class _Part(BaseModel):
    """What is needed of a bundle; fields that this version does not know are passed over."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel)


class _PublicKeyHint(_Part):
    hint: str = ""


class _Certificate(_Part):
    raw_bytes: str


class _Chain(_Part):
    certificates: tuple[_Certificate, ...] = Field(min_length=1)


class _Material(_Part):
    public_key: _PublicKeyHint | None = None
    certificate: _Certificate | None = None
    x509_certificate_chain: _Chain | None = None


class _Signature(_Part):
    sig: str


class _Envelope(_Part):
    payload: str
    payload_type: str
    signatures: tuple[_Signature, ...] = Field(min_length=1)


class _Bundle(_Part):
    verification_material: _Material
    dsse_envelope: _Envelope


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedStatement:
    """A statement out of a bundle, and who is said to have signed it: nothing of it is checked yet."""

    statement: Statement
    signer: str
    """`key ID`, or whom a certificate names."""
    payload: bytes = field(repr=False)
    signatures: tuple[bytes, ...] = field(repr=False)

    def is_signed_by(self, key: PublicKey) -> bool:
        """Check the signatures: one by `key` is enough."""
        return any(_is_valid(key, signature, self.payload) for signature in self.signatures)


def read_bundle(data: bytes) -> SignedStatement:
    """Return the statement in a Sigstore bundle.

    Raises:
        RegistryError: it is no bundle, or holds something else than an in-toto statement.
    """
    try:
        bundle = _Bundle.model_validate(parse_json(data, origin="the bundle"))
        envelope = bundle.dsse_envelope
        payload = base64.b64decode(envelope.payload, validate=True)
        signatures = tuple(base64.b64decode(one.sig, validate=True) for one in envelope.signatures)
        if envelope.payload_type != PAYLOAD_TYPE:
            raise RegistryError(f"the bundle holds {envelope.payload_type!r}, not an in-toto statement")
        statement = read_statement(payload)
    except ValidationError as error:
        raise RegistryError(f"the bundle is broken: {_first(error)}") from error
    except ValueError as error:  # of base64
        raise RegistryError(f"the bundle is broken: {error}") from error
    signer = _signer(bundle.verification_material)
    return SignedStatement(statement=statement, signer=signer, payload=payload, signatures=signatures)


def read_statement(data: bytes) -> Statement:
    """Return an in-toto statement; raise RegistryError where `data` is none."""
    try:
        return Statement.model_validate(parse_json(data, origin="the statement"))
    except ValidationError as error:
        raise RegistryError(f"the statement is broken: {_first(error)}") from error


def load_signing_key(path: Path) -> SigningKey:
    """Read a private key in PEM; the password of an encrypted one is taken from GEMMA_PACK_KEY_PASSWORD.

    Raises:
        InvalidUsageError: it is no private key over P-256, or the password is missing or wrong.
    """
    password = os.environ.get(PASSWORD_VARIABLE)
    data = _read(path)
    try:
        key = serialization.load_pem_private_key(data, password.encode() if password else None)
    except TypeError as error:  # a password is missing, or is not wanted
        said = f"{path} is not encrypted" if password else f"{path} is encrypted"
        raise InvalidUsageError(said, hint=f"{'unset' if password else 'set'} {PASSWORD_VARIABLE}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        hint = f"check {PASSWORD_VARIABLE}" if password else _MAKE_KEY
        raise InvalidUsageError(f"{path} is no private key in PEM that can be read", hint=hint) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidUsageError(f"{path} is no key over P-256", hint=_MAKE_KEY)
    return SigningKey(key)


def load_public_key(path: Path) -> PublicKey:
    """Read a public key in PEM; raise InvalidUsageError where `path` holds none over P-256."""
    hint = "openssl pkey -in KEY -pubout -out KEY.pub takes it out of a private key"
    try:
        key = serialization.load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidUsageError(f"{path} is no public key in PEM", hint=hint) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidUsageError(f"{path} is no public key over P-256", hint=hint)
    return PublicKey(key)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidUsageError(f"{path} cannot be read: {error.strerror}", hint=_MAKE_KEY) from error


def _pae(payload_type: str, payload: bytes) -> bytes:
    """Return what a DSSE signature is over: the pre-authentication encoding of type and payload."""
    return b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type.encode(), len(payload), payload)


def _is_valid(key: PublicKey, signature: bytes, payload: bytes) -> bool:
    try:
        key.key.verify(signature, _pae(PAYLOAD_TYPE, payload), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _signer(material: _Material) -> str:
    chain = material.x509_certificate_chain
    certificate = material.certificate or (chain.certificates[0] if chain else None)
    if certificate is None:
        return f"key {printable(material.public_key.hint) if material.public_key else 'unnamed'}"
    try:
        parsed = x509.load_der_x509_certificate(base64.b64decode(certificate.raw_bytes))
        names: Any = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return f"certificate of {printable(', '.join(str(name.value) for name in names))}"
    except (ValueError, x509.ExtensionNotFound):
        return "a certificate that names nobody"


def printable(text: str) -> str:
    """Return a stranger's text without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
