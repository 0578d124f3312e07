"""An engine of the fleet that is a vLLM server somebody else started.

Token ids in, token ids out: requests go to vLLM's `/inference/v1/generate`, whose answer has what the OpenAI routes lack, the
weight version of each token. The server is started with

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs --no-enable-chunked-prefill
        --worker-extension-cls skyrl_mega.rollout.vllm_weight_transfer.ShmWorkerExtension
        --weight-transfer-config '{"backend": "skyrl_mega_shm"}'

with this package importable there. `connect` asks for each of these things and says which is missing. Weight updates use the
server's RL routes (/pause, /resume, /weight_info, /update_weight_version) and /collective_rpc; a transport must reach the
server's machine. The fleet must be the server's only user while it trains.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import BackendUnavailableError, EngineDiedError, RolloutError, WeightSyncError
from skyrl_mega.rollout.versioned_engine import VersionedEngine
from skyrl_mega.rollout.vllm_requests import STOP_REASONS, check_length, prefix_cache_salt
from skyrl_mega.types import Completion, GenerationRequest, SamplingParams, StopReason

#: Connections to one server besides those of its requests.
CONTROL_CONNECTIONS = 16
CONNECT_TIMEOUT_S = 10.0
#: JSON has no infinity: the server writes this for a logprob that is -inf or NaN.
CLAMPED_LOGPROB = -9999.0
#: What a server says of its weights before anyone labelled them.
UNLABELLED = "default"


@dataclass(frozen=True)
class ExternalEngineFactory:
    """Connects to the server at `url` (`fleet.EngineFactory`). `vocab_size`: of the trainer's model, and so of the server's."""

    rollout: RolloutConfig
    url: str
    vocab_size: int
    transport: httpx.AsyncBaseTransport | None = None

    async def __call__(self, name: str) -> OpenAIEngine:
        return await OpenAIEngine.connect_to(name, self.url, self.rollout, vocab_size=self.vocab_size, transport=self.transport)


class OpenAIEngine(VersionedEngine):
    """`fleet.FleetEngine` over HTTP. Closing it leaves the server running."""

    def __init__(self, name: str, client: httpx.AsyncClient, rollout: RolloutConfig, model: str, version: int) -> None:
        """Use `connect_to`."""
        super().__init__(name, version)
        self._client = client
        self._rollout = rollout
        self._model = model
        self._ids = itertools.count()
        self._running: set[str] = set()

    @classmethod
    async def connect_to(
        cls,
        name: str,
        url: str,
        rollout: RolloutConfig,
        *,
        vocab_size: int,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> OpenAIEngine:
        """The engine behind `url`, once it answered everything that will be asked of it. `transport`: another way to reach it.

        Raises EngineDiedError if nothing answers there, BackendUnavailableError if the server lacks a route, a setting or the
        model's vocabulary.
        """
        connections = (rollout.max_concurrent_requests or rollout.max_num_seqs) + CONTROL_CONNECTIONS
        client = httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),  # deadlines are the router's and the fleet's
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            transport=transport,
        )
        try:
            model = await _check_model(client, name, rollout)
            engine = cls(name, client, rollout, model, version=0)
            label = await engine._check_routes()
            await engine._check_vocabulary(vocab_size)
            await engine._make_ready(label)
        except BaseException:
            await client.aclose()
            raise
        return engine

    async def _check_routes(self) -> str:
        """How the server labels its weights. Ends the update that a pusher who died left on its way."""
        try:
            label = (await _get(self._client, self._name, "/weight_info"))["weight_version"]
            if (await _get(self._client, self._name, "/is_paused"))["is_paused"]:
                await self._on_workers("abandon_weight_update")
                await self._run_on()
        except EngineDiedError:
            raise
        except RolloutError as error:
            raise BackendUnavailableError(
                f"the server of engine {self._name} must have vLLM's RL routes; start it with VLLM_SERVER_DEV_MODE=1: {error}"
            ) from error
        return label

    async def _check_vocabulary(self, vocab_size: int) -> None:
        """One token after the vocabulary's last, with all that an answer must have."""
        probe = GenerationRequest("vocabulary", [vocab_size - 1], SamplingParams(max_new_tokens=1, temperature=0.0))
        missing = ""
        try:
            (choice,) = (await self._generate(generate_body(probe, self._model)))["choices"]
            missing = ", ".join(key for key in ("token_ids", "logprobs", "weight_versions") if not choice.get(key))
        except EngineDiedError:
            raise
        except RolloutError as error:
            missing = str(error)
        if missing:
            raise BackendUnavailableError(
                f"engine {self._name} must serve the trainer's model and return token ids with logprobs and versions; asked for "
                f"one token after token id {vocab_size - 1}, the last of the vocabulary, its answer lacks or says: {missing}"
            )

    async def _make_ready(self, label: str) -> None:
        """The weights are version 0 from now on; they are only trusted if nobody has labelled them before."""
        if label == UNLABELLED:
            await _post(self._client, self._name, "/init_weight_transfer_engine", {"init_info": {}})
        else:
            self._gate.distrust(f"the server had weights labelled {label!r} already, of whatever run")
        await _post(self._client, self._name, "/update_weight_version", {"new_version": "0"})

    async def policy_version(self) -> int:
        """As `AsyncVLLMEngine.policy_version`."""
        self._gate.check_whole()
        if self._gate.on_its_way is not None:
            return self._gate.version
        label = (await _get(self._client, self._name, "/weight_info"))["weight_version"]
        if label != str(self._gate.version):
            # Restarted, or labelled by somebody else: then its weights are not what this fleet gave it.
            raise EngineDiedError(
                f"engine {self._name} had weight version {self._gate.version} and now says {label!r}: the server was restarted "
                "or has another user."
            )
        return self._gate.version

    async def generate(self, request: GenerationRequest) -> Completion:
        """See `protocols.AsyncEngine`. Waits while a weight version is on its way."""
        num_tokens, most = len(request.prompt_token_ids) + 1, self._rollout.max_model_len
        check_length(f"request {request.request_id} with one new token", num_tokens, most, least=2)
        answer = await self._generate(generate_body(request, self._model))
        return completion_of(request, answer)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `protocols.AsyncEngine`. The server needs room for one token after each sequence."""
        for i, sequence in enumerate(sequences):
            check_length(f"sequence {i} to score with one new token", len(sequence) + 1, self._rollout.max_model_len, least=2)
        return await asyncio.gather(*(self._score_one(list(sequence)) for sequence in sequences))

    async def _score_one(self, sequence: list[int]) -> list[float]:
        answer = await self._generate(score_body(sequence, self._model))
        rows = answer.get("prompt_logprobs") or []
        if len(rows) != len(sequence):
            raise RolloutError(f"engine {self._name} returned {len(rows)} prompt logprobs for {len(sequence)} tokens.")
        return [0.0, *(rows[t][str(sequence[t])]["logprob"] for t in range(1, len(sequence)))]

    async def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        version = await self._gate.serving()
        if (salt := prefix_cache_salt(self._rollout, version)) is not None:
            body["cache_salt"] = salt
        request_id = f"{self._name}-{next(self._ids)}"
        self._running.add(request_id)
        try:
            return await _post(self._client, self._name, "/inference/v1/generate", body, headers={"X-Request-Id": request_id})
        finally:
            self._running.discard(request_id)

    async def interrupt(self) -> int:
        """See `FleetEngine.interrupt`."""
        running = [f"generate-tokens-{request_id}" for request_id in self._running]
        if running:  # an empty list would end everybody's
            await _post(self._client, self._name, "/abort_requests", {"request_ids": running})
        return len(running)

    # What a weight update needs (`VersionedEngine`).

    async def _freeze(self) -> None:
        await _post(self._client, self._name, "/pause", params={"mode": "keep", "clear_cache": False})

    async def _run_on(self) -> None:
        await _post(self._client, self._name, "/resume")

    async def _doze(self, level: int) -> None:
        await _post(self._client, self._name, "/sleep", params={"level": level, "mode": "keep"})

    async def _rouse(self, tags: Sequence[str] | None) -> bool:
        answer = await _post(self._client, self._name, "/wake_up", params={"tags": list(tags)} if tags else None)
        return answer["status"] == "awake"

    async def _label(self, version: int) -> None:
        if self._rollout.kv_cache_on_update == "recompute":
            await _post(self._client, self._name, "/reset_prefix_cache", params={"reset_running_requests": True})
        await _post(self._client, self._name, "/update_weight_version", {"new_version": str(version)})

    async def _on_workers(self, method: str, kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        body = {"method": method, "kwargs": dict(kwargs or {})}
        try:
            answer = await _post(self._client, self._name, "/collective_rpc", body)
        except EngineDiedError as error:
            # The server says 500 whether a worker raised or the engine is gone; its health tells which.
            await _get(self._client, self._name, "/health")
            raise WeightSyncError(f"{method} failed in a worker: {error}") from error
        return answer.get("results", [])

    async def close(self) -> None:
        """Closes the connections; the server stays. Safe to call twice."""
        self._gate.release()
        await self._client.aclose()


async def _check_model(client: httpx.AsyncClient, name: str, rollout: RolloutConfig) -> str:
    """The served model's name."""
    models = (await _get(client, name, "/v1/models")).get("data", [])
    if not models:
        raise BackendUnavailableError(f"the server of engine {name} serves no model.")
    longest = models[0].get("max_model_len")
    if longest is not None and longest < rollout.max_model_len:
        raise BackendUnavailableError(
            f"the server of engine {name} must allow sequences of rollout.max_model_len ({rollout.max_model_len}) tokens, and "
            f"allows {longest}; start it with --max-model-len {rollout.max_model_len}."
        )
    return models[0]["id"]


def generate_body(request: GenerationRequest, model: str) -> dict[str, Any]:
    """The JSON of `/inference/v1/generate` for one turn."""
    sampling = request.sampling
    parameters = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop": list(sampling.stop),
        "seed": sampling.seed,
        "logprobs": 0,
        "include_stop_str_in_output": True,
    }
    return {"model": model, "token_ids": list(request.prompt_token_ids), "sampling_params": parameters, "output_mode": "text"}


def score_body(sequence: list[int], model: str) -> dict[str, Any]:
    """The JSON of `/inference/v1/generate` that asks for the log-probability of each token of `sequence`."""
    parameters = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
    return {"model": model, "token_ids": sequence, "sampling_params": parameters}


def completion_of(request: GenerationRequest, answer: Mapping[str, Any]) -> Completion:
    """The completion in the server's answer. Raises RolloutError if it breaks the protocol."""
    (choice,) = answer["choices"]
    token_ids = choice["token_ids"] or []
    content = (choice["logprobs"] or {}).get("content") or []
    logprobs = [entry["logprob"] for entry in content]
    reason = choice["finish_reason"]
    if reason not in STOP_REASONS:
        raise RolloutError(f"request {request.request_id} ended with {reason!r}; known: {sorted(STOP_REASONS)}.")
    whole = all(math.isfinite(logprob) and logprob > CLAMPED_LOGPROB for logprob in logprobs)
    if len(logprobs) != len(token_ids) or not whole or not (token_ids or STOP_REASONS[reason] is StopReason.ABORT):
        raise RolloutError(
            f"request {request.request_id}: every sampled token must come with a finite logprob; the server returned "
            f"{len(token_ids)} tokens and {len(logprobs)} logprobs {logprobs[:8]}. Its weights may hold NaN."
        )
    versions = [
        int(span["version"])
        for span in choice["weight_versions"] or []
        for _ in range(span["start"], min(span["end"], len(token_ids)))
    ]
    if len(versions) != len(token_ids):
        raise RolloutError(
            f"request {request.request_id}: every sampled token must have a weight version; the server reports "
            f"{choice['weight_versions']} for {len(token_ids)} tokens."
        )
    return Completion(request.request_id, token_ids, logprobs, choice["text"], STOP_REASONS[reason], versions)


async def _get(client: httpx.AsyncClient, name: str, path: str) -> dict[str, Any]:
    return await _send(client, name, client.build_request("GET", path))


async def _post(
    client: httpx.AsyncClient,
    name: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    return await _send(client, name, client.build_request("POST", path, json=body, params=params, headers=headers))


async def _send(client: httpx.AsyncClient, name: str, request: httpx.Request) -> dict[str, Any]:
    """The answer's JSON ({} if it has none). EngineDiedError without a server, or if it failed; RolloutError if it refused."""
    if client.is_closed:
        raise EngineDiedError(f"engine {name} was closed; connect again.")
    try:
        response = await client.send(request)
    except httpx.TransportError as error:
        raise EngineDiedError(f"the server of engine {name} at {request.url} is gone: {type(error).__name__}: {error}") from error
    said = f"{request.method} {request.url.path}: {response.status_code} {response.text[:500]}"
    if response.is_server_error:
        raise EngineDiedError(f"the server of engine {name} failed: {said}")
    if response.is_error:
        raise RolloutError(f"the server of engine {name} refused: {said}")
    return response.json() if response.content else {}
