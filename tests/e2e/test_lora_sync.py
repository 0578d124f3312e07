"""Adapters reach the real vLLM engine alone, whole or not at all, wherever it runs. Oracle: the policy in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.policy import tiny_config

TESTS = Path(__file__).parents[1]


@pytest.fixture(
    scope="module",
    params=[
        ("in_process", "shm"),
        pytest.param(("child_process", "gloo"), marks=[pytest.mark.nightly, pytest.mark.timeout(600)]),
        pytest.param(("ray", "gloo"), marks=[pytest.mark.nightly, pytest.mark.timeout(600)]),  # vLLM comes up twice
    ],
    ids="-".join,
)
def seen(request, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("lora_sync")
    model = tiny_config(folder, family="llama", tied=True).model.path
    command = [sys.executable, "-m", "helpers.lora_engine", model, str(folder), *request.param]
    ended = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr[-6000:]
    return json.loads(ended.stdout.strip().splitlines()[-1])


def test_an_engine_with_an_adapter_gives_the_policys_logprobs(seen):
    assert seen["fresh"] < 1e-3
    for version in (1, 2):
        assert seen[f"stale {version}"] > 0.05  # the test would see an adapter that did not arrive
        assert seen[f"version {version}"] < 1e-3
        assert seen[f"served {version}"] == version
    assert seen["base"] > 0.05


def test_only_the_adapter_travels(seen):
    rank, hidden, ffn, qkv, layers = 4, 64, 128, 128 + 2 * 64, 2
    assert seen["bytes"] == 4 * layers * rank * (3 * hidden + qkv + 128 + hidden + 2 * (hidden + ffn) + ffn + hidden)


def test_an_adapter_that_does_not_fit_is_refused_and_the_old_one_serves_on(seen):
    assert "no projection" in seen["refusal"]
    assert seen["after refusal"] < 1e-3
    assert seen["served after refusal"] == 2


def test_an_engine_that_replaces_a_dead_one_gets_the_current_adapter(seen):
    if "replaced" in seen:  # on Ray
        assert seen["replaced"] < 1e-3
        assert seen["served by the replacement"] == 2
