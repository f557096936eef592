"""One reply on its way to the screen, over lost connections and with Ctrl-C as the wish to stop it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from chatserve.cli.loop_thread import LoopThread
from chatserve.cli.screen import Screen
from chatserve.client.chat import ChatClient
from chatserve.client.errors import CommandFailedError
from chatserve.client.snapshot import text_of
from chatserve.protocol.events import TERMINAL_EVENTS

_ENDED = frozenset({"completed", "incomplete", "cancelled", "failed"})


class Reply:
    """Shows the text of one response as it comes, each character once."""

    def __init__(self, client: ChatClient, loop: LoopThread, screen: Screen, session_id: str, response_id: str) -> None:
        self._client = client
        self._loop = loop
        self._screen = screen
        self._session_id = session_id
        self._response_id = response_id
        self._num_shown = 0
        self._cancelling: Future[str] | None = None

    def show(self) -> dict[str, Any]:
        """Show the reply until it ends; returns the response object. Ctrl-C asks the server to stop it."""
        response = None
        try:
            while response is None:
                response = self._take(self._next_event())
            self._show_from(0, response.get("text", ""))
        finally:
            self._screen.reply_end()
        return response

    def _next_event(self) -> dict[str, Any]:
        coming = self._loop.submit(self._client.next_event())
        while True:
            try:
                return coming.result()
            except KeyboardInterrupt:
                if self._cancelling is not None:
                    raise  # the second time the person means it
                self._cancelling = self._loop.submit(self._client.cancel(self._session_id, self._response_id))

    def _take(self, event: Mapping[str, Any]) -> dict[str, Any] | None:
        """Show what an event brings; gives the response object once it has ended."""
        kind = event["type"]
        if kind == "response.output_text.delta" and event["response_id"] == self._response_id:
            self._show_from(event["offset"], event["delta"])
        elif kind in TERMINAL_EVENTS and event["response"]["id"] == self._response_id:
            return dict(event["response"])
        elif kind == "session.attached" and event["session_id"] == self._session_id and event["mode"] == "snapshot":
            return self._take_snapshot(event["snapshot"])
        elif kind == "client.disconnected":
            self._screen.remark(f"\n[connection lost: {event['reason']}; trying to come back]")
        elif kind == "error" and event.get("session_id") == self._session_id and not event["error"].get("retryable"):
            raise CommandFailedError(event["error"])
        return None

    def _take_snapshot(self, snapshot: Mapping[str, Any]) -> dict[str, Any] | None:
        for message in snapshot["messages"]:
            response = message.get("response") or {}
            if response.get("id") == self._response_id:
                self._show_from(0, text_of(message))
                return dict(response) if response.get("status") in _ENDED else None
        return None

    def _show_from(self, offset: int, text: str) -> None:
        """Show what of a piece of text at `offset` was not shown yet; a gap is filled when the reply ends."""
        if offset <= self._num_shown < offset + len(text):
            self._screen.reply_part(text[self._num_shown - offset :])
            self._num_shown = offset + len(text)
