"""Guards attention on the CPU: values and gradients against float64, ranges of keys, strides, autocast."""

import math

import pytest
import torch
import torch.nn.functional as F
from peak import saved_bytes

from qlora_native._check.reference import attention as expected
from qlora_native.functional import attention
from qlora_native.testing import assert_close_by_norm, assert_error_ratio, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
# B, H, KV, Tq, Tk, D
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 4, 2, 17, 17, 64),
    (2, 3, 1, 5, 33, 80),
    (1, 2, 2, 1, 40, 128),
    (1, 6, 2, 70, 70, 17),
    (2, 2, 1, 40, 9, 16),
    (1, 2, 1, 70, 300, 24),
    (2, 6, 2, 1, 200, 64),
    (1, 70, 1, 1, 140, 8),
    (1, 4, 2, 16, 150, 40),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
NAMES = ("out", "dq", "dk", "dv")


def operands(shape, dtype, seed=0):
    """q, k, v and the gradient of the result, laid out as transformers has them: views of [B, T, heads, D]."""
    B, H, KV, Tq, Tk, D = shape
    torch.manual_seed(seed)
    sizes = ((B, Tq, H, D), (B, Tk, KV, D), (B, Tk, KV, D), (B, Tq, H, D))
    q, k, v, dout = (torch.randn(size).to(dtype).transpose(1, 2) for size in sizes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def all_of(q, k, v, dout, **options):
    """The result and the gradients by name."""
    out = attention(q, k, v, **options)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, (q, k, v), dout)), strict=True))


def seen_by(ranges, keys):
    """bool [B or 1, 1, Tq, Tk]"""
    each = torch.arange(keys)
    return ((each >= ranges[..., :1]) & (each < ranges[..., 1:]))[:, None]


def assert_right(actual, wanted):
    for name, (value, tolerance) in wanted.items():
        assert_close_by_norm(name, actual[name], value, tolerance)


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril()[None, None]


def some_ranges(B, Tq, Tk, seed=3):
    """For each query of each sequence its own; of the first three one sees nothing, one all, one nothing at the end."""
    generator = torch.Generator().manual_seed(seed)
    ranges = torch.randint(0, Tk + 1, (B, Tq, 2), generator=generator, dtype=torch.int32).sort(-1).values
    first = torch.tensor([[0, 0], [0, Tk], [Tk, Tk]], dtype=torch.int32)[:Tq]
    ranges[0, : len(first)] = first
    return ranges


@dtypes
@shapes
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_attention_and_its_gradients_are_those_of_float64(shape, dtype, is_causal):
    q, k, v, dout = operands(shape, dtype)
    actual = all_of(q, k, v, dout, is_causal=is_causal)
    assert all(t.dtype == dtype for t in actual.values())
    seen = causal(*shape[3:5]) if is_causal else torch.ones(1, 1, *shape[3:5], dtype=torch.bool)
    assert_right(actual, expected(q, k, v, dout, seen))


@dtypes
@shapes
@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
def test_queries_see_the_keys_of_their_ranges(shape, dtype, shared):
    q, k, v, dout = operands(shape, dtype)
    ranges = some_ranges(1 if shared else shape[0], *shape[3:5])
    actual = all_of(q, k, v, dout, key_ranges=ranges, scale=0.3)
    assert_right(actual, expected(q, k, v, dout, seen_by(ranges, shape[4]), 0.3))
    assert actual["out"][0, :, 0].eq(0).all() and actual["dq"][0, :, 0].eq(0).all()


def flash_attention(q, k, v, dout):
    """Causal attention by matrices in fp32, rounded to the dtype where FlashAttention rounds: {name: value}."""
    dtype, (B, H, T, D), KV = q.dtype, q.shape, k.shape[1]
    scale = D**-0.5
    q, k, v, dout = (t.detach().float() for t in (q, k, v, dout))
    k, v = (t.repeat_interleave(H // KV, dim=1) for t in (k, v))

    def rounded(tensor):
        return tensor.to(dtype).float()

    scores = (scale * q @ k.mT).masked_fill(~causal(T, T), -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    out = rounded(rounded(weights) @ v / weights.sum(-1, keepdim=True))
    P = scores.softmax(-1)
    dS = rounded(P * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)))
    dk, dv = ((t.mT @ of).view(B, KV, H // KV, T, D).sum(2) for t, of in ((scale * dS, q), (rounded(P), dout)))
    return dict(zip(NAMES, (out, rounded(scale * dS @ k), rounded(dk), rounded(dv)), strict=True))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype)[6:])
def test_error_is_that_of_flash_attention(dtype):
    shape = (2, 4, 2, 64, 64, 48)
    ours, yardsticks = {name: [] for name in NAMES}, {name: [] for name in NAMES}
    for seed in range(3):
        tensors = operands(shape, dtype, seed)
        wanted = expected(*tensors, causal(64, 64))
        for results, errors in ((all_of(*tensors, is_causal=True), ours), (flash_attention(*tensors), yardsticks)):
            for name in NAMES:
                errors[name].append(relative_error(results[name], wanted[name][0]))
    for name in NAMES:
        assert_error_ratio(name, ours[name], yardsticks[name], wanted[name][0].numel())


def test_large_scores_give_finite_results():
    q, k, v, dout = operands((1, 2, 1, 9, 9, 16), torch.float32)
    q.data.mul_(100), k.data.mul_(100)
    assert_right(all_of(q, k, v, dout, is_causal=True), expected(q, k, v, dout, causal(9, 9)))


@pytest.mark.parametrize("layout", ["one projection", "expanded", "columns", "backwards in memory"])
def test_any_strides_give_the_same(layout):
    B, H, T, D = 2, 4, 6, 8
    torch.manual_seed(0)
    whole = torch.randn(B, T, 3 * H * D)
    q, k, v = (each.view(B, T, H, D).transpose(1, 2) for each in whole.chunk(3, dim=-1))  # as Phi-3 has them
    if layout == "expanded":
        k, v = (each[:, :1].expand(B, H, T, D) for each in (k, v))
    elif layout == "columns":
        q, k, v = (each.mT.contiguous().mT for each in (q, k, v))
    elif layout == "backwards in memory":
        q, k, v = (each.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for each in (q, k, v))
    copies = [each.detach().contiguous().requires_grad_() for each in (q, k, v)]
    q, k, v = (each.detach().requires_grad_() for each in (q, k, v))
    dout = torch.randn(B, H, T, D)
    wanted = all_of(*copies, dout, is_causal=True)
    for name, tensor in all_of(q, k, v, dout.mT.contiguous().mT, is_causal=True).items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 3, 8), (2, 2, 1, 0, 3, 8), (2, 2, 1, 3, 0, 8)], ids=str)
def test_empty_operands_give_empty_results_or_zeros(shape):
    q, k, v, dout = operands(shape, torch.float32)
    for name, tensor in all_of(q, k, v, dout).items():
        like = {"out": q, "dq": q, "dk": k, "dv": v}[name]
        assert tensor.shape == like.shape and tensor.eq(0).all()


def test_operands_result_and_a_number_a_query_are_saved():
    B, H, KV, T, D = 2, 4, 2, 33, 16
    q, k, v, _ = operands((B, H, KV, T, T, D), torch.bfloat16)
    out, saved = saved_bytes(lambda: attention(q, k, v, is_causal=True))
    ranges = T * 2 * 4
    assert saved == 2 * B * D * T * (2 * H + 2 * KV) + 4 * B * H * T + ranges
    assert out.transpose(1, 2).is_contiguous()


@dtypes
def test_bits_are_the_same_for_any_number_of_threads(dtype):
    tensors = operands((3, 6, 2, 65, 65, 24), dtype)
    ranges = some_ranges(3, 65, 65)
    results = []
    for threads in (1, 3, 3):
        torch.set_num_threads(threads)
        results.append(all_of(*tensors, key_ranges=ranges))
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in NAMES)


def test_gradients_of_some_operands_are_those_of_all():
    q, k, v, dout = operands((1, 4, 2, 7, 7, 16), torch.float32)
    wanted = all_of(q, k, v, dout)
    (dv,) = torch.autograd.grad(attention(q.detach(), k.detach(), v), v, dout)
    assert torch.equal(dv, wanted["dv"])
    assert not attention(q.detach(), k.detach(), v.detach()).requires_grad


def test_ops_pass_opcheck():
    q, k, v, dout = operands((2, 4, 2, 5, 7, 8), torch.float32)
    ops, ranges = torch.ops.qlora_native, some_ranges(2, 5, 7)
    torch.library.opcheck(ops.attention.default, (q, k, v, 0.3))
    torch.library.opcheck(ops.attention.default, (q, k, v, 0.3, ranges))
    q, k, v = (each.detach().bfloat16() for each in (q, k, v))
    torch.library.opcheck(ops.attention.default, (q, k, v, 0.3, ranges[:1]))
    out, lse = ops.attention(q, k, v, 0.3, ranges)
    torch.library.opcheck(ops.attention_backward.default, (dout.bfloat16(), q, k, v, out, lse, 0.3, ranges))


def test_autocast_casts_as_for_torchs_own():
    q, k, v, dout = operands((1, 4, 2, 5, 5, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k.bfloat16(), v)
        own = F.scaled_dot_product_attention(q, k.bfloat16(), v, enable_gqa=True)
    assert out.dtype == own.dtype == torch.bfloat16
    assert torch.equal(out, attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    assert torch.autograd.grad(out, q, dout.bfloat16())[0].dtype == torch.float32


RANGES = torch.tensor([[[0, 3]] * 3], dtype=torch.int32)
LATE = RANGES + torch.tensor([0, 1], dtype=torch.int32)
BAD = [  # the error, and what is changed of three equal operands [1, 4, 3, 8]
    (TypeError, "q: expected a tensor, got list", lambda x: {"q": [1.0]}),
    (TypeError, "q: expected torch.float32, torch.bfloat16 or", lambda x: {"q": x.long()}),
    (TypeError, "k: expected torch.float32, as q", lambda x: {"k": x.double()}),
    (TypeError, "v: expected torch.float32, as q", lambda x: {"v": x.bfloat16()}),
    (ValueError, "q: .*use torch.nn.functional.scaled_dot_product", lambda x: {"q": x.to("meta")}),
    (ValueError, "v: .*use torch.nn.functional.scaled_dot_product", lambda x: {"v": x.to("meta")}),
    (ValueError, "q: expected .B, H, Tq, D.", lambda x: {"q": x[0]}),
    (ValueError, "q: expected .B, H, Tq, D.", lambda x: dict.fromkeys("qkv", x[..., :0])),
    (ValueError, "k: expected .1, KV, Tk, 8. where KV divides 4", lambda x: dict.fromkeys("kv", x[:, :3])),
    (ValueError, "k: ", lambda x: dict.fromkeys("kv", x[..., :4])),
    (ValueError, "k: ", lambda x: {"k": x.expand(2, 4, 3, 8)}),
    (ValueError, "v: expected .1, 4, 3, 8., as k", lambda x: {"v": x[:, :, :2]}),
    (ValueError, "scale: expected a finite number > 0, got 0.0", lambda x: {"scale": 0.0}),
    (ValueError, "scale", lambda x: {"scale": float("nan")}),
    (ValueError, "is_causal, key_ranges: expected one of them", lambda x: {"is_causal": True, "key_ranges": RANGES}),
    (TypeError, "key_ranges: expected an int32 tensor, got torch.int64", lambda x: {"key_ranges": RANGES.long()}),
    (ValueError, "key_ranges: ", lambda x: {"key_ranges": RANGES[:, :2]}),
    (ValueError, "key_ranges: ", lambda x: {"key_ranges": RANGES.to("meta")}),
    (ValueError, "key_ranges: expected ranges within 0 ... 3, got 0 ... 4 for q", lambda x: {"key_ranges": LATE}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD)
def test_bad_argument_is_named_in_the_error(error, message, change):
    x = torch.ones(1, 4, 3, 8)
    with pytest.raises(error, match=message):
        attention(**dict.fromkeys("qkv", x) | change(x))
