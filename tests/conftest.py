"""Fixtures that several test files share. A real vLLM engine takes seconds to start: one serves the whole session.

Tests that push weights into `engine` put the original ones back (`test_weight_sync` shows how): whoever comes next finds
the engine serving the weights of `tiny_model_dir`, under whatever version number.
"""

from __future__ import annotations

import pytest

from helpers.tiny import write_tiny_model

#: Head size 32: vLLM's CPU attention has no kernel for smaller ones.
TINY_SHAPE = {"hidden_size": 128, "head_dim": 32}


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A random tied Llama in float32 with a byte tokenizer, on disk."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama", tied=True, **TINY_SHAPE)


@pytest.fixture(scope="session")
def engine(tiny_model_dir):
    """The session's vLLM engine: `tiny_model_dir` in float32, in this process, on one CPU thread."""
    from skyrl_mega.config.schema import RolloutConfig
    from skyrl_mega.rollout.vllm_engine import VLLMEngine

    rollout = RolloutConfig(dtype="float32", max_model_len=256, max_num_seqs=64, kv_cache_gib=1)
    engine = VLLMEngine.start(rollout, model_path=str(tiny_model_dir), seed=0, threads=1, in_process=True, device="cpu")
    yield engine
    engine.close()


def pytest_terminal_summary(terminalreporter):
    """Shows why a test that was tried once more (scripts/test.sh) had failed before."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.write_sep("_", f"failed, then tried once more: {report.nodeid}")
        terminalreporter.write_line(report.longreprtext[-8000:])
