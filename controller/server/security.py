"""Who may call: bearer tokens, certificates, and the addresses that need them."""

from __future__ import annotations

import hashlib
import hmac
import re
import ssl
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import grpc

from phalanx.controller.units import is_loopback
from phalanx.protos.errors import ConfigError, Unauthenticated

from .rights import Caller
from .watched import CHECK_S, Watched

MAX_FILE_BYTES = 1024 * 1024
MAX_TOKEN_CHARS = 4096
TENANT = re.compile(r"[A-Za-z0-9._\-]{1,64}")
_LINE = re.compile(rf"({TENANT.pattern}):([0-9a-fA-F]{{64}})(?::(user|admin))?")

Metadata = Iterable[tuple[str, str | bytes]]


class TokenTable:
    """Tenants by the SHA-256 of their bearer tokens; the tokens themselves are nowhere kept.

    A tenant may have several tokens, of different roles. An empty table knows nobody.
    """

    def __init__(self, digests: Mapping[bytes, Caller]) -> None:
        self._digests = tuple(digests.items())

    @classmethod
    def read(cls, path: str) -> TokenTable:
        """From lines `tenant:sha256-in-hex:role`; without a role it is "user". Empty lines and
        lines with # are skipped.

        Raises `ConfigError` naming the line, never its text.
        """
        digests: dict[bytes, Caller] = {}
        for number, line in enumerate(
            _read(path, "token_file").decode(errors="replace").split("\n")
        ):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                raise ConfigError(
                    f"token_file, line {number + 1}: allowed is tenant:digest:role, the tenant of 1 "
                    "to 64 letters, digits and . _ -, the digest being the token's SHA-256 in 64 hex "
                    "digits, the role user or admin"
                )
            digest = bytes.fromhex(match[2])
            if digest in digests:
                raise ConfigError(f"token_file, line {number + 1}: the token is listed twice")
            digests[digest] = Caller(match[1], "admin" if match[3] == "admin" else "user")
        if not digests:
            raise ConfigError("token_file holds no token: nobody could call")
        return cls(digests)

    def caller(self, metadata: Metadata) -> Caller:
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
        found = [who for known, who in self._digests if hmac.compare_digest(known, digest)]
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


class Keys(Protocol):
    """Whom to ask who calls."""

    def caller(self, metadata: Metadata) -> Caller:
        """Raises `Unauthenticated`."""


class TokenFile:
    """A token file that is read again when it changes. operators: tenants whose tokens all have
    the role admin."""

    def __init__(
        self, path: str, *, operators: Collection[str] = (), check_s: float = CHECK_S
    ) -> None:
        self._operators = frozenset(operators)
        self._table = Watched([path], lambda: TokenTable.read(path), check_s=check_s)

    def caller(self, metadata: Metadata) -> Caller:
        """As the table of now says. Raises `Unauthenticated`."""
        found = self._table.get().caller(metadata)
        return replace(found, role="admin") if found.tenant in self._operators else found


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a server; `client_ca` makes it mutual."""

    cert: str
    key: str
    client_ca: str | None

    @classmethod
    def of(cls, cert: str | None, key: str | None, client_ca: str | None) -> TlsFiles | None:
        """None without a certificate. Raises `ConfigError` for a part without the others."""
        if cert is not None and key is not None:
            return cls(cert, key, client_ca)
        if cert or key or client_ca:
            raise ConfigError(
                "tls_cert and tls_key are given together, tls_client_ca only with them"
            )
        return None

    @property
    def paths(self) -> list[str]:
        """All of them."""
        return [self.cert, self.key, *([self.client_ca] if self.client_ca else [])]

    def configuration(self) -> Any:
        """For gRPC's servers. Raises `ConfigError` for files that are missing, not PEM, or do not
        belong together."""
        self.context()
        authority = None if self.client_ca is None else _read(self.client_ca, "tls_client_ca")
        pair = (_read(self.key, "tls_key"), _read(self.cert, "tls_cert"))
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authority)

    def context(self) -> ssl.SSLContext:
        """For servers of Python's own sockets. Raises `ConfigError` in the same way."""
        return _context(self)


def server_credentials(files: TlsFiles, *, check_s: float = CHECK_S) -> grpc.ServerCredentials:
    """TLS, or mutual TLS, with the files as they are when a connection begins."""
    watched = Watched(files.paths, files.configuration, check_s=check_s)
    return grpc.dynamic_ssl_server_credentials(
        watched.get(), watched.get, require_client_authentication=files.client_ca is not None
    )


def server_context(files: TlsFiles, *, check_s: float = CHECK_S) -> ssl.SSLContext:
    """The same for a server of Python's own sockets."""
    context = files.context()
    renew(context, files, check_s=check_s)
    return context


def renew(context: ssl.SSLContext, files: TlsFiles, *, check_s: float = CHECK_S) -> None:
    """Let connections that begin in this context use the files as they are then."""
    watched = Watched(files.paths, files.context, check_s=check_s)

    def begin(connection: ssl.SSLObject, _name: str | None, _first: ssl.SSLContext) -> None:
        connection.context = watched.get()

    context.sni_callback = begin


def _context(files: TlsFiles) -> ssl.SSLContext:
    tls_cert, tls_key, tls_client_ca = files.cert, files.key, files.client_ca
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
