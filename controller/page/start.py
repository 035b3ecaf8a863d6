"""The page as a configuration asks for it."""

from __future__ import annotations

from contextlib import AsyncExitStack

from phalanx.controller.config import ClusterConfig
from phalanx.controller.server.service import InferenceService
from phalanx.controller.units import split_address

from .figures import Figures
from .host import PageHost
from .state import Cluster


async def start_page(
    config: ClusterConfig,
    service: InferenceService,
    cluster: Cluster,
    figures: Figures,
    stack: AsyncExitStack,
) -> PageHost:
    """Serve it until the stack ends. Raises `ConfigError`."""
    host, port = split_address(config.page or "") or ("127.0.0.1", 0)
    page = PageHost(
        service,
        cluster,
        figures,
        host=host,
        port=port,
        tls_cert=config.tls_cert,
        tls_key=config.tls_key,
        tls_client_ca=config.tls_client_ca,
        token_file=config.token_file,
        insecure=config.insecure,
    )
    await page.start()
    service.listeners.append(page.listener)
    stack.push_async_callback(page.stop)
    return page
