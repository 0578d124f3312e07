"""The real vLLM engine keeps the conventions the trainer relies on. Oracle: Hugging Face in float32."""

from __future__ import annotations

import pytest
import torch

from skyrl_mega.errors import RolloutError
from skyrl_mega.types import GenerationRequest, SamplingParams, StopReason

MAX_MODEL_LEN = 256
EOS = 2


@pytest.fixture(scope="module")
def hf_model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


def random_prompts(count, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 261, (count, length), generator=generator).tolist()


def requests_for(prompts, **sampling):
    seeds = sampling.pop("seeds", range(len(prompts)))
    return [
        GenerationRequest(f"r{i}", prompt, SamplingParams(seed=seed, **sampling))
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]


@torch.no_grad()
def hf_logits(model, token_ids):
    return model(torch.tensor([token_ids])).logits[0].double()


def logprobs_of(logits, token_ids):
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def hf_turn_logits(model, prompt, completion):
    return hf_logits(model, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1]


def test_logprobs_are_the_models_at_temperature_one(engine, hf_model):
    prompts = random_prompts(4, 40)
    for prompt, completion in zip(prompts, engine.generate(requests_for(prompts, max_new_tokens=12)), strict=True):
        assert len(completion.token_ids) == len(completion.logprobs) >= 1
        expected = logprobs_of(hf_turn_logits(hf_model, prompt, completion), completion.token_ids)
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-3


def test_logprobs_are_of_the_distribution_sampled_from_at_other_temperatures(engine, hf_model):
    (prompt,) = random_prompts(1, 40)
    (completion,) = engine.generate(requests_for([prompt], max_new_tokens=12, temperature=0.6))
    logits = hf_turn_logits(hf_model, prompt, completion)
    assert (torch.tensor(completion.logprobs) - logprobs_of(logits / 0.6, completion.token_ids)).abs().max() < 1e-3
    assert (torch.tensor(completion.logprobs) - logprobs_of(logits, completion.token_ids)).abs().max() > 0.1


def test_logprobs_are_renormalised_after_top_k(engine, hf_model):
    (prompt,) = random_prompts(1, 40)
    (completion,) = engine.generate(requests_for([prompt], max_new_tokens=12, top_k=5))
    logits = hf_turn_logits(hf_model, prompt, completion)
    kept = logits.masked_fill(logits < logits.topk(5).values[:, -1:], -torch.inf)
    assert (torch.tensor(completion.logprobs) - logprobs_of(kept, completion.token_ids)).abs().max() < 1e-3


def test_top_p_samples_only_from_the_nucleus(engine, hf_model):
    (prompt,) = random_prompts(1, 40)
    (completion,) = engine.generate(requests_for([prompt], max_new_tokens=24, top_p=0.3))
    probs = hf_turn_logits(hf_model, prompt, completion).softmax(-1)
    for row, token in zip(probs, completion.token_ids, strict=True):
        assert row[row > row[token]].sum() < 0.3


def test_temperature_zero_is_greedy(engine, hf_model):
    (prompt,) = random_prompts(1, 30)
    (completion,) = engine.generate(requests_for([prompt], max_new_tokens=10, temperature=0.0))
    logits = hf_turn_logits(hf_model, prompt, completion)
    assert list(completion.token_ids) == logits.argmax(-1).tolist()
    assert (torch.tensor(completion.logprobs) - logprobs_of(logits, completion.token_ids)).abs().max() < 1e-3


def test_score_is_the_raw_logprob_of_every_token(engine, hf_model):
    sequences = [*random_prompts(2, 33), *random_prompts(1, MAX_MODEL_LEN, seed=1), [7, 8], [9]]
    rows = engine.score(sequences)
    assert [len(row) for row in rows] == [33, 33, MAX_MODEL_LEN, 2, 1]
    for sequence, row in zip(sequences, rows, strict=True):
        expected = logprobs_of(hf_logits(hf_model, sequence)[:-1], sequence[1:])
        assert row[0] == 0.0
        assert (torch.tensor(row[1:], dtype=torch.float64) - expected).abs().amax() < 1e-3 if len(sequence) > 1 else True


def test_a_seed_gives_the_same_tokens_in_any_batch(engine):
    prompts = random_prompts(12, 20)
    requests = requests_for(prompts, max_new_tokens=16)
    together = engine.generate(requests)
    backwards = engine.generate(requests[::-1])[::-1]
    alone = [engine.generate([request])[0] for request in requests[:3]]
    assert [c.token_ids for c in together] == [c.token_ids for c in backwards]
    assert [c.token_ids for c in together[:3]] == [c.token_ids for c in alone]
    assert [c.request_id for c in backwards] == [r.request_id for r in requests]


def test_different_seeds_give_different_tokens(engine):
    completions = engine.generate(requests_for(random_prompts(1, 20) * 8, max_new_tokens=16))
    assert len({tuple(c.token_ids) for c in completions}) == 8


def test_many_long_seeded_prompts_are_prefilled_whole(engine):
    """12,800 prompt tokens do not fit in one step; a prompt cut in two would end the engine (no rewinding of its seed)."""
    prompts = random_prompts(64, 200, seed=3)
    completions = engine.generate(requests_for(prompts, max_new_tokens=4))
    alone = engine.generate(requests_for(prompts[-1:], seeds=[63], max_new_tokens=4))
    assert completions[-1].token_ids == alone[0].token_ids


def test_an_unseeded_engine_has_a_stream_of_its_own(engine):
    (prompt,) = random_prompts(1, 20)
    request = GenerationRequest("free", prompt, SamplingParams(max_new_tokens=16))
    before = torch.get_rng_state()
    first, second = engine.generate([request])[0], engine.generate([request])[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert list(first.token_ids) != list(second.token_ids)


def test_thread_count_stays_settable_beside_an_engine(engine):
    torch.set_num_threads(2)
    try:
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_the_tokens_of_a_stop_string_stay_in_the_turn(engine):
    from helpers.tiny import make_tokenizer

    tokenizer = make_tokenizer()
    prompts = random_prompts(32, 20)
    tested = 0
    for i, free in enumerate(engine.generate(requests_for(prompts, max_new_tokens=24))):
        letters = [t for t in free.token_ids if tokenizer.decode([t]).isalnum()]
        if not letters:
            continue
        where = list(free.token_ids).index(letters[-1])
        stop = tokenizer.decode([letters[-1]])
        (stopped,) = engine.generate(requests_for(prompts[i : i + 1], seeds=[i], max_new_tokens=24, stop=(stop,)))
        assert list(stopped.token_ids) == list(free.token_ids)[: where + 1]
        assert stopped.stop_reason is StopReason.STOP
        assert stopped.text.endswith(stop)
        assert stopped.text.count(stop) == 1
        tested += 1
        if tested == 4:
            return
    pytest.fail(f"only {tested} of 32 turns hold a letter or digit: the model is not what this test expects")


def test_end_of_sequence_ends_the_turn_and_stays_in_it(engine):
    completions = engine.generate(requests_for(random_prompts(64, 10), max_new_tokens=48))
    reasons = {completion.stop_reason for completion in completions}
    assert reasons == {StopReason.STOP, StopReason.LENGTH}
    for completion in completions:
        ended = completion.stop_reason is StopReason.STOP
        assert EOS not in completion.token_ids[:-1]
        assert (completion.token_ids[-1] == EOS) == ended
        assert ended or len(completion.token_ids) == 48


def test_the_context_length_ends_a_turn(engine):
    (prompt,) = random_prompts(1, MAX_MODEL_LEN - 3)
    (completion,) = engine.generate(requests_for([prompt], seeds=[1], max_new_tokens=10))
    assert (completion.stop_reason, len(completion.token_ids)) == (StopReason.LENGTH, 3)


@pytest.mark.parametrize("length", [0, MAX_MODEL_LEN])
def test_a_prompt_without_room_for_a_token_is_refused_and_nothing_else_happens(engine, length):
    good, bad = random_prompts(1, 20)[0], [7] * length
    with pytest.raises(RolloutError, match=rf"r1 .* {length + 1} tokens.*{MAX_MODEL_LEN}"):
        engine.generate(requests_for([good, bad], max_new_tokens=4))
    assert len(engine.generate(requests_for([good], max_new_tokens=4))) == 1


def test_no_requests_give_no_completions(engine):
    assert engine.generate([]) == []
    assert engine.score([]) == []


def test_other_settings_beside_a_running_engine_are_an_error(engine):
    from skyrl_mega.errors import BackendUnavailableError
    from skyrl_mega.rollout.vllm_env import apply_environment, engine_environment

    running = engine_environment(device="cpu", in_process=True, threads=1, kv_cache_gib=1)
    with pytest.raises(BackendUnavailableError, match="VLLM_ENABLE_V1_MULTIPROCESSING is False and must become 1"):
        apply_environment(engine_environment(device="cpu", in_process=False, threads=1, kv_cache_gib=1))
    apply_environment(running)


def test_the_trainers_process_group_outlives_an_engine(engine):
    from skyrl_mega.rollout.vllm_isolation import kept_process_group

    assert torch.distributed.is_initialized()
    with kept_process_group():
        torch.distributed.destroy_process_group()
    assert torch.distributed.is_initialized()
