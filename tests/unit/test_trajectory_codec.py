"""Trajectories come back from bytes exactly as they went in, or not at all."""

import base64
import dataclasses
import math
import struct

import msgspec
import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.ledger import finished
from skyrl_mega.data.trajectory_codec import FORMAT_VERSION, check_encoded, decode_group, encode_group
from skyrl_mega.errors import DataError
from skyrl_mega.types import StopReason, Trajectory, TrajectoryGroup, Turn


@st.composite
def groups(draw):
    """Groups of 1 to 4 trajectories of 1 to 12 tokens; each has at least one sampled token."""

    shape, num_experts = draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), draw(st.sampled_from([8, 128, 256, 384]))

    def routing(length, seed):
        return np.random.default_rng(seed).integers(-1, num_experts, (length, *shape)).astype(np.int16)

    def trajectory():
        length = draw(st.integers(1, 12))
        mask = [1, *draw(st.lists(st.integers(0, 1), min_size=length - 1, max_size=length - 1))]
        number = st.floats(allow_nan=False, width=draw(st.sampled_from([32, 64])))
        turns = st.builds(Turn, st.integers(0, 99), st.integers(0, 99), st.sampled_from(StopReason), st.floats(allow_nan=False))
        version = st.integers(0, draw(st.sampled_from([0, 127, 128, 2**31, 2**62])))
        return Trajectory(
            token_ids=draw(
                st.lists(st.integers(0, draw(st.sampled_from([127, 50_000, 2**40]))), min_size=length, max_size=length)
            ),
            loss_mask=mask,
            rollout_logprobs=[draw(number) if m else 0.0 for m in mask],
            policy_versions=[draw(version) if m else -1 for m in mask],
            turns=tuple(draw(st.lists(turns, max_size=3))),
            reward=draw(st.floats(allow_nan=False)),
            terminated=draw(st.booleans()),
            truncated=draw(st.booleans()),
            metrics=draw(st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False), max_size=3)),
            text=draw(st.text(st.characters(), max_size=20)),
            reward_components=draw(st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False), max_size=3)),
            answer=draw(st.none() | st.text(st.characters(), max_size=8)),
            routed_experts=draw(st.none() | st.builds(routing, st.just(length), st.integers(0, 99))),
        )

    trajectories = tuple(trajectory() for _ in range(draw(st.integers(1, 4))))
    counts = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    errors = draw(st.dictionaries(st.text(max_size=8), st.integers(0, 9), max_size=2))
    baseline = draw(st.none() | st.floats(allow_nan=False))
    names = draw(st.text(max_size=8)), draw(st.text(max_size=8))
    return TrajectoryGroup(*names, trajectories, *counts, errors, baseline_reward=baseline)


@settings(max_examples=150, deadline=None)
@given(groups())
def test_every_field_comes_back_exactly(group):
    encoded = encode_group(group)
    assert check_encoded(encoded.content) == ""
    decoded = decode_group(encoded.content)
    assert decoded == group
    for ours, theirs in zip(decoded.trajectories, group.trajectories, strict=True):
        assert (ours.routed_experts is None) == (theirs.routed_experts is None)
        if ours.routed_experts is not None:
            assert ours.routed_experts.dtype == np.int16
            assert np.array_equal(ours.routed_experts, theirs.routed_experts)
    masks = [sum(t.loss_mask) for t in group.trajectories]
    versions = [v for t in group.trajectories for v in t.policy_versions if v >= 0]
    assert (encoded.response_tokens, encoded.longest_response) == (sum(masks), max(masks))
    assert (encoded.min_policy_version, encoded.max_policy_version) == (group.min_policy_version, max(versions))
    assert encoded.tokens == sum(len(t.token_ids) for t in group.trajectories)


def test_the_test_above_gives_every_field_of_a_trajectory():
    assert [f.name for f in dataclasses.fields(Trajectory)] == [
        *("token_ids", "loss_mask", "rollout_logprobs", "policy_versions", "turns", "reward", "terminated", "truncated"),
        *("metrics", "text", "reward_components", "answer", "routed_experts"),
    ]
    assert [f.name for f in dataclasses.fields(Turn)] == ["start", "end", "stop_reason", "reward"]
    assert [f.name for f in dataclasses.fields(TrajectoryGroup)] == [
        *("group_id", "prompt_id", "trajectories", "num_masked", "num_retries", "reward_errors"),
        "is_replayed",  # of one step's copy, not of the group that is stored
        "baseline_reward",
    ]


def test_groups_from_before_rewards_had_terms_are_still_read():
    group = finished("g1")
    content = encode_group(group).content
    name, *rest = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(content[13:]))
    trajectories = [fields[:7] for fields in rest[5]]
    assert [len(fields) for fields in rest[5]] == [10, 10]
    assert len(rest) == 12
    frame = zstandard.ZstdCompressor().compress(msgspec.msgpack.encode([name, *rest[:5], trajectories, *rest[6:8]]))
    old = content[:5] + xxhash.xxh3_64_digest(frame) + frame
    assert decode_group(old) == group


def test_a_group_that_was_written_before_there_were_baselines_still_reads():
    content = base64.b64decode(
        "U01URwHFYSQaUMVU8ii1L/0gmtUDAKQGmaJnMaJwMZKjPGk0xBABAAAABQAAAGUiAAC3kQAAkqM8aTHEBAAAAQGSozxmOMQgAPiENVstHuu/E59AeNdw6L///"
        "wAAkZcEkZQCBKRzdG9wy8PCgahhY2N1cmFjecQIYW5zd2VyIDABAgUAOEuyFBCQpapsRQeg"
    )
    group = decode_group(content)
    assert (group.group_id, group.num_masked, group.num_retries, group.baseline_reward) == ("g1", 1, 2, None)
    assert group.trajectories[0].token_ids == [1, 5, 8805, 37303]


def test_logprobs_keep_their_last_bit_and_the_sign_of_zero():
    logprobs = [0.0, -0.0, -0.1, -math.pi, -1e-300, struct.unpack("f", struct.pack("f", -0.1))[0]]
    group = finished("g1", length=4)
    group = dataclasses.replace(group, trajectories=(dataclasses.replace(group.trajectories[0], rollout_logprobs=logprobs),))
    back = decode_group(encode_group(group).content).trajectories[0].rollout_logprobs
    assert [struct.pack("d", x) for x in back] == [struct.pack("d", x) for x in logprobs]


def test_float32_logprobs_take_four_bytes_each():
    def size(logprob):
        group = finished("g1", length=2000, samples=1)
        single = [0.0, 0.0] + [logprob(x) for x in group.trajectories[0].rollout_logprobs[2:]]
        replaced = dataclasses.replace(group.trajectories[0], rollout_logprobs=single)
        return len(encode_group(dataclasses.replace(group, trajectories=(replaced,))).content)

    as_float32 = size(lambda x: struct.unpack("f", struct.pack("f", x))[0])
    assert as_float32 < 2000 * (4 + 4 + 1)  # logprob, token id, and everything else
    assert size(lambda x: x) > as_float32 + 2000 * 3


@pytest.mark.parametrize("place", [0, 4, 5, 12, 13, -1])
def test_a_changed_byte_is_found(place):
    content = bytearray(encode_group(finished("g1")).content)
    content[place] ^= 1
    assert check_encoded(bytes(content)) != ""
    with pytest.raises(DataError, match="can't be read"):
        decode_group(bytes(content))


@pytest.mark.parametrize("length", [0, 3, 12, 13, 40])
def test_bytes_cut_short_are_found(length):
    assert check_encoded(encode_group(finished("g1")).content[:length]) != ""


def test_a_later_format_is_named():
    content = bytearray(encode_group(finished("g1")).content)
    content[4] = FORMAT_VERSION + 1
    assert check_encoded(bytes(content)) == f"format version {FORMAT_VERSION + 1}, this program reads {FORMAT_VERSION}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": [0, 0]}, "loss_mask and token_ids must have equally many"),
        ({"policy_versions": [-1] * 5, "loss_mask": [0] * 5, "rollout_logprobs": [0.0] * 5}, "the policy sampled none"),
    ],
)
def test_a_group_that_nothing_could_be_trained_on_is_refused(change, message):
    group = finished("g1", samples=1)
    with pytest.raises(DataError, match=message):
        encode_group(dataclasses.replace(group, trajectories=(dataclasses.replace(group.trajectories[0], **change),)))


def test_routing_of_another_length_than_its_tokens_is_refused():
    group = finished("g1")
    rows = np.zeros((len(group.trajectories[0].token_ids) - 1, 2, 2), dtype=np.int16)
    short = dataclasses.replace(group.trajectories[0], routed_experts=rows)
    with pytest.raises(DataError, match=r"routed_experts must be \[tokens, layers, experts per token\]"):
        encode_group(dataclasses.replace(group, trajectories=(short,)))
