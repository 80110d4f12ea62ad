"""Writes the seeds of tests/fuzz/corpus: python tests/fuzz/make_corpus.py. Inputs that crashed are there by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
WIDTH, INNER, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 4, 6, 4, 2, 1, 2
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


class File:
    """A safetensors file; equal tensors share their bytes, so that a seed stays small."""

    def __init__(self) -> None:
        self.header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.data = b""

    def add(self, name: str, dtype: str, shape: list[int], data: bytes) -> None:
        if (begin := self.data.find(data)) < 0:
            begin = len(self.data)
            self.data += data
        self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + len(data)]}

    def bytes(self) -> bytes:
        header = json.dumps(self.header, separators=(",", ":")).encode()
        return struct.pack("<Q", len(header)) + header + self.data


def floats(dtype: str, count: int) -> bytes:
    """0.5 and 1 in turn."""
    pair = {"F32": struct.pack("<2f", 0.5, 1), "F16": struct.pack("<2e", 0.5, 1), "BF16": b"\x00\x3f\x80\x3f"}[dtype]
    return (pair * count)[: count * len(pair) // 2]


def model(dtype: str = "BF16", format: str = "nf4", nested: bool = True, tied: bool = True) -> File:
    """One block."""
    file = File()
    names = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    for name in names:
        file.add(name, dtype, [VOCABULARY, WIDTH], floats(dtype, VOCABULARY * WIDTH))
    block = "model.layers.0."
    for name in ("model.norm", f"{block}input_layernorm", f"{block}post_attention_layernorm"):
        file.add(f"{name}.weight", dtype, [WIDTH], floats(dtype, WIDTH))
    for name, shape in LINEARS.items():
        weight, count = f"{block}{name}.weight", shape[0] * shape[1]
        state = {"quant_type": format, "blocksize": 32, "dtype": "bfloat16", "shape": shape}
        file.add(weight, "U8", [count // 2, 1], bytes(range(1, count // 2 + 1)))
        file.add(f"{weight}.quant_map", "F32", [16], floats("F32", 16))
        if nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
            file.add(f"{weight}.absmax", "U8", [1], b"\x80")
            file.add(f"{weight}.nested_absmax", "F32", [1], floats("F32", 1))
            file.add(f"{weight}.nested_quant_map", "F32", [256], floats("F32", 256))
        else:
            file.add(f"{weight}.absmax", "F32", [1], floats("F32", 1))
        text = json.dumps(state, separators=(",", ":")).encode()
        file.add(f"{weight}.quant_state.bitsandbytes__{format}", "U8", [len(text)], text)
    return file


def seeds_of_safetensors() -> dict[str, bytes]:
    """Models that are accepted, and those of which each was once believed."""

    def seed(config: dict[str, object] | bytes, file: File | bytes) -> bytes:
        text = config if isinstance(config, bytes) else json.dumps(config, separators=(",", ":")).encode()
        return text + b"\0" + (file if isinstance(file, bytes) else file.bytes())

    def with_tensor(name: str, **fields: object) -> bytes:
        file = model()
        file.header[name].update(fields)
        return file.bytes()

    norm = "model.norm.weight"
    whole = model().bytes()
    seeds = {
        "bf16": seed(CONFIG, model()),
        "f32-fp4": seed(CONFIG, model("F32", "fp4")),
        "f16-scales-in-f32": seed(CONFIG, model("F16", nested=False)),
        "head-of-its-own": seed(CONFIG | {"tie_word_embeddings": False}, model(tied=False)),
        "rope-parameters": seed(CONFIG | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, whole),
        "surrogates": seed(json.dumps(CONFIG | {"name": "\U0001f600"}).encode(), whole),
        "surrogate-alone": seed(b'{"name":"\\ud83d"}', b""),
        "key-twice": seed(b'{"vocab_size":4,"vocab_size":5}', b""),
        "deep": seed(b"[" * 200, b""),
        "hidden-size": seed(CONFIG | {"hidden_size": 64}, whole),
        "hidden-size-fraction": seed(CONFIG | {"hidden_size": 4.5}, whole),
        "hidden-size-beyond-int64": seed(CONFIG | {"hidden_size": 10**300}, whole),
        "vocab-size": seed(CONFIG | {"vocab_size": 2000000}, whole),
        "head-dim": seed(CONFIG | {"head_dim": 4096}, whole),
        "intermediate-size": seed(CONFIG | {"intermediate_size": 9999}, whole),
        "elements-overflow": seed(CONFIG, with_tensor(norm, shape=[2**32, 2**32], data_offsets=[0, 0])),
        "shape-negative": seed(CONFIG, with_tensor(norm, shape=[-4])),
        "shape-fraction": seed(CONFIG, with_tensor(norm, shape=[4.5])),
        "offsets-negative": seed(CONFIG, with_tensor(norm, data_offsets=[-8, 0])),
        "offsets-beyond-int64": seed(CONFIG, with_tensor(norm, data_offsets=[0, 10**30])),
        "dtype-unknown": seed(CONFIG, with_tensor(norm, dtype="F99999999999999999999")),
        "dtype-of-a-byte": seed(CONFIG, with_tensor(norm, dtype="U8", shape=[8])),
        "cut-short": seed(CONFIG, whole[:-20]),
        "cut-in-header": seed(CONFIG, whole[:1000]),
        "header-length": seed(CONFIG, b"\xff" * 8 + whole[8:]),
        "blocksize-0": seed(CONFIG, whole.replace(b'"blocksize":32', b'"blocksize":0 ')),
        "blocksize-48": seed(CONFIG, whole.replace(b'"blocksize":32', b'"blocksize":48')),
        "nested-blocksize-0": seed(CONFIG, whole.replace(b'"nested_blocksize":256', b'"nested_blocksize":0  ')),
        "scale-nan": seed(CONFIG, whole.replace(b"\x00\x00\x00\x3f", b"\x00\x00\xc0\x7f")),
    }
    return seeds


def seeds_of_api() -> dict[str, bytes]:
    """For each of the eight calls: small shapes of fp32, then bytes that ask for other things."""
    names = ["quantize", "quantize-absmax", "dequantize", "check-quantized-weight", "linear-forward"]
    names += ["linear-backward-input", "lora-gradients", "adamw-8bit-step"]
    seeds = {}
    for operation, name in enumerate(names):
        seeds[f"{name}-plain"] = bytes([operation, 1]) + bytes([39, 37, 33, 1, 5] * 12)
        seeds[f"{name}-various"] = bytes([operation, 7]) + bytes((i * 37 + operation) % 240 for i in range(120))
        seeds[f"{name}-hostile"] = bytes([operation, 3]) + bytes(
            255 if i % 23 == operation else i * 11 % 200 for i in range(120)
        )
    return seeds


def main() -> None:
    """Write all seeds."""
    for target, seeds in (("safetensors", seeds_of_safetensors()), ("api", seeds_of_api())):
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, data in seeds.items():
            (CORPUS / target / name).write_bytes(data)


if __name__ == "__main__":
    main()
