"""Which transport a setting means on which machine, and what is refused."""

from dataclasses import replace

import pytest

from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import BackendUnavailableError, ConfigError
from skyrl_mega.rollout.transport.choose import resolve_transport

CPU = dict(device="cpu", in_process=False, one_machine=True, trainer_ranks=1)
CUDA = CPU | {"device": "cuda"}


@pytest.mark.parametrize(
    ("place", "settings", "expected"),
    [
        (CPU, {}, "shm"),
        (CPU | {"in_process": True}, {}, "shm"),
        (CPU | {"one_machine": False}, {}, "gloo"),
        (CUDA, {}, "cuda_ipc"),
        (CUDA | {"in_process": True}, {}, "shm"),
        (CUDA | {"trainer_ranks": 2}, {}, "shm"),
        (CUDA, {"colocated": False}, "nccl"),
        (CUDA | {"one_machine": False}, {"colocated": False}, "nccl"),
        (CUDA | {"one_machine": False, "trainer_ranks": 2}, {}, "gloo"),
        (CUDA, {"weight_delta": True}, "shm"),
        (CUDA | {"one_machine": False}, {"weight_delta": True, "colocated": False}, "gloo"),
    ],
)
def test_auto_takes_the_fastest_road_that_reaches_every_engine(place, settings, expected):
    assert resolve_transport(RolloutConfig(**settings), **place) == expected


@pytest.mark.parametrize("name", ["shm", "gloo"])
def test_what_was_asked_for_is_taken(name):
    assert resolve_transport(RolloutConfig(weight_transport=name), **CUDA) == name


@pytest.mark.parametrize(
    ("place", "settings", "error", "match"),
    [
        (CPU, {"weight_transport": "nccl"}, BackendUnavailableError, "needs CUDA"),
        (CPU, {"weight_transport": "cuda_ipc"}, BackendUnavailableError, "needs CUDA"),
        (CPU | {"one_machine": False}, {"weight_transport": "shm"}, ConfigError, "take gloo or nccl"),
        (
            CUDA,
            {"weight_transport": "nccl", "weight_delta": True, "colocated": False},
            ConfigError,
            "weight_delta works over shm",
        ),
        (CUDA, {"weight_transport": "nccl"}, ConfigError, "rollout.colocated=false"),
        (CUDA, {"weight_transport": "cuda_ipc", "colocated": False}, ConfigError, "the trainer's own GPU"),
        (CUDA | {"in_process": True}, {"weight_transport": "cuda_ipc"}, ConfigError, "child_process"),
    ],
)
def test_what_can_not_work_is_refused_with_the_remedy(place, settings, error, match):
    with pytest.raises(error, match=match):
        resolve_transport(replace(RolloutConfig(), **settings), **place)
