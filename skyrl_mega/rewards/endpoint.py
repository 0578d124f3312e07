"""JSON over HTTP to one server: a bounded number of requests at once, each with a deadline, tried again where that may help."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx

from skyrl_mega.errors import RewardError
from skyrl_mega.rewards.attempts import with_retries

CONNECT_TIMEOUT_S = 10.0
#: Overload, and errors of the server that another attempt may not meet.
TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_MOST_OF_A_MESSAGE = 300


class EndpointError(RewardError):
    """What a server did instead of answering. `retry_after_s`: the pause that it asked for."""

    def __init__(self, message: str, *, is_transient: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.is_transient, self.retry_after_s = is_transient, retry_after_s


class Endpoint:
    """The server at `url`. Waiting for one of the `concurrency` places does not count towards `timeout_s`."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        retries: int,
        concurrency: int,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`transport`: another way to reach the server."""
        self._url, self._timeout_s, self._retries = url.rstrip("/"), timeout_s, retries
        self._places = asyncio.Semaphore(concurrency)
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            transport=transport,
        )

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that the server answers. Raises EndpointError once no attempt is left."""
        return await with_retries(
            lambda: self._attempt(path, body),
            retries=self._retries,
            is_transient=lambda error: isinstance(error, EndpointError) and error.is_transient,
        )

    async def _attempt(self, path: str, body: Mapping[str, Any]) -> Any:
        where = f"{self._url}{path}"
        async with self._places:
            try:
                async with asyncio.timeout(self._timeout_s):
                    response = await self._client.post(where, json=body)
            except TimeoutError as error:
                raise EndpointError(f"{where} has not answered within {self._timeout_s:g} s", is_transient=True) from error
            except httpx.HTTPError as error:
                why = f"{type(error).__name__}: {error}"
                raise EndpointError(f"{where} can't be reached ({why})", is_transient=True) from error
        if response.status_code != 200:
            raise EndpointError(
                f"{where} answered {response.status_code}: {response.text[:_MOST_OF_A_MESSAGE]}",
                is_transient=response.status_code in TRANSIENT_STATUS,
                retry_after_s=_seconds(response.headers.get("retry-after", "")),
            )
        try:
            return response.json()
        except ValueError as error:
            raise EndpointError(f"{where} answered no JSON: {response.text[:_MOST_OF_A_MESSAGE]}") from error

    async def close(self) -> None:
        await self._client.aclose()


def _seconds(header: str) -> float:
    """A Retry-After header in seconds; 0 where it is a date or absent."""
    try:
        return max(0.0, float(header))
    except ValueError:
        return 0.0
