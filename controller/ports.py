"""Whether an address can be bound, asked before anything slow is started."""

from __future__ import annotations

import socket

from phalanx.protos.errors import ConfigError


def check_free(field: str, host: str, port: int) -> None:
    """Raise `ConfigError` for a port that is taken, or a host that is not here.

    field: the configuration's word for the host, such as "openai_host".
    """
    bare = host.strip("[]")
    try:
        found = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            # as servers do, so that connections that are just ending are no hindrance
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        raise ConfigError(
            f"{field} {host!r}, port {port}: cannot be bound: {error.strerror}"
        ) from None
