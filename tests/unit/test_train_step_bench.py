"""What scripts/bench/train_step.py compares and concludes: the same tokens on both sides, and goals that can be missed."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH_FOLDER = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH_FOLDER))
    import train_step

    yield train_step
    for name in ("train_step", "train_step_sides"):
        sys.modules.pop(name, None)


@pytest.fixture
def sides(bench):
    return sys.modules["train_step_sides"]


@pytest.mark.parametrize("order", ["batch", "sorted"])
@pytest.mark.parametrize("name", ["equal", "long_tail", "shared"])
def test_padded_rows_hold_every_sample_once(sides, name, order):
    shape = sides.SHAPES[name]
    samples = sides.make_samples(shape)
    batches = sides.padded_batches(samples, shape, order)
    rows = [
        (row_ids[seen.bool()].tolist(), response_ids[mask].tolist())
        for b in batches
        for row_ids, seen, response_ids, mask in zip(
            b.input_ids, b.attention_mask, b.response_ids_BR, b.response_mask_BR, strict=True
        )
    ]
    expected = [(s.token_ids.tolist(), s.token_ids[s.loss_mask].tolist()) for s in samples]
    assert sorted(rows) == sorted(expected)
    total = sum(float((b.advantages_BR * b.response_mask_BR).sum()) for b in batches)
    assert total == pytest.approx(sum(float(s.advantages.sum()) for s in samples), rel=1e-4)
    padded, tokens = sum(b.input_ids.numel() for b in batches), sum(s.num_tokens for s in samples)
    assert (padded == tokens) == (name != "long_tail")


def test_the_long_tail_is_one_and_sorting_helps_the_rival(sides):
    shape = sides.SHAPES["long_tail"]
    samples = sides.make_samples(shape)
    lengths = torch.tensor([float(s.num_tokens) for s in samples])
    assert lengths.max() == shape.longest
    assert lengths.max() > 2 * lengths.median()
    sizes = {
        order: sum(b.input_ids.numel() for b in sides.padded_batches(samples, shape, order)) for order in ("batch", "sorted")
    }
    assert sizes["sorted"] < 0.8 * sizes["batch"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_heads_of_the_rival_give_the_logprobs_of_float64(sides, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 70, 300, generator=generator)).to(dtype)
    ids = torch.randint(300, (3, 70), generator=generator)
    table = logits.double().log_softmax(-1)
    exact = table.gather(-1, ids[..., None])[..., 0], -(table.exp() * table).sum(-1)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for head in (sides.selective_logprobs, sides.float32_logprobs):
        for mine, theirs in zip(head(logits, ids), exact, strict=True):
            assert mine.shape == ids.shape
            assert (mine - theirs).abs().max() <= tolerance


def record(bench, ratio=1.3, ours_bytes=10, norm=5.0):
    def side(peak, grad_norm):
        return {
            "cpu_s": 1.0,
            "tokens_per_cpu_s": 1.0,
            "peak_bytes": peak,
            "peak_extra_bytes": peak - 5,
            "first_step": {"loss": 0.5, "grad_norm": grad_norm},
        }

    ours, theirs = side(ours_bytes, norm), side(11, 5.0)
    return {"case": "equal/float32", "variant": "selective", "ratio": ratio, "load": 0.0, "ours": ours, "hugging_face": theirs}


def test_goals_hold_or_are_missed_one_by_one(bench):
    def verdicts(**changes):
        return [held for _, held, _ in bench.goals(record(bench, **changes), exact)]

    exact = None
    assert verdicts() == [True, True, True, True]
    assert verdicts(ratio=0.99) == [False, True, True, True]
    assert verdicts(ours_bytes=11) == [True, False, False, True]
    assert verdicts(norm=5.01) == [True, True, True, False]
    exact = {"loss": 0.5, "grad_norm": 5.01}
    assert verdicts() == [True, True, True, False]
    assert verdicts(norm=5.01) == [True, True, True, True]


def test_goals_are_printed_from_a_file_and_a_new_record_replaces_its_own_kind(bench, tmp_path, capsys, monkeypatch):
    records = [record(bench), {**record(bench, ratio=0.5), "variant": "sorted", "case": "long_tail/bfloat16"}]
    bench.put(records, record(bench, ratio=1.7))
    assert sorted(r["ratio"] for r in records) == [0.5, 1.7]
    path = tmp_path / "train_step.json"
    path.write_text(json.dumps(records))
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--goals", str(path)])
    bench.main()
    printed = capsys.readouterr().out
    assert "holds   at least 1.0x: 1.70x" in printed
    assert "long_tail/bfloat16 against sorted (no goal)" in printed
    assert "missed  at least 1.5x: 0.50x" in printed


def test_a_difference_in_bfloat16_is_laid_at_the_side_that_is_away_from_float32(bench, capsys):
    exact, half = record(bench, norm=5.0), {**record(bench, norm=5.05), "case": "equal/bfloat16"}
    half["hugging_face"]["first_step"]["grad_norm"] = 5.2
    bench.print_goals([half])
    assert "float32" not in capsys.readouterr().out
    bench.print_goals([exact, half])
    assert "away from the first step in float32: ours 1.0e-02 (grad_norm), theirs 4.0e-02 (grad_norm)" in capsys.readouterr().out
