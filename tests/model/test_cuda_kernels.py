"""The CUDA kernels against torch in float64, on random inputs and into poisoned outputs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import rms_norm, silu

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from chatserve.model import cuda_kernels as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 5e-3}
NAN = float("nan")
EPS = 1e-5


@pytest.fixture(autouse=True)
def seeded():
    """Random inputs differ from test to test, not from run to run."""
    torch.manual_seed(0)


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def error(found, expected):
    """Relative to the expected in the Euclidean norm; not-a-number where an element was not written."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def replayed(run):
    """Run once to load the kernel, then capture and replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()


# ---- rotate_and_store


class Case:
    """Heads, table, arena and the expected outcome in float64."""

    def __init__(self, n, num_heads, num_kv_heads, head_dim, *, dtype=torch.bfloat16, normed=False, arena_rows=None):
        self.num_heads, self.num_kv_heads, self.eps = num_heads, num_kv_heads, EPS
        rows = arena_rows or 2 * n + 7
        self.heads = random(n, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype) * 3
        self.qk_norm = random(num_heads + num_kv_heads, head_dim, dtype=dtype) if normed else None
        angles = torch.rand(500, head_dim // 2, device="cuda") * 6
        self.cos_sin = torch.stack((angles.cos(), angles.sin()), 1) * 1.25
        self.positions = torch.randint(500, (n,), dtype=torch.int32, device="cuda")
        self.rows = torch.randperm(rows, device="cuda")[:n].to(torch.int32)
        self.arena = torch.full((rows, 3, 2, num_kv_heads, head_dim), NAN, dtype=dtype, device="cuda")
        self.layer = self.arena[:, 1]
        self.q = torch.full((n, num_heads, head_dim), NAN, dtype=dtype, device="cuda")

    def run(self):
        arguments = (self.heads, self.qk_norm, self.eps, self.cos_sin, self.positions, self.rows)
        return kernels.rotate_and_store(*arguments, self.layer, self.num_heads, out=self.q)

    def expected(self):
        """Queries, keys and values."""
        heads = self.heads.double()
        qk, v = heads[:, : -self.num_kv_heads], heads[:, -self.num_kv_heads :]
        if self.qk_norm is not None:
            qk = rms_norm(qk, (qk.shape[-1],), None, self.eps) * self.qk_norm.double()
        cos, sin = self.cos_sin[self.positions.long()].double()[:, :, None].unbind(1)
        low, high = qk.chunk(2, -1)
        qk = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
        return qk[:, : self.num_heads], qk[:, self.num_heads :], v

    def check(self):
        q, k, v = self.expected()
        stored = self.rows >= 0
        found = self.layer[self.rows[stored].long()]
        limit = TOLERANCE[self.heads.dtype]
        assert error(self.q, q) < limit
        assert error(found[:, 0], k[stored]) < limit
        assert torch.equal(found[:, 1], v[stored].to(found.dtype))

    def untouched(self):
        """Whether everything but the stored rows of the middle layer is still poison."""
        self.arena[self.rows[self.rows >= 0].long(), 1] = NAN
        return bool(self.arena.isnan().all())


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64), (4, 1, 80), (2, 2, 256), (3, 1, 16)]
)
def test_rotation_agrees_with_float64(n, normed, num_heads, num_kv_heads, head_dim):
    """Queries, stored keys and stored values are right, for heads that fill lanes and heads that do not."""
    case = Case(n, num_heads, num_kv_heads, head_dim, normed=normed)
    assert case.run() is case.q
    case.check()
    assert case.untouched()


def test_rotation_in_float16():
    """The same source compiled for the other 16-bit type."""
    case = Case(33, 32, 8, 128, dtype=torch.float16, normed=True)
    case.run()
    case.check()


def test_rotation_makes_its_output():
    """Without `out` the queries come in a new tensor."""
    case = Case(3, 4, 2, 64)
    expected = case.run().clone()
    arguments = (case.heads, None, EPS, case.cos_sin, case.positions, case.rows, case.layer, case.num_heads)
    assert torch.equal(kernels.rotate_and_store(*arguments), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_negative_rows_are_not_stored(dtype):
    """Queries of padding are computed, its keys and values go nowhere."""
    case = Case(20, 8, 2, 128)
    case.rows[::3] = -1
    case.rows = case.rows.to(dtype)
    case.run()
    case.check()
    assert case.untouched()


def test_rows_beyond_32_bit_offsets():
    """Offsets in the arena are 64 bits wide: rows behind element 2^32 at a token stride of 65,536."""
    stride, rows = 65_536, 66_000
    case = Case(4, 32, 8, 128)
    memory = torch.empty(rows * stride, dtype=torch.bfloat16, device="cuda")
    case.layer = memory.as_strided((rows, 2, 8, 128), (stride, 1024, 128, 1), 2048)
    case.rows = ints([rows - 1, 65_537, 32_769, 0])
    case.run()
    case.check()


def test_rotation_in_a_graph():
    """Captured and replayed it does the same."""
    case = Case(5, 32, 8, 128, normed=True)
    replayed(case.run)
    case.q.fill_(NAN)
    case.layer.fill_(NAN)
    replayed(case.run)
    case.check()


def test_rotation_refuses_an_arena_of_other_heads():
    """A view with other heads than the input would be written in the wrong places."""
    case = Case(2, 4, 2, 64)
    case.layer = case.arena[:, 1, :, :1]
    with pytest.raises(ValueError, match="keys_values"):
        case.run()


# ---- tokens


@pytest.mark.parametrize(("n", "hidden_size"), [(1, 4096), (300, 4096), (5, 8), (3, 2056)])
def test_embed_takes_known_and_sampled_tokens(n, hidden_size):
    """An id of -1 - s stands for slot s's token; rows come out bit by bit."""
    embedding, slot_tokens = random(1000, hidden_size), torch.randint(1000, (50,), dtype=torch.int32, device="cuda")
    ids = torch.randint(-50, 1000, (n,), dtype=torch.int32, device="cuda")
    known = torch.where(ids >= 0, ids, slot_tokens[(-1 - ids).clamp(min=0).long()])
    out = embedding.new_full((n, hidden_size), NAN)
    assert torch.equal(kernels.embed(ids, slot_tokens, embedding, out=out), embedding[known.long()])
    assert torch.equal(kernels.embed(ids, slot_tokens, embedding), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "vocab_size"), [(1, 128_256), (64, 128_256), (3, 5), (7, 8193), (300, 1000)])
def test_argmax_is_the_first_largest(dtype, m, vocab_size):
    """16-bit logits have many ties; the first of them counts, as on the CPU, and again at the next launch."""
    slot_tokens, out = ints([-7] * (m + 2)), ints([-7] * (m + 3))
    slots = torch.randperm(m + 2, device="cuda")[:m].to(torch.int32)
    for _ in range(3):
        logits = random(m, vocab_size, dtype=dtype)
        kernels.argmax(logits, slots, slot_tokens, out)
        expected = (logits == logits.amax(1, keepdim=True)).int().argmax(1).int()
        assert torch.equal(out[:m], expected)
        assert torch.equal(slot_tokens[slots.long()], expected)
    assert out[m:].tolist() == [-7] * 3
    assert sorted(slot_tokens.tolist())[:2] == [-7] * 2


def test_argmax_of_special_rows():
    """Rows of minus infinity, of both zeros, of negatives only; a row without a slot writes `out` alone."""
    logits = torch.full((4, 9000), -float("inf"), device="cuda")
    logits[1] = -0.0
    logits[1, 8999] = 0.0
    logits[2] = -5.0
    logits[2, 8500] = -1.0
    logits[3, 17] = -1e30
    slot_tokens, out = ints([-7] * 4), ints([-7] * 4)
    kernels.argmax(logits, ints([0, 1, -1, 3]), slot_tokens, out)
    assert out.tolist() == [0, 0, 8500, 17]
    assert slot_tokens.tolist() == [0, 0, -7, 17]


def test_argmax_of_rows_that_lie_apart():
    """Rows off the 16-byte boundary are read number by number."""
    logits = random(5, 1003, dtype=torch.float32)[:, 1:1002]
    out = ints([-7] * 5)
    kernels.argmax(logits, ints([-1] * 5), out.clone(), out)
    assert torch.equal(out.long(), logits.argmax(1))


def test_argmax_in_a_graph():
    """The launches leave nothing behind that the next one could see."""
    logits, slot_tokens, out = random(8, 50_000, dtype=torch.float32), ints([0] * 8), ints([0] * 8)
    slots = ints(range(8))
    replayed(lambda: kernels.argmax(logits, slots, slot_tokens, out))
    assert torch.equal(out.long(), logits.argmax(1))


def test_expand_indices_count_up_from_each_base():
    """Requests of no, few and many blocks; what lies behind the last stays."""
    counts = torch.randint(0, 300, (200,))
    counts[[0, 50, 199]] = 0
    counts[77] = 20_000
    bases = torch.randint(0, 1 << 30, (200,))
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    out = torch.full((int(indptr[-1]) + 100,), -7, dtype=torch.int32, device="cuda")
    kernels.expand_indices(ints(bases.tolist()), ints(indptr.tolist()), out)
    expected = torch.cat([torch.arange(base, base + count) for base, count in zip(bases, counts, strict=True)])
    assert torch.equal(out[:-100].cpu().long(), expected)
    assert out[-100:].tolist() == [-7] * 100


# ---- small_linear

SHAPES = [(6144, 4096), (4096, 14_336), (100, 8), (17, 520), (2111, 1000), (16, 512), (5000, 2048)]


def expected_product(x, weight, *, norm=None, residual=None, bias=None):
    x = x.double()
    if norm is not None:
        x = rms_norm(x, (x.shape[-1],), norm.double(), EPS)
    y = x @ weight.double().t()
    for added in (residual, bias):
        y = y if added is None else y + added.double()
    return y


@pytest.mark.parametrize("m", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("out_size", "in_size"), SHAPES)
@pytest.mark.parametrize("kind", ["plain", "normed"])
def test_small_linear_agrees_with_float64(m, out_size, in_size, kind):
    """Plain and normalised rows, with and without what is added, for sizes that do and do not fill tiles."""
    weight, bias = random(out_size, in_size) / in_size**0.5, random(out_size)
    x = random(m, in_size)
    options = {"norm": random(in_size)} if kind == "normed" else {}
    out = torch.full((m, out_size), NAN, device="cuda", dtype=torch.float32)
    kernels.small_linear(x, weight, eps=EPS, out=out, **options)
    assert error(out, expected_product(x, weight, **options)) < TOLERANCE[torch.float32]
    total = random(m, out_size)
    expected = expected_product(x, weight, residual=total, bias=bias, **options)
    kernels.small_linear(x, weight, eps=EPS, residual=total, bias=bias, out=total, **options)
    assert error(total, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("m", [1, 4, 7])
@pytest.mark.parametrize(("out_size", "in_size"), [(28_672, 4096), (32, 520), (12, 64), (6, 264), (1050, 1000)])
def test_small_linear_activates_its_output(m, out_size, in_size):
    """Gate and up are rows of one weight that lie far apart; their products meet in one lane."""
    weight, bias, norm = random(out_size, in_size) / in_size**0.5, random(out_size), random(in_size)
    x = random(m, in_size)
    for options in ({}, {"norm": norm}, {"bias": bias}):
        out = torch.full((m, out_size // 2), NAN, device="cuda", dtype=torch.float32)
        kernels.small_linear(x, weight, eps=EPS, activated=True, out=out, **options)
        gate, up = expected_product(x, weight, **options).chunk(2, -1)
        assert error(out, silu(gate) * up) < 2 * TOLERANCE[torch.float32]
    assert kernels.small_linear(x, weight, activated=True).shape == (m, out_size // 2)


def test_small_linear_makes_its_output():
    """Its dtype is that of the rows, or the one asked for."""
    x, weight = random(2, 256), random(64, 256)
    assert kernels.small_linear(x, weight).dtype == torch.bfloat16
    assert kernels.small_linear(x, weight, out_dtype=torch.float32).dtype == torch.float32


def test_small_linear_in_float16():
    """The same source compiled for the other 16-bit type."""
    x, weight = random(4, 1024, dtype=torch.float16), random(512, 1024, dtype=torch.float16) / 32
    assert error(kernels.small_linear(x, weight), expected_product(x, weight)) < TOLERANCE[torch.float16]


def test_small_linear_reads_rows_that_lie_apart():
    """Neither the stride of x nor that of the output need be its width."""
    x, weight = random(4, 3000)[:, 8:520], random(96, 512)
    out = torch.full((4, 200), NAN, device="cuda", dtype=torch.bfloat16)
    kernels.small_linear(x, weight, out=out[:, :96])
    assert error(out[:, :96], expected_product(x, weight)) < TOLERANCE[torch.bfloat16]
    assert bool(out[:, 96:].isnan().all())


def test_small_linear_of_rows_too_long_to_hold_at_once():
    """Rows that shared memory cannot hold all are taken in several launches."""
    x, weight, total = random(8, 28_672), random(64, 28_672) / 170, random(8, 64)
    expected = expected_product(x, weight, residual=total)
    assert error(kernels.small_linear(x, weight, residual=total, out=total), expected) < TOLERANCE[torch.bfloat16]


def test_small_linear_after_itself_in_a_graph():
    """A chain of dependent launches waits for its inputs: every product sees the one before, replay after replay."""
    weights = [random(1024, 1024) / 32 for _ in range(6)]
    start = random(2, 1024)
    rows = [torch.empty_like(start) for _ in weights]

    def chain():
        x = start
        for weight, out in zip(weights, rows, strict=True):
            x = kernels.small_linear(x, weight, residual=x, out=out)

    chain()
    eager = rows[-1].clone()
    expected = start
    for weight in weights:
        expected = expected_product(expected, weight, residual=expected)
    assert error(eager, expected) < 2 * TOLERANCE[torch.bfloat16]
    for _ in range(20):
        rows[-1].fill_(NAN)
        replayed(chain)
        assert torch.equal(rows[-1], eager)


@pytest.mark.parametrize(
    ("rows", "width", "options"),
    [
        (9, 64, {}),
        (2, 128, {}),
        (2, 63, {}),
        (2, 64, {"activated": True, "residual": (2, 32)}),
    ],
)
def test_small_linear_refuses_what_does_not_fit(rows, width, options):
    """Too many rows, rows of another width, and what no product has at once."""
    tensors = {name: value if value is True else random(*value) for name, value in options.items()}
    with pytest.raises(ValueError, match=r"does not go|at most|no residual"):
        kernels.small_linear(random(rows, width), random(32, 64), **tensors)
