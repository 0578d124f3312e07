"""Rows from several datasets: their shares are exact, epochs whole, and a saved position goes on with the row that comes next."""

from __future__ import annotations

from collections import Counter

import pytest

from skyrl_mega.data.examples import Example, TokenSequence, fingerprint, samples_of
from skyrl_mega.data.mixing import Dataset, MixedStream
from skyrl_mega.errors import DataError


def rows(name: str, count: int) -> list[Example]:
    return [Example(f"{name}:{n}", (TokenSequence.of([n, len(name), 1], [0, 0, 1]),)) for n in range(count)]


def stream(*, seed: int = 0, weights=(0.0, 0.0), sizes=(7, 3)) -> MixedStream:
    return MixedStream([Dataset(name, rows(name, n), w) for name, n, w in zip(("a", "bb"), sizes, weights, strict=True)], seed)


def test_without_weights_an_epoch_holds_every_row_of_every_dataset_once():
    mixed = stream()
    epochs = [[example.place for example in mixed.next(10)] for _ in range(3)]
    assert all(sorted(epoch) == sorted(example.place for example in mixed.examples) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert mixed.epoch == 3.0
    assert mixed.drawn == {"a": 21, "bb": 9}


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.1, 0.9), (1.0, 1.0)])
def test_shares_are_the_weights_at_every_moment(weights):
    mixed = stream(weights=weights)
    share = weights[0] / sum(weights)
    for count in range(1, 101):
        mixed.next(1)
        assert abs(mixed.drawn["a"] - share * count) < 1.0
    # Each dataset repeats its own rows evenly.
    seen = Counter(example.place for example in stream(weights=weights).next(100) if example.place.startswith("bb"))
    assert max(seen.values()) - min(seen.values()) <= 1


def test_a_saved_position_goes_on_exactly_in_batches_of_any_size():
    whole = [example.place for example in stream(weights=(2.0, 1.0)).next(40)]
    for cut in (1, 9, 25):
        first = stream(weights=(2.0, 1.0))
        first.next(cut)
        second = stream(weights=(2.0, 1.0))
        second.load_state_dict(first.state_dict())
        rest = [example.place for _ in range(40 - cut) for example in second.next(1)]
        assert rest == whole[cut:]


def test_seeds_order_rows_differently():
    assert [e.place for e in stream(seed=1).next(10)] != [e.place for e in stream(seed=2).next(10)]


@pytest.mark.parametrize(
    "other", [stream(seed=1), stream(weights=(1.0, 2.0)), stream(sizes=(7, 4))], ids=["seed", "weights", "rows"]
)
def test_a_position_of_other_rows_is_refused(other):
    with pytest.raises(DataError, match="does not belong to these rows"):
        stream().load_state_dict(other.state_dict())


def test_empty_and_like_named_datasets_are_refused():
    with pytest.raises(DataError, match="dataset a has no training row"):
        MixedStream([Dataset("a", [])], 0)
    with pytest.raises(DataError, match="names of their own"):
        MixedStream([Dataset("a", rows("a", 1)), Dataset("a", rows("a", 1))], 0)


def test_what_is_trained_is_in_the_fingerprint():
    one = Example("x:1", (TokenSequence.of([1, 2, 3], [0, 1, 1]),))
    others = [
        Example("x:1", (TokenSequence.of([1, 2, 4], [0, 1, 1]),)),
        Example("x:1", (TokenSequence.of([1, 2, 3], [0, 0, 1]),)),
        Example("x:1", (TokenSequence.of([1, 2, 3], [0, 1, 1]),), target=1.0),
    ]
    assert len({fingerprint([example]) for example in (one, *others)}) == 4


def test_samples_number_the_sequences_of_pairs_through():
    pair = (TokenSequence.of([1, 2, 3], [0, 1, 1]), TokenSequence.of([1, 4], [1, 1]))
    samples = samples_of([Example("x:1", pair), Example("x:2", pair, target=0.5)])
    assert [(s.sample_index, s.group_index, s.group_id) for s in samples] == [
        (0, 0, "x:1"),
        (1, 0, "x:1"),
        (2, 1, "x:2"),
        (3, 1, "x:2"),
    ]
    assert samples[3].loss_mask.tolist() == [False, True], "token 0 follows nothing"
    assert samples[3].reward == 0.5
