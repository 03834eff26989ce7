"""uvicorn, set up for clients that nobody knows: slow or endless headers cost them their connection."""

import asyncio
import socket

import uvicorn
from uvicorn.protocols.http import h11_impl

HEADER_SECONDS = 20.0         # from a connection to its first whole header
_HEADER_BYTES = 32 << 10
_CONNECTIONS = 1000


class _Protocol(h11_impl.H11Protocol):
    """HTTP/1.1; a connection must have sent a whole header within HEADER_SECONDS."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(HEADER_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at an address.

    Raises:
      ValueError: it cannot.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError("--host and --port must name a free address of this machine; got "
                         f"{host} and {port}: {error.strerror or error}") from error


def url(listener: socket.socket) -> str:
    """Returns the URL of the API at a socket."""
    host, port, *_ = listener.getsockname()
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def server(app, *, seconds: float) -> uvicorn.Server:
    """Returns a server; once told to stop, it waits up to `seconds` for answers."""
    return uvicorn.Server(uvicorn.Config(
        app, http=_Protocol, ws="none", lifespan="off", log_level="warning",
        access_log=False, server_header=False, proxy_headers=False, limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=_HEADER_BYTES, timeout_graceful_shutdown=max(1, int(seconds))))
