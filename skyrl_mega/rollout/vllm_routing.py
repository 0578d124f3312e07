"""The experts that vLLM's routers chose for every token, on the CPU too. Runs in vLLM's processes.

vLLM returns them with each request (`enable_return_routed_experts`): its workers keep the rows of every full block under the
block's prefix-cache hash, so that a prompt found in the cache comes with the routing with which its keys and values were
computed. That is wired to its second model runner only, which needs Triton; on a CPU vLLM 0.32 refuses the setting. Both halves
of vLLM's own connector work on a CPU all the same; here they are put to use there: `RoutingScheduler` is the scheduler with its
half, `RoutingWorkerExtension` gives the CPU's model runner the other one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector
from vllm.distributed.aux_output_connector.worker import AuxOutputWorkerConnector, PendingAuxOutput
from vllm.v1.core.sched.scheduler import Scheduler

from skyrl_mega.rollout.vllm_weight_transfer import WeightWorkerExtension

SCHEDULER = "skyrl_mega.rollout.vllm_routing.RoutingScheduler"
WORKER_EXTENSION = "skyrl_mega.rollout.vllm_routing.RoutingWorkerExtension"


class RoutingScheduler(Scheduler):
    """vLLM's scheduler (the synchronous one, as on every CPU), which hands on what the workers captured."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aux_output_connector = AuxOutputSchedulerConnector()


class RoutingWorkerExtension(WeightWorkerExtension):
    """A worker that also captures routing, from `capture_routed_experts` on; that must come before the first request."""

    def capture_routed_experts(self) -> None:
        connector = AuxOutputWorkerConnector(
            vllm_config=self.vllm_config, model=self.model_runner.model, kv_cache_config=self.model_runner.kv_cache_config
        )
        _Capture(self.model_runner, connector).install()


@dataclass
class _Batch:
    """A step's requests as the connector asks for them: where each one's rows begin, and how many tokens came before them."""

    req_ids: list[str]
    query_start_loc_np: np.ndarray
    num_computed_tokens_np: np.ndarray


class _Capture:
    """Stands around the two calls that make a step of the CPU's model runner."""

    def __init__(self, runner: Any, connector: AuxOutputWorkerConnector) -> None:
        self._runner, self._connector = runner, connector
        self._execute_model, self._sample_tokens = runner.execute_model, runner.sample_tokens
        self._pending: PendingAuxOutput | None = None

    def install(self) -> None:
        self._runner.execute_model = self.execute_model
        self._runner.sample_tokens = self.sample_tokens

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._connector.begin_step(scheduler_output.aux_output_connector_metadata)
        output = self._execute_model(scheduler_output, *args, **kwargs)
        if output is None:  # there were tokens to compute; they are sampled next
            batch = self._runner.input_batch
            count = len(batch.req_ids)
            self._pending = self._connector.prepare_output(
                _Batch(
                    list(batch.req_ids),
                    self._runner.query_start_loc.np[: count + 1].copy(),
                    batch.num_computed_tokens_cpu[:count].copy(),
                )
            )
        return output

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = self._sample_tokens(*args, **kwargs)
        pending, self._pending = self._pending, None
        if pending is not None:
            sampled = np.array([len(token_ids) for token_ids in output.sampled_token_ids])
            pending.enqueue_cpu_copy(sampled, np.zeros_like(sampled))
            output.aux_output_connector_output = pending.process_output()
        return output
