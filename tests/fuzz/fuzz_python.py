"""Fuzz every entry of the library from Python.

    python tests/fuzz/fuzz_python.py                        every target for 10 seconds
    python tests/fuzz/fuzz_python.py layer --seconds 600    one of them
    python tests/fuzz/fuzz_python.py layer --atheris        guided by coverage, if atheris is installed
    python tests/fuzz/fuzz_python.py layer --input FILE     one input again

An input that causes any other error than the documented ones is a finding. It is written to a file, whose name is
printed; add it to tests/fuzz/corpus/ with its repair. All inputs there are run first.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from choices import DTYPES, NUMBERS, Choices
from safetensors.torch import load_file, save_file

if "--atheris" in sys.argv:  # it must instrument our modules while they are imported
    import atheris

    with atheris.instrument_imports(include=["qlora_native"]):
        import qlora_native as qn
        import qlora_native.convert.merge
        from qlora_native._files.gguf import GGUF_TYPES
        from qlora_native._files.gguf_file import GGUFFile
else:
    import qlora_native as qn
    from qlora_native._files.gguf import GGUF_TYPES
    from qlora_native._files.gguf_file import GGUFFile

CORPUS = Path(__file__).parent / "corpus"
LONGEST = 96  # bytes of a random input


# ---- weights, layers, optimizers: state dicts ------------------------------------------------------------------------


@cache
def _entries(double_quant: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return qn.quantize(torch.randn(6, 70), double_quant=double_quant).to_bitsandbytes("layer.")


def fuzz_entries(choices: Choices) -> None:
    """QuantizedWeight.from_bitsandbytes: what it accepts can be decoded."""
    entries = dict(_entries(choices.one_in(2)))
    for _ in range(1 + choices.below(3)):
        key = choices.of(sorted(entries)) if entries else ""
        kind = choices.below(4)
        if kind == 0:
            entries.pop(key, None)
        elif kind == 1 and choices.one_in(8):
            _overlap(choices, entries)
        elif kind == 1 and isinstance(entries.get(key), torch.Tensor):
            entries[key] = choices.tensor(entries[key])
        else:
            key = next(iter(k for k in entries if "quant_state" in k), None)
            if key is not None and isinstance(entries[key], torch.Tensor) and entries[key].dtype == torch.uint8:
                with contextlib.suppress(UnicodeDecodeError, RuntimeError, NotImplementedError):
                    text = bytes(entries[key].flatten().tolist()).decode()
                    changed = bytearray(choices.text(text).encode()) or bytearray(b" ")
                    entries[key] = torch.frombuffer(changed, dtype=torch.uint8)
    q = qn.QuantizedWeight.from_bitsandbytes(entries, "layer.")
    decoded = q.dequantize(torch.float32)
    assert decoded.is_meta or decoded.isfinite().all(), "a weight with NaN was accepted"
    assert tuple(decoded.shape) == q.shape


def fuzz_layer(choices: Choices) -> None:
    """Linear4bit.load_state_dict: what it accepts is finite, and the layer multiplies."""
    format = choices.of(("nf4", "int8", "mxfp4", "nvfp4"))
    kind = qn.nn.Linear8bit if format == "int8" else qn.nn.Linear4bit
    layer = kind(70, 6, format=format, double_quant=choices.one_in(2))
    state: dict[str, Any] = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for _ in range(1 + choices.below(3)):
        key = choices.of(sorted(state)) if state else "weight"
        if choices.one_in(4):
            state.pop(key, None)
        elif choices.one_in(8):
            _overlap(choices, state)
        elif isinstance(state.get(key), torch.Tensor):
            state[key] = choices.tensor(state[key])
    try:
        layer.load_state_dict(state, strict=choices.one_in(2), assign=choices.one_in(4))
    except RuntimeError as error:  # torch's own, of all that was wrong
        assert "Error(s) in loading state_dict" in str(error) or "state_dict" in str(error), error
        return
    if not any(tensor.is_meta for tensor in layer.state_dict().values()):
        layer(torch.ones(2, 70))


def fuzz_optimizer(choices: Choices) -> None:
    """load_state_dict of an optimizer: all of it or nothing, and what it accepts can be stepped."""
    params = [torch.nn.Parameter(torch.ones(70, 64)), torch.nn.Parameter(torch.ones(5))]
    optimizer = choices.of((qn.optim.AdamW8bit, qn.optim.Lion8bit, qn.optim.AdEMAMix8bit))(params)
    for param in params:
        param.grad = torch.full_like(param, 0.1)
    optimizer.step()
    state: Any = copy.deepcopy(optimizer.state_dict())
    for _ in range(1 + choices.below(2)):
        kind = choices.below(6)
        if kind == 0:
            state = choices.value() if choices.one_in(8) else {k: v for k, v in state.items() if choices.one_in(2)}
        elif kind == 1 and isinstance(state.get("param_groups"), list) and state["param_groups"]:
            group = state["param_groups"][0]
            if isinstance(group, dict) and group:
                key = choices.of(sorted(group))
                group[key] = choices.value()
                if choices.one_in(4):
                    del group[key]
        elif kind == 2:
            state["state" if choices.one_in(2) else "param_groups"] = choices.value()
        elif isinstance(state.get("state"), dict) and state["state"]:
            index = choices.of(sorted(map(str, state["state"])))
            entries = state["state"].get(int(index) if index.isdigit() else index)
            if isinstance(entries, dict) and entries:
                key = choices.of(sorted(entries))
                old = entries[key]
                entries[key] = choices.tensor(old) if isinstance(old, torch.Tensor) else choices.value()
                if choices.one_in(4):
                    del entries[key]
        if not isinstance(state, dict):
            break
    optimizer.load_state_dict(state)
    for param in params:
        param.grad = torch.full_like(param, 0.1)
    if choices.one_in(2):
        _change_operands(choices, optimizer, params)
    optimizer.step()


def _overlap(choices: Choices, tensors: dict[str, Any]) -> None:
    """Move two of the tensors into one memory."""
    names = sorted(name for name, value in tensors.items() if isinstance(value, torch.Tensor))
    if names:
        first, second = choices.of(names), choices.of(names)
        tensors[first], tensors[second] = choices.overlapping(tensors[first], tensors[second])


def _change_operands(choices: Choices, optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> None:
    """Move two operands of a step into one memory, or free or cut short one of them."""
    operands: dict[str, torch.Tensor] = {}
    for index, param in enumerate(params):
        operands |= {f"{index} param": param.data, f"{index} grad": param.grad}
        operands |= {f"{index} {name}": tensor for name, tensor in optimizer.state[param].items()}
    if choices.one_in(2):
        _overlap(choices, operands)
    else:
        storage = operands[choices.of(sorted(operands))].untyped_storage()
        storage.resize_(choices.below(storage.nbytes() + 1) if choices.one_in(2) else 0)
    for index, param in enumerate(params):
        param.data, param.grad = operands.pop(f"{index} param"), operands.pop(f"{index} grad")
        for name in optimizer.state[param]:
            optimizer.state[param][name] = operands.pop(f"{index} {name}")


def fuzz_config(choices: Choices) -> None:
    """BitsAndBytesConfig: any value of any field."""
    from qlora_native.integrations.transformers import BitsAndBytesConfig

    fields: dict[str, Any] = {"load_in_4bit": True}
    names = sorted(name for name in BitsAndBytesConfig().to_dict() if name != "quant_method")
    for _ in range(1 + choices.below(3)):
        name = choices.of(names)
        fields[name] = choices.value()
    config = BitsAndBytesConfig(**fields)
    config.to_dict()
    repr(config)


# ---- folders ---------------------------------------------------------------------------------------------------------


@cache
def _folders() -> Path:
    """A model of one layer in shards, in one file with a tokenizer and in 4 bits, and an adapter."""
    import peft
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    from qlora_native.convert.merge import convert

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    config = transformers.LlamaConfig(vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "shards", max_shard_size="2KB")
    model.save_pretrained(folder / "one")
    convert(folder / "one", folder / "nf4", to="nf4", progress=False)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["some words"], vocab_size=259, special_tokens=["<s>"], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")
    tokenizer.save_pretrained(folder / "one")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    return folder


def _damage(choices: Choices, folder: Path) -> None:
    """Change a file of a folder: its text, some bytes, or its length."""
    path = choices.of(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
    data = path.read_bytes()
    if path.suffix == ".json":
        path.write_text(choices.text(data.decode()), encoding="utf-8", errors="surrogateescape")
    elif choices.one_in(4):
        os.truncate(path, choices.below(len(data)))
    else:
        length = int.from_bytes(data[:8], "little")
        header = choices.text(data[8 : 8 + length].decode()).encode()
        size = len(header) if choices.one_in(2) else length
        path.write_bytes(size.to_bytes(8, "little") + header + data[8 + length :])


def _damaged_copies(choices: Choices, scratch: str, names: tuple[str, ...]) -> tuple[Path, Path, bool]:
    """A base of one of these names and an adapter, one of them damaged; and whether the adapter takes part."""
    base, adapter = Path(scratch) / choices.of(names), Path(scratch) / "adapter"
    shutil.copytree(_folders() / base.name, base)
    shutil.copytree(_folders() / "adapter", adapter)
    adapts = choices.one_in(2)
    for _ in range(1 + choices.below(2)):
        _damage(choices, adapter if adapts and choices.one_in(2) else base)
    return base, adapter, adapts


@contextlib.contextmanager
def _nothing_else_in(scratch: str) -> Iterator[None]:
    """A conversion that fails writes nothing."""
    before = set(os.listdir(scratch))
    try:
        yield
    except (TypeError, ValueError, OSError):
        assert set(os.listdir(scratch)) == before, "a failed conversion wrote something"
        raise


def fuzz_folder(choices: Choices) -> None:
    """`quantize` and `merge` over damaged folders: an error, or a result that has every tensor."""
    from qlora_native.convert._checkpoints import Checkpoint
    from qlora_native.convert.merge import convert

    with tempfile.TemporaryDirectory() as scratch:
        base, adapter, merging = _damaged_copies(choices, scratch, ("shards", "one", "nf4"))
        out = Path(scratch) / "out"
        with _nothing_else_in(scratch):
            convert(base, out, adapter if merging else None, choices.of(("nf4", "fp32")), progress=False)
        assert len(Checkpoint(out).shards) > 0


def fuzz_export(choices: Choices) -> None:
    """`export` over damaged folders: an error, or a file that the package gguf reads."""
    import gguf

    from qlora_native.convert.gguf import export_adapter, export_model

    with tempfile.TemporaryDirectory() as scratch:
        base, adapter, adapts = _damaged_copies(choices, scratch, ("one", "one", "nf4"))
        out = Path(scratch) / "out"
        with _nothing_else_in(scratch):
            if adapts:
                export_adapter(base, adapter, out, choices.of(("f32", "f16")))
            else:
                export_model(base, out, choices.of((None, "f16", "q8_0")), progress=False)
        assert len(gguf.GGUFReader(out).tensors) > 0


# What other quantizers write beside a weight.
SCALES = "weight_scale weight_scale_inv weight_scale_2 input_scale SCB weight_format qweight bias".split()
METHODS = ("fp8", "compressed-tensors", "modelopt", "bitsandbytes", "gptq", "mxfp4", "qlora_native", None, 4)


def fuzz_dtypes(choices: Choices) -> None:
    """`merge` and `export` of tensors of any dtype, and what other quantizers write: an error, or the base's values."""
    import gguf

    from qlora_native.convert.gguf import export_model
    from qlora_native.convert.merge import convert

    with tempfile.TemporaryDirectory() as scratch:
        base, out = Path(scratch) / "base", Path(scratch) / "out"
        shutil.copytree(_folders() / "one", base)
        values = load_file(base / "model.safetensors")
        stored = dict(values)
        for _ in range(1 + choices.below(3)):
            name, kind = choices.of(sorted(values)), choices.below(4)
            if kind == 0:
                stored[name] = stored[name].to(choices.of(DTYPES))
                if stored[name].dtype in (torch.float32, torch.bfloat16, torch.float16):
                    values[name] = stored[name]  # rounded, or infinite, in the base itself
            elif kind == 1:
                scale = f"{name.removesuffix('weight')}{choices.of(SCALES)}"
                stored[scale] = torch.ones(choices.of(((), (1,), (32, 1)))).to(choices.of(DTYPES))
            elif kind == 2:
                values[name] = stored[name] = values[name] * 2.0 ** choices.of((-30, 14, 24, 100))
            else:
                described = {"quant_method": choices.of(METHODS), choices.of(("load_in_8bit", "load_in_4bit")): True}
                config = json.loads((base / "config.json").read_text())
                config["quantization_config"] = described if choices.one_in(2) else choices.value()
                (base / "config.json").write_text(json.dumps(config))
        save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
        to = choices.of((None, "fp32", "fp16", "bf16", "gguf"))
        with _nothing_else_in(scratch):
            if to == "gguf":
                export_model(base, out, "f32", progress=False)
            else:
                convert(base, out, to=to, progress=False)
        if to == "gguf":
            if all(bool(tensor.isfinite().all()) for tensor in values.values()):
                assert all(abs(tensor.data).max() < float("inf") for tensor in gguf.GGUFReader(out).tensors)
            return
        written = load_file(out / "model.safetensors")
        for name, tensor in values.items():
            expected = tensor.double()
            assert torch.allclose(written[name].double(), expected, 2**-7, 1e-6, True), f"{name} has other values"


# ---- layers of quantized files ---------------------------------------------------------------------------------------


@cache
def _layers_of_files() -> list[tuple[Any, dict[str, Any]]]:
    """Each reader with arguments that it accepts. The words and bytes are random, and scales are not NaN."""
    F, generator = qn.functional, torch.Generator().manual_seed(0)

    def data(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        size = 4 if dtype == torch.int32 else 1
        return torch.randint(8, (*shape[:-1], size * shape[-1]), dtype=torch.uint8, generator=generator).view(dtype)

    scales, order, group = torch.rand(2, 16).half(), torch.arange(64, dtype=torch.int32), {"group_size": 32}
    scheme = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", **group}
    fp8, of_rows = data(16, 64, dtype=torch.float8_e4m3fn), scales.t()
    packed = {"weight_packed": data(16, 8), "weight_shape": torch.tensor([16, 64]), "weight_scale": of_rows}
    integers = {"weight": data(16, 64, dtype=torch.int8), "weight_scale": of_rows, "weight_g_idx": order // 32}
    calls: list[tuple[Any, dict[str, Any]]] = [
        *((F.from_gguf, {"data": data(4, kind.bytes, dtype=torch.uint8), "type": type, "shape": [2, 2 * kind.elements],
                         "scale": 1.0})
          for type, kind in GGUF_TYPES.items()),
        (F.from_gptq, {"qweight": data(8, 16), "qzeros": data(2, 2), "scales": scales, "g_idx": order % 2, "bits": 4,
                       "sym": False, "checkpoint_format": "gptq", **group}),
        (F.from_gptq, {"qweight": data(16, 16), "qzeros": data(2, 4), "scales": scales, "bits": 8, **group}),
        (F.from_awq, {"qweight": data(64, 2), "qzeros": data(2, 2), "scales": scales, **group}),
        (F.from_compressed_tensors, {"tensors": {**packed, "weight_zero_point": data(2, 2)}, "weights": scheme,
                                     "format": "pack-quantized"}),
        (F.from_compressed_tensors, {"tensors": integers, "weights": {**scheme, "num_bits": 8, "symmetric": True},
                                     "format": "int-quantized"}),
        (F.from_compressed_tensors, {"tensors": {"weight": fp8, "weight_scale": torch.rand(1, 2)}, "format":
                                     "float-quantized", "weights": {"type": "float", "strategy": "block",
                                                                    "block_structure": [128, 32]}}),
        (F.from_fp8, {"weight": fp8, "scale": torch.rand(1, 1), "block_size": [128, 128]}),
        (F.from_fp8, {"weight": fp8, "scale": data(1, 1, dtype=torch.uint8) + 120, "block_size": [128, 128]}),
    ]  # fmt: skip
    for function, arguments in calls:
        function(**arguments)
    return calls


def fuzz_files(choices: Choices) -> None:
    """The readers of quantized files: what they accept is finite, and multiplies."""

    def changed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return choices.tensor(value)
        if isinstance(value, dict) and value and not choices.one_in(8):
            key = choices.of(sorted(value))
            if choices.one_in(4):
                return {k: v for k, v in value.items() if k != key}
            return {**value, key: changed(value[key])}
        return choices.edited(value)

    function, arguments = choices.of(_layers_of_files())
    for _ in range(1 + choices.below(3)):
        arguments = {**arguments, (name := choices.of(sorted(arguments))): changed(arguments[name])}
    q = function(**arguments)
    w = q.dequantize(torch.float32)
    assert q.format == "mxfp4" or w.isfinite().all(), "a weight with NaN was accepted"
    if len(q.shape) == 2:
        qn.linear(torch.ones(2, q.shape[1]), q)


@cache
def _gguf_file() -> bytes:
    """A whole file of a few keys and tensors."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint32("llama.block_count", 1)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
        writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
        for name, kind in (
            ("token_embd.weight", "Q8_0"),
            ("blk.0.attn_q.weight", "Q4_1"),
            ("output_norm.weight", "F32"),
        ):
            values = torch.linspace(-1, 1, 128).view(*((2, 64) if kind != "F32" else (128,))).numpy()
            kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        return path.read_bytes()


def fuzz_gguf(choices: Choices) -> None:
    """The container of GGUF: what is accepted lies within the file, and its quantized tensors are read or refused."""
    data = bytearray(_gguf_file())
    for _ in range(1 + choices.below(4)):
        at = choices.below(len(data))
        if choices.one_in(4):
            number = choices.of([each for each in NUMBERS if type(each) is int and 0 <= each < 1 << 64])
            data[at : at + 8] = number.to_bytes(8, "little")
        elif choices.one_in(4):
            del data[at : at + 1 + choices.below(40)]
        else:
            data[at] = choices.below(256)
        if not data:
            return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(data)
        file = GGUFFile(path)
        for tensor in file.tensors.values():
            assert file.data(tensor).numel() == tensor.end - tensor.begin, "a tensor behind the end of the file"
            if tensor.type in GGUF_TYPES:
                with contextlib.suppress(ValueError):
                    qn.functional.from_gguf(file.data(tensor), tensor.type, tensor.shape)


# ---- functions, and the ops themselves -------------------------------------------------------------------------------


def fuzz_functions(choices: Choices) -> None:
    """qlora_native.functional: what it accepts can be computed, and differentiated."""
    F = qn.functional
    N, K, M, rank, E = 1 + choices.below(9), 1 + choices.below(130), choices.below(40), choices.below(5), 2
    dtype = choices.of((torch.float32, torch.bfloat16, torch.float16))
    q, experts = qn.quantize(torch.ones(N, K)), qn.quantize(torch.ones(E, N, K))

    def adapter(*of_each: int) -> dict[str, Any]:
        return {"lora_a": torch.ones(*of_each, rank, K), "lora_b": torch.ones(*of_each, N, rank)}

    x, bias, labels = torch.ones(M, K, dtype=dtype), torch.ones(N), torch.zeros(M, dtype=torch.int64)
    heads, angles = torch.ones(1, 2, M, 8, dtype=dtype), torch.ones(1, M, 8, dtype=dtype)
    weight, offsets = torch.ones(N, K, dtype=dtype), torch.tensor([0, M // 2, M])
    calls: list[tuple[Any, dict[str, Any]]] = [
        (F.quantize, {"weight": weight, "codebook": torch.linspace(-1, 1, 16)}),
        (F.quantize, {"weight": torch.ones(E, N, K, dtype=dtype), "format": choices.of(("int8", "mxfp4", "nvfp4"))}),
        (F.embedding, {"ids": labels, "q": q}),
        (F.linear, {"x": x, "q": q, "bias": bias, **adapter(), "lora_dropout": choices.of((0.0, 0.5))}),
        (F.linear_grouped, {"x": x, "q": experts, "offsets": offsets, "bias": torch.ones(E, N), **adapter(E)}),
        (F.linear_grouped, {"x": x, "q": q, "bias": bias, **adapter(E), "adapter_index": labels}),
        (F.linear_cross_entropy, {"hidden": x, "weight": q, "labels": labels, "bias": bias, **adapter()}),
        (F.linear_cross_entropy, {"hidden": x, "weight": weight, "labels": labels, "bias": bias, **adapter()}),
        (F.attention, {"q": heads, "k": heads.clone(), "v": heads.clone(), "is_causal": choices.one_in(2)}),
        (F.gated_activation, {"gate": x, "up": x.clone()}),
        (F.rms_norm, {"x": x, "weight": torch.ones(K, dtype=dtype)}),
        (F.rotary_embedding, {"x": heads, "cos": angles, "sin": angles.clone()}),
    ]
    function, arguments = choices.of(calls)
    for _ in range(choices.below(3)):
        name = choices.of([name for name, value in arguments.items() if isinstance(value, torch.Tensor)] or ["x"])
        if choices.one_in(4):
            _overlap(choices, arguments)
        elif name in arguments:
            arguments[name] = choices.tensor(arguments[name])
    with torch.autocast("cpu", torch.bfloat16, enabled=choices.one_in(3)):
        result = function(**arguments)
    if isinstance(result, torch.Tensor) and result.requires_grad:
        result.sum().backward()


def fuzz_ops(choices: Choices) -> None:
    """torch.ops.qlora_native: any tensors and numbers. Memory safety is all that they promise; it runs in a child."""
    from qlora_native._core.weight import op_arguments

    ops = torch.ops.qlora_native
    N, K, M, rank = 1 + choices.below(9), 1 + choices.below(130), choices.below(40), choices.below(5)
    dtype = choices.of((torch.float32, torch.bfloat16, torch.float16))
    format = choices.of(("nf4", "int8", "mxfp4", "nvfp4"))
    blocksize = choices.of((32, 64, 4096)) if format in ("nf4", "int8") else None
    q = qn.quantize(torch.ones(N, K), format, blocksize, choices.one_in(2))
    weight = list(op_arguments(q))
    seed = torch.tensor(choices.below(1 << 16))
    adapter = [torch.ones(rank, K, dtype=dtype), torch.ones(N, rank, dtype=dtype), 0.5, choices.of((0.0, 0.25)), seed]
    x, dy = torch.ones(M, K, dtype=dtype), torch.ones(M, N, dtype=dtype)
    low = torch.ones(M, rank, dtype=dtype)
    calls: list[tuple[Any, list[Any]]] = [
        (ops.quantize, [torch.ones(N, K, dtype=dtype), q.code, q.nested_code, q.bits, q.blocksize]),
        (ops.quantize_microscaled, [torch.ones(N, K, dtype=dtype), choices.of((16, 32))]),
        (ops.dequantize, [*weight, dtype]),
        (ops.linear_forward, [x, *weight, torch.ones(N, dtype=dtype), *adapter]),
        (ops.linear_backward_input, [dy, *weight, *adapter, choices.one_in(2)]),
        (ops.lora_gradients, [x, dy, low, low, *adapter[2:], dtype]),
        (ops.optimizer_8bit_step, _step_arguments(choices)),
        (ops.dequantize_rows, [*weight, dtype, torch.zeros(M, dtype=torch.int64)]),
        (ops.quantize_absmax, [torch.ones(K), torch.linspace(-1, 1, 256)]),
        *_calls_beside_products(choices, dtype),
    ]
    op, arguments = choices.of(calls)
    overlapping = choices.one_in(4)
    if overlapping:
        places = [(arguments, at) for at, value in enumerate(arguments) if isinstance(value, torch.Tensor)]
        lists = [value for value in arguments if isinstance(value, list)]
        places += [(value, at) for value in lists for at, each in enumerate(value) if isinstance(each, torch.Tensor)]
        (first, i), (second, j) = choices.of(places), choices.of(places)
        first[i], second[j] = choices.overlapping(first[i], second[j])
    for _ in range(0 if overlapping else choices.below(4)):
        at = choices.below(len(arguments))
        old = arguments[at]
        if isinstance(old, torch.Tensor):
            arguments[at] = choices.tensor(old)
        elif isinstance(old, list) and old and isinstance(old[0], torch.Tensor):
            index = choices.below(len(old))
            changed = choices.tensor(old[index])
            arguments[at] = [*old[:index], *([] if choices.one_in(4) else [changed]), *old[index + 1 :]]
        elif isinstance(old, torch.dtype):
            arguments[at] = choices.of((torch.float32, torch.float64, torch.uint8, torch.bfloat16))
        elif old is None:
            arguments[at] = torch.ones(choices.below(300))
        elif not isinstance(old, list):
            arguments[at] = choices.of(NUMBERS)
    op.default(*arguments)  # not the packet, whose error prints all arguments, which torch cannot where memory is freed


def _calls_beside_products(choices: Choices, dtype: torch.dtype) -> list[tuple[Any, list[Any]]]:
    """The ops of attention, of what a block computes between its products, and of the loss."""
    ops = torch.ops.qlora_native
    rows, N, B, H, KV, T, D = (1 + choices.below(each) for each in (9, 70, 2, 2, 2, 9, 20))
    x, weight, r = torch.ones(rows, N, dtype=dtype), torch.ones(N, dtype=dtype), torch.ones(rows)
    q, k = torch.ones(B, H * KV, T, D, dtype=dtype), torch.ones(B, KV, T, D, dtype=dtype)
    cos, lse = torch.ones(1, T, D, dtype=dtype), torch.ones(B, H * KV, T)
    ranges = choices.of((None, torch.tensor([[[0, T]] * T], dtype=torch.int32)))
    labels = torch.zeros(rows, dtype=torch.int64)
    dense, order = torch.ones(rows, N), torch.arange(N).flip(0)
    code, scales, bits = torch.linspace(-1, 1, 16), torch.ones(-(-rows * N // 64)), choices.of((4, 8))
    return [
        (ops.cross_entropy_, [x.clone(), labels, -100, 1.0, 0.0, 0.0, 0.0, choices.one_in(2), choices.of((None, r))]),
        (ops.attention, [q, k, k.clone(), 0.5, ranges]),
        (ops.attention_backward, [q.clone(), q, k, k.clone(), q.clone(), lse, 0.5, ranges]),
        (ops.rotary, [q, cos, cos.clone(), choices.one_in(2)]),
        (ops.gated_activation, [x, x.clone(), 0]),
        (ops.gated_activation_backward, [x, x.clone(), x.clone(), 0]),
        (ops.rms_norm, [x, weight, 0.0, 1e-6]),
        (ops.rms_norm_backward, [x, x.clone(), weight, 0.0, r]),
        (ops.gram, [torch.zeros(N, N), x]),
        (ops.weighted_scales, [dense, torch.ones(N), code, bits, 64, 0.5, 1.15, 40]),
        (ops.quantize_with_feedback, [dense, order, torch.eye(N), scales, code, bits, 64]),
    ]


def _step_arguments(choices: Choices) -> list[Any]:
    numel = choices.of((1, 255, 256, 257, 4096, 5000))
    blocks = -(-numel // 256)
    in_8_bits = choices.one_in(2)
    algorithm = choices.of(("adamw", "lion", "ademamix"))
    counts = {"adamw": (1, 1), "lion": (1, 0), "ademamix": (2, 1)}[algorithm]  # of moments in state1 and in state2
    dtype = torch.uint8 if in_8_bits else torch.float32
    moments = [[torch.zeros(count * numel, dtype=dtype)] if count else [] for count in counts]
    scales = [[torch.zeros(count * blocks)] if count and in_8_bits else [] for count in counts]
    return [
        algorithm, [torch.ones(numel)], [torch.ones(numel)], *moments, *scales,
        [torch.zeros((), dtype=torch.int64)], [1], [1e-3], [0.9], [0.999], [1e-8], [0.0], None, None,
        torch.zeros(1, dtype=torch.int64), [], [], [0.9999], [5.0], [0.0], [choices.of((0.0, 10.0))],
    ]  # fmt: skip


def fuzz_json(choices: Choices) -> None:
    """The reader of JSON."""
    from qlora_native._core.json import parse_object

    text = '{"a": [1, {"b": "\\u00e9"}], "c": null, "shape": [8, 64], "d": 1e5}'
    for _ in range(1 + choices.below(8)):
        text = choices.text(text)
    parse_object(text.encode("utf-8", "surrogatepass"), "text")


# What each may raise. Of an op it may be anything, from Python too: its fake has no checks.
PROMISED: dict[str, tuple[type[Exception], ...]] = {
    "entries": (ValueError, TypeError),
    "layer": (ValueError, TypeError),
    "optimizer": (ValueError, TypeError),
    "config": (ValueError, TypeError),
    "folder": (TypeError, ValueError, OSError),
    "export": (TypeError, ValueError, OSError),
    "dtypes": (TypeError, ValueError, OSError),
    "json": (ValueError,),
    "files": (ValueError, TypeError),
    "gguf": (ValueError,),
    "functions": (ValueError, TypeError),
    "ops": (Exception,),
}
OF_FOLDERS = ("folder", "export", "dtypes")
TARGETS: dict[str, Callable[[Choices], None]] = {name: globals()[f"fuzz_{name}"] for name in PROMISED}


def run(target: str, data: bytes) -> None:
    """One input. Raises what the target may not."""
    with contextlib.suppress(*PROMISED[target]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TARGETS[target](Choices(data))


# ---- running them ----------------------------------------------------------------------------------------------------


def batch(target: str, inputs: list[bytes]) -> tuple[bytes, str] | None:
    """Run inputs in a child process; the first finding, if any: its bytes, and what happened."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "wb", buffering=0) as progress:
            for index, data in enumerate(inputs):
                progress.write(index.to_bytes(4, "little"))
                try:
                    run(target, data)
                except BaseException:
                    progress.write(b"\xff\xff\xff\xff" + traceback.format_exc().encode())
                    os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as progress:
        told = progress.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return None
    numbers, _, text = told.partition(b"\xff\xff\xff\xff")
    index = int.from_bytes(numbers[-4:], "little")
    return inputs[index], text.decode(errors="replace") or f"the process was ended by signal {-status}"


def prepare(target: str) -> None:
    """What is done once, before children are forked."""
    if target in OF_FOLDERS:
        _folders()
    elif target == "files":
        _layers_of_files()
    elif target == "config":
        import qlora_native.integrations.transformers  # noqa: F401


def corpus(target: str) -> list[bytes]:
    """Inputs that were findings once."""
    return [path.read_bytes() for path in sorted((CORPUS / target).glob("*"))]


def fuzz(target: str, seconds: float, seed: int) -> int:
    """Run a target for so long. Returns how many inputs; ends the program at a finding."""
    prepare(target)
    random_bytes = random.Random(f"{seed} {target}").randbytes
    length = random.Random(seed).randrange
    deadline, count, inputs = time.monotonic() + seconds, 0, corpus(target)
    size = 20 if target in OF_FOLDERS else 1000
    while True:
        finding = batch(target, inputs)
        if finding is not None:
            path = Path(tempfile.mkdtemp()) / f"{target}-finding"
            path.write_bytes(finding[0])
            print(f"{finding[1]}\n{target}: a finding, in {path}")
            raise SystemExit(1)
        count += len(inputs)
        if time.monotonic() >= deadline:
            return count
        inputs = [random_bytes(length(LONGEST)) for _ in range(size)]


def with_atheris(target: str, seconds: float) -> None:
    """Hand the target to atheris, which does not return."""
    prepare(target)
    folder = CORPUS / target
    options = [f"-max_total_time={int(seconds)}", f"-max_len={LONGEST}", "-rss_limit_mb=8192"]
    atheris.Setup([sys.argv[0], *options, *([str(folder)] if folder.exists() else [])], lambda data: run(target, data))
    atheris.Fuzz()


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="default: all")
    parser.add_argument("--seconds", type=float, default=10, help="for each target")
    parser.add_argument("--seed", type=int, default=None, help="default: the time")
    parser.add_argument("--atheris", action="store_true", help="coverage-guided, one target")
    parser.add_argument("--input", type=Path, help="run this file's bytes alone, in this process")
    args = parser.parse_args()
    targets = args.targets or list(TARGETS)
    torch.set_num_threads(1)  # children are forked: they would wait for threads that only this process has
    if args.input is not None:
        run(targets[0], args.input.read_bytes())
        return
    if args.atheris:
        with_atheris(targets[0], args.seconds)
    seed = int(time.time()) if args.seed is None else args.seed
    for target in targets:
        start = time.monotonic()
        count = fuzz(target, args.seconds, seed)
        print(
            json.dumps({"target": target, "inputs": count, "seconds": round(time.monotonic() - start, 1), "seed": seed})
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
