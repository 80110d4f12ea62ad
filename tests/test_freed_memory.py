"""Guards every op against tensors whose storage was freed (`untyped_storage().resize_(0)`), as FSDP leaves them.

Their address is null or anywhere. Every argument of every op refuses them by name, and takes none for an absent one.
"""

import pytest
import torch

import qlora_native as qn

ops = torch.ops.qlora_native
M, N, K, RANK = 3, 8, 128, 4
WEIGHT = ("codes", "absmax", "nested_absmax", "nested_code", "offset", "code")
REST = ("N", "K", "bits", "blocksize")
LORA = ("lora_a", "lora_b", "lora_scaling", "lora_dropout", "seed")


def weight():
    return dict(zip((*WEIGHT, *REST), qn.quantize(torch.randn(N, K)).op_arguments(), strict=True))


def lora():
    return dict(zip(LORA, (torch.ones(RANK, K), torch.ones(N, RANK), 1.0, 0.5, torch.tensor(7)), strict=True))


def optimizer():
    zeros = {"state1": torch.zeros(512, dtype=torch.uint8), "state2": torch.zeros(512, dtype=torch.uint8)}
    scales = {"absmax1": torch.zeros(2), "absmax2": torch.zeros(2), "steps": torch.zeros((), dtype=torch.int64)}
    lists = {name: [tensor] for name, tensor in {"params": torch.ones(512), "grads": torch.ones(512)}.items()}
    lists |= {name: [tensor] for name, tensor in (zeros | scales).items()}
    numbers = {"lr": [1e-3], "beta1": [0.9], "beta2": [0.99], "eps": [1e-8], "weight_decay": [0.0]}
    one = {"inv_scale": torch.ones(1), "found_inf": torch.zeros(1), "skipped": torch.zeros(1, dtype=torch.int64)}
    rates = {"lr_tensors": [torch.ones(1)], "lr_groups": [0]}
    return {"algorithm": "adamw", **lists, "group_sizes": [1], **numbers, **one, **rates}


CALLS = {
    "quantize": lambda: (
        {"weight": torch.ones(N, K), "code": torch.arange(16.0), "nested_code": torch.arange(256.0)}
        | {"bits": 4, "blocksize": 64}
    ),
    "dequantize": lambda: weight() | {"dtype": torch.float32},
    "linear_forward": lambda: {"x": torch.ones(M, K)} | weight() | {"bias": torch.ones(N)} | lora(),
    "linear_backward_input": lambda: {"dy": torch.ones(M, N)} | weight() | lora() | {"need_dx": True},
    "lora_gradients": lambda: (
        {"x": torch.ones(M, K), "dy": torch.ones(M, N), "u": torch.ones(M, RANK)}
        | {"v": torch.ones(M, RANK), "lora_scaling": 1.0, "lora_dropout": 0.5, "seed": torch.tensor(7)}
        | {"dtype": torch.float32}
    ),
    "optimizer_8bit_step": optimizer,
}


def freed(tensor, left=0):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(left)
    return tensor


def tensors_of(arguments):
    return [name for name, value in arguments.items() if isinstance(value, (torch.Tensor, list))
            and isinstance(value[0] if isinstance(value, list) else value, torch.Tensor)]  # fmt: skip


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, make in CALLS.items() for name in tensors_of(make())])
@pytest.mark.parametrize("how", ["freed", "cut short", "a view of freed memory"])
def test_tensor_without_memory_is_named_in_the_error(op, name, how):
    arguments = CALLS[op]()
    getattr(ops, op)(**arguments)  # as it is, it works
    whole = arguments[name][0] if isinstance(arguments[name], list) else arguments[name]
    if how == "a view of freed memory":
        larger = torch.cat((whole.reshape(-1), whole.reshape(-1)))
        bad = larger[whole.numel() :].view(whole.shape)
        larger.untyped_storage().resize_(0)
    else:
        bad = freed(whole, 0 if how == "freed" else whole.nbytes - 1)
    arguments[name] = [bad] if isinstance(arguments[name], list) else bad
    before = {key: value[0].clone() for key, value in arguments.items() if key in ("params", "state1") and key != name}
    with pytest.raises(ValueError, match=rf"{name}(\[0\])?: expected a tensor with memory, got one whose storage was"):
        getattr(ops, op)(**arguments)
    assert all(torch.equal(arguments[key][0], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", WEIGHT)
def test_weight_without_memory_is_named_in_the_error(name):
    q = qn.quantize(torch.randn(N, K))
    getattr(q, name).untyped_storage().resize_(0)
    for call in (lambda: qn.linear(torch.ones(M, K), q), q.dequantize, lambda: q.to("cpu")):
        with pytest.raises(ValueError, match=f"{name}: expected a tensor with memory"):
            call()


def test_copy_of_strided_memory_is_checked_first():
    """What is no contiguous tensor is copied by torch, which would read what is not there."""
    x = torch.ones(M, 2 * K)[:, ::2]
    x.untyped_storage().resize_(8)
    with pytest.raises(ValueError, match="x: expected a tensor with memory"):
        qn.linear(x, qn.quantize(torch.randn(N, K)))
    with pytest.raises(ValueError, match="weight: expected a tensor with memory"):
        qn.quantize(x)
