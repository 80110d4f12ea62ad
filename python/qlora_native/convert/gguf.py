"""GGUF files, which llama.cpp and Ollama load: a model, or a LoRA adapter beside a model's file.

    python -m qlora_native export --model DIR --out FILE.gguf [--to bf16|f16|f32|q8_0|q4_0|...]
    python -m qlora_native export --base DIR|FILE.gguf --adapter DIR --out FILE.gguf [--to f32|f16|bf16]

Each tensor is read, converted and written before the next one is read, so memory holds a few copies of one tensor. RoPE
rotates pairs of elements of a head. A pair is an element of each half in transformers, and two adjacent ones in
llama.cpp's architecture "llama", so its files have the rows of q_proj and k_proj in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._core.versions import require

require("transformers")
require("gguf")

import gguf
import torch
from torch import Tensor, nn

from .._core.errors import bad, is_finite_number
from ..integrations.transformers._gguf_config import llama3_divisors
from ..integrations.transformers._gguf_weights import ROPE_DIVISORS
from ._adapter_changes import Experts, LowRank
from ._adapters import Adapter
from ._checkpoints import Checkpoint, other_files, repository_of
from ._gguf_bases import Base, base_of
from ._gguf_files import ADAPTER_TYPES, ARCHITECTURES, DTYPES, MODEL_TYPES, Entry, GGMLType, Layout, gguf_writer
from ._gguf_tokenizer import add_tokenizer
from ._report import Report
from ._skeleton import Skeleton

__all__ = ["ADAPTER_TYPES", "ARCHITECTURES", "MODEL_TYPES", "export_adapter", "export_model"]

# The variants of RoPE that llama.cpp supports for these models: {name: its parameters beside rope_theta}.
ROPE_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
# What other parameters of RoPE may say, which is what llama.cpp takes. `attention_factor`, and the two of `mscale`, are
# not among them: without them both libraries scale YaRN's attention by 1 + ln(factor) / 10.
NEUTRAL_ROPE = {"partial_rotary_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
MERGE = "merge it, and export the model"

# ---- a model ---------------------------------------------------------------------------------------------------------


def export_model(model: str | Path, out: str | Path, to: str | None = None, progress: bool = True) -> Report:
    """Write the checkpoint `model` to the new file `out`, with its tokenizer.

    Args:
        model: folder of a checkpoint in safetensors files, in 16 or 32 bits or in bitsandbytes' 4 (which is decoded);
            or the id of a model that is in the Hugging Face cache.
        out: a file that does not exist yet. It appears when it is complete.
        to: the type of matrices, a key of MODEL_TYPES; None is the dtype of config.json, which rounds nothing. Norms
            and biases are fp32. With 4 or 5 bits the embeddings and the output layer get 8 bits. A matrix whose rows
            are not a multiple of 32 keeps its dtype.
        progress: show the progress on stderr: on a terminal a bar, if tqdm is installed; in a log file a line now and
            then.

    Returns:
        What was written, and the error of rounding.

    Raises:
        FileNotFoundError, FileExistsError: a file of the model is missing, or `out` exists.
        ValueError: GGUF cannot express the architecture or a setting, or a file is damaged. Nothing is written.
    """
    checkpoint = Checkpoint(model)
    layout = Layout(Skeleton(checkpoint))
    layout.skeleton.check_files(checkpoint)
    if to is None:
        to = DTYPES[layout.skeleton.dtype].name.lower()
    if to not in MODEL_TYPES:
        raise bad("to", "one of " + ", ".join(MODEL_TYPES), repr(to))
    kind, report = MODEL_TYPES[to], Report()
    report.notes += layout.skeleton.note_of_unread("left out")
    other_files(checkpoint.folder)  # raises if a link leads out of the folder
    with gguf_writer(out, layout.architecture.name, kind) as (writer, write):
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(_name_of(checkpoint.folder))
        _add_hyperparameters(writer, layout, report)
        if note := add_tokenizer(writer, checkpoint.folder, layout.skeleton.config.vocab_size):
            report.notes.append(note)
        write(list(_model_entries(checkpoint, layout, kind)), report, progress)
    return report


def _name_of(folder: Path) -> str:
    """The name of a folder, or of the repository whose snapshot in the hub's cache it is."""
    folder = folder.resolve()
    repository = repository_of(folder)
    return folder.name if repository is None else repository.name.rpartition("--")[2]


def _add_hyperparameters(writer: gguf.GGUFWriter, layout: Layout, report: Report) -> None:
    """Write what llama.cpp needs to compute the same as transformers. `report` gets a note if the context is shorter.

    Raises:
        ValueError: the config has a setting that llama.cpp would ignore.
    """
    config = layout.skeleton.config
    if config.hidden_act not in ("silu", "swish"):
        raise bad("config.json: hidden_act", "silu, the only one that llama.cpp has for it", config.hidden_act)
    context, window = _count(config, "max_position_embeddings"), getattr(config, "sliding_window", None)
    if window is not None and _count(config, "sliding_window") < context:
        report.notes.append(
            f"llama.cpp has no sliding window here: the file says {window} tokens of context, not {context}"
        )
        context = window
    writer.add_vocab_size(_count(config, "vocab_size"))
    writer.add_context_length(context)
    writer.add_embedding_length(_count(config, "hidden_size"))
    writer.add_block_count(_count(config, "num_hidden_layers"))
    writer.add_feed_forward_length(_count(config, "intermediate_size"))
    writer.add_head_count(_count(config, "num_attention_heads"))
    writer.add_head_count_kv(_count(config, "num_key_value_heads"))
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_layer_norm_rms_eps(_real("rms_norm_eps", config.rms_norm_eps))
    writer.add_rope_dimension_count(layout.head_dim)
    if not isinstance(config.rope_parameters, dict):
        raise bad("config.json: rope_parameters", "an object", type(config.rope_parameters).__name__)
    _add_rope(writer, dict(config.rope_parameters))


def _add_rope(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    """Write the frequencies of RoPE. "llama3" becomes a tensor of factors in `_model_entries`."""
    kind = rope.pop("rope_type", "default")
    if kind not in ROPE_PARAMETERS:
        raise bad("config.json: rope_type", "one of " + ", ".join(ROPE_PARAMETERS) + " for GGUF", kind)
    values = {name: _real(name, rope.pop(name, None)) for name in ("rope_theta", *ROPE_PARAMETERS[kind])}
    rope.pop("type", None)  # an older name of rope_type
    for name, value in rope.items():
        if value is not None and value != NEUTRAL_ROPE.get(name):
            raise bad("config.json: rope_parameters", f"what GGUF has for {kind}", f"{name}={value}")
    writer.add_rope_freq_base(values["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(values["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(values["original_max_position_embeddings"]))


def _count(config: Any, name: str) -> int:
    """Check a size of the config, which GGUF stores as uint32."""
    value = getattr(config, name)
    if type(value) is not int or not 0 < value < 2**32:
        raise bad(f"config.json: {name}", "a number from 1 to 4294967295", repr(value))
    return value


def _real(name: str, value: Any) -> float:
    """Check a number of the config, which must be positive and finite in fp32."""
    if not is_finite_number(value) or not 0 < torch.tensor(float(value), dtype=torch.float32) < float("inf"):
        raise bad(f"config.json: {name}", "a positive number", repr(value))
    return value


def _model_entries(checkpoint: Checkpoint, layout: Layout, kind: GGMLType) -> Iterator[Entry]:
    """Make the entries of the model, in the order of its files."""
    skeleton = layout.skeleton
    file_names = skeleton.file_names(checkpoint)
    embedding, head = (file_names.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    if skeleton.config.tie_word_embeddings and head is not None:
        # GGUF wants the embedding. transformers ties the two, unless the files have both with different values.
        if embedding is None:
            file_names["model.embed_tokens.weight"] = file_names.pop("lm_head.weight")
        elif torch.equal(checkpoint.dense(embedding), checkpoint.dense(head)):
            del file_names["lm_head.weight"]
    for own, file_name in file_names.items():
        name, shape = layout.name_of(own), skeleton.shape(own)

        def values(own: str = own, file_name: str = file_name) -> Tensor:
            return layout.reordered(own, checkpoint.dense(file_name))

        yield Entry(name, shape, _kind_of(name, shape, kind, DTYPES[skeleton.dtype]), values)
    if skeleton.config.rope_parameters.get("rope_type") == "llama3":
        divisors = llama3_divisors(skeleton.config)
        yield Entry(ROPE_DIVISORS, list(divisors.shape), GGMLType.F32, lambda: divisors)


def _kind_of(name: str, shape: list[int], wanted: GGMLType, own: GGMLType) -> GGMLType:
    """The type of a tensor, by the rules of `export_model`."""
    if len(shape) == 1:
        return GGMLType.F32
    if wanted in DTYPES.values():
        return wanted
    if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        return own
    return GGMLType.Q8_0 if name in ("token_embd.weight", "output.weight") else wanted


# ---- an adapter ------------------------------------------------------------------------------------------------------


def export_adapter(base: str | Path, adapter: str | Path, out: str | Path, to: str = "f32") -> Report:
    """Write the LoRA adapter `adapter` to the new file `out`, for llama.cpp to add to a GGUF file of `base`.

    GGUF has one alpha for all layers and divides it by each layer's rank. If PEFT scales otherwise (alpha_pattern,
    rsLoRA), B is multiplied by the rest of the factor.

    Args:
        base: what the adapter was trained over. The folder of a model, in 16 or 4 bits, or its id in the Hugging Face
            cache: its config and shapes are read, and only those weights that the adapter's file also has. Or a GGUF
            file (`KeepQuantized`), of any causal language model that transformers reads: of it the same is read.
        adapter: folder of the adapter, as PEFT saved it.
        out: a file that does not exist yet. It appears when it is complete.
        to: a key of ADAPTER_TYPES. PEFT saves "f32".

    Returns:
        What was written, and the error of rounding.

    Raises:
        FileNotFoundError, FileExistsError: a file is missing, or `out` exists.
        ValueError: GGUF cannot express the architecture or the adapter, the adapter does not fit the base, or a file is
            damaged. Nothing is written.
    """
    if to not in ADAPTER_TYPES:
        raise bad("to", "one of " + ", ".join(ADAPTER_TYPES) + " for an adapter", repr(to))
    over, kind = base_of(base), ADAPTER_TYPES[to]
    lora = Adapter(adapter, over.skeleton)
    for name, tensor in lora.replaced.items():
        # PEFT saves an adapted embedding's own weight too, which must be the base's.
        value = over.value(name)
        if value is None or tensor.shape != value.shape or not torch.equal(tensor, value.to(tensor.dtype)):
            raise bad("adapter", f"LoRA alone, as GGUF has nothing else ({MERGE})", f"a {name} of its own")
    if not lora.changes:
        raise bad("adapter", "LoRA layers", "none")
    alpha = torch.tensor(float(lora.config.get("lora_alpha", 1)), dtype=torch.float32).item()
    if alpha == 0 or math.isinf(alpha):  # llama.cpp takes 0 for a file without scaling
        alpha = 1.0
    entries = [e for name in sorted(lora.changes) for e in _adapter_entries(lora, name, alpha, over, kind)]
    report = Report()
    with gguf_writer(out, over.architecture, kind) as (writer, write):
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(_name_of(Path(adapter)))
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        write(entries, report, progress=False)
    return report


def _adapter_entries(lora: Adapter, weight: str, alpha: float, base: Base, kind: GGMLType) -> Iterator[Entry]:
    """Make lora_a and lora_b of a weight; llama.cpp multiplies their product by alpha / rank."""
    for _, change in lora.changes[weight]:
        if not isinstance(change, LowRank | Experts):
            raise bad(f"adapter, {weight}", f"LoRA alone, as GGUF has no {change.kind} ({MERGE})", change.kind)
    if len(base.skeleton.tied(weight)) > 1:
        raise bad("adapter", f"no layer whose weight is tied, as llama.cpp adapts both or none ({MERGE})", weight)
    ((_, change),) = lora.changes[weight]
    factor = change.scaling * change.lora_a.shape[-2] / alpha
    is_embedding = isinstance(base.skeleton.module(weight.rpartition(".")[0]), nn.Embedding)
    for name, (a, b) in base.factors(weight, change.lora_a, change.lora_b).items():
        if is_embedding:
            a, b = b, a.t()  # llama.cpp looks up rows of A
        yield Entry(f"{name}.lora_a", list(a.shape), kind, lambda a=a: a)
        yield Entry(f"{name}.lora_b", list(b.shape), kind, lambda b=b: b if factor == 1 else b.float() * factor)
