"""A worker's half of nccl and cuda_ipc: vLLM's own weight-transfer engines, with the loading put under our checks.

vLLM's engine receives a bucket and hands its tensors to `model.load_weights`. Here that model is a stand-in whose
`load_weights` is ours, so that every tensor is counted and summed before it is loaded, and an incomplete layer copies what
it keeps out of vLLM's receive buffers.

CUDA IPC handles travel as plain values (`handles_to_plain`), not pickled: an engine need not accept pickles
(VLLM_ALLOW_INSECURE_SERIALIZATION) to be given weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

#: Our transport's name -> vLLM's backend.
VLLM_BACKENDS = {"nccl": "nccl", "cuda_ipc": "ipc"}
#: What vLLM's engines raise where a rendezvous, a broadcast or a handle fails.
TRANSFER_ERRORS = (RuntimeError, ValueError, OSError, AssertionError)

Load = Callable[[Iterable[tuple[str, torch.Tensor]]], set[str]]


class NativeReceiver:
    """One transport that was joined. `token` names it, "" where joining or receiving failed; `error` says how."""

    def __init__(self, endpoint: Mapping[str, Any], config: Any, vllm_config: Any, device: torch.device, model: Any) -> None:
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        self.token, self.error = endpoint["token"], ""
        backend = VLLM_BACKENDS[endpoint["transport"]]
        self._engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=backend), vllm_config, device, model
        )
        try:
            self._engine.init_transfer_engine(self._engine.parse_init_info(dict(endpoint["init_info"])))
        except TRANSFER_ERRORS as error:
            self._fail(error)

    @staticmethod
    def serves(message: Mapping[str, Any]) -> bool:
        """Whether an endpoint or a bucket is of one of these transports."""
        return message.get("transport") in VLLM_BACKENDS

    def receive(self, bucket: Mapping[str, Any], load: Load) -> str:
        """Receives a bucket, handing its tensors to `load`, maybe in several parts; returns "" or why it failed."""
        update = dict(bucket["update_info"])
        try:
            if update.get("ipc_handles") is not None:
                update["ipc_handles"] = handles_from_plain(update["ipc_handles"])
            self._engine.model = SimpleNamespace(load_weights=load)
            self._engine.receive_weights(self._engine.parse_update_info(update))
        except TRANSFER_ERRORS as error:
            self._fail(error)
            return f"vLLM's {type(self._engine).__name__} could not receive a bucket: {self.error}"
        return ""

    def _fail(self, error: Exception) -> None:
        self.token, self.error = "", f"{type(error).__name__}: {error}"

    def close(self) -> None:
        self._engine.shutdown()


def handles_to_plain(handles: Any) -> Any:
    """vLLM's `ipc_handles` ({GPU: arguments of rebuild_cuda_tensor}, or a list of such) with plain values only."""
    if isinstance(handles, Mapping):
        return {gpu: [_value_to_plain(value) for value in arguments] for gpu, arguments in handles.items()}
    return [handles_to_plain(one) for one in handles]


def handles_from_plain(plain: Any) -> Any:
    """Inverse of `handles_to_plain`. Raises ValueError for what no handle contains."""
    if isinstance(plain, Mapping):
        return {gpu: tuple(_value_from_plain(value) for value in arguments) for gpu, arguments in plain.items()}
    return [handles_from_plain(one) for one in plain]


#: Classes that the arguments name: the tensor's and its storage's.
_CLASSES = {each.__name__: each for each in (torch.Tensor, torch.nn.Parameter, torch.UntypedStorage, torch.storage.TypedStorage)}


def _value_to_plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.Size | tuple | list):
        return {"sizes": [int(size) for size in value]}
    if isinstance(value, type):
        return {"class": value.__name__}
    if value is None or isinstance(value, bool | int | str):
        return value
    raise ValueError(f"a CUDA IPC handle holds {type(value).__name__}, which this version of vLLM is not known to send.")


def _value_from_plain(plain: Any) -> Any:
    if not isinstance(plain, Mapping):
        return plain
    ((kind, value),) = plain.items()
    if kind == "bytes":
        return bytes.fromhex(value)
    if kind == "dtype" and isinstance(getattr(torch, value, None), torch.dtype):
        return getattr(torch, value)
    if kind == "sizes":
        return torch.Size(value)
    if kind == "class" and value in _CLASSES:
        return _CLASSES[value]
    raise ValueError(f"a CUDA IPC handle can't hold {kind} {value!r}.")
