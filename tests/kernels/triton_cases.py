"""Cases of the Triton backend and what they must give: float64 sums of the definitions, and the same in the inputs' dtype.

Used in Triton's interpreter with tiny shapes and on a GPU with real ones. Shape letters: N rows, H hidden, U columns.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from skyrl_mega_kernels.linear_logprobs import triton as linear


@dataclass(frozen=True)
class Case:
    """Inputs of `statistics` and `gradients`; `bias_U` and `floor_N` may be None."""

    hidden_NH: torch.Tensor
    weight_UH: torch.Tensor
    bias_U: torch.Tensor | None
    columns_N: torch.Tensor
    floor_N: torch.Tensor | None
    coefficients_3N: torch.Tensor
    temperature: float = 1.0
    softcap: float = 0.0

    def rows(self, rows: slice | torch.Tensor) -> Case:
        """The same with some of the rows."""
        return dataclasses.replace(
            self,
            hidden_NH=self.hidden_NH[rows],
            columns_N=self.columns_N[rows],
            floor_N=None if self.floor_N is None else self.floor_N[rows],
            coefficients_3N=self.coefficients_3N[:, rows].contiguous(),
        )


def make_case(
    num_rows, hidden_size, num_columns, dtype, *, bias=False, floor=False, temperature=1.0, offset=0.0, device="cpu", seed=0
) -> Case:
    """Random inputs with logits of scale 1 around `offset`; one row in eight has its label on another shard (-1)."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    hidden, weight = normal(num_rows, hidden_size), normal(num_columns, hidden_size) * hidden_size**-0.5
    if offset:
        hidden[:, 0], weight[:, 0] = offset, 1.0
    columns = torch.randint(0, num_columns, (num_rows,), generator=generator, device=device)
    columns[3::8] = -1
    return Case(
        hidden.to(dtype),
        weight.to(dtype),
        normal(num_columns).to(dtype) if bias else None,
        columns,
        normal(num_rows) + offset if floor else None,
        normal(3, num_rows),
        temperature,
    )


@dataclass(frozen=True)
class Results:
    """Everything a backend computes of a case; `lse_N` is what its gradients were computed with."""

    packed_4N: torch.Tensor
    grad_hidden_NH: torch.Tensor
    grad_weight_UH: torch.Tensor
    grad_bias_U: torch.Tensor


def logits_of(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """Tempered logits, the matmul in `dtype` and the rest in float32 or better."""
    logits = (case.hidden_NH.to(dtype) @ case.weight_UH.to(dtype).t()).to(torch.promote_types(dtype, torch.float32))
    logits = logits if case.bias_U is None else logits + case.bias_U.to(logits.dtype)
    return (case.softcap * torch.tanh(logits / case.softcap) if case.softcap else logits) / case.temperature


def definition(case: Case, dtype: torch.dtype = torch.float64, lse_N: torch.Tensor | None = None) -> Results:
    """The definitions, term by term: in float64 the truth, in the inputs' dtype what a plain program would get."""
    logits = logits_of(case, dtype)
    at_label = torch.arange(logits.shape[1], device=logits.device) == case.columns_N[:, None]
    # The floor decides by float64 logits, so that both programs leave out the same columns.
    exact = logits_of(case, torch.float64)
    included = torch.ones_like(at_label) if case.floor_N is None else (exact >= case.floor_N[:, None]) | at_label
    kept = logits.masked_fill(~included, -torch.inf)
    m = kept.amax(1)
    shift = m.masked_fill(m.isneginf(), 0)[:, None]
    exps = (kept - shift).exp()
    x = torch.where(included, (logits - shift) * exps, 0).sum(1)
    packed = torch.stack([m, exps.sum(1), x, torch.where(at_label, logits, 0).sum(1)])

    lse = (m + packed[1].log() if lse_N is None else lse_N.to(logits.dtype))[:, None]
    a, b, c = case.coefficients_3N.to(logits.dtype)[:, :, None]
    probs = torch.where(included, (logits - lse).exp(), 0)
    dz = torch.where(included, probs * (a + b * (logits - lse)), 0) + torch.where(at_label, c, 0)
    if case.softcap:
        dz = dz * (1 - (logits * case.temperature / case.softcap) ** 2)
    dz = (dz / case.temperature).to(dtype)
    return Results(packed, dz @ case.weight_UH.to(dtype), dz.t() @ case.hidden_NH.to(dtype), dz.sum(0))


def statistics(case: Case, *, with_entropy: bool = True, top_k: int = 0, chunk_tokens: int = 1024):
    """The backend's `statistics` of a case."""
    return linear.statistics(
        *(case.hidden_NH, case.weight_UH, case.bias_U, case.columns_N, case.floor_N),
        temperature=case.temperature,
        with_entropy=with_entropy,
        top_k=top_k,
        chunk_tokens=chunk_tokens,
        softcap=case.softcap,
    )


def outputs(case: Case, weight_dtype: torch.dtype = torch.float32, fill: float = torch.nan):
    """(grad_hidden, grad_weight, grad_bias) to write to."""
    (num_rows, hidden_size), num_columns = case.hidden_NH.shape, case.weight_UH.shape[0]
    new = case.coefficients_3N.new_full
    return (
        new((num_rows, hidden_size), fill),
        new((num_columns, hidden_size), fill, dtype=weight_dtype),
        new((num_columns,), fill),
    )


def lse_of(packed_4N: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp per row, finite also where nothing is included."""
    return (packed_4N[0] + packed_4N[1].log()).nan_to_num(nan=0.0, neginf=0.0)


def whole(case: Case, *, workspace_bytes: int = linear.WORKSPACE_BYTES, weight_dtype: torch.dtype = torch.float32) -> Results:
    """Forward and backward by `statistics` and `gradients`."""
    packed = statistics(case)[0]
    grads = outputs(case, weight_dtype)
    linear.gradients(
        *(case.hidden_NH, case.weight_UH, case.bias_U, case.columns_N, case.floor_N, lse_of(packed), case.coefficients_3N),
        temperature=case.temperature,
        **dict(zip(("grad_hidden_NH", "grad_weight_UH", "grad_bias_U"), grads, strict=True)),
        accumulate=False,
        chunk_tokens=1024,
        workspace_bytes=workspace_bytes,
        softcap=case.softcap,
    )
    return Results(packed, *grads)


def by_chunks(case: Case, chunk_tokens: int) -> Results:
    """The same by the chunk functions, one workspace for all chunks."""
    num_rows, num_columns = case.hidden_NH.shape[0], case.weight_UH.shape[0]
    size = linear.workspace_size(min(chunk_tokens, num_rows), num_columns, case.hidden_NH.dtype)
    workspace = case.coefficients_3N.new_full((size,), torch.nan)
    grad_hidden, grad_weight, grad_bias = outputs(case, fill=0.0)
    packed = []
    for start in range(0, num_rows, chunk_tokens):
        chunk = case.rows(slice(start, start + chunk_tokens))
        packed.append(
            linear.chunk_statistics(
                *(chunk.hidden_NH, chunk.weight_UH, chunk.bias_U, chunk.columns_N, chunk.floor_N, workspace),
                temperature=case.temperature,
                with_entropy=True,
                softcap=case.softcap,
            )
        )
        linear.chunk_gradients(
            *(chunk.hidden_NH, chunk.weight_UH, chunk.columns_N, chunk.floor_N, lse_of(packed[-1]), chunk.coefficients_3N),
            workspace,
            temperature=case.temperature,
            grad_hidden_CH=grad_hidden[start : start + chunk_tokens],
            grad_weight_UH=grad_weight,
            grad_bias_U=grad_bias,
            softcap=case.softcap,
        )
    return Results(torch.cat(packed, 1), grad_hidden, grad_weight, grad_bias)


def assert_as_good_as_eager(case: Case, ours: Results, *, factor: float = 3.0, floor: float = 3e-6) -> None:
    """Errors against float64 at most `factor` times those of the plain program in the inputs' dtype, plus float32's own."""
    truth = definition(case)
    eager = definition(case, case.hidden_NH.dtype)
    for field in dataclasses.fields(Results):
        true = getattr(truth, field.name)
        for row, (mine, plain, exact) in enumerate(
            zip(*(_as_rows(getattr(r, field.name)) for r in (ours, eager, truth)), strict=True)
        ):
            same = mine.double() == exact  # infinities, too
            error = torch.where(same, 0.0, (mine.double() - exact).abs()).max().item()
            allowed = factor * torch.where(plain.double() == exact, 0.0, (plain.double() - exact).abs()).max().item()
            allowed += floor * max(1.0, exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 1.0)
            assert error <= allowed, f"{field.name}[{row}] of {tuple(true.shape)}: error {error:.3e}, allowed {allowed:.3e}"


def _as_rows(tensor: torch.Tensor) -> list[torch.Tensor]:
    # The four statistics have scales of their own; a gradient is one thing.
    return list(tensor.unbind(0)) if tensor.shape[0] == 4 and tensor.dim() == 2 else [tensor]
