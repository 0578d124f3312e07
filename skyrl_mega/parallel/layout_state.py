"""What Megatron-Core keeps in module globals of one layout, so that several layouts over the same ranks can take turns.

Megatron-Core knows one layout per process: process groups, sizes and ranks are globals of `parallel_state`, random states those
of a tracker. Models keep some of the groups they were built with and look up others while they run, as the schedules do. A model
with a layout of its own (a critic) is therefore built, run and saved while the globals are those of its layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class LayoutState:
    """Megatron-Core's global state of one layout. The state that is in force is remembered while another's takes its place."""

    #: The state that is in force; None before the first layout and after the last.
    _in_force: LayoutState | None = None

    def __init__(self) -> None:
        self._groups: dict[str, Any] = {}
        self._random: dict[str, Any] = {}

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """The globals are this layout's inside the block, and what they were after it. May be nested."""
        before = LayoutState._in_force
        if before is self:
            yield
            return
        if before is not None:
            before._remember()
        self._put()
        try:
            yield
        finally:
            self._remember()
            LayoutState._in_force = before
            if before is not None:
                before._put()

    @contextlib.contextmanager
    def founded(self) -> Iterator[None]:
        """As `in_force`, for the block that initialises Megatron-Core for this layout: it finds the globals as none was there."""
        from megatron.core import parallel_state

        self._groups = dict.fromkeys(_globals(parallel_state)) | {"_HYBRID_DP_CP_GROUPS": {}}
        with self.in_force():
            yield

    def stay_in_force(self) -> None:
        """Makes this the state that others give way to: that of the process's first layout, which is in the globals already."""
        LayoutState._in_force = self

    @staticmethod
    def forget() -> None:
        """No layout is in force any more: all groups are gone."""
        LayoutState._in_force = None

    def _remember(self) -> None:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        self._groups = _globals(parallel_state)
        self._random = get_cuda_rng_tracker().get_states()

    def _put(self) -> None:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        vars(parallel_state).update(self._groups)
        tracker = get_cuda_rng_tracker()
        tracker.reset()
        tracker.set_states(self._random)
        LayoutState._in_force = self


def _globals(parallel_state: Any) -> dict[str, Any]:
    """Megatron-Core's globals of a layout, by name: _TENSOR_MODEL_PARALLEL_GROUP and the like."""
    return {name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name.isupper()}
