"""Rows of every kind become the tokens of a rollout with what is trained marked; a row that can't is an error naming it."""

from __future__ import annotations

import pytest

from helpers.tiny import make_tokenizer
from skyrl_mega.agents.conversations import ConversationEncoder
from skyrl_mega.agents.row_encoder import RowEncoder
from skyrl_mega.errors import ConfigError, DataError

TOKENIZER = make_tokenizer()
TURNS = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?"), ("assistant", "6")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
HEAD = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def encoder(kind="sft", *, tokenizer=TOKENIZER, **settings) -> RowEncoder:
    return RowEncoder(tokenizer, kind, **{"vocab_size": 272, "max_length": 400, **settings})


def texts(example) -> list[tuple[str, str]]:
    """(all of it, what is trained) of each sequence."""
    return [
        (TOKENIZER.decode(one.token_ids.tolist()), TOKENIZER.decode(one.token_ids[one.loss_mask].tolist()))
        for one in example.sequences
    ]


def with_template(template: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("train_on", "trained"), [("assistant", "4<|im_end|>6<|im_end|>"), ("last", "6<|im_end|>"), ("all", None)]
)
def test_a_conversation_trains_the_assistants_turns(train_on, trained):
    ((whole, got),) = texts(encoder(train_on=train_on).example({"messages": MESSAGES}, "rows:1"))
    assert whole == "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in TURNS).removesuffix("\n")
    assert got == (whole.removeprefix("<|im_start|>") if trained is None else trained)


def test_a_prompt_and_a_response_are_a_conversation_of_two():
    expected = [(HEAD + "4<|im_end|>", "4<|im_end|>")]
    for row in (
        {"prompt": "2+2?", "response": "4"},
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": MESSAGES[1:2], "response": MESSAGES[2:3]},
        {"messages": [dict(message, name=None) for message in MESSAGES[1:3]]},  # as Parquet has it
    ):
        assert texts(encoder().example(row, "rows:1")) == expected


def test_an_earlier_answer_in_a_prompt_is_not_trained():
    ((_, trained),) = texts(encoder().example({"prompt": MESSAGES[:4], "response": "6"}, "rows:1"))
    assert trained == "6<|im_end|>"


def test_raw_text_ends_with_the_end_of_text():
    raw = encoder(chat_template=False)
    assert texts(raw.example({"prompt": "2+2=", "response": "4"}, "rows:1")) == [("2+2=4</s>", "4</s>")]
    assert texts(raw.example({"text": "two"}, "rows:1")) == [("two</s>", "wo</s>")]
    every = encoder(chat_template=False, train_on="all")
    assert texts(every.example({"prompt": "2+2=", "response": "4"}, "rows:1")) == [("2+2=4</s>", "+2=4</s>")]


def test_pretokenised_rows_are_taken_as_they_are():
    expected = ([9, 8, 7], [False, True, False])
    for row in (
        {"input_ids": [9, 8, 7], "loss_mask": [0, 1, 0]},
        {"input_ids": [9, 8, 7], "labels": [-100, 8, -100]},
    ):
        (one,) = encoder().example(row, "rows:1").sequences
        assert (one.token_ids.tolist(), one.loss_mask.tolist()) == expected
    (one,) = encoder().example({"input_ids": [9, 8, 7]}, "rows:1").sequences
    assert one.loss_mask.tolist() == [False, True, True]


def test_tools_reach_the_template_and_a_call_is_a_turn():
    template = (
        "{% for t in tools or [] %}[{{ t['function']['name'] }}]{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
        "{% for c in m['tool_calls'] or [] %}<call>{{ c['function']['name'] }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    messages = [MESSAGES[1], call, {"role": "tool", "content": "4"}, MESSAGES[2]]
    tools = [{"type": "function", "function": {"name": "add"}}]
    ((whole, trained),) = texts(
        encoder(tokenizer=with_template(template)).example({"messages": messages, "tools": tools}, "rows:1")
    )
    assert whole.startswith("[add]<|im_start|>user")
    assert trained == "<call>add</call><|im_end|>4<|im_end|>"


def test_a_templates_own_marks_are_used():
    turn = "{{ m['content'] + '<|im_end|>' }}"
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        f"{{% if m['role'] == 'assistant' %}}{{% generation %}}{turn}{{% endgeneration %}}{{% else %}}{turn}{{% endif %}}"
        "{{ '\\n' }}{% endfor %}"
    )
    tokenizer = with_template(marked)
    plain, own = (encoder(tokenizer=t).example({"messages": MESSAGES}, "rows:1").sequences[0] for t in (TOKENIZER, tokenizer))
    assert own.token_ids.tolist() == plain.token_ids.tolist()
    assert own.loss_mask.tolist() == plain.loss_mask.tolist()
    last = encoder(tokenizer=tokenizer, train_on="last").example({"messages": MESSAGES}, "rows:1")
    assert texts(last)[0][1] == "6<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_an_error_unless_only_the_last_is_trained():
    forgetful = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and not loop.last %}...{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = with_template(forgetful)
    with pytest.raises(DataError, match=r"rows:1: the assistant's message 2 can't be found.*sft\.train_on=last"):
        encoder(tokenizer=tokenizer).example({"messages": MESSAGES}, "rows:1")
    ((whole, trained),) = texts(encoder(tokenizer=tokenizer, train_on="last").example({"messages": MESSAGES}, "rows:1"))
    assert trained == "6<|im_end|>"
    assert "..." in whole


def test_an_absent_template_is_an_error():
    with pytest.raises(ConfigError, match="no chat template"):
        ConversationEncoder(with_template(""))


def test_pairs_of_every_spelling_are_the_same_tokens():
    expected = [(HEAD + "4<|im_end|>", "4<|im_end|>"), (HEAD + "5<|im_end|>", "5<|im_end|>")]
    wrong = {"role": "assistant", "content": "5"}
    for row in (
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": MESSAGES[1:2], "chosen": MESSAGES[2:3], "rejected": [wrong]},
        {"chosen": MESSAGES[1:3], "rejected": [MESSAGES[1], wrong], "margin": 0.5},
    ):
        example = encoder("pairs").example(row, "rows:1")
        assert texts(example) == expected
        assert example.target == row.get("margin", 0.0)


def test_labels_and_scores_are_targets():
    assert encoder("labelled").example({"prompt": "a", "response": "b", "label": True}, "rows:1").target == 1.0
    assert encoder("labelled").example({"prompt": "a", "completion": "b", "label": 0}, "rows:1").target == 0.0
    assert encoder("scored").example({"prompt": "a", "response": "b", "score": -2}, "rows:1").target == -2.0


def test_a_scored_sequence_has_one_token_more_and_its_number_is_read_before_it():
    row = {"prompt": "2+2=", "response": "4", "score": 1}
    (one,) = encoder("scored", aim="score", chat_template=False).example(row, "rows:1").sequences
    assert TOKENIZER.decode(one.token_ids[:-1].tolist()) == "2+2=4</s>"
    assert one.loss_mask.tolist() == [False] * 6 + [True]


def test_long_rows_are_an_error_or_dropped_or_cut_and_counted():
    row = {"prompt": "a" * 30, "response": "b" * 30}
    with pytest.raises(DataError, match=r"rows:1 has 61 tokens, more than data\.max_length \(40\)"):
        encoder(max_length=40, chat_template=False).example(row, "rows:1")
    dropping = encoder(max_length=40, chat_template=False, too_long="drop")
    assert dropping.example(row, "rows:1") is None
    assert dropping.counts == {"dropped": 1}
    cutting = encoder(max_length=40, chat_template=False, too_long="truncate")
    assert texts(cutting.example(row, "rows:1")) == [("a" * 30 + "b" * 10, "b" * 10)]
    assert cutting.example({"prompt": "a" * 40, "response": "b"}, "rows:2") is None, "nothing that is trained is left"
    assert cutting.counts == {"truncated": 2, "dropped": 1}
    pairs = encoder("pairs", max_length=40, chat_template=False, too_long="truncate")
    assert pairs.example({"prompt": "a" * 30, "chosen": "b" * 30, "rejected": "b" * 20}, "rows:3") is None, (
        "cut to the same tokens"
    )


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("sft", {"question": "a"}, 'must be {"messages".*it has the keys question'),
        ("sft", {"messages": []}, "messages must be a list"),
        ("sft", {"messages": [{"role": "user"}]}, "messages must be a list"),
        ("sft", {"messages": MESSAGES[:2]}, "last message must be the assistant's"),
        ("sft", {"messages": MESSAGES[2:3]}, "the first answers none"),
        ("sft", {"prompt": "a", "response": 4}, "must be"),
        ("sft", {"input_ids": [1, 999]}, "integers from 0 to 271"),
        ("sft", {"input_ids": [1, 2], "loss_mask": [1]}, "as many zeros and ones"),
        ("sft", {"input_ids": [1, 2], "labels": [-100, 3]}, "label 1 is 3, its token 2"),
        ("sft", {"input_ids": [1, 2], "loss_mask": [1, 0]}, "no token to train"),
        ("pairs", {"prompt": "a", "chosen": "b"}, 'must be {"prompt", "chosen", "rejected"}'),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same tokens"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}, "`margin` must be a finite number"),
        ("labelled", {"prompt": "a", "response": "b", "label": "good"}, "true or false"),
        ("scored", {"prompt": "a", "response": "b", "score": float("nan")}, "`score` must be a finite number"),
    ],
)
def test_a_row_that_can_not_be_used_is_an_error_that_names_it(kind, row, words):
    with pytest.raises(DataError, match=rf"(?s)rows:7.*{words}"):
        encoder(kind).example(row, "rows:7")


def test_messages_without_a_template_are_an_error():
    with pytest.raises(DataError, match=r"rows:7 has messages, and `data\.chat_template` is false"):
        encoder(chat_template=False).example({"messages": MESSAGES}, "rows:7")
