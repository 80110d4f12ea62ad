"""Guards every function and op against tensors whose storage was freed (`untyped_storage().resize_(0)`) or cut short.

FSDP and offloading leave such tensors. Their address is null or anywhere. Every argument refuses them by name, before
torch casts, compares or copies it, and takes none for an absent one.
"""

import inspect
import os
import subprocess
import sys

import pytest
import torch
from test_aliasing import step

import qlora_native as qn
from qlora_native import functional
from qlora_native._core.weight import as_matrix, op_arguments, unchecked

ops = torch.ops.qlora_native
M, N, K, RANK = 3, 8, 128, 4
WEIGHT = ("codes", "absmax", "nested_absmax", "nested_code", "offset", "code")
REST = ("N", "K", "bits", "blocksize")
LORA = ("lora_a", "lora_b", "lora_scaling", "lora_dropout", "seed")


def weight():
    return dict(zip((*WEIGHT, *REST), op_arguments(qn.quantize(torch.randn(N, K))), strict=True))


def lora():
    return dict(zip(LORA, (torch.ones(RANK, K), torch.ones(N, RANK), 1.0, 0.5, torch.tensor(7)), strict=True))


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
    "optimizer_8bit_step": step,
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


# ---- functions, layers and optimizers, some of which let torch read a tensor first -----------------------------------

E, V, HEADS, TOKENS, HEAD_DIM = 2, 8, 2, 4, 8


def adapter(of_each=(), dtype=torch.float32):
    return {"lora_a": torch.ones(*of_each, RANK, K, dtype=dtype), "lora_b": torch.ones(*of_each, N, RANK, dtype=dtype)}


def scaled_adapter(of_each=()):
    """With the scaling as a tensor, which only functions take."""
    return {**adapter(of_each), "lora_scaling": torch.ones(())}


def double(*shape):
    """A bias that is cast wherever it is used."""
    return torch.ones(*shape, dtype=torch.float64)


def changed_weight(method):
    """A method of a weight whose fields are the arguments."""
    q = qn.quantize(torch.ones(N, K))
    rest = (q.shape, q.blocksize, q.format, q.dtype)
    return lambda **tensors: method(unchecked(*tensors.values(), *rest)), q.tensors()


def cast_layer():
    layer = qn.nn.Linear4bit.from_quantized(qn.quantize(torch.ones(N, K)))
    layer.compute_dtype = torch.bfloat16
    return layer, {"x": torch.ones(M, K), **adapter()}


def experts_layer(x, **tensors):
    layer = qn.nn.Experts4bit.from_quantized(qn.quantize(torch.ones(E, N, K)))
    layer.compute_dtype = torch.bfloat16
    layer.adapters = [(tensors["lora_a"], tensors["lora_b"], 1.0)] * 2
    return layer(x, tensors["offsets"], tensors["bias"])


def reset_layer(**tensors):
    layer = qn.nn.Linear4bit(K, N)
    for name, tensor in tensors.items():
        layer._buffers[name] = tensor
    layer.reset_parameters()


def new_optimizer(**options):
    param = torch.nn.Parameter(torch.ones(4096))
    optimizer = qn.optim.AdamW8bit([param], **options)
    param.grad = torch.ones(4096)
    return optimizer, param


def first_step(lr, grad_scale, found_inf):
    optimizer, _ = new_optimizer(lr=torch.tensor(1e-3))
    optimizer.param_groups[0]["lr"] = lr
    optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf
    optimizer.step()


def state_of_optimizer():
    optimizer, param = new_optimizer()
    optimizer.step()
    return {name: tensor.clone() for name, tensor in optimizer.state[param].items()}


def second_step(**state):
    optimizer, param = new_optimizer()
    optimizer.state[param] = state
    optimizer.step()


def written_for_bitsandbytes(**state):
    optimizer, param = new_optimizer()
    optimizer.state[param] = state
    optimizer.to_bitsandbytes()


def loaded_state(**state):
    optimizer, _ = new_optimizer()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})


def loaded_arguments():
    optimizer, _ = new_optimizer()
    optimizer.step()
    return optimizer.to_bitsandbytes()["state"][0]


def heads():
    return torch.ones(1, HEADS, TOKENS, HEAD_DIM)


def labels():
    return torch.arange(M) % V


@torch.autocast("cpu", enabled=False)  # only the function that calls it knows of autocast
def loss_op(**tensors):
    """The op, with a dense weight."""
    order = ("hidden", "labels", "weight", *[None] * 6, N, K, 0, 0, "bias", "lora_a", "lora_b")
    rest = (1.0, -100, 1.0, 0.0, 0.0, 0.0, [True] * 4, None)
    return ops.linear_cross_entropy.default(*(tensors.get(each, each) for each in order), *rest)


def gradient_of_loss(reduction):
    hidden = torch.ones(M, K, requires_grad=True)
    return lambda dloss: functional.linear_cross_entropy(
        hidden, qn.quantize(torch.ones(V, K)), labels(), reduction=reduction
    ).backward(dloss)


@torch.autocast("cpu", enabled=False)  # torch would cast dy to the dtype of y
def gradient_of_bias(dy):
    qn.linear(torch.ones(M, K), qn.quantize(torch.ones(N, K)), torch.ones(N, requires_grad=True)).backward(dy)


@torch.autocast("cpu", enabled=False)
def gradient_of_norm(dy):
    functional.rms_norm(torch.ones(M, K), torch.ones(K, requires_grad=True)).backward(dy)


# {name: () -> (function, its arguments)}
FUNCTIONS = {
    "quantize": lambda: (qn.quantize, {"weight": torch.ones(N, K), "codebook": torch.arange(16).double()}),
    "quantize of experts": lambda: (qn.quantize, {"weight": torch.ones(E, N, K)}),
    "quantize in mxfp4": lambda: (qn.quantize, {"weight": torch.ones(E, N, K), "format": "mxfp4"}),
    "dequantize": lambda: changed_weight(qn.dequantize),
    "embedding": lambda: (
        functional.embedding,
        {"ids": torch.zeros(M, dtype=torch.int32), "q": qn.quantize(torch.ones(N, K))},
    ),
    "linear": lambda: (
        qn.linear,
        {"x": torch.ones(M, K), "q": qn.quantize(torch.ones(N, K)), "bias": double(N), **scaled_adapter()},
    ),
    "linear of a changed weight": lambda: changed_weight(lambda q: qn.linear(torch.ones(M, K), q)),
    "linear_grouped by index": lambda: (
        functional.linear_grouped,
        {"x": torch.ones(M, K), "q": qn.quantize(torch.ones(N, K)), "bias": double(N), **scaled_adapter((E,))}
        | {"adapter_index": torch.tensor([1, 0, -1])},
    ),
    "linear_grouped by offsets": lambda: (
        functional.linear_grouped,
        {"x": torch.ones(M, K), "q": qn.quantize(torch.ones(E, N, K)), "bias": double(E, N), **scaled_adapter((E,))}
        | {"offsets": torch.tensor([0, 1, M])},
    ),
    "linear_cross_entropy": lambda: (
        functional.linear_cross_entropy,
        {"hidden": torch.ones(M, K), "weight": qn.quantize(torch.ones(V, K)), "labels": labels(), "bias": double(V)}
        | scaled_adapter(),
    ),
    "linear_cross_entropy of a dense head": lambda: (
        functional.linear_cross_entropy,
        {"hidden": torch.ones(M, K), "weight": torch.ones(V, K), "labels": labels(), "bias": double(V)}
        | scaled_adapter(),
    ),
    "the op linear_cross_entropy": lambda: (
        loss_op,
        {"hidden": torch.ones(M, K), "labels": labels(), "weight": torch.ones(V, K), "bias": torch.ones(V)} | adapter(),
    ),
    "attention": lambda: (
        functional.attention,
        {"q": heads(), "k": heads(), "v": heads()}
        | {"key_ranges": torch.tensor([[[0, TOKENS]] * TOKENS], dtype=torch.int32)},
    ),
    "gated_activation": lambda: (functional.gated_activation, {"gate": torch.ones(M, K), "up": torch.ones(M, K)}),
    "rms_norm": lambda: (functional.rms_norm, {"x": torch.ones(M, K), "weight": torch.ones(K)}),
    "rotary_embedding": lambda: (
        functional.rotary_embedding,
        {"x": heads(), "cos": torch.ones(1, TOKENS, HEAD_DIM), "sin": torch.ones(1, TOKENS, HEAD_DIM)},
    ),
    "the gradient of a mean": lambda: (gradient_of_loss("mean"), {"dloss": torch.ones(())}),
    "the gradient of each loss": lambda: (gradient_of_loss("none"), {"dloss": torch.ones(M)}),
    "the gradient of a bias": lambda: (gradient_of_bias, {"dy": torch.ones(M, N)}),
    "the gradient of a norm's weight": lambda: (gradient_of_norm, {"dy": torch.ones(M, K)}),
    "QuantizedWeight": lambda: changed_weight(lambda q: as_matrix(q).__post_init__()),
    "check_values": lambda: changed_weight(qn.QuantizedWeight.check_values),
    "to": lambda: changed_weight(lambda q: q.to("cpu")),
    "to_bitsandbytes": lambda: changed_weight(qn.QuantizedWeight.to_bitsandbytes),
    "from_mxfp4": lambda: (
        qn.QuantizedWeight.from_mxfp4,
        {name: torch.ones(N, size, dtype=torch.uint8) for name, size in (("blocks", K // 2), ("scales", K // 32))},
    ),
    "from_nvfp4": lambda: (
        qn.QuantizedWeight.from_nvfp4,
        {name: torch.ones(N, size, dtype=torch.uint8) for name, size in (("codes", K // 2), ("scales", K // 16))}
        | {"weight_scale_2": torch.ones(1)},
    ),
    "Linear4bit": cast_layer,
    "Experts4bit": lambda: (
        experts_layer,
        {"x": torch.ones(M, K), "offsets": torch.tensor([0, 1, M]), "bias": double(E, N), **adapter((E,))},
    ),
    "reset_parameters": lambda: (
        reset_layer,
        {"nested_absmax": torch.ones(1), "nested_code": torch.ones(256)}
        | {"offset": torch.ones(()), "codebook": torch.ones(16)},
    ),
    "the first step": lambda: (
        first_step,
        {name: torch.ones((), dtype=torch.float64) for name in ("lr", "grad_scale", "found_inf")},
    ),
    "the second step": lambda: (second_step, state_of_optimizer()),
    "to_bitsandbytes of an optimizer": lambda: (written_for_bitsandbytes, state_of_optimizer()),
    "load_state_dict of an optimizer": lambda: (loaded_state, state_of_optimizer()),
    "load_state_dict of bitsandbytes' optimizer": lambda: (loaded_state, loaded_arguments()),
}  # fmt: skip


def strided(tensor):
    """The same values, but no two of them adjacent."""
    return torch.stack((tensor, tensor), -1)[..., 0]


def cut(tensor, bytes_left):
    tensor.untyped_storage().resize_(bytes_left)
    return tensor


WAYS = {
    "freed": lambda t: cut(t.clone(), 0),
    "cut short": lambda t: cut(t.clone(), t.nbytes - 1),
    "strided and freed": lambda t: cut(strided(t), 0),
    "strided and cut short": lambda t: cut(strided(t), 2 * t.nbytes - t.element_size() - 1),
}


EXPECTED = "a (tensor with memory|contiguous tensor)"  # the fields of a weight must also be contiguous


def call_all():
    """Run in a process of its own, which prints each case before it begins."""
    for name, make in FUNCTIONS.items():
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                function, arguments = make()
                print(f"{name}, {autocast=}", flush=True)
                function(**arguments)  # as it is, it works
                tensors = [argument for argument, value in arguments.items() if isinstance(value, torch.Tensor)]
                for argument, way in ((argument, way) for argument in tensors for way in WAYS):
                    print(f"{name}, {argument} {way}, {autocast=}", flush=True)
                    function, arguments = make()
                    arguments[argument] = WAYS[way](arguments[argument])
                    with pytest.raises(ValueError, match=rf"^(\S+\.)?{argument}(\[0\])?: expected {EXPECTED}"):
                        function(**arguments)


def test_torch_reads_no_tensor_before_its_memory_is_checked():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    case = done.stdout.strip().rpartition("\n")[2]
    assert done.returncode == 0, f"{case}: ended with {done.returncode}\n{done.stderr[-2000:]}"


def test_every_function_with_tensors_is_in_the_table():
    """So that a new argument is tried, too."""
    tried = {}
    for make in FUNCTIONS.values():
        function, arguments = make()
        tried.setdefault(function, set()).update(arguments)
    for name in set(functional.__all__) - {"dequantize"}:
        function = getattr(functional, name)
        tensors = {p.name for p in inspect.signature(function).parameters.values() if "Tensor" in p.annotation}
        assert tensors <= tried[function], name


if __name__ == "__main__":
    call_all()
