"""An engine of the fleet whose requests are written to the run's trace."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from skyrl_mega.types import Completion, GenerationRequest

if TYPE_CHECKING:
    from skyrl_mega.rollout.fleet import EngineFactory, FleetEngine
    from skyrl_mega.telemetry.rollout_trace import RolloutTrace


class TracedEngine:
    """Passes everything on to `engine`, and writes each request."""

    def __init__(self, engine: FleetEngine, trace: RolloutTrace) -> None:
        self._engine, self._trace = engine, trace

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: GenerationRequest) -> Completion:
        """See `protocols.AsyncEngine`."""
        span = self._trace.begin(f"engine {self._engine.name}")
        outcome: dict[str, Any] = {"prompt_tokens": len(request.prompt_token_ids)}
        try:
            completion = await self._engine.generate(request)
            versions = completion.policy_versions
            outcome |= {"tokens": len(completion.token_ids), "stop": completion.stop_reason.value}
            outcome |= {"versions": f"{min(versions)}..{max(versions)}"} if versions else {}
            return completion
        finally:
            span.end(request.request_id, **outcome)


def traced(factory: EngineFactory, trace: RolloutTrace) -> Callable[[str], Awaitable[FleetEngine]]:
    """A factory whose engines are traced."""

    async def start(name: str) -> FleetEngine:
        return TracedEngine(await factory(name), trace)

    return start
