"""An engine for unit tests of router and fleet: it samples the letters of a fixed alphabet, one per tick, under a version."""

from __future__ import annotations

import asyncio
import itertools

from skyrl_mega.errors import EngineDiedError, EngineStaleError
from skyrl_mega.types import Completion, StopReason


class FakeEngine:
    """`fleet.FleetEngine`. Token t of a turn is (last token + 1) % 26, so that any continuation is checked by looking at it."""

    def __init__(self, name, *, tick_s=0.001, version=0):
        self.name = name
        self.tick_s = tick_s
        self.version = version
        self.dead = ""
        self.stale = False
        self.hangs = False
        self.closed = self.killed = False
        self.running: dict[str, asyncio.Event] = {}
        self.seen: list = []
        self.cancelled: list[str] = []
        self.most_running = 0
        self._calls = itertools.count()

    async def generate(self, request):
        self._check()
        self.seen.append(request)
        interrupted, call = asyncio.Event(), f"{request.request_id}/{next(self._calls)}"
        self.running[call] = interrupted
        self.most_running = max(self.most_running, len(self.running))
        tokens, last = [], request.prompt_token_ids[-1]
        text, reason = "", StopReason.LENGTH
        try:
            while len(tokens) < request.sampling.max_new_tokens:
                await asyncio.sleep(self.tick_s)
                while self.hangs:
                    await asyncio.sleep(0.005)
                self._check()
                if interrupted.is_set():
                    reason = StopReason.ABORT
                    break
                last = (last + 1) % 26
                tokens.append(last)
                text += chr(97 + last)
                if any(stop in text for stop in request.sampling.stop):
                    reason = StopReason.STOP
                    break
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        finally:
            del self.running[call]
        logprobs = [-float(token) for token in tokens]
        return Completion(request.request_id, tokens, logprobs, text, reason, [self.version] * len(tokens))

    async def score(self, sequences):
        self._check()
        return [[0.0] * len(sequence) for sequence in sequences]

    async def policy_version(self):
        while self.hangs:
            await asyncio.sleep(0.005)
        self._check()
        return self.version

    async def interrupt(self):
        for event in self.running.values():
            event.set()
        return len(self.running)

    async def sleep(self, level=1):
        self._check()

    async def wake(self, tags=None):
        self._check()

    def receiver(self):
        return self

    async def close(self):
        self.closed = True

    async def kill(self):
        self.killed = True
        self.dead = self.dead or "killed"

    def _check(self):
        if self.dead:
            raise EngineDiedError(f"engine {self.name}: {self.dead}")
        if self.stale:
            raise EngineStaleError(f"engine {self.name} waits for weights")
