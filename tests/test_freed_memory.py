"""Guards tensors whose memory is gone: each function names them before anything reads what is not there.

FSDP and offloading leave such tensors. Their address is null or anywhere. Every argument refuses them by name, before
torch casts, compares or copies it, and takes none for an absent one.
"""

import inspect

import process
import pytest
import torch
from test_aliasing import put, step, tensors_of

import qlora_native as qn
from qlora_native import functional
from qlora_native._core.weight import as_matrix, op_arguments, unchecked

ops, ones = torch.ops.qlora_native, torch.ones
M, N, K, RANK = 3, 8, 128, 4
E, V, HEADS, TOKENS, HEAD_DIM = 2, 8, 2, 4, 8
WEIGHT = (
    "codes", "absmax", "nested_absmax", "nested_code", "offset", "code", "minimum", "nested_minimum", "zero_point",
    "N", "K", "bits", "blocksize", "nested_blocksize", "byte_format",
)  # fmt: skip


def op(name, **arguments):
    """An op and its arguments. Of autocast knows only the function that calls it."""
    return torch.autocast("cpu", enabled=False)(getattr(ops, name)), arguments


def quantized(*shape):
    return qn.quantize(ones(*shape or (N, K)))


def of_weight():
    return dict(zip(WEIGHT, op_arguments(quantized()), strict=True))


def adapter(of_each=(), dtype=torch.float32):
    return {"lora_a": torch.ones(*of_each, RANK, K, dtype=dtype), "lora_b": torch.ones(*of_each, N, RANK, dtype=dtype)}


def changed_weight(method):
    """A method of a weight whose fields are the arguments."""
    q = qn.quantize(torch.ones(N, K))
    rest = (q.shape, q.blocksize, q.format, q.dtype, q.minimum, q.nested_minimum, q.zero_point, q.column_order)
    return lambda **tensors: method(unchecked(*tensors.values(), *rest)), q.tensors()


def cast_layer():
    layer = qn.nn.Linear4bit.from_quantized(qn.quantize(torch.ones(N, K)))
    layer.compute_dtype = torch.bfloat16
    return layer, {"x": torch.ones(M, K), **adapter()}


def compressed_layer(**tensors):
    scheme = {"num_bits": 4, "symmetric": False, "group_size": 32}
    return functional.from_compressed_tensors(tensors, scheme, "pack-quantized")


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
    param = torch.nn.Parameter(ones(4096))
    optimizer = qn.optim.AdamW8bit([param], **options)
    param.grad = ones(4096)
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


def with_state(method):
    """A method of an optimizer whose state are the arguments."""

    def call(**state):
        optimizer, param = new_optimizer()
        optimizer.state[param] = state
        method(optimizer)

    return call, state_of_optimizer()


def loaded_state(**state):
    optimizer, _ = new_optimizer()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})


def state_for_bitsandbytes():
    optimizer, _ = new_optimizer()
    optimizer.step()
    return optimizer.to_bitsandbytes()["state"][0]


def gradient(function, **gradient):
    """The backward pass of what a function of x computes."""

    def backward(**tensors):
        function(ones(M, K, requires_grad=True)).backward(*tensors.values())

    if "dy" in gradient:  # which torch would cast under autocast to the dtype of y
        backward = torch.autocast("cpu", enabled=False)(backward)
    return backward, gradient


def loss(reduction):
    return lambda x: functional.linear_cross_entropy(x, quantized(V, K), labels(), reduction=reduction)


def labels():
    return torch.arange(M) % V


def of_loss(weight, bias=None, **more):
    bias = {"bias": ones(V, dtype=torch.float64) if bias is None else bias}
    return {"hidden": ones(M, K), "weight": weight, "labels": labels()} | bias | adapter() | more


def bytes_of(**shapes):
    return {name: ones(N, size, dtype=torch.uint8) for name, size in shapes.items()}


def words(**shapes):
    return {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}


def scaled(*of_each):
    """An adapter with the scaling as a tensor, and a bias that is cast wherever it is used."""
    return adapter(of_each) | {"lora_scaling": ones(())}


LORA = {"lora_scaling": 1.0, "lora_dropout": 0.5}
SEED = torch.tensor(7)
BIAS = torch.float64  # which is cast wherever it is used
# {name: () -> (function, its arguments)}
FUNCTIONS = {
    "the op quantize": lambda: op(
        "quantize", weight=ones(N, K), code=torch.arange(16.0), nested_code=torch.arange(256.0), bits=4, blocksize=64),
    "the op dequantize": lambda: op("dequantize", **of_weight(), dtype=torch.float32),
    "the op linear_forward": lambda: op(
        "linear_forward", x=ones(M, K), **of_weight(), bias=ones(N), **adapter(), **LORA, seed=SEED.clone()),
    "the op linear_backward_input": lambda: op(
        "linear_backward_input", dy=ones(M, N), **of_weight(), **adapter(), **LORA, seed=SEED.clone(), need_dx=True),
    "the op lora_gradients": lambda: op(
        "lora_gradients", x=ones(M, K), dy=ones(M, N), u=ones(M, RANK), v=ones(M, RANK), **LORA, seed=SEED.clone(),
        dtype=torch.float32),
    "the op linear_cross_entropy": lambda: op(
        "linear_cross_entropy", **of_loss(ones(V, K), ones(V)), **dict.fromkeys(WEIGHT[:9]), N=V, K=K, bits=0,
        blocksize=0, nested_blocksize=0, byte_format=0, lora_scaling=1.0, ignore_index=-100, scale=1.0, softcap=0.0,
        label_smoothing=0.0, z_loss=0.0, wanted=[True] * 4, row_gradients=None),
    "the op optimizer_8bit_step": lambda: op("optimizer_8bit_step", **step()),
    "quantize": lambda: (qn.quantize, {"weight": ones(N, K), "codebook": torch.arange(16).double()}),
    "quantize of experts": lambda: (qn.quantize, {"weight": ones(E, N, K)}),
    "quantize in mxfp4": lambda: (qn.quantize, {"weight": ones(E, N, K), "format": "mxfp4"}),
    "dequantize": lambda: changed_weight(qn.dequantize),
    "embedding": lambda: (functional.embedding, {"ids": torch.zeros(M, dtype=torch.int32), "q": quantized()}),
    "linear": lambda: (qn.linear, {"x": ones(M, K), "q": quantized(), "bias": ones(N, dtype=BIAS), **scaled()}),
    "linear of a changed weight": lambda: changed_weight(lambda q: qn.linear(ones(M, K), q)),
    "linear_grouped by index": lambda: (
        functional.linear_grouped,
        {"x": ones(M, K), "q": quantized(), "bias": ones(N, dtype=BIAS), **scaled(E)}
        | {"adapter_index": torch.tensor([1, 0, -1])}),
    "linear_grouped by offsets": lambda: (
        functional.linear_grouped,
        {"x": ones(M, K), "q": quantized(E, N, K), "bias": ones(E, N, dtype=BIAS), **scaled(E)}
        | {"offsets": torch.tensor([0, 1, M])}),
    "linear_cross_entropy": lambda: (
        functional.linear_cross_entropy, of_loss(quantized(V, K), lora_scaling=ones(()))),
    "linear_cross_entropy of a dense head": lambda: (
        functional.linear_cross_entropy, of_loss(ones(V, K), lora_scaling=ones(()))),
    "attention": lambda: (
        functional.attention,
        {name: ones(1, HEADS, TOKENS, HEAD_DIM) for name in "qkv"}
        | {"key_ranges": torch.tensor([[[0, TOKENS]] * TOKENS], dtype=torch.int32)}),
    "gated_activation": lambda: (functional.gated_activation, {"gate": ones(M, K), "up": ones(M, K)}),
    "rms_norm": lambda: (functional.rms_norm, {"x": ones(M, K), "weight": ones(K)}),
    "rotary_embedding": lambda: (
        functional.rotary_embedding,
        {"x": ones(1, HEADS, TOKENS, HEAD_DIM)} | {name: ones(1, TOKENS, HEAD_DIM) for name in ("cos", "sin")}),
    "the gradient of a mean": lambda: gradient(loss("mean"), dloss=ones(())),
    "the gradient of each loss": lambda: gradient(loss("none"), dloss=ones(M)),
    "the gradient of a bias": lambda: gradient(
        lambda x: qn.linear(x, quantized(), ones(N, requires_grad=True)), dy=ones(M, N)),
    "the gradient of a norm's weight": lambda: gradient(
        lambda x: functional.rms_norm(x, ones(K, requires_grad=True)), dy=ones(M, K)),
    "QuantizedWeight": lambda: changed_weight(lambda q: as_matrix(q).__post_init__()),
    "check_values": lambda: changed_weight(qn.QuantizedWeight.check_values),
    "to": lambda: changed_weight(lambda q: q.to("cpu")),
    "to_bitsandbytes": lambda: changed_weight(qn.QuantizedWeight.to_bitsandbytes),
    "from_mxfp4": lambda: (qn.QuantizedWeight.from_mxfp4, bytes_of(blocks=K // 2, scales=K // 32)),
    "from_nvfp4": lambda: (
        qn.QuantizedWeight.from_nvfp4, bytes_of(codes=K // 2, scales=K // 16) | {"weight_scale_2": ones(1)}),
    "from_gguf": lambda: (functional.from_gguf, bytes_of(data=18) | {"type": "Q4_0", "shape": (N, 32)}),
    "gguf_rows": lambda: (functional.gguf_rows, bytes_of(data=18) | {"type": "Q4_0", "shape": (N, 32)}),
    "from_gptq": lambda: (
        functional.from_gptq,
        words(qweight=(4, 8), qzeros=(1, 1), g_idx=(32,))
        | {"scales": ones(1, 8, dtype=torch.float16), "group_size": 32}),
    "from_awq": lambda: (
        functional.from_awq,
        words(qweight=(32, 1), qzeros=(1, 1)) | {"scales": ones(1, 8, dtype=torch.float16), "group_size": 32}),
    "from_compressed_tensors": lambda: (
        compressed_layer,
        words(weight_packed=(8, 4), weight_zero_point=(1, 1), weight_g_idx=(32,))
        | {"weight_scale": ones(8, 1), "weight_shape": torch.tensor([8, 32])}),
    "from_fp8": lambda: (
        functional.from_fp8, {"weight": ones(N, 32, dtype=torch.float8_e4m3fn), "scale": ones(1, 1)}),
    "Linear4bit": cast_layer,
    "Experts4bit": lambda: (
        experts_layer,
        {"x": ones(M, K), "offsets": torch.tensor([0, 1, M]), "bias": ones(E, N, dtype=BIAS), **adapter((E,))}),
    "reset_parameters": lambda: (
        reset_layer,
        {"nested_absmax": ones(1), "nested_code": ones(256), "offset": ones(()), "codebook": ones(16)}),
    "the first step": lambda: (
        first_step, {name: ones((), dtype=torch.float64) for name in ("lr", "grad_scale", "found_inf")}),
    "the second step": lambda: with_state(qn.optim.AdamW8bit.step),
    "to_bitsandbytes of an optimizer": lambda: with_state(qn.optim.AdamW8bit.to_bitsandbytes),
    "load_state_dict of an optimizer": lambda: (loaded_state, state_of_optimizer()),
    "load_state_dict of bitsandbytes' optimizer": lambda: (loaded_state, state_for_bitsandbytes()),
}  # fmt: skip


def strided(tensor):
    """The same values, but no two of them adjacent."""
    return tensor[..., None].expand(*tensor.shape, 2).contiguous()[..., 0]


def cut(tensor, size):
    tensor.untyped_storage().resize_(size)
    return tensor


FAULTS = {
    "freed": lambda t: cut(t.clone(), 0),
    "cut short": lambda t: cut(t.clone(), t.nbytes - 1),
    "a view of freed memory": lambda t: cut(t.expand(2, *t.shape).contiguous()[1], 0),
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
                for argument in tensors_of(arguments):
                    for fault in FAULTS:
                        print(f"{name}, {argument} {fault}, {autocast=}", flush=True)
                        function, arguments = make()
                        put(arguments, argument, FAULTS[fault](tensors_of(arguments)[argument]))
                        with pytest.raises(ValueError, match=rf"^(\S+\.)?{argument}(\[0\])?: expected {EXPECTED}"):
                            function(**arguments)


def test_tensor_without_memory_is_named_before_torch_reads_it():
    done = process.run(__file__, OMP_NUM_THREADS="1")
    case = done.stdout.strip().rpartition("\n")[2]
    assert done.returncode == 0, f"{case}: ended with {done.returncode}\n{done.stderr[-2000:]}"


def test_every_function_with_tensors_is_in_the_table():
    """So that a new argument is tried, too."""
    tried = {}
    for make in FUNCTIONS.values():
        function, arguments = make()
        tried.setdefault(function, set()).update(arguments)
    for name in set(functional.__all__) - {"dequantize", "from_compressed_tensors"}:  # tensors are in its arguments
        function = getattr(functional, name)
        tensors = {p.name for p in inspect.signature(function).parameters.values() if "Tensor" in p.annotation}
        assert tensors <= tried[function], name


if __name__ == "__main__":
    call_all()
