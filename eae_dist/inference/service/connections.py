"""Limits for connections: the time in which the header of a request must arrive, and how many one address may hold.

Without them, clients that connect and send nothing, or half a header, would hold all connections for ever.
"""

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # AutoHTTPProtocol is one of two classes with these methods
    from uvicorn.protocols.http.h11_impl import H11Protocol as AutoHTTPProtocol
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADER_SECONDS = 10
TOO_LATE = b"408 Request Timeout", b"the header of the request did not arrive in time"
TOO_MANY = b"503 Service Unavailable", b"your address has too many connections"


def limited_protocol(most_of_one: int | None, header_seconds: float = HEADER_SECONDS) -> type:
    """Returns a protocol class for uvicorn.

    most_of_one: the most connections of one address, None for any number. Connections beyond it are answered with 503.
    """
    held: Counter[str] = Counter()

    class LimitedProtocol(AutoHTTPProtocol):
        """One connection. `_deadline` runs while no request is being answered and something was, or is to be, received."""

        _deadline: asyncio.TimerHandle | None = None
        _address = ""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn declares it
            super().connection_made(transport)
            self._address = (transport.get_extra_info("peername") or ("",))[0]
            held[self._address] += 1
            if most_of_one is not None and held[self._address] > most_of_one:
                self._end(TOO_MANY)
            else:
                self._await_header()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            held[self._address] -= 1
            if not held[self._address]:
                del held[self._address]
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self._deadline is None:
                self._await_header()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._deadline is None and not self.transport.is_closing() and self.cycle.response_complete:
                self._await_header()

        def _await_header(self) -> None:
            self._deadline = self.loop.call_later(header_seconds, self._end, TOO_LATE)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _end(self, answer: tuple[bytes, bytes]) -> None:
            if not self.transport.is_closing():
                status, reason = answer
                body = b'{"detail": "%s"}' % reason
                header = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
                self.transport.write(header % (status, len(body)) + body)
                self.transport.close()

    return LimitedProtocol
