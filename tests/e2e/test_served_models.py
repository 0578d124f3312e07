"""A teacher and a reward model behind live vLLM servers say what the same models say when they are loaded."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.rewards import TOKENIZER, reward_input, write_reward_model
from helpers.spawn import free_port
from skyrl_mega.config.schema import Config, EnvConfig, ModelTerm, RewardConfig, TeacherConfig
from skyrl_mega.orchestration.served_teacher import ask_server, check_served_teacher
from skyrl_mega.rewards.build import make_scorer
from skyrl_mega.rewards.check import find_problem

pytestmark = pytest.mark.nightly

START_TIMEOUT_S = 300.0


@contextlib.contextmanager
def vllm_serve(model: Path, folder: Path, *options: str):
    """The URL of a server of `model` on one CPU thread."""
    port = free_port()
    # The CPU build's `vllm` command does not start: it looks for the package under its other name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16", *options]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_TIMEOUT_S
    try:
        while True:
            assert process.poll() is None, f"the server died:\n{log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"the server was not up in {START_TIMEOUT_S} s:\n{log.read_text()[-4000:]}"
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def test_a_teachers_server_judges_tokens_as_hugging_face_does(tiny_model_dir, tmp_path):
    topk = 24  # more than a server gives unasked
    with vllm_serve(tiny_model_dir, tmp_path, "--max-logprobs", str(topk)) as url:
        settings = TeacherConfig(path=str(tiny_model_dir), url=url, topk=topk)
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
        check_served_teacher(Config(teacher=settings), model.config.vocab_size)
        sequences = [[int(token) for token in torch.randint(3, 250, (length,))] for length in (2, 17, 90)]
        for sequence, judgement in zip(sequences, ask_server(settings, sequences), strict=True):
            with torch.no_grad():
                logprobs = model(torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)
            own = logprobs.gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
            torch.testing.assert_close(judgement.logprobs[1:].double(), own, atol=1e-4, rtol=0)
            torch.testing.assert_close(judgement.topk_logprobs[1:].double(), logprobs.topk(topk).values, atol=1e-4, rtol=0)
            at_ids = logprobs.gather(1, judgement.topk_ids[1:])
            torch.testing.assert_close(judgement.topk_logprobs[1:].double(), at_ids, atol=1e-4, rtol=0)


def test_a_reward_models_server_scores_as_hugging_face_does(tmp_path):
    directory = write_reward_model(tmp_path / "model")
    inputs = [reward_input(text, sample=n) for n, text in enumerate(("42", "forty-two, of course", "4" * 60, "I do not know."))]

    def scored(term: ModelTerm) -> list[float]:
        async def run():
            config = Config(env=EnvConfig(name="x", chat_template=False), reward=RewardConfig(terms=(term,)))
            scorer = make_scorer(term, config, TOKENIZER, sequential=False)
            outcomes = await scorer.score(inputs)
            await scorer.close()
            return outcomes

        return asyncio.run(run())

    with vllm_serve(directory, tmp_path, "--runner", "pooling") as url:
        served = ModelTerm(name="m", path=str(directory), url=url)
        assert find_problem(served) == ""
        loaded = ModelTerm(name="m", path=str(directory), dtype="float32", device="cpu")
        expected = scored(loaded)
        assert max(expected) - min(expected) > 0.1
        assert scored(served) == pytest.approx(expected, abs=1e-4)
