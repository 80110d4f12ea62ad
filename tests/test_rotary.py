"""The rotation of positions: the op against float64, and models of transformers that rotate by it."""

import copy

import pytest
import torch
from fuse_models import batch, make, step
from models import assert_same

import qlora_native as qn
from qlora_native.integrations.fuse import _rotary as rotary
from qlora_native.integrations.fuse import fuse_attention
from qlora_native.testing import unit_roundoff

rotary_embedding = qn.functional.rotary_embedding
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(B=2, H=3, T=5, D=12, dtype=torch.float32, shared=False):
    torch.manual_seed(0)
    x = torch.randn(B, T, H, D).to(dtype).transpose(1, 2)
    cos, sin = torch.randn(2, 1 if shared else B, T, D).to(dtype)  # no angle has these: all four terms are seen
    return x, cos, sin


def by_definition(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-x2, x1), dim=-1) * sin[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 12), (1, 1, 1, 2), (2, 2, 7, 80), (3, 1, 0, 4)], ids=str)
def test_result_and_gradient_are_those_of_float64(shape, dtype, shared):
    x, cos, sin = operands(*shape, dtype=dtype, shared=shared)
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, expected = rotary_embedding(x, cos, sin), by_definition(wide, cos.double(), sin.double())
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy)
    expected.backward(dy.double())
    if not x.numel():
        return
    angles = torch.cat((cos, sin)).abs().amax().double()
    for actual, right, operand in ((y, expected, x), (x.grad, wide.grad, dy)):
        of_terms = 2 * unit_roundoff(torch.float32) * 2 * angles * operand.detach().abs().amax().double()
        assert ((actual.double() - right).abs() <= unit_roundoff(dtype) * right.abs() + of_terms).all()


def test_op_passes_opcheck():
    x, cos, sin = operands()
    for transposed in (False, True):
        torch.library.opcheck(torch.ops.qlora_native.rotary, (x.requires_grad_(), cos, sin, transposed))


def test_result_has_its_tokens_side_by_side():
    x, cos, sin = operands()
    assert rotary_embedding(x, cos, sin).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 1.0}, TypeError, "x: expected a tensor, got float"),
        ({"x": torch.zeros(2, 3, 5, 12, dtype=torch.float64)}, TypeError, "x: expected"),
        ({"x": torch.zeros(3, 5, 12)}, ValueError, r"x: expected \[B, H, T, D\] with an even D"),
        ({"x": torch.zeros(2, 3, 5, 11)}, ValueError, r"x: expected \[B, H, T, D\] with an even D"),
        ({"x": torch.zeros(2, 3, 5, 12, device="meta")}, ValueError, "x: expected a tensor on the CPU"),
        ({"cos": torch.zeros(2, 5, 12).half()}, TypeError, "cos: expected torch.float32, as x"),
        ({"cos": torch.zeros(2, 4, 12)}, ValueError, r"cos: expected \[2, 5, 12\] or \[1, 5, 12\]"),
        ({"sin": torch.zeros(1, 5, 12)}, ValueError, "sin: expected .*cos and sin alike"),
    ],
)
def test_bad_input_is_named_in_the_error(change, error, message):
    given = dict(zip(("x", "cos", "sin"), operands(), strict=True)) | change
    with pytest.raises(error, match=message):
        rotary_embedding(**given)


# ---- models of transformers ------------------------------------------------------------------------------------------


@pytest.fixture
def rotations(monkeypatch):
    """The shapes of what rotary_embedding got."""
    shapes = []

    def rotate(x, cos, sin):
        shapes.append(tuple(x.shape))
        return rotary_embedding(x, cos, sin)

    monkeypatch.setattr(rotary, "rotary_embedding", rotate)
    return shapes


@pytest.mark.parametrize("family", ["llama", "qwen3", "stablelm", "cohere"])
def test_fused_model_rotates_by_the_op_where_it_computes_the_same(family, rotations):
    model = make(family)
    other = copy.deepcopy(model)
    fuse_attention(model)
    rotations.clear()
    result = step(model)
    assert len(rotations) == (0 if family == "cohere" else 2 * 2)  # q and k of each layer; cohere's pairs are adjacent
    rotations.clear()
    assert_same(result, step(other))
    assert not rotations  # the other model of the same code is as it was


def test_second_call_and_copies_keep_one_hook(rotations):
    model = make()
    fuse_attention(model)
    fuse_attention(model)
    copied = copy.deepcopy(model)
    for each in (model, copied):
        assert len(each.model.rotary_emb._forward_hooks) == 1
        rotations.clear()
        step(each)
        assert len(rotations) == 4


def test_positions_of_each_sequence_are_its_own(rotations):
    model = make()
    inputs = batch() | {"position_ids": torch.arange(33).reshape(3, 11)}
    expected = step(model, inputs)
    fuse_attention(model)
    assert_same(step(model, inputs), expected)
    assert rotations


def test_compiled_model_rotates_as_transformers_does(rotations):
    model = make().eval()
    fuse_attention(model)
    rotations.clear()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert rotations
        rotations.clear()
        compiled = torch.compile(model, backend="eager")(ids).logits
    assert not rotations and torch.allclose(compiled, expected, atol=1e-5)
