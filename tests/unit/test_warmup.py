"""Supervised warm-up: rows become the tokens of a rollout, in an order that resumes, and an update lowers their cross-entropy."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.oracle import token_logprobs
from helpers.policy import make_policy, tiny_config
from helpers.tiny import make_tokenizer
from skyrl_mega.agents.chat import ObservationEncoder
from skyrl_mega.agents.demonstrations import DemonstrationEncoder
from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES
from skyrl_mega.errors import DataError, EnvError, NonFiniteUpdateError
from skyrl_mega.orchestration.nonfinite import BATCHES_FILE, SkippedUpdates
from skyrl_mega.orchestration.warmup import read_demonstrations, row_order, supervised, warm_up
from skyrl_mega.telemetry.metrics import read_metrics
from skyrl_mega.training.reference import ReferenceModel
from skyrl_mega.types import TrainState

TOKENIZER = make_tokenizer()
EOS, IM_END = 2, 4
needs_cross_entropy = pytest.mark.skipif("cross_entropy" not in POLICY_LOSSES, reason="no policy loss is named cross_entropy yet")


def encoder(*, chat_template=True, stop=(), max_tokens=500):
    return DemonstrationEncoder(TOKENIZER, chat_template=chat_template, stop=stop, max_tokens=max_tokens)


def texts(sample):
    """What the sample holds and what of it is trained, as text."""
    trained = sample.token_ids[sample.loss_mask].tolist()
    return TOKENIZER.decode(sample.token_ids.tolist()), TOKENIZER.decode(trained)


def test_a_prompt_is_a_user_message_and_the_response_ends_as_the_template_ends_a_turn():
    sample = encoder().sample({"prompt": "2+2?", "response": "4"}, "rows:1", 3)
    whole, trained = texts(sample)
    assert whole == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
    assert trained == "4<|im_end|>"
    assert sample.sample_index == 3
    assert torch.equal(sample.advantages, sample.loss_mask.float())
    messages = [{"role": "user", "content": "2+2?"}]
    for row in ({"prompt": messages, "response": "4"}, {"messages": [*messages, {"role": "assistant", "content": "4"}]}):
        assert torch.equal(encoder().sample(row, "rows:2", 0).token_ids, sample.token_ids)


def test_several_turns_are_the_tokens_that_an_episode_would_hold():
    turns = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?"), ("assistant", "6")]
    messages = [{"role": role, "content": content} for role, content in turns]
    sample = encoder().sample({"messages": messages}, "rows:1", 0)
    whole, trained = texts(sample)
    assert whole == "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns).removesuffix("\n")
    assert trained == "4<|im_end|>6<|im_end|>"
    observations = ObservationEncoder(TOKENIZER, chat_template=True)
    answers = [[*TOKENIZER.encode(text, add_special_tokens=False), IM_END] for text in ("4", "6")]
    between = observations.later(messages[3:4], answers[0])
    assert sample.token_ids.tolist() == [*observations.first(messages[:2]), *answers[0], *between, *answers[1]]


def test_raw_text_is_continued_and_ends_with_a_stop_string_or_the_end_of_text():
    row = {"prompt": "2+2=", "response": "4"}
    assert texts(encoder(chat_template=False).sample(row, "rows:1", 0)) == ("2+2=4</s>", "4</s>")
    assert texts(encoder(chat_template=False, stop=["\n"]).sample(row, "rows:1", 0)) == ("2+2=4</s>", "4</s>")
    line = {"prompt": "2+2=", "response": "4\n"}
    assert texts(encoder(chat_template=False, stop=["\n"]).sample(line, "rows:1", 0)) == ("2+2=4\n", "4\n")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a"}, "it has the keys question"),
        ({"prompt": "a", "response": 4}, "must be"),
        ({"messages": []}, "must be"),
        ({"messages": [{"role": "user", "content": "a"}]}, "last message must be the assistant's"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "answers none"),
        ({"prompt": "a" * 600, "response": "b"}, "more than rollout.max_model_len"),
    ],
)
def test_a_row_that_can_not_be_imitated_is_an_error_that_names_it(row, words):
    with pytest.raises(DataError, match="rows:7") as error:
        encoder().sample(row, "rows:7", 0)
    assert words in str(error.value)


def test_a_template_that_is_absent_is_an_error():
    with pytest.raises(EnvError, match="no chat template"):
        DemonstrationEncoder(SimpleNamespace(chat_template=None), chat_template=True, stop=(), max_tokens=9)


def test_every_epoch_holds_every_row_once_in_an_order_of_its_own_that_the_seed_repeats():
    def first(count, seed):
        order = row_order(7, seed=seed)
        return [next(order) for _ in range(count)]

    rows = first(21, seed=1)
    epochs = [rows[:7], rows[7:14], rows[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert first(21, seed=1) == rows
    assert first(21, seed=2) != rows


class FakeRecorder:
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)

    def phase(self, name):
        from contextlib import nullcontext

        return nullcontext()


class FakeCheckpointer:
    def __init__(self):
        self.saved = []

    def save(self, policy, state, metrics):
        self.saved.append(state)


def make_parts(config, policy, **settings):
    return SimpleNamespace(
        config=config,
        topology=policy.topology,
        policy=policy,
        recorder=FakeRecorder(),
        checkpointer=FakeCheckpointer(),
        state=TrainState(0, 0, {}, num_trained_groups=0, num_optimizer_steps=0),
        demonstrations=read_demonstrations(config),
        rollout=None,
        **{"reference": None, "skipped": SkippedUpdates(3, lambda message: None), **settings},
    )


def write_rows(path):
    rows = [{"prompt": f"{n}+1=", "response": f"{n + 1}\n"} for n in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def warm_config(tmp_path, *overrides):
    write_rows(tmp_path / "rows.jsonl")
    settings = (f"warmup.path={tmp_path / 'rows.jsonl'}", "warmup.steps=3", "warmup.batch_size=4", "warmup.lr=1e-2")
    return tiny_config(tmp_path, "rollout.temperature=0.6", "optimizer.clip_grad_norm=0", *settings, *overrides)


@needs_cross_entropy
def test_the_first_update_is_that_of_the_rows_cross_entropy_in_float64(tmp_path):
    config = warm_config(tmp_path, "warmup.steps=1", "optimizer.eps=1e-6")
    encode = DemonstrationEncoder(TOKENIZER, chat_template=False, stop=["\n"], max_tokens=500).sample
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    order = row_order(5, seed=config.trainer.seed)
    samples = [encode(lines[next(order)], "", 0) for _ in range(4)]
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    picked = [token_logprobs(model, s.token_ids, 1.0)[0][s.loss_mask[1:]] for s in samples]
    loss = -torch.cat(picked).mean()
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0).step()
    with make_policy(config) as policy:
        own = policy.config
        parts = make_parts(config, policy)
        metrics = warm_up(parts)
        assert policy.config is own
        assert metrics["warmup/loss"] == pytest.approx(float(loss.detach()), abs=2e-6)
        assert metrics["warmup/tokens"] == sum(s.num_loss_tokens for s in samples)
        weights = dict(model.named_parameters())
        for name, value in policy.iter_weights(torch.float32):
            assert (value.double() - weights[name].detach()).abs().max() < 0.05 * 1e-2, name


@needs_cross_entropy
def test_a_warm_up_lowers_the_loss_is_saved_and_is_what_a_reference_holds_then(tmp_path):
    config = warm_config(tmp_path)
    with make_policy(config) as policy:
        parts = make_parts(config, policy, reference=ReferenceModel(config, policy.topology))
        metrics = warm_up(parts)
        assert metrics["warmup/loss"] < metrics["warmup/first_loss"] - 0.1
        assert parts.state.warmup_steps == 3
        assert parts.state.num_optimizer_steps == policy.num_updates == 3
        assert parts.checkpointer.saved == [parts.state]
        rows = read_metrics(tmp_path / "run" / "warmup")
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert rows[-1]["warmup/loss"] == metrics["warmup/loss"]
        ours, theirs = ([p.clone() for p in chunk.parameters()] for chunk in (policy.chunks[0], parts.reference.chunks[0]))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

        # A run that is past it makes no update, and its reference is the warmed-up model again.
        resumed = make_parts(config, policy, reference=ReferenceModel(config, policy.topology))
        resumed.state = parts.state
        assert warm_up(resumed) == {}
        assert policy.num_updates == 3
        theirs = resumed.reference.chunks[0].parameters()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@needs_cross_entropy
def test_a_longer_warm_up_goes_on_with_the_rows_that_come_next(tmp_path):
    config = warm_config(tmp_path)
    with make_policy(config) as policy:
        warm_up(make_parts(config, policy))
        whole = {name: value.clone() for name, value in policy.iter_weights(torch.float32)}
    with make_policy(config) as policy:
        begun = warm_config(tmp_path, "warmup.steps=1")
        parts = make_parts(begun, policy)
        warm_up(parts)
        parts.config = config
        warm_up(parts)
        assert parts.state.warmup_steps == 3
        assert all(torch.equal(value, whole[name]) for name, value in policy.iter_weights(torch.float32))


def test_supervised_updates_have_no_term_of_the_runs_own_algorithm(tmp_path):
    config = supervised(tiny_config(tmp_path, "algorithm.kl.coef=0.1", "algorithm.entropy_coef=0.1", "rollout.top_p=0.9"))
    assert config.algorithm.policy_loss == "cross_entropy"
    assert config.algorithm.kl.coef == config.algorithm.entropy_coef == 0.0
    assert (config.rollout.temperature, config.rollout.top_p) == (1.0, 1.0)
    assert config.optimizer.lr == 1e-4


def test_a_warm_up_that_comes_too_late_is_left_out_and_said(tmp_path):
    config = warm_config(tmp_path)
    with make_policy(config) as policy:
        parts = make_parts(config, policy)
        parts.state = TrainState(2, 2, {}, num_trained_groups=8, num_optimizer_steps=2)
        assert warm_up(parts) == {}
        assert policy.num_updates == 0
        assert "comes too late" in parts.recorder.notes[0]


@needs_cross_entropy
def test_an_update_of_a_warm_up_that_is_not_finite_is_left_out_counted_and_its_rows_written_down(tmp_path):
    config = warm_config(tmp_path)
    with make_policy(config) as policy:
        train_step, calls = policy.train_step, []
        weight = policy.chunks[0].decoder.layers[0].mlp.linear_fc2.weight

        def broken_once(batch):
            calls.append(batch)
            hook = weight.register_hook(lambda gradient: gradient * float("inf")) if len(calls) == 2 else None
            try:
                return train_step(batch)
            finally:
                if hook is not None:
                    hook.remove()

        policy.train_step = broken_once
        parts = make_parts(config, policy)
        metrics = warm_up(parts)
        assert len(calls) == 3
        assert (parts.state.warmup_steps, parts.state.num_optimizer_steps, parts.state.num_nonfinite_skipped) == (3, 2, 1)
        assert metrics["warmup/loss"] < metrics["warmup/first_loss"]
    rows = read_metrics(tmp_path / "run" / "warmup")
    assert [row["warmup/nonfinite_skipped"] for row in rows] == [0.0, 1.0, 0.0]
    assert ["warmup/loss" in row for row in rows] == [True, False, True]
    [line] = [json.loads(text) for text in (tmp_path / "run" / "warmup" / BATCHES_FILE).read_text().splitlines()]
    order = list(itertools.islice(row_order(5, seed=config.trainer.seed), 4, 8))
    assert line["step"] == 2
    assert line["rows"] == [f"{tmp_path / 'rows.jsonl'}:{row + 1}" for row in order]
    assert "gradient norm" in line["reason"]


@needs_cross_entropy
def test_a_warm_up_whose_updates_all_fail_ends_the_run(tmp_path):
    config = warm_config(tmp_path)
    with make_policy(config) as policy:
        policy.chunks[0].decoder.layers[0].mlp.linear_fc2.weight.data.fill_(float("nan"))
        parts = make_parts(config, policy, skipped=SkippedUpdates(1, lambda message: None))
        with pytest.raises(NonFiniteUpdateError):
            warm_up(parts)
        assert policy.num_updates == 0
