"""Guards the ops that write into their operands: memory that they write must be no other operand's.

Labels that lie in the logits were checked, and then overwritten before they were used.
"""

import pytest
import torch

import qlora_native as qn

ops = torch.ops.qlora_native
ROWS, V, NUMEL = 4, 16, 512


def loss():
    return {
        "logits": torch.ones(ROWS, V), "labels": torch.arange(ROWS), "ignore_index": -100, "scale": 1.0, "softcap": 0.0,
        "label_smoothing": 0.0, "z_loss": 0.0, "gradient": True, "row_gradients": torch.ones(ROWS),
    }  # fmt: skip


def step():
    """The arguments of optimizer_8bit_step."""
    lists = {name: [torch.ones(NUMEL)] for name in ("params", "grads")}
    lists |= {name: [torch.zeros(NUMEL, dtype=torch.uint8)] for name in ("state1", "state2")}
    lists |= {name: [torch.zeros(NUMEL // 256)] for name in ("absmax1", "absmax2")}
    numbers = {"lr": [1e-3], "beta1": [0.9], "beta2": [0.99], "eps": [1e-8], "weight_decay": [0.0]}
    one = {"inv_scale": torch.ones(1), "found_inf": torch.zeros(1), "skipped": torch.zeros(1, dtype=torch.int64)}
    rates = {"lr_tensors": [torch.ones(1)], "lr_groups": [0]}
    steps = [torch.zeros((), dtype=torch.int64)]
    return {"algorithm": "adamw", **lists, "steps": steps, "group_sizes": [1], **numbers, **one, **rates}


def gram():
    return {"gram": torch.zeros(V, V), "x": torch.ones(ROWS, V)}


CALLS = {"cross_entropy_": loss, "gram": gram, "optimizer_8bit_step": step}


def written(op):
    arguments = getattr(ops, op).default._schema.arguments
    return [each.name for each in arguments if each.alias_info is not None and each.alias_info.is_write]


def tensors_of(arguments):
    """{name: tensor}, of a list its first one."""
    first = {name: value[0] if isinstance(value, list) and value else value for name, value in arguments.items()}
    return {name: value for name, value in first.items() if isinstance(value, torch.Tensor)}


def put(arguments, name, tensor):
    arguments[name] = [tensor] if isinstance(arguments[name], list) else tensor


def views(memory, at, tensor):
    """`tensor` in the bytes of `memory` from `at` on."""
    view = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return view.copy_(tensor)


PAIRS = [
    (op, writer, other)
    for op, make in CALLS.items()
    for writer in written(op)
    for other in tensors_of(make())
    if other != writer
]


@pytest.mark.parametrize(("op", "writer", "other"), PAIRS)
def test_operand_in_memory_that_is_written_is_named_in_the_error(op, writer, other):
    arguments = CALLS[op]()
    tensors = tensors_of(arguments)
    memory = torch.zeros(1 << 14, dtype=torch.uint8)
    begin = 4096
    put(arguments, writer, views(memory, begin, tensors[writer]))
    last_word = begin + (tensors[writer].nbytes - 1) // 8 * 8
    put(arguments, other, views(memory, last_word, tensors[other]))
    before = memory.clone()
    names = rf"({writer}|{other})(\[0\])?"
    with pytest.raises(ValueError, match=f"^{names}: expected memory apart from that of {names}, which is written"):
        getattr(ops, op).default(**arguments)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("op", CALLS)
def test_operands_may_be_adjacent_in_memory(op):
    expected, arguments = CALLS[op](), CALLS[op]()
    at, memory = 0, torch.zeros(1 << 14, dtype=torch.uint8)
    for name, tensor in tensors_of(arguments).items():
        put(arguments, name, views(memory, at, tensor))
        at += -(-tensor.nbytes // 8) * 8  # an int64 is aligned
    for each in (expected, arguments):
        getattr(ops, op).default(**each)
    for name, tensor in tensors_of(expected).items():
        assert torch.equal(tensor, tensors_of(arguments)[name]), name


def test_operands_that_are_only_read_may_share_memory():
    arguments = loss() | {"row_gradients": torch.ones(()).expand(ROWS).contiguous()}
    memory = torch.zeros(8 * ROWS, dtype=torch.uint8)
    arguments["labels"] = memory.view(torch.int64)
    arguments["row_gradients"] = memory[: 4 * ROWS].view(torch.float32)
    ops.cross_entropy_.default(**arguments)
    logits = torch.zeros(ROWS, V)
    labels = logits.view(-1).view(torch.int64)[:ROWS]
    ops.cross_entropy_.default(**loss() | {"logits": logits, "labels": labels, "gradient": False})
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    params[0].grad = params[1].grad = torch.ones(()).expand(3)
    qn.optim.AdamW8bit(params).step()


def test_parameters_may_be_columns_of_one_matrix():
    matrix = torch.ones(6, 4)
    params = [torch.nn.Parameter(matrix[:, :2]), torch.nn.Parameter(matrix[:, 2:])]
    for param in params:
        param.grad = torch.ones_like(param)
    qn.optim.AdamW8bit(params, lr=0.5).step()
    assert (matrix < 1).all()


def test_optimizer_names_parameters_that_share_memory():
    vector = torch.ones(10)
    params = [torch.nn.Parameter(vector[:6]), torch.nn.Parameter(vector[5:])]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = qn.optim.AdamW8bit(params)
    with pytest.raises(ValueError, match=r"params\[0\]: expected memory apart from that of params\[1\]"):
        optimizer.step()
    assert vector.eq(1).all()


def test_every_op_that_writes_is_tried():
    names = {name.removeprefix("qlora_native::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("qlora_native::")}  # fmt: skip
    assert {name for name in names if written(name)} == set(CALLS)
