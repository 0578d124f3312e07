"""Prompt streams: endless, resumable, and never a held-out prompt in training."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from skyrl_mega.config.schema import Config, DataConfig, EnvConfig, EvalConfig, TrainerConfig
from skyrl_mega.data.prompts import GeneratorPromptSource, RowPromptSource, make_prompt_source, row_key
from skyrl_mega.data.rows import load_rows
from skyrl_mega.envs.registry import get_env_class
from skyrl_mega.errors import DataError, EnvError
from skyrl_mega.protocols import PromptSource

ROWS = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(400)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row_source(rows=ROWS, eval_rows=None, seed=0, **options) -> RowPromptSource:
    return RowPromptSource(rows, eval_rows, seed, "rows.jsonl", **options)


def generator_source(seed=0, **options) -> GeneratorPromptSource:
    return GeneratorPromptSource(get_env_class("arithmetic"), options, seed)


@pytest.mark.parametrize("make", [row_source, generator_source])
def test_sources_fit_the_protocol_and_resume_where_they_stood(make):
    source = make()
    assert isinstance(source, PromptSource)
    source.next(333)
    state = json.loads(json.dumps(source.state_dict()))
    assert len(json.dumps(state)) < 200, "the state must not grow with the data"
    expected = source.next(500)  # crosses an epoch of the rows
    resumed = make()
    resumed.load_state_dict(state)
    assert resumed.next(500) == expected


@pytest.mark.parametrize("make", [row_source, generator_source])
def test_how_prompts_are_grouped_into_calls_changes_nothing(make):
    one, other = make(), make()
    assert [p for n in (1, 5, 700, 0, 3) for p in one.next(n)] == other.next(709)


def test_an_epoch_draws_every_training_row_once_and_the_next_is_another_order():
    source = row_source()
    epochs = [[p.prompt_id for p in source.next(source.num_train)] for _ in range(3)]
    assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == source.num_train
    assert epochs[0] != epochs[1] != epochs[2]
    assert [p.prompt_id for p in row_source(seed=1).next(20)] != epochs[0][:20]


def test_about_a_twentieth_is_held_out_the_same_for_every_seed_and_never_trained():
    source = row_source([{"n": n} for n in range(4000)])
    assert 140 <= source.num_eval <= 260  # 200, standard deviation 14
    held_out = source.eval_prompts(source.num_eval)
    assert source.eval_prompts(10) == held_out[:10] == row_source([{"n": n} for n in range(4000)], seed=5).eval_prompts(10)
    assert source.num_train + source.num_eval == 4000
    trained = {p.prompt_id for p in source.next(2 * source.num_train)}
    assert not trained & {p.prompt_id for p in held_out}


def test_a_rows_side_does_not_depend_on_the_other_rows():
    def held_out(rows):
        source = row_source(rows)
        return {row_key(p.payload) for p in source.eval_prompts(source.num_eval)}

    assert held_out(ROWS[:200]) <= held_out(ROWS)
    assert held_out(list(reversed(ROWS))) == held_out(ROWS)


def test_duplicates_of_a_held_out_row_are_held_out_and_evaluated_once():
    source = row_source(ROWS + ROWS)
    held_out = {row_key(p.payload) for p in source.eval_prompts(source.num_eval)}
    assert source.num_eval == len(held_out) == row_source().num_eval
    assert not held_out & {row_key(p.payload) for p in source.next(source.num_train)}
    assert source.num_train == 2 * row_source().num_train


def test_training_rows_equal_to_an_evaluation_row_are_left_out():
    gsm8k = get_env_class("gsm8k")
    evaluation = [{**ROWS[3], "answer": "other words\n#### 4"}, ROWS[7], ROWS[7], {"question": "new?", "answer": "#### 1"}]
    source = row_source(eval_rows=evaluation, key=gsm8k.payload_key)
    assert (source.num_train, source.num_eval) == (398, 3)
    assert not {"rows.jsonl:3", "rows.jsonl:7"} & {p.prompt_id for p in source.next(398)}
    assert all(p.prompt_id.startswith("rows.jsonl:eval:") for p in source.eval_prompts(3))


def test_too_few_held_out_rows_is_an_error_with_both_numbers():
    source = row_source()
    with pytest.raises(
        DataError, match=rf"128 evaluation prompts .* {source.num_eval} distinct held-out rows .*{source.num_train}"
    ):
        source.eval_prompts(128)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (row_source(ROWS[:-1]), "fingerprint"),
        (row_source([*ROWS[:-1], {"question": "x", "answer": "y"}]), "fingerprint"),
        (row_source(seed=1), "seed"),
        (generator_source(), "kind"),
    ],
)
def test_a_state_of_other_data_is_refused(other, message):
    with pytest.raises(DataError, match=f"does not belong to rows.jsonl: its {message}"):
        row_source().load_state_dict(other.state_dict())


def test_a_generator_state_of_other_options_or_a_broken_one_is_refused():
    with pytest.raises(DataError, match="fingerprint"):
        generator_source().load_state_dict(generator_source(level="multiplication").state_dict())
    with pytest.raises(DataError, match="counters index >= 0"):
        generator_source().load_state_dict({**generator_source().state_dict(), "index": -1})


def test_generator_prompts_have_unique_ids_and_no_held_out_problem():
    source = generator_source(level="multiplication")
    trained, held_out = source.next(3000), source.eval_prompts(128)
    assert len({p.prompt_id for p in trained + held_out}) == 3128
    assert trained[5].prompt_id.startswith("train:5:multiplication/")
    assert not {p.prompt_id.split(":")[2] for p in trained} & {p.prompt_id.split(":")[2] for p in held_out}
    assert source.eval_prompts(128) == held_out


def test_generator_refuses_an_unknown_option():
    with pytest.raises(EnvError, match="did you mean 'level'"):
        generator_source(levle="mixed")


@pytest.mark.parametrize("source", ["jsonl", "parquet", "hf_dataset"])
def test_every_file_format_gives_the_same_rows(source, tmp_path):
    rows = [*ROWS[:20], {"question": "gr\u00f6\u00dfer als 5 \u2264?", "answer": "#### 1"}]
    if source == "jsonl":
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
    elif source == "parquet":
        import pyarrow
        import pyarrow.parquet

        path = str(tmp_path / "rows.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import datasets

        path = str(tmp_path / "rows")
        datasets.Dataset.from_list(rows).save_to_disk(path)
    assert load_rows(path, source)[0] == rows
    assert load_rows(path, source, limit=3)[0] == rows[:3]


def test_a_dataset_with_several_splits_names_them(tmp_path):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:2])}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="holds the splits train; give the directory of one"):
        load_rows(tmp_path / "d", "hf_dataset")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n\n{"a": \n', r"bad\.jsonl:3 is not JSON: .* column 7"),
        ('{"a": 1}\n[1]\n', r"bad\.jsonl:2 must be a JSON object, but is a list"),
        ("\n", "holds no rows"),
    ],
)
def test_a_bad_line_is_named(text, message, tmp_path):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path / "bad.jsonl", "jsonl")


@pytest.mark.parametrize(
    ("source", "message"), [("jsonl", "is not UTF-8"), ("parquet", "can't be read as parquet"), ("hf_dataset", "save_to_disk")]
)
def test_a_file_of_another_format_is_refused(source, message, tmp_path):
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match=message):
        load_rows(path, source)
    with pytest.raises(DataError, match="does not exist"):
        load_rows(tmp_path / "absent", source)


def config(path="", eval_path="", env="gsm8k", num_prompts=10, source="jsonl", **options) -> Config:
    return Config(
        env=EnvConfig(name=env, options=options),
        data=DataConfig(source=source, path=path, eval_path=eval_path),
        evaluation=EvalConfig(num_prompts=num_prompts),
        trainer=TrainerConfig(seed=3),
    )


def test_make_prompt_source_reads_the_rows_the_config_names(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", ROWS)
    eval_path = write_jsonl(tmp_path / "eval.jsonl", ROWS[:12])
    source = make_prompt_source(config(path), get_env_class("gsm8k"))
    assert source.next(3)[0].payload in ROWS
    with_eval = make_prompt_source(config(path, eval_path), get_env_class("gsm8k"))
    assert {row_key(p.payload) for p in with_eval.eval_prompts(12)} == {row_key(row) for row in ROWS[:12]}


def test_make_prompt_source_finds_every_fault_before_anything_else_starts(tmp_path):
    gsm8k, arithmetic = get_env_class("gsm8k"), get_env_class("arithmetic")
    bad_row = write_jsonl(tmp_path / "bad.jsonl", [*ROWS[:5], {"question": "q", "answer": "five"}])
    with pytest.raises(DataError, match=r"bad\.jsonl:6: the answer of a gsm8k row must hold a number"):
        make_prompt_source(config(bad_row), gsm8k)
    nan_row = tmp_path / "nan.jsonl"
    nan_row.write_text('{"question": "q", "answer": "#### 1", "x": NaN}\n')
    with pytest.raises(DataError, match=r"nan\.jsonl:1: .*not JSON compliant"):
        make_prompt_source(config(str(nan_row)), gsm8k)
    with pytest.raises(DataError, match="500 evaluation prompts are wanted"):
        make_prompt_source(config(write_jsonl(tmp_path / "t.jsonl", ROWS), num_prompts=500), gsm8k)
    with pytest.raises(DataError, match=r"needs data\.path"):
        make_prompt_source(config(""), gsm8k)
    with pytest.raises(EnvError, match="can't generate prompts"):
        make_prompt_source(config(source="generator", num_prompts=0), gsm8k)
    with pytest.raises(EnvError, match="held-out problems"):
        make_prompt_source(config(source="generator", env="arithmetic", num_prompts=128, level="one_digit_addition"), arithmetic)
