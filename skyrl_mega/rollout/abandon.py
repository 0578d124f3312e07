"""How a call that nobody waits for any more ends."""

from __future__ import annotations

import asyncio
from typing import Any


def abandon(call: asyncio.Future[Any]) -> None:
    """Cancels the call. It may fail instead (its engine was closed first): that is no error which anyone has missed."""
    call.cancel()
    call.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
