"""What starting, running and closing vLLM does to the trainer's process, and how each of it is undone.

An engine in this process
- replaces `torch.set_num_threads` by a function that does nothing (CPU): put back;
- seeds the generators of Python, NumPy and torch when it starts, and draws from torch's at every step: the engine gets a
  stream of its own, swapped in while it runs;
- ends the default process group when it closes, whoever made it: kept if the trainer made it.

On CPU it also makes `torch.accelerator.synchronize` and `empty_cache` do nothing, which they have no reason not to.

An engine in child processes changes nothing here, but can keep the trainer waiting: `start_deadline` bounds that.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import threading
from collections.abc import Iterator

import numpy as np
import torch

from skyrl_mega.errors import DeadlineError, RolloutError


class RandomStream:
    """The torch random stream of an in-process engine."""

    def __init__(self) -> None:
        """Captures the current state of torch's default generators."""
        self._state = _torch_state()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """The engine's stream is torch's default inside the block; outside, nothing happened."""
        outside = _torch_state()
        _set_torch_state(self._state)
        try:
            yield
        finally:
            self._state = _torch_state()
            _set_torch_state(outside)


def _torch_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_torch_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def undisturbed_process(threads: int) -> Iterator[None]:
    """Sets torch's thread count, and puts back after the block what an in-process engine's start replaces."""
    set_num_threads = torch.set_num_threads
    set_num_threads(threads)
    torch_state, python_state, numpy_state = _torch_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        _set_torch_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def kept_process_group() -> Iterator[None]:
    """Inside the block, destroying the default process group does nothing; groups named explicitly are destroyed."""
    destroy = torch.distributed.destroy_process_group

    def destroy_named_only(group: torch.distributed.ProcessGroup | None = None) -> None:
        if group is not None:
            destroy(group)

    torch.distributed.destroy_process_group = destroy_named_only
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


@contextlib.contextmanager
def start_deadline(timeout_s: float) -> Iterator[None]:
    """Kills vLLM's child processes if the block is not done after `timeout_s`; the block's RolloutError becomes DeadlineError."""
    before = set(multiprocessing.active_children())
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        for child in set(multiprocessing.active_children()) - before:
            if child.name.startswith("EngineCore"):
                child.kill()

    timer = threading.Timer(timeout_s, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RolloutError as error:
        if expired.is_set():
            raise DeadlineError(
                f"the rollout engine must be up within rollout.start_timeout_s ({timeout_s:g} s) and was not; its processes "
                "were ended. Raise the limit, or look for what keeps this machine busy."
            ) from error
        raise
    finally:
        timer.cancel()
