"""Guards exported files in llama.cpp itself: it computes what transformers and PEFT compute, and splits text alike."""

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp_py_sync._cffi_bindings", exc_type=ImportError)

import llama_cpp_api as llama_cpp  # noqa: E402
import models  # noqa: E402
from gguf_files import make, make_all  # noqa: E402
from test_export import ROPES  # noqa: E402
from test_export_adapter import PATTERNS, adapter_of  # noqa: E402
from test_export_tokenizer import BYTE_LEVEL, SENTENCEPIECE, TEXTS, characters_bpe, save  # noqa: E402

from qlora_native.convert.gguf import ARCHITECTURES, export_adapter, export_model  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
TOKENS = models.ids(1, 12)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_all(tmp_path_factory)


def assert_close(actual, expected):
    """fp32 throughout, but for exp, which llama.cpp approximates, and what two layers make of that."""
    assert (actual - expected).norm() <= 2**-16 * expected.norm(), ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS).logits[0]


@pytest.mark.parametrize("name", [*ARCHITECTURES, "biased", "tied"])
def test_model_and_adapter_give_the_same_logits(bases, name, tmp_path):
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if name == "Qwen2ForCausalLM":
        modules += ["embed_tokens", "lm_head"]
    model = adapter_of(bases[name], tmp_path / "adapter", target_modules=modules, use_rslora=True, **PATTERNS)
    export_model(bases[name], tmp_path / "m.gguf", "f32", progress=False)
    export_adapter(bases[name], tmp_path / "adapter", tmp_path / "a.gguf")
    adapted = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    assert (adapted - plain).norm() > 0.1 * plain.norm()
    for expected, adapters in ((plain, []), (adapted, [tmp_path / "a.gguf"])):
        with llama_cpp.Model(tmp_path / "m.gguf", adapters) as loaded:
            assert_close(loaded.logits(TOKENS[0].tolist()), expected)


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rope_gives_the_same_logits(kind, tmp_path):
    model = make("LlamaForCausalLM", rope_parameters={"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]})
    model.save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    with llama_cpp.Model(tmp_path / "m.gguf") as loaded:
        assert_close(loaded.logits(TOKENS[0].tolist()), logits(model))


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_text_is_split_alike(kind, tmp_path):
    tokenizer = BYTE_LEVEL[kind]() if kind in BYTE_LEVEL else characters_bpe(**SENTENCEPIECE[kind])
    expected = save(tokenizer, tmp_path / "model", **({} if kind in BYTE_LEVEL else {"unk_token": "<unk>"}))
    export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    with llama_cpp.Model(tmp_path / "m.gguf") as loaded:
        for text in [*TEXTS, "one</s>two[user]three"]:
            if kind == "metaspace" and text.startswith(" "):  # the export says so
                continue
            assert loaded.tokenize(text, special=True) == expected(text).input_ids, text
