"""The CPU shim stays inside Megatron's namespace, and a Megatron upgrade shows what moved."""

from __future__ import annotations

import ast
import inspect
import sys

import pytest
import torch

from helpers.spawn import run_ranks
from helpers.tiny import write_tiny_model
from skyrl_mega.errors import BackendUnavailableError
from skyrl_mega.parallel import device as device_module
from skyrl_mega.parallel.device import install_megatron_cpu_shim, resolve_device, set_threads

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is inert where CUDA exists")

#: Parts of Megatron that no policy of ours runs: their call sites are not listed.
NOT_OURS = (
    "megatron.core.distributed.fsdp",
    "megatron.core.extensions",
    "megatron.core.fp8_utils",
    "megatron.core.fusions",
    "megatron.core.inference",
    "megatron.core.nccl_allocator",
    "megatron.core.optimizer.cpu_offloading",
    "megatron.core.pipeline_parallel.fine_grained_activation_offload",
    "megatron.core.pipeline_parallel.hybrid_cp_schedule",
    "megatron.core.rerun_state_machine",
    "megatron.core.ssm",
    "megatron.core.tensor_parallel.inference_layers",
    "megatron.core.transformer.cuda_graphs",
    "megatron.core.transformer.moe.fused_a2a",
    "megatron.core.transformer.moe.grouped_gemm_util",
)

#: What the rest asks of CUDA, and where (without "megatron.core."). When this test fails after an upgrade: look at the sites that
#: came or went, extend the shim if a policy reaches them, then bring the list up to date.
CALL_SITES = {
    ".cuda()": "dist_checkpointing.exchange_utils models.common.embeddings.rope_utils "
    "models.common.language_module.language_module optimizer.distrib_optimizer optimizer.grad_scaler optimizer.optimizer "
    "tensor_parallel.data utils",
    ".type()": "optimizer.clip_grads optimizer.distrib_optimizer optimizer.optimizer",
    "device='cuda' in symm_mem.empty": "utils",
    "device='cuda' in torch.cuda.Stream": "pipeline_parallel.utils",
    "device='cuda' in torch.empty": "dist_checkpointing.exchange_utils",
    "device='cuda' in torch.empty_like": "dist_checkpointing.exchange_utils",
    "device='cuda' in torch.ones": "transformer.utils",
    "device='cuda' in torch.tensor": "dist_checkpointing.strategies.state_dict_saver optimizer.clip_grads optimizer.grad_scaler "
    "optimizer.optimizer tensor_parallel.data utils",
    "device='cuda' in torch.zeros": "distributed.param_and_grad_buffer optimizer.clip_grads pipeline_parallel.schedules "
    "transformer.moe.moe_utils",
    "torch.cuda.Event": "pipeline_parallel.utils utils",
    "torch.cuda.Stream": "distributed.distributed_data_parallel pipeline_parallel.utils transformer.moe.shared_experts "
    "transformer.moe.token_dispatcher",
    "torch.cuda.current_device": "dist_checkpointing.strategies.async_utils dist_checkpointing.strategies.state_dict_saver "
    "distributed.distributed_data_parallel distributed.param_and_grad_buffer models.common.embeddings.rotary_pos_embedding "
    "models.common.embeddings.yarn_rotary_pos_embedding models.gpt.gpt_model optimizer.distrib_optimizer optimizer.grad_scaler "
    "optimizer.optimizer parallel_state pipeline_parallel.p2p_communication tensor_parallel.data tensor_parallel.layers "
    "tensor_parallel.mappings tensor_parallel.random tensor_parallel.utils timers transformer.attention "
    "transformer.dot_product_attention transformer.module transformer.moe.experts transformer.moe.router "
    "transformer.multi_token_prediction transformer.transformer_layer utils",
    "torch.cuda.current_stream": "pipeline_parallel.combined_1f1b pipeline_parallel.utils transformer.moe.moe_utils "
    "transformer.moe.shared_experts transformer.moe.token_dispatcher",
    "torch.cuda.default_stream": "distributed.param_and_grad_buffer",
    "torch.cuda.get_rng_state": "tensor_parallel.random",
    "torch.cuda.manual_seed": "tensor_parallel.random",
    "torch.cuda.stream": "distributed.param_and_grad_buffer pipeline_parallel.utils transformer.moe.shared_experts "
    "transformer.moe.token_dispatcher",
    "torch.cuda.synchronize": "dist_checkpointing.strategies.async_utils dist_checkpointing.strategies.filesystem_async "
    "dist_checkpointing.strategies.fully_parallel distributed.distributed_data_parallel parallel_state "
    "pipeline_parallel.p2p_communication timers utils",
}

#: Names of torch.cuda that the proxy passes on to torch, because they work without CUDA or only features we do not use ask for
#: them.
PASSED_ON = {
    "BFloat16Tensor": "types, compared with isinstance",
    "FloatTensor": "types, compared with isinstance",
    "HalfTensor": "types, compared with isinstance",
    "OutOfMemoryError": "an exception class",
    "amp": "decorators for old torch versions",
    "empty_cache": "does nothing without CUDA",
    "is_available": "answers False",
    "CUDAGraph": "graph-safe RNG: off",
    "default_generators": "graph-safe RNG: off",
    "random": "inside _get_cuda_rng_state, which is replaced whole",
    "nvtx": "profiler ranges: off",
    "device_count": "asynchronous checkpoints: synchronous ones are used",
    "set_device": "asynchronous checkpoints: synchronous ones are used",
    "clock_rate": "straggler detector: off",
    "power_draw": "straggler detector: off",
    "temperature": "straggler detector: off",
    "utilization": "straggler detector: off",
}


def _dotted(node):
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _asks(name):
    """What one module asks of CUDA."""
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[name]))):
        dotted = _dotted(node) if isinstance(node, ast.Attribute) else ""
        if dotted.startswith("torch.cuda.") and dotted.count(".") == 2:
            yield dotted
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if (
                    keyword.arg == "device"
                    and isinstance(keyword.value, ast.Constant)
                    and str(keyword.value.value).startswith("cuda")
                ):
                    yield f"device='cuda' in {_dotted(node.func)}"
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("cuda", "type") and not node.args:
                yield f".{node.func.attr}()"
            elif isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
                yield ".cuda()"


def _found_in_a_fresh_process(rank):
    """Call sites of the modules that the shim reaches when nothing else imported Megatron before."""
    report = install_megatron_cpu_shim()
    found = {}
    for name in report.modules:
        if name.startswith(NOT_OURS):
            continue
        for ask in _asks(name):
            found.setdefault(ask, set()).add(name.removeprefix("megatron.core."))
    return report.status, len(report.modules), found


@pytest.fixture(scope="module")
def found():
    return run_ranks(_found_in_a_fresh_process, 1)[0]


def test_megatron_asks_cuda_at_the_listed_sites_only(found):
    status, count, sites = found
    assert status == "installed"
    assert count > 80
    answered = {name: modules for name, modules in sites.items() if name.removeprefix("torch.cuda.") not in PASSED_ON}
    assert answered == {name: set(modules.split()) for name, modules in CALL_SITES.items()}


def test_every_name_of_torch_cuda_that_megatron_asks_for_is_answered_or_known(found):
    names = {site.removeprefix("torch.cuda.") for site in found[2] if site.startswith("torch.cuda.")}
    answered = set(vars(device_module._cuda_proxy))
    assert names - answered == set(PASSED_ON)
    factories = {site.removeprefix("device='cuda' in torch.") for site in found[2] if site.startswith("device='cuda' in torch.")}
    assert factories - set(device_module.FACTORIES) == {"cuda.Stream"}


def _load_twice(rank, path):
    """Hugging Face logits before and after the shim, and what torch itself answers outside Megatron afterwards."""
    from helpers.hf_oracle import load_oracle

    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = load_oracle(path)(ids).logits
        install_megatron_cpu_shim()
        after = load_oracle(path)(ids).logits
    refused = 0
    for call in (lambda: torch.zeros(1, device="cuda"), lambda: torch.zeros(1).cuda(), torch.cuda.current_device):
        try:
            call()
        except (RuntimeError, AssertionError):
            refused += 1
    return before, after, refused, type(torch.zeros(1).type()) is str


def test_hugging_face_loads_right_after_the_shim_and_torch_itself_is_unchanged(tmp_path):
    path = write_tiny_model(tmp_path, "llama")
    before, after, refused, plain_type = run_ranks(_load_twice, 1, path)[0]
    assert before.std() > 0.1
    assert torch.equal(before, after)
    assert refused == 3, "outside Megatron, CUDA must still be refused"
    assert plain_type


def test_the_shim_is_idempotent_and_answers_inside_megatron():
    first = install_megatron_cpu_shim()
    assert install_megatron_cpu_shim().modules == first.modules
    from megatron.core.tensor_parallel import random

    assert random.torch.cuda.current_device() == torch.device("cpu")
    assert random.torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    assert random.torch.Tensor is torch.Tensor


def test_a_forked_rng_state_is_restored():
    install_megatron_cpu_shim()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("other", 7)
    expected = torch.rand(2, generator=torch.Generator().manual_seed(1))
    with tracker.fork("other"):
        inside = torch.rand(2)
    assert torch.equal(inside, torch.rand(2, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(torch.rand(2), expected)


def test_type_names_equal_their_cuda_spelling_both_ways():
    name = device_module._TypeName("torch.FloatTensor")
    assert name == "torch.cuda.FloatTensor"
    assert "torch.cuda.FloatTensor" == name  # noqa: SIM300 - the reflected comparison is the claim
    assert name in ["torch.cuda.HalfTensor", "torch.cuda.FloatTensor"]
    assert name != "torch.cuda.HalfTensor"


def test_the_shim_is_inert_where_cuda_exists(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device_module, "MEGATRON_MODULES", ("no.such.module",))
    report = install_megatron_cpu_shim()
    assert (report.status, report.modules) == ("inert", ())


def test_devices_are_resolved_by_name(monkeypatch):
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(BackendUnavailableError, match=r"trainer.device=cpu"):
        resolve_device("cuda")
    with pytest.raises(BackendUnavailableError, match="auto, cpu or cuda"):
        resolve_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BackendUnavailableError, match="at most one rank per device"):
        resolve_device("cuda")


def test_a_group_of_one_leaves_buffers_where_they_are(monkeypatch):
    calls = []
    lone = device_module._alone_is_done(lambda *args, **kwargs: calls.append((args, kwargs)) or "handle")
    buffer = torch.arange(4.0)
    ranks = {"one": 1, "two": 2}
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks[group])
    assert lone(buffer.view(-1), buffer, group="one", op="sum") is None
    assert calls == []
    # Another place, other ranks, or somebody who waits for a handle: the collective itself.
    assert lone(torch.empty(4), buffer, group="one", op="sum") == "handle"
    assert lone(buffer[:2], buffer, group="two", op="sum") == "handle"
    assert lone(buffer.view(-1), buffer, group="one", async_op=True) == "handle"
    assert [kwargs["group"] for _, kwargs in calls] == ["one", "two", "one"]
    assert calls[0][1] == {"group": "one", "async_op": False, "op": "sum"}


def test_megatron_reduces_through_the_shim():
    from megatron.core.distributed import param_and_grad_buffer

    install_megatron_cpu_shim()
    for function in (param_and_grad_buffer.dist_reduce_scatter_func, param_and_grad_buffer.dist_all_gather_func):
        assert function.__qualname__.startswith("_alone_is_done")


def test_threads_are_set():
    before = torch.get_num_threads()
    set_threads(1)
    assert torch.get_num_threads() == 1
    set_threads(before)
