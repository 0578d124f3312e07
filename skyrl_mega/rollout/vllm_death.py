"""The death of vLLM's child processes reaches whoever waits for them.

vLLM 0.32 notices that its engine process was killed (`resources.engine_dead`), and refuses every later call; but a call that is
under way waits for an answer that can't come: `collective_rpc`, `generate`, with no deadline. Here a thread passes the news on.
"""

from __future__ import annotations

import threading
from typing import Any

POLL_S = 0.5


def release_waiters_on_death(engine_core: Any) -> threading.Event:
    """Makes calls of a dead engine fail with vLLM's EngineDeadError within a second. Set the event to end the watch.

    `engine_core` is vLLM's `SyncMPClient`: an engine in child processes.
    """
    ended = threading.Event()

    def watch() -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        while not ended.wait(POLL_S):
            if engine_core.resources.engine_dead:
                for future in list(engine_core.utility_results.values()):
                    if not future.done():
                        future.set_exception(EngineDeadError())
                engine_core.outputs_queue.put_nowait(EngineDeadError())
                return

    threading.Thread(target=watch, name="vllm-death", daemon=True).start()
    return ended
