"""The project's CUDA kernels as functions on tensors of the current device, in bfloat16 or float16.

Each is one launch on torch's current stream, may be captured in a CUDA graph, and computes in float32. A first call
compiles or loads its kernel, so it must not be inside a capture. Shapes are checked where a mistake would be silent.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from chatserve.model.config import ModelConfig
from chatserve.model.nvrtc import Kernel, load_kernel, shared_memory_bytes

MAX_HEAD_DIM = 256
MAX_ARGMAX_ROWS = 4096
ARGMAX_CHUNK = 8192  # logits of one block
VECTOR = 8  # 16-bit numbers of one access, which takes 16 bytes
TOKEN_THREADS = 256
ROTARY_THREADS = 128
MAX_INDEX_BLOCKS = 1024

MAX_SMALL_BATCH = 4  # tokens up to which `small_linear` beats cuBLAS
SMALL_TOKENS = 8  # what one launch of it could take
SMALL_THREADS = 288
SMALL_TILE = 8  # rows of the weight that go together
SMALL_PAD_BYTES = 64
SMALL_STAGE_BYTES = SMALL_TILE * (1024 * 2 + SMALL_PAD_BYTES)  # so many rows of 1,024 columns, padded
SMALL_SUMS_BYTES = (2 * SMALL_TILE + 1) * 8 * SMALL_TOKENS * 4  # of 8 warps: products of two tiles, and squares
MIN_STAGES, MAX_STAGES = 2, 12
SMALL_BARRIER_BYTES = (2 * MAX_STAGES + 1) * 8
PLAIN, NORMED = 0, 1


def build_rope(config: ModelConfig, device: torch.device) -> Tensor:
    """Table [max_position, 2, head_dim / 2] float32 of cos and sin, scaled by the attention factor."""
    inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32, device=device)
    angles = torch.arange(config.max_position, dtype=torch.float32, device=device)[:, None] * inv_freq
    return torch.stack((angles.cos(), angles.sin()), dim=1).mul_(config.attention_factor)


def rotate_and_store(
    heads: Tensor,
    qk_norm: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    rows: Tensor,
    keys_values: Tensor,
    num_heads: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys, write keys and values to the arena, return the queries [n, num_heads, head_dim].

    `heads` [n, num_heads + 2 * num_kv_heads, head_dim] are query, key and value heads, contiguous. `qk_norm`
    [num_heads + num_kv_heads, head_dim] scales RMS-normalised query and key heads first. `cos_sin` is `build_rope`'s,
    `positions` [n] int32. `rows` [n] int32 or int64 are rows of `keys_values` [arena_tokens, 2, num_kv_heads,
    head_dim], one layer of the arena, whose tokens may lie apart; what has a negative row is not stored.
    """
    num_tokens, num_all, head_dim = heads.shape
    num_kv_heads = (num_all - num_heads) // 2
    if keys_values.shape[1:] != (2, num_kv_heads, head_dim) or keys_values.stride(1) != num_kv_heads * head_dim:
        raise ValueError(
            f"keys_values {tuple(keys_values.shape)} must be [tokens, 2, {num_kv_heads}, {head_dim}] packed"
        )
    q = heads.new_empty(num_tokens, num_heads, head_dim) if out is None else out
    kernel, groups_per_block = _rotary_kernel(head_dim, heads.dtype)
    kernel.launch(
        (-(-num_tokens * num_all // groups_per_block), 1),
        *(heads.data_ptr(), _address(qk_norm), cos_sin.data_ptr(), positions.data_ptr()),
        *(rows.data_ptr(), keys_values.data_ptr(), q.data_ptr(), keys_values.stride(0), eps),
        *(rows.dtype == torch.int64, num_tokens, num_heads, num_kv_heads),
    )
    return q


def embed(ids: Tensor, slot_tokens: Tensor, embedding: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Rows [n, hidden_size] of `embedding` [vocab_size, hidden_size] for `ids` [n] int32.

    An id below zero stands for the token that `slot_tokens` [slots] int32 holds at -1 - id: one sampled on the device.
    """
    hidden_size = embedding.shape[1]
    if hidden_size % VECTOR:
        raise ValueError(f"hidden_size={hidden_size} must be a multiple of {VECTOR}")
    hidden = embedding.new_empty(ids.shape[0], hidden_size) if out is None else out
    pointers = (ids.data_ptr(), slot_tokens.data_ptr(), embedding.data_ptr(), hidden.data_ptr())
    _token_kernel("embed", "PPPPi", embedding.dtype).launch((ids.shape[0], 1), *pointers, hidden_size)
    return hidden


def argmax(logits: Tensor, slots: Tensor, slot_tokens: Tensor, out: Tensor) -> None:
    """Write the index of each row's largest logit, the first of equals, to `out` and to `slot_tokens[slots]`.

    `logits` is [m, vocab_size] in float32, bfloat16 or float16, its rows maybe apart; `out` [at least m] and
    `slot_tokens` are int32, `slots` [m] int32, negative for none. At most 4,096 rows; on one stream at a time.
    """
    num_rows, vocab_size = logits.shape
    if num_rows > MAX_ARGMAX_ROWS:
        raise ValueError(f"{num_rows} rows of logits at once; at most {MAX_ARGMAX_ROWS}")
    is_wide = logits.dtype == torch.float32
    kernel = _token_kernel("argmax", "PPPPqii", torch.bfloat16 if is_wide else logits.dtype)
    pointers = (logits.data_ptr(), slots.data_ptr(), slot_tokens.data_ptr(), out.data_ptr())
    kernel.launch((-(-vocab_size // ARGMAX_CHUNK), num_rows), *pointers, logits.stride(0), vocab_size, is_wide)


def expand_indices(bases: Tensor, indptr: Tensor, out: Tensor) -> None:
    """Set `out[indptr[i] + j] = bases[i] + j` for all requests i: indices that count up. All int32.

    `indptr` [b + 1] begins with 0; `out` may be longer than `indptr[b]`, and the rest of it stays as it is.
    """
    kernel = _token_kernel("expand_indices", "PPPi", torch.bfloat16)
    blocks = min(-(-out.shape[0] // TOKEN_THREADS), MAX_INDEX_BLOCKS)
    kernel.launch((blocks, 1), bases.data_ptr(), indptr.data_ptr(), out.data_ptr(), bases.shape[0])


def small_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    activated: bool = False,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The product [m, out_size] of up to 8 rows `x` [m, in_size] with `weight` [out_size, in_size], transposed.

    `norm` [in_size]: the rows are RMS-normalised with `eps` and scaled by it first. `activated`: `weight` and `bias`
    are gate, then up, and what comes out is silu(gate) * up [m, out_size / 2]. `bias` [out_size] and `residual`
    [m, out_size] are added; `out` may be `residual`. `out_dtype` is that of `x`, or float32. `weight`, `norm` and
    `bias` must be constants, since they are read before the kernel ahead has ended. Needs compute capability 9.0.

    On an H200 the products of Llama-3-8B read their weights at 3.6 to 4.4 TB/s for one token, with norm, residual and
    activation, where cuBLAS alone reaches 2.7 to 4.4. A decode step of 600 tokens of history takes 3.94 ms for 1
    session, 4.04 for 2 and 4.22 for 4, with cuBLAS 4.75 to 4.98; for 8 rows cuBLAS is ahead.
    """
    _check_small(x, weight, activated=activated, added=residual is not None)
    num_rows, (out_size, in_size) = x.shape[0], weight.shape
    columns = out_size // 2 if activated else out_size
    result = x.new_empty(num_rows, columns, dtype=out_dtype) if out is None else out
    layout = _small_layout(num_rows, in_size, norm is not None)
    kernel, num_processors = _small_kernel(x.dtype)
    grid = (min(-(-out_size // SMALL_TILE), num_processors), 1)
    kind = PLAIN if norm is None else NORMED
    for first in range(0, num_rows, layout.num_rows):  # once, unless the rows are too long to hold them all
        kernel.launch(
            grid,
            *(_row_address(x, first), weight.data_ptr(), _address(norm), _address(bias)),
            *(_row_address(residual, first), _row_address(result, first)),
            *(x.stride(0), 0 if residual is None else residual.stride(0), result.stride(0), eps),
            *(min(layout.num_rows, num_rows - first), out_size, in_size, kind, activated),
            *(result.dtype == torch.float32, layout.num_stages),
            shared_bytes=layout.shared_bytes,
        )
    return result


def _check_small(x: Tensor, weight: Tensor, *, activated: bool, added: bool) -> None:
    """Raise `ValueError` for what `small_linear` would compute wrongly."""
    out_size, in_size = weight.shape
    if x.shape[1] != in_size or in_size % VECTOR or not weight.is_contiguous():
        raise ValueError(f"x {tuple(x.shape)} does not go with weight {tuple(weight.shape)}")
    if x.shape[0] > SMALL_TOKENS:
        raise ValueError(f"{x.shape[0]} rows at once; at most {SMALL_TOKENS}")
    if activated and (added or out_size % 2):
        raise ValueError("an activated product has gate and up of one size, and no residual")


@dataclass(frozen=True, slots=True)
class _SmallLayout:
    """Rows of x that shared memory holds, stages of its ring of weights, and all of it in bytes."""

    num_rows: int
    num_stages: int
    shared_bytes: int


@functools.cache
def _small_layout(num_rows: int, in_size: int, normed: bool) -> _SmallLayout:
    """As many rows, and then as many stages, as fit."""
    row_bytes = -(-2 * in_size // 128) * 128 + SMALL_PAD_BYTES
    fixed = num_rows * row_bytes + 2 * in_size * normed + SMALL_SUMS_BYTES + SMALL_BARRIER_BYTES
    num_stages = min((shared_memory_bytes() - fixed) // SMALL_STAGE_BYTES, MAX_STAGES)
    if num_stages >= MIN_STAGES:
        return _SmallLayout(num_rows, num_stages, fixed + num_stages * SMALL_STAGE_BYTES)
    if num_rows == 1:
        raise ValueError(f"rows of {in_size} numbers are too long for this GPU's shared memory")
    return _small_layout(num_rows // 2, in_size, normed)


@functools.cache
def _rotary_kernel(head_dim: int, dtype: torch.dtype) -> tuple[Kernel, int]:
    """The kernel, and how many heads one of its blocks takes."""
    if head_dim % (2 * VECTOR) or head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim={head_dim} must be a multiple of {2 * VECTOR} up to {MAX_HEAD_DIM}")
    defines = (f"HEAD_DIM={head_dim}", *_dtype_defines(dtype))
    kernel = load_kernel("rotary.cu", "rotate_and_store", "PPPPPPPqfiiii", threads=ROTARY_THREADS, defines=defines)
    lanes_per_head = 1 << (head_dim // (2 * VECTOR) - 1).bit_length()
    return kernel, ROTARY_THREADS // lanes_per_head


@functools.cache
def _token_kernel(name: str, signature: str, dtype: torch.dtype) -> Kernel:
    return load_kernel("tokens.cu", name, signature, threads=TOKEN_THREADS, defines=_dtype_defines(dtype))


@functools.cache
def _small_kernel(dtype: torch.dtype) -> tuple[Kernel, int]:
    """The kernel, and how many of its blocks the device runs at once."""
    kernel = load_kernel(
        "small_linear.cu",
        "small_linear",
        "PPPPPPqqqfiiiiiii",
        threads=SMALL_THREADS,
        defines=_dtype_defines(dtype),
        max_shared_bytes=shared_memory_bytes(),
    )
    return kernel, torch.cuda.get_device_properties().multi_processor_count


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _row_address(tensor: Tensor | None, row: int) -> int:
    return 0 if tensor is None else tensor.data_ptr() + row * tensor.stride(0) * tensor.itemsize


def _dtype_defines(dtype: torch.dtype) -> tuple[str, ...]:
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the CUDA kernels take bfloat16 or float16, not {dtype}")
    return ("CHATSERVE_FP16",) if dtype == torch.float16 else ()
