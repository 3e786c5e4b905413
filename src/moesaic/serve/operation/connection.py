"""Connections that may not be held open for nothing: headers must come soon and be small, and there is a most of them.

uvicorn bounds neither the seconds nor the bytes of headers with its fast parser.
"""

from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from moesaic.serve.operation.refusals import refusal_body
from moesaic.serve.operation.settings import Limits

_PHRASES = {408: b"Request Timeout", 431: b"Request Header Fields Too Large", 503: b"Service Unavailable"}


def guarded(limits: Limits) -> type[HttpToolsProtocol]:
    """uvicorn's protocol under limits."""

    class Guarded(HttpToolsProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._header_bytes = 0
            self._in_headers = True
            self._too_slow: TimerHandle | None = None

        def connection_made(self, transport: Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self._refuse(503, "too many connections; try again later")
                return
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_clock()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self._in_headers and self._too_slow is None:
                self._await_headers()
            self._header_bytes += len(data) * self._in_headers
            super().data_received(data)
            if self._in_headers and self._header_bytes > limits.header_bytes:
                self._refuse(431, f"headers of more than {limits.header_bytes} bytes")

        def on_headers_complete(self) -> None:
            self._in_headers = False
            self._stop_clock()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._in_headers, self._header_bytes = True, 0
            super().on_message_complete()

        def _await_headers(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                return  # an answer is on its way; what comes meanwhile is the next request, or a stray line end
            self._too_slow = self.loop.call_later(limits.header_s, self._refuse, 408, "the headers came too slowly")

        def _stop_clock(self) -> None:
            if self._too_slow is not None:
                self._too_slow.cancel()
                self._too_slow = None

        def _refuse(self, status: int, message: str) -> None:
            self._stop_clock()
            if self.transport.is_closing():
                return
            body = refusal_body("", status, message)
            head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\n" % (status, _PHRASES[status])
            self.transport.write(head + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)
            self.transport.close()

    return Guarded
