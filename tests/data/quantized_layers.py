"""Write quantized_layers.safetensors: small layers that GPTQModel and auto-round have packed, and what they decode to.

    pip install gptqmodel==7.7.0 auto-round==0.16.1
    python tests/data/quantized_layers.py

The file in the repository was written on a CPU, with torch 2.13. `tests/test_files.py` reads it. Keys are
"<case>.<tensor>", and the metadata has the arguments of the reader of each case. "<case>.weight" is the library's own
decoded weight [N, K] in fp16.
"""

import json
from pathlib import Path

import torch
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import FORMAT, QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

N, K, GROUP = 32, 64, 32


def parameters(weight, bits, symmetric, g_idx):
    """Scales and zero points [N, groups] of the columns of each group. Zero points are at least 1."""
    columns = torch.stack([weight[:, g_idx == group] for group in range(K // GROUP)], dim=1)
    largest = 2**bits - 1
    if symmetric:
        scale = 2 * columns.abs().amax(2) / largest
        return scale.half().float(), torch.full_like(scale, 2 ** (bits - 1))
    low, high = columns.amin(2), columns.amax(2)
    scale = ((high - low) / largest).half().float()
    return scale, (-low / scale).round().clamp(1, largest)


def layer(bits, symmetric, g_idx=None):
    """A linear layer of random values, its scales, its zero points, and the group of each column."""
    torch.manual_seed(bits + symmetric)
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = 0.02 * torch.randn(N, K) + 0.01
    g_idx = torch.arange(K) // GROUP if g_idx is None else g_idx
    return linear, *parameters(linear.weight.data, bits, symmetric, g_idx), g_idx.int()


def gptq(bits, symmetric, checkpoint_format, g_idx=None):
    """GPTQModel's own layer for a CPU."""
    linear, scales, zeros, g_idx = layer(bits, symmetric, g_idx)
    packed = TorchLinear(
        bits=bits, group_size=GROUP, sym=symmetric, desc_act=True, in_features=K, out_features=N, register_buffers=True
    )
    packed.pack_block(linear, scales, zeros, g_idx)
    packed.post_init()
    weight = packed.dequantize_weight().t()
    if checkpoint_format == "gptq":
        config = QuantizeConfig(bits=bits, group_size=GROUP, format=FORMAT.GPTQ)
        convert_gptq_v2_to_v1_format_module(packed, config)
    tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    arguments = {"bits": bits, "group_size": GROUP, "sym": symmetric, "checkpoint_format": checkpoint_format}
    return tensors, weight, arguments


def awq():
    """GPTQModel's own layer in the version "gemm"."""
    linear, scales, zeros, _ = layer(4, symmetric=False)
    packed = AwqTorchLinear(bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=K, out_features=N)
    packed.pack(linear, scales.half(), zeros)
    weight = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, GROUP).t()
    tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    return tensors, weight, {"group_size": GROUP}


def auto_round(module, packing_format, symmetric):
    """auto-round's own layer, which decodes while it multiplies: its weight is its product with the identity."""
    linear, scales, zeros, _ = layer(4, symmetric)
    packed = module.QuantLinear(4, GROUP, K, N, bias=False)
    packed.device = torch.device("cpu")  # as its exporter does
    packed.pack(linear, scales, int(zeros[0, 0]) if symmetric else zeros, device="cpu")
    weight = packed(torch.eye(K, dtype=torch.float16)).t()
    tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    return tensors, weight, {"group_size": GROUP, "sym": symmetric, "checkpoint_format": packing_format}


def main():
    """Write the file."""
    permuted = torch.arange(K)[torch.randperm(K, generator=torch.Generator().manual_seed(0))] // GROUP
    cases = {
        "gptq": gptq(4, True, "gptq"),
        "gptq_asymmetric": gptq(4, False, "gptq"),
        "gptq_v2": gptq(4, False, "gptq_v2"),
        "gptq_desc_act": gptq(4, False, "gptq", permuted),
        "gptq_8_bits": gptq(8, False, "gptq"),
        "awq": awq(),
        "auto_round": auto_round(qlinear_torch, "auto_round", False),
        "auto_round_gptq": auto_round(qlinear_torch_zp, "auto_round:auto_gptq", True),
    }
    tensors = {
        f"{case}.{name}": tensor.detach().contiguous()
        for case, (layer_tensors, weight, _) in cases.items()
        for name, tensor in {**layer_tensors, "weight": weight}.items()
    }
    metadata = {case: json.dumps(arguments) for case, (_, _, arguments) in cases.items()}
    save_file(tensors, Path(__file__).with_suffix(".safetensors"), metadata=metadata)


if __name__ == "__main__":
    main()
