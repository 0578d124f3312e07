"""Reward models: batched scores against Hugging Face's of one sequence at a time, loaded here and through vLLM's schema."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
import torch

from helpers.rewards import TOKENIZER, JsonServer, reward_input, write_reward_model
from helpers.tiny import make_tokenizer
from skyrl_mega.config.schema import Config, EnvConfig, ModelTerm, RewardConfig
from skyrl_mega.errors import ConfigError, ModelLoadError, RewardError
from skyrl_mega.rewards.build import make_scorer
from skyrl_mega.rewards.encoding import SequenceEncoder
from skyrl_mega.rewards.model import LoadedClassifier, ModelReward, ServedClassifier, batches, output_index

RESPONSES = ("42", "", "forty-two, of course", "4" * 60, "I do not know.", "42</s>")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_reward_model(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture(scope="module")
def two_outputs(tmp_path_factory):
    return write_reward_model(tmp_path_factory.mktemp("reward") / "two", num_labels=2, pad_token_id=None)


def term_of(directory, **changes) -> ModelTerm:
    return ModelTerm(**{**dict(name="m", path=str(directory), dtype="float32", device="cpu"), **changes})


def scored(term, inputs, *, policy_tokenizer=TOKENIZER, chat=False, sequential=False):
    config = Config(env=EnvConfig(name="x", chat_template=chat), reward=RewardConfig(terms=(term,)))

    async def run():
        return await make_scorer(term, config, policy_tokenizer, sequential=sequential).score(inputs)

    return asyncio.run(run())


def direct(directory, sequence, output=0):
    """Hugging Face's own score of one sequence alone, in float64."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float64).eval()
    with torch.no_grad():
        return float(model(torch.tensor([sequence])).logits[0, output])


@pytest.mark.parametrize(("tokens_per_batch", "sequential"), [(8192, False), (130, True), (1, False)])
def test_batched_scores_are_those_of_each_sequence_alone(directory, tokens_per_batch, sequential):
    inputs = [reward_input(text, sample=n) for n, text in enumerate(RESPONSES)]
    got = scored(term_of(directory, tokens_per_batch=tokens_per_batch), inputs, sequential=sequential)
    expected = [direct(directory, list(one.token_ids)) for one in inputs]
    assert max(expected) - min(expected) > 0.1, "the model tells these apart"
    assert got == pytest.approx(expected, abs=2e-6)


def test_the_score_is_the_output_that_the_term_names_and_a_model_without_padding_goes_one_by_one(two_outputs):
    inputs = [reward_input(text, sample=n) for n, text in enumerate(RESPONSES)]
    got = scored(term_of(two_outputs, output=1), inputs)
    assert got == pytest.approx([direct(two_outputs, list(one.token_ids), output=1) for one in inputs], abs=2e-6)


def test_bfloat16_scores_stay_near(directory):
    inputs = [reward_input(text, sample=n) for n, text in enumerate(RESPONSES)]
    exact, coarse = scored(term_of(directory), inputs), scored(term_of(directory, dtype="bfloat16"), inputs)
    assert coarse == pytest.approx(exact, abs=0.05)
    assert coarse != exact


def test_batches_hold_every_sequence_once_and_at_most_the_budget():
    lengths = dict(enumerate([5, 100, 7, 30, 30, 1, 64]))
    for budget in (1, 64, 100, 10_000):
        made = list(batches(lengths, budget))
        assert sorted(index for batch in made for index in batch) == sorted(lengths)
        assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in made)
    assert list(batches(lengths, 10_000)) == [[5, 0, 2, 3, 4, 6, 1]]
    assert list(batches({}, 1)) == []


def test_the_policys_own_tokens_are_passed_as_they_were_sampled(directory):
    odd = [3, 1, 0, 200, 5]  # specials and half a character: no text encodes to these
    assert SequenceEncoder(make_tokenizer(), TOKENIZER, chat=True)(reward_input(token_ids=odd)) == odd
    [score] = scored(term_of(directory), [reward_input(token_ids=odd)], chat=True)
    assert score == pytest.approx(direct(directory, odd), abs=2e-6)


def other_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    return tokenizer


def test_another_chat_template_renders_the_conversation_anew_unless_the_policy_uses_none():
    one = reward_input("yes", prompt="ok?", token_ids=[9, 9])
    rendered = TOKENIZER.encode("<s>[user] ok?</s>[assistant] yes</s>", add_special_tokens=False)
    assert SequenceEncoder(other_template(), TOKENIZER, chat=True)(one) == rendered
    assert SequenceEncoder(other_template(), TOKENIZER, chat=False)(one) == [9, 9]


def test_another_vocabulary_gets_the_texts_and_its_own_specials():
    other = other_template()
    other.add_tokens(["<extra>"])
    one = reward_input("yes", prompt="ok?", token_ids=[9, 9])
    assert SequenceEncoder(other, TOKENIZER, chat=False)(one) == other.encode("<s>[user] ok?</s>[assistant] yes</s>")
    other.chat_template = None
    assert SequenceEncoder(other, TOKENIZER, chat=False)(one) == other.encode("ok?yes")
    other.chat_template = "{{ raise_exception('no user, please') }}"
    with pytest.raises(RewardError, match=r"refuses the roles \['user', 'assistant'\]: no user, please"):
        SequenceEncoder(other, TOKENIZER, chat=False)(one)


def test_a_sequence_that_is_too_long_is_an_error_of_its_sample_alone(tmp_path):
    directory = write_reward_model(tmp_path / "short", max_position_embeddings=16)
    good, bad = scored(term_of(directory), [reward_input("42"), reward_input("4" * 20, sample=1)])
    assert isinstance(good, float)
    assert str(bad) == "reward `m` failed for group 'g', sample 1: 27 tokens, and the model knows 16 positions"


def test_a_forward_pass_that_fails_is_an_error_of_its_batch(directory):
    inputs = [reward_input(token_ids=[5, 6, 7]), reward_input(token_ids=[5, 9999])]
    outcomes = scored(term_of(directory, tokens_per_batch=1), inputs)
    assert [isinstance(outcome, RewardError) for outcome in outcomes] == [False, True]
    assert "IndexError: index out of range" in str(outcomes[1])


def test_a_directory_without_the_score_head_is_refused(tmp_path, directory):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in directory.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks score\.weight: its scores would be random"):
        LoadedClassifier(term_of(broken))
    with pytest.raises(ModelLoadError, match="can't be loaded from"):
        LoadedClassifier(term_of(tmp_path))


def test_a_model_of_several_outputs_needs_to_be_told_which(two_outputs, directory):
    from transformers import AutoConfig

    two, one = AutoConfig.from_pretrained(two_outputs), AutoConfig.from_pretrained(directory)
    assert (output_index(term_of(directory), one), output_index(term_of(directory, output=0), one)) == (0, 0)
    for output in (-1, 2):
        with pytest.raises(ConfigError, match=rf"2 outputs \(0: LABEL_0, 1: LABEL_1\); got {output}"):
            output_index(term_of(two_outputs, output=output), two)


# -- served -----------------------------------------------------------------------------------------------------------------


def served(server, directory, inputs, **changes):
    from transformers import AutoConfig

    term = term_of(directory, url="http://models", **changes)

    async def run():
        classifier = ServedClassifier(term, transport=httpx.ASGITransport(server))
        encode = SequenceEncoder(make_tokenizer(), TOKENIZER, chat=False)
        reward = ModelReward(term, classifier, encode, AutoConfig.from_pretrained(directory))
        try:
            return await reward.score(inputs)
        finally:
            await reward.close()

    return asyncio.run(run())


def vllm_answer(path, body):
    """The last token id over 100 as the only output, parsed and answered by vLLM's own classes."""
    from pydantic import TypeAdapter
    from vllm.entrypoints.pooling.classify.protocol import (
        ClassificationCompletionRequest,
        ClassificationData,
        ClassificationRequest,
        ClassificationResponse,
    )
    from vllm.entrypoints.serve.engine.protocol import UsageInfo

    request = TypeAdapter(ClassificationRequest).validate_python(body)
    assert path == "/classify"
    assert isinstance(request, ClassificationCompletionRequest)
    assert request.to_pooling_params().use_activation is False
    rows = [ClassificationData(index=n, label=None, probs=[ids[-1] / 100], num_classes=1) for n, ids in enumerate(request.input)]
    response = ClassificationResponse(model="m", data=rows[::-1], usage=UsageInfo(prompt_tokens=1, total_tokens=1))
    return 200, json.loads(response.model_dump_json())


def test_a_vllm_server_gets_token_ids_and_gives_raw_outputs(directory):
    server = JsonServer(vllm_answer)
    inputs = [reward_input(token_ids=[5] * n + [100 + n]) for n in (9, 2, 30)]
    assert served(server, directory, inputs, tokens_per_batch=40) == [1.09, 1.02, 1.3]
    assert [[len(ids) for ids in body["input"]] for _, body in server.calls] == [[3, 10], [31]]


def test_a_server_that_fails_is_tried_again_and_what_it_lacks_is_said(directory):
    def busy_once(path, body):
        return (503, {}) if len(server.calls) < 2 else (200, {"data": [{"index": 0, "probs": [0.5]}]})

    server = JsonServer(busy_once)
    assert served(server, directory, [reward_input()], retries=1) == [0.5]
    cases = {
        "models/classify answered 404": (404, {"detail": "Not Found"}),
        "has no outputs for 1 sequences": (200, {"data": []}),
        "IndexError": (200, {"data": [{"index": 0, "probs": []}]}),
        "must give a finite number": (200, '{"data": [{"index": 0, "probs": [NaN]}]}'),
    }
    for message, answer in cases.items():
        [error] = served(JsonServer(lambda path, body, answer=answer: answer), directory, [reward_input()])
        assert isinstance(error, RewardError)
        assert message in str(error)
