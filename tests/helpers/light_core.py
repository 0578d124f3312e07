"""The process of a light engine: what vLLM's engine core is to vLLM's, up in two seconds. See `light_engine`.

It samples tokens by the request's seed, one each tick, and receives weight buckets as a vLLM worker does, checksums included;
but it has no model: a token's logprob is that of a uniform distribution. Speaks pickled frames over standard input and output.
"""

from __future__ import annotations

import asyncio
import math
import os
import pickle
import random
import signal
import struct
import sys
from typing import Any

#: Byte tokens of `helpers.tiny.make_tokenizer`, and its end of sequence.
FIRST_TOKEN, NUM_TOKENS, END = 5, 256, 2
TICK_S = float(os.environ.get("LIGHT_TICK_S", "0.03"))
LOAD_S = float(os.environ.get("LIGHT_LOAD_S", "0.05"))
HEADER = struct.Struct("!I")


def frame(message: Any) -> bytes:
    content = pickle.dumps(message)
    return HEADER.pack(len(content)) + content


async def read_frame(reader: asyncio.StreamReader) -> Any:
    """The next message. Raises IncompleteReadError at the end of the stream."""
    (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
    return pickle.loads(await reader.readexactly(size))


class LightCore:
    """Every public method answers the message of its name."""

    def __init__(self) -> None:
        from skyrl_mega.rollout.transport.receiver import BucketReceiver

        self._buckets = BucketReceiver()
        self._version = 0
        self._overwritten = False
        self._running = asyncio.Event()
        self._running.set()
        self._turns: dict[str, asyncio.Event] = {}

    async def version(self) -> int:
        return self._version

    async def label(self, version: int) -> None:
        self._version = version

    async def freeze(self) -> None:
        self._running.clear()

    async def run_on(self) -> None:
        self._running.set()

    async def abort(self, turns: list[str] | None) -> int:
        chosen = [self._turns[turn] for turn in (self._turns if turns is None else turns) if turn in self._turns]
        for ended in chosen:
            ended.set()
        return len(chosen)

    async def generate(self, turn: str, seed: int, max_new_tokens: int) -> dict[str, Any]:
        draw, ended = random.Random(seed), self._turns.setdefault(turn, asyncio.Event())
        tokens: list[int] = []
        versions: list[int] = []
        reason = "length"
        try:
            while len(tokens) < max_new_tokens:
                await asyncio.sleep(TICK_S)
                while not self._running.is_set() and not ended.is_set():
                    await asyncio.sleep(TICK_S / 4)
                if ended.is_set():
                    reason = "abort"
                    break
                stops = draw.random() < 0.2
                tokens.append(END if stops else FIRST_TOKEN + draw.randrange(NUM_TOKENS))
                versions.append(self._version)
                if stops:
                    reason = "stop"
                    break
        finally:
            del self._turns[turn]
        text = "".join(chr(97 + token % 26) for token in tokens)
        return {"tokens": tokens, "logprob": -math.log(NUM_TOKENS), "versions": versions, "text": text, "reason": reason}

    # What a worker of vLLM answers (`rollout.vllm_weight_transfer`).

    async def connect_weight_transport(self, endpoint: dict[str, Any]) -> None:
        self._buckets.connect(endpoint, 0)

    async def start_weight_update(self) -> None:
        self._overwritten = False
        self._buckets.begin()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        await asyncio.sleep(LOAD_S)
        if self._buckets.receive(update_info["bucket"]):
            self._overwritten = True
        self._buckets.release(update_info["bucket"])

    async def weight_update_report(self) -> dict[str, Any]:
        state = {"error": self._buckets.error, "num_workers": 1, "seconds": self._buckets.seconds}
        return state | self._buckets.totals() | self._buckets.state()

    async def finish_weight_update(self) -> None:
        self._buckets.commit()

    async def abandon_weight_update(self) -> dict[str, bool]:
        self._buckets.abandon()
        return {"overwritten": self._overwritten}


async def serve() -> None:
    """Answers frames (number, method, arguments) with (number, result, error), until standard input ends."""
    loop = asyncio.get_running_loop()
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print must not come between frames
    core, tasks = LightCore(), set()
    reader = asyncio.StreamReader(limit=2**30)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    async def answer(number: int, method: str, arguments: dict[str, Any]) -> None:
        try:
            outcome = (number, await getattr(core, method)(**arguments), None)
        except Exception as error:  # noqa: BLE001 - whoever asked hears of it
            outcome = (number, None, f"{type(error).__name__}: {error}")
        answers.write(frame(outcome))

    answers.write(frame((-1, os.getpid(), None)))
    try:
        while True:
            task = loop.create_task(answer(*await read_frame(reader)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    except asyncio.IncompleteReadError:
        return


if __name__ == "__main__":
    from skyrl_mega.rollout.engine_process import die_with_parent

    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; its parent decides
    asyncio.run(serve())
