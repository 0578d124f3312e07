"""A small ASGI server that speaks vLLM's schema: bodies are parsed and answers made by vLLM's own classes.

It "samples" token (last + 1) % vocabulary, one per tick. What it was told is in `calls`.
"""

from __future__ import annotations

import asyncio
import json
from urllib.parse import parse_qs

VOCABULARY = 64


class FakeServer:
    def __init__(self, *, dev_mode=True, scale_out=True, max_model_len=256, label="default"):
        self.dev_mode, self.scale_out, self.max_model_len = dev_mode, scale_out, max_model_len
        self.label = label
        self.calls: list[tuple[str, dict]] = []
        self.unpaused = asyncio.Event()
        self.unpaused.set()
        self.running: dict[str, asyncio.Event] = {}
        self.cancelled: list[str] = []
        self.overwritten = False
        self.failing: dict[str, int] = {}
        self.tick_s = 0.001
        self.nan = False

    async def __call__(self, scope, receive, send):
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        query = parse_qs(scope["query_string"].decode())
        headers = {key.decode().lower(): value.decode() for key, value in scope["headers"]}
        status, answer = await self.answer(scope["path"], json.loads(body or "{}"), query, headers)
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    async def answer(self, path, body, query, headers):
        self.calls.append((path, body | {key: values[0] if len(values) == 1 else values for key, values in query.items()}))
        if path in self.failing:
            return self.failing[path], {"error": {"message": "it failed"}}
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny", "max_model_len": self.max_model_len}]}
        if path == "/health":
            return 200, {}
        if path == "/inference/v1/generate":
            return (
                await self.generate(body, headers["x-request-id"]) if self.scale_out else (403, {"error": "--enable-scale-out"})
            )
        if not self.dev_mode:
            return 404, {"detail": "Not Found"}
        if path == "/weight_info":
            return 200, {"weight_version": self.label}
        if path == "/update_weight_version":
            self.label = body["new_version"]
            return 200, {"success": True}
        if path == "/pause":
            self.unpaused.clear()
            return 200, {"status": "paused"}
        if path == "/resume":
            self.unpaused.set()
            return 200, {"status": "resumed"}
        if path == "/is_paused":
            return 200, {"is_paused": not self.unpaused.is_set()}
        if path == "/abort_requests":
            for request_id in body["request_ids"]:
                self.running[request_id].set()
            return 200, {"status": "aborted"}
        if path == "/collective_rpc":
            return self.collective_rpc(body)
        if path == "/wake_up":
            return 200, {"status": "awake"}
        return 200, {}

    def collective_rpc(self, body):
        results = {
            "weight_update_report": [{"error": "", "num_tensors": 3, "size_bytes": 12, "checksum": "c"}],
            "abandon_weight_update": [{"overwritten": self.overwritten}],
        }
        return (
            (500, {"detail": "a worker raised"})
            if body["method"] == "explode"
            else (200, {"results": results.get(body["method"], [None])})
        )

    async def generate(self, body, request_id):
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionLogProbs, ChatCompletionLogProbsContent
        from vllm.entrypoints.scale_out.token_in_token_out import protocol
        from vllm.logprobs import Logprob
        from vllm.outputs import WeightVersionSpan

        request = protocol.GenerateRequest.model_validate(body)
        if max(request.token_ids) >= VOCABULARY:
            return 400, {"error": {"message": "token id out of vocabulary"}}
        sampling, last = request.sampling_params, request.token_ids[-1]
        interrupted = self.running[f"generate-tokens-{request_id}"] = asyncio.Event()
        tokens, versions, reason = [], [], "length"
        try:
            while len(tokens) < sampling.max_tokens:
                await asyncio.sleep(self.tick_s)
                if interrupted.is_set():
                    reason = "abort"
                    break
                if self.unpaused.is_set():
                    last = (last + 1) % VOCABULARY
                    tokens.append(last)
                    versions.append(self.label)
        except asyncio.CancelledError:
            self.cancelled.append(request_id)
            raise
        spans = [WeightVersionSpan(v, versions.index(v), versions.index(v) + versions.count(v)) for v in dict.fromkeys(versions)]
        fields = dict(index=0, finish_reason=reason, token_ids=tokens, weight_versions=spans)
        if request.output_mode == "text":
            logprob = -9999.0 if self.nan else -0.5
            content = [ChatCompletionLogProbsContent(token=chr(97 + t), logprob=logprob, bytes=[t]) for t in tokens]
            text = "".join(chr(97 + t) for t in tokens)
            choice = protocol.GenerateTextChoice(text=text, logprobs=ChatCompletionLogProbs(content=content), **fields)
            return 200, protocol.GenerateTextResponse(choices=[choice]).model_dump(mode="json")
        prompt = [None] if sampling.prompt_logprobs is not None else None
        if prompt is not None:
            prompt += [{t: Logprob(-float(t))} for t in request.token_ids[1:]]
        choice = protocol.GenerateTokensChoice(**fields)
        return 200, protocol.GenerateTokensResponse(choices=[choice], prompt_logprobs=prompt).model_dump(mode="json")
