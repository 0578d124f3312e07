"""The routing of a growing text, from the requests that computed it."""

from __future__ import annotations

import numpy as np

#: In `routed_experts`: the router chooses for itself.
UNKNOWN_EXPERT = -1


class RoutedTokens:
    """Which experts computed each token, as the first request said that told it.

    Every request computes its whole prompt, or finds it in the engine's cache, and gives the routing of all its tokens but the
    last. Of a token that an earlier request computed already, that one's routing stays: its logprobs came of it.
    """

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._count = 0

    def add(self, rows: np.ndarray | None) -> None:
        """`rows` [n, layers, K]: of the first n tokens; None: a request that tells nothing."""
        if rows is not None and len(rows) > self._count:
            self._parts.append(rows[self._count :])
            self._count = len(rows)

    def rows(self) -> np.ndarray | None:
        """int16 [n, layers, K] of the tokens known so far; None where nothing is."""
        return np.concatenate(self._parts).astype(np.int16) if self._parts else None

    def padded(self, length: int) -> np.ndarray | None:
        """The same for `length` tokens: -1 for those that no request has computed."""
        rows = self.rows()
        if rows is None:
            return None
        return np.concatenate([rows, np.full((length - len(rows), *rows.shape[1:]), UNKNOWN_EXPERT, dtype=np.int16)])
