"""Who may call: bearer tokens, certificates, and the addresses that need them."""

from __future__ import annotations

import hashlib
import hmac
import re
import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path

import grpc

from phalanx.controller.quantities import is_loopback
from phalanx.protos.errors import ConfigError, Unauthenticated

DEFAULT_TENANT = "default"
MAX_FILE_BYTES = 1024 * 1024
MAX_TOKEN_CHARS = 4096
_LINE = re.compile(r"([A-Za-z0-9._\-]{1,64}):([0-9a-fA-F]{64})")

Metadata = Iterable[tuple[str, str | bytes]]


class TokenTable:
    """Tenants by the SHA-256 of their bearer tokens; the tokens themselves are nowhere kept.

    A tenant may have several tokens. An empty table knows nobody.
    """

    def __init__(self, digests: Mapping[bytes, str]) -> None:
        self._digests = tuple(digests.items())

    @classmethod
    def read(cls, path: str) -> TokenTable:
        """From lines `tenant:sha256-in-hex`; empty lines and lines with # are skipped.

        Raises `ConfigError` naming the line, never its text.
        """
        digests: dict[bytes, str] = {}
        for number, line in enumerate(
            _read(path, "token_file").decode(errors="replace").split("\n")
        ):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                raise ConfigError(
                    f"token_file, line {number + 1}: allowed is tenant:digest, the tenant of 1 to 64 "
                    "letters, digits and . _ -, the digest being the token's SHA-256 in 64 hex digits"
                )
            digest = bytes.fromhex(match[2])
            if digest in digests:
                raise ConfigError(f"token_file, line {number + 1}: the token is listed twice")
            digests[digest] = match[1]
        if not digests:
            raise ConfigError("token_file holds no token: nobody could call")
        return cls(digests)

    def tenant(self, metadata: Metadata) -> str:
        """Whose bearer token this is. Raises `Unauthenticated`.

        Every digest is compared, each in constant time: how long it takes tells nothing.
        """
        given = [value for key, value in metadata if key == "authorization"]
        if len(given) != 1:
            raise Unauthenticated("one bearer token is needed, as metadata: authorization")
        text = given[0] if isinstance(given[0], str) else given[0].decode(errors="replace")
        scheme, _, token = text.partition(" ")
        if scheme.lower() != "bearer" or not 0 < len(token) <= MAX_TOKEN_CHARS:
            raise Unauthenticated("the authorization is not a bearer token")
        digest = hashlib.sha256(token.encode()).digest()
        found = [name for known, name in self._digests if hmac.compare_digest(known, digest)]
        if not found:
            raise Unauthenticated("the bearer token is not known here")
        return found[0]


def _read(path: str, field: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{field} is {path!r}, which cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{field} is {path!r}, which has over {MAX_FILE_BYTES} bytes")
    return data


def server_credentials(
    tls_cert: str | None, tls_key: str | None, tls_client_ca: str | None
) -> grpc.ServerCredentials | None:
    """TLS, or mutual TLS with `tls_client_ca`; None without a certificate.

    Raises `ConfigError` for files that are missing, not PEM, or do not belong together.
    """
    if server_context(tls_cert, tls_key, tls_client_ca) is None or not (tls_cert and tls_key):
        return None
    authority = None if tls_client_ca is None else _read(tls_client_ca, "tls_client_ca")
    return grpc.ssl_server_credentials(
        [(_read(tls_key, "tls_key"), _read(tls_cert, "tls_cert"))],
        root_certificates=authority,
        require_client_auth=authority is not None,
    )


def server_context(
    tls_cert: str | None, tls_key: str | None, tls_client_ca: str | None
) -> ssl.SSLContext | None:
    """The same for a server of Python's own sockets."""
    if tls_cert is None or tls_key is None:
        if tls_cert or tls_key or tls_client_ca:
            raise ConfigError(
                "tls_cert and tls_key are given together, tls_client_ca only with them"
            )
        return None
    _read(tls_cert, "tls_cert")
    _read(tls_key, "tls_key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls_cert, tls_key, password="")
    except (ssl.SSLError, OSError, ValueError):
        raise ConfigError(
            f"tls_cert {tls_cert!r} and tls_key {tls_key!r} are not a certificate and its "
            "unencrypted private key in PEM"
        ) from None
    if tls_client_ca is not None:
        authority = _read(tls_client_ca, "tls_client_ca")
        try:
            context.load_verify_locations(cadata=authority.decode("ascii"))
        except (ssl.SSLError, ValueError):
            raise ConfigError(
                f"tls_client_ca {tls_client_ca!r} holds no certificate in PEM"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def check_exposure(
    host: str, *, encrypted: bool, authenticated: bool, insecure: bool, field: str = "host"
) -> None:
    """Refuse an address that other machines reach, unless callers are known and traffic is hidden.

    field: the setting that `host` comes from. Raises `ConfigError`.
    """
    if is_loopback(host) or insecure or (encrypted and authenticated):
        return
    raise ConfigError(
        f"{field} is {host!r}, which other machines reach: allowed with TLS and one of token_file, "
        "tls_client_ca; or with insecure"
    )
