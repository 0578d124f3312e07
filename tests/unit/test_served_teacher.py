"""A teacher behind a server: its answers are those of the same model loaded, and what is wrong with it is found out at the start.

The server answers from a Hugging Face model in float64, in vLLM's schema: a row of prompt logprobs holds the likeliest tokens
and the token that stands there. `tests/e2e/test_served_models.py` asks a live vLLM.
"""

from __future__ import annotations

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from helpers.policy import make_policy, tiny_config
from helpers.rewards import JsonServer
from helpers.tiny import write_tiny_model
from skyrl_mega.config.validate import validate
from skyrl_mega.data.packing import balance_and_pack, unpack
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.errors import BackendUnavailableError, ConfigError, RolloutError
from skyrl_mega.orchestration.served_teacher import ServedTeacher, check_served_teacher, judgement_of
from skyrl_mega.training.reference import ReferenceModel

TOPK = 4


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("teacher") / "model", "qwen3", tied=False, seed=7, hidden_size=96)


def serve(directory, *, max_logprobs=20):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)

    def answer(path, body):
        request = CompletionRequest(**body)  # vLLM's own reading of what was sent
        assert path == "/v1/completions"
        if request.prompt_logprobs > max_logprobs:
            return 400, {"error": {"message": f"max allowed: {max_logprobs}"}}
        if max(request.prompt) >= model.config.vocab_size:
            return 400, {"error": {"message": f"Token id {max(request.prompt)} is out of vocabulary"}}
        with torch.no_grad():
            logprobs = model(torch.tensor([request.prompt])).logits[0].log_softmax(-1)
        rows = [None]
        for here, token in zip(logprobs[:-1], request.prompt[1:], strict=True):
            best = here.topk(request.prompt_logprobs).indices.tolist()
            own = {token: int((here >= here[token]).sum())}
            ranks = own | {one: rank for rank, one in enumerate(best, 1)}
            rows.append({str(one): {"logprob": float(here[one]), "rank": rank} for one, rank in ranks.items()})
        return 200, {"choices": [{"text": "x", "prompt_logprobs": rows}]}

    server = JsonServer(answer)
    return server, httpx.ASGITransport(app=server)


def served_config(tmp_path, teacher_dir, *overrides):
    return tiny_config(tmp_path, f"teacher.path={teacher_dir}", "teacher.url=http://teacher", f"teacher.topk={TOPK}", *overrides)


@pytest.mark.parametrize("share_prompts", [True, False])
def test_a_served_teacher_says_what_the_same_model_says_when_it_is_loaded(tmp_path, teacher_dir, share_prompts):
    config = served_config(tmp_path, teacher_dir)
    samples = random_samples(3, 2, seed=1)
    server, transport = serve(teacher_dir)
    with make_policy(config) as policy:
        loaded = ReferenceModel(config, policy.topology, str(teacher_dir))
        batch = balance_and_pack(
            samples, tokens_per_micro_batch=60, dp_rank=0, dp_size=1, skip_zero_advantage=False, share_prompts=share_prompts
        )
        teacher = ServedTeacher(config, policy.topology, transport=transport)
        teacher.ask(samples)
        for sample, row in zip(samples, unpack(loaded.compute_logprobs(batch), batch, samples), strict=True):
            torch.testing.assert_close(sample.teacher_logprobs, row, atol=1e-4, rtol=0)
        for vocab_size in (policy.vocab_size, 50):
            expected = loaded.compute_topk(batch, TOPK, vocab_size=vocab_size)
            found = teacher.compute_topk(batch, TOPK, vocab_size=vocab_size)
            for (ids_TK, logprobs_TK), (expected_ids_TK, expected_TK) in zip(found, expected, strict=True):
                assert torch.equal(ids_TK, expected_ids_TK)
                torch.testing.assert_close(logprobs_TK, expected_TK, atol=1e-4, rtol=0)
    assert len(server.calls) == len(samples)


def test_a_server_that_cant_judge_this_policy_is_refused_with_the_command_that_starts_one(tmp_path, teacher_dir):
    config = served_config(tmp_path, teacher_dir)
    _, transport = serve(teacher_dir)
    check_served_teacher(config, 272, transport=transport)
    with pytest.raises(BackendUnavailableError, match="out of vocabulary"):
        check_served_teacher(config, 10_000, transport=transport)
    _, few = serve(teacher_dir, max_logprobs=TOPK - 1)
    with pytest.raises(BackendUnavailableError, match=f"--max-logprobs {TOPK}"):
        check_served_teacher(config, 272, transport=few)
    nobody = httpx.MockTransport(lambda request: (_ for _ in ()).throw(httpx.ConnectError("refused")))
    with pytest.raises(BackendUnavailableError, match="can't be reached"):
        check_served_teacher(config, 272, transport=nobody)


def test_an_answer_that_leaves_tokens_out_is_an_error():
    with pytest.raises(RolloutError, match="no prompt_logprobs"):
        judgement_of([1, 2], {"choices": []}, 0)
    with pytest.raises(RolloutError, match="1 prompt logprobs for 2 tokens"):
        judgement_of([1, 2], {"choices": [{"prompt_logprobs": [None]}]}, 0)
    with pytest.raises(RolloutError, match="leave out that token, 2"):
        judgement_of([1, 2], {"choices": [{"prompt_logprobs": [None, {"7": {"logprob": -1.0, "rank": 1}}]}]}, 1)


def test_a_served_teacher_is_asked_at_temperature_1_and_beside_its_tokenizer(tmp_path, teacher_dir):
    with pytest.raises(ConfigError, match=r"rollout\.temperature` is 0\.7"):
        validate(served_config(tmp_path, teacher_dir, "algorithm.advantage=distill", "rollout.temperature=0.7"), world_size=1)
    with pytest.raises(ConfigError, match=r"teacher\.path` is empty"):
        validate(served_config(tmp_path, "", "algorithm.advantage=distill"), world_size=1)
