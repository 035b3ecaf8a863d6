"""Health of the server that a config file describes, for probes: exit code 0 is healthy.

Reads the same file as `phalanx serve --config`, so address, TLS and client certificate need no
second description. Exit code 1: it does not serve (or with --live: does not answer); 2: the file is
wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from phalanx.controller.config import ClusterConfig
from phalanx.controller.settings import load_config
from phalanx.protos.errors import ConfigError

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]"}
HEALTHY, UNHEALTHY, REFUSED = 0, 1, 2


def open_channel(config: ClusterConfig, authority: Path | None, server_name: str) -> grpc.Channel:
    """A channel to the server of `config` on this machine.

    authority: what signed the server's certificate; None takes `tls_client_ca`, else the
    certificate itself. With mutual TLS, the server's own certificate is also shown as the caller's.
    """
    address = f"{EVERYWHERE.get(config.host, config.host)}:{config.port}"
    if config.tls_cert is None or config.tls_key is None:
        return grpc.insecure_channel(address)
    certificate = Path(config.tls_cert).read_bytes()
    trusted = authority or Path(config.tls_client_ca or config.tls_cert)
    mutual = config.tls_client_ca is not None
    credentials = grpc.ssl_channel_credentials(
        trusted.read_bytes(),
        Path(config.tls_key).read_bytes() if mutual else None,
        certificate if mutual else None,
    )
    return grpc.secure_channel(
        address, credentials, [("grpc.ssl_target_name_override", server_name)]
    )


def is_healthy(channel: grpc.Channel, timeout_s: float, *, live: bool) -> bool:
    """Whether the server says SERVING; with `live`, whether it says anything."""
    request = health_pb2.HealthCheckRequest()
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
    except grpc.RpcError:
        return False
    return bool(live or answer.status == health_pb2.HealthCheckResponse.SERVING)


def main() -> int:
    """Parse flags, ask, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(os.environ.get("PHALANX_CONFIG", "/etc/phalanx/config.toml")),
    )
    parser.add_argument("--ca", type=Path, help="PEM; default: tls_client_ca, else tls_cert")
    parser.add_argument("--server-name", default="localhost", help="a name in the certificate")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds")
    parser.add_argument("--live", action="store_true", help="any answer counts, also NOT_SERVING")
    flags = parser.parse_args()
    try:
        config = load_config(flags.config, {})
        channel = open_channel(config, flags.ca, flags.server_name)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return REFUSED
    with channel:
        healthy = is_healthy(channel, flags.timeout, live=flags.live)
    return HEALTHY if healthy else UNHEALTHY


if __name__ == "__main__":
    sys.exit(main())
