"""Limits around the application: size of a request, time for it to arrive, and what a browser may do with answers."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_BYTES = 8 << 20
REQUEST_SECONDS = 30
UNREAD_SECONDS = 5  # how long the rest of a refused request is read
# The page needs only this service, so browsers shall refuse all other sources.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


class TooLarge(ValueError):
    """A request has more bytes than it may have."""


class Guard:
    """An ASGI application that guards another one.

    hosts: host names by which the service may be called, None for any. Without this check, a page from another server could reach
    a service on 127.0.0.1 by a name of its own that resolves to it (DNS rebinding).
    """

    def __init__(self, app: "ASGIApp", hosts: tuple[str, ...] | None = None, request_bytes: int = REQUEST_BYTES):
        self.app, self.hosts, self.request_bytes = app, hosts, request_bytes

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Reads and checks a request, and passes it on to the application."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        if is_head := scope["method"] == "HEAD":  # answered as GET is, without the body
            scope = {**scope, "method": "GET"}

        async def send_guarded(message: "Message") -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *headers]}
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        host = name_in(dict(scope["headers"]).get(b"host", b""))
        if self.hosts is not None and host not in self.hosts:
            return await refuse(receive, send_guarded, 400, f"the host {host!r} is not accepted; use {' or '.join(self.hosts)}")
        try:
            body = await asyncio.wait_for(self._body(scope, receive), REQUEST_SECONDS)
        except TooLarge as error:
            return await refuse(receive, send_guarded, 413, str(error))
        except asyncio.TimeoutError:
            return await refuse(receive, send_guarded, 408, f"the request did not arrive within {REQUEST_SECONDS} s")
        except ConnectionResetError:
            return None
        messages: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_whole() -> "Message":
            return next(messages, None) or await receive()

        await self.app(scope, receive_whole, send_guarded)

    async def _body(self, scope: "Scope", receive: "Receive") -> bytes:
        """Returns the whole body.

        Raises TooLarge, before it reads a body whose length is announced, and ConnectionResetError if the client disconnects.
        """
        too_large = TooLarge(f"a request may have at most {self.request_bytes:,} bytes; send fewer images at a time")
        if int(dict(scope["headers"]).get(b"content-length", b"0")) > self.request_bytes:
            raise too_large
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.request_bytes:
                raise too_large
            more = message.get("more_body", False)
        return b"".join(parts)


def name_in(host: bytes) -> str:
    """Returns the name in a Host header, without its port."""
    text = host.decode("latin-1").lower()
    return text.rpartition(":")[0] if text.rpartition(":")[2].isdigit() else text


async def refuse(receive: "Receive", send: "Send", status: int, reason: str) -> None:
    """Answers at once, and then discards the rest of the request.

    A connection that is closed with unread bytes would lose the answer too.
    """
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(the_rest(receive), UNREAD_SECONDS)
    await send({"type": "http.response.body", "body": b""})


async def the_rest(receive: "Receive") -> None:
    """Reads the rest of a request."""
    while (await receive()).get("more_body", False):
        pass
