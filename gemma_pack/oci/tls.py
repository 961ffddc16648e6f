"""Whom a registry's certificate must come from, and what a connection that does not come about means."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING

import httpx

from gemma_pack.errors import InvalidUsageError, OfflineError, RegistryError

if TYPE_CHECKING:
    from pathlib import Path


def trust(ca_file: Path | None) -> ssl.SSLContext:
    """Trust certifi's roots and what the system trusts (or SSL_CERT_FILE, SSL_CERT_DIR in their place), and `ca_file`.

    A company's own CA is in the system's store, where httpx by itself would not look.

    Raises:
        InvalidUsageError: `ca_file` holds no certificate, or SSL_CERT_FILE cannot be read.
    """
    context = named_context()
    if not (os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")):
        context.load_default_certs()
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise InvalidUsageError(
                f"{ca_file} holds no PEM certificates", hint="pass the CA's .pem or .crt"
            ) from error
    return context


def named_context() -> ssl.SSLContext:
    """Trust SSL_CERT_FILE, SSL_CERT_DIR or certifi's roots; raise InvalidUsageError for a file that holds none."""
    try:
        return httpx.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one, and neither names the file
        if not (named := os.environ.get("SSL_CERT_FILE")):
            raise
        reason = "holds no PEM certificates" if isinstance(error, ssl.SSLError) else f"cannot be read: {error.strerror}"
        raise InvalidUsageError(
            f"SSL_CERT_FILE {named} {reason}", hint="name a file of PEM certificates, or unset the variable"
        ) from error


def unreachable(url: httpx.URL, error: httpx.TransportError) -> RegistryError | OfflineError:
    """Return the error for a connection to `url` that was never made."""
    tls = tls_error(error)
    if isinstance(tls, ssl.SSLCertVerificationError):
        return RegistryError(
            f"{url.host} shows a certificate that is not trusted: {tls.verify_message}",
            hint="--ca-file names the CA that signed it",
        )
    if tls is not None:
        return RegistryError(
            f"{url.netloc.decode()} does not speak TLS: {tls.reason or tls}",
            hint="--plain-http speaks HTTP without encryption",
        )
    return OfflineError(
        f"{url.netloc.decode()} cannot be reached: {str(error) or 'no answer'}",
        hint="check the name, the network, and HTTPS_PROXY if there is a proxy",
    )


def tls_error(error: BaseException) -> ssl.SSLError | None:
    """Return the TLS error at the bottom of `error`, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None
