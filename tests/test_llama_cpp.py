"""Guards exported files in llama.cpp itself: it computes what transformers and PEFT compute, and splits text alike."""

import copy
import functools

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp_py_sync._cffi_bindings", exc_type=ImportError)

import models  # noqa: E402
from gguf_files import from_gguf, kinds, make, make_all, skeleton, write_random  # noqa: E402
from llama_cpp_py_sync import _cffi_bindings as bindings  # noqa: E402
from test_export import PATTERNS, adapted_model  # noqa: E402
from test_export_tokenizer import BYTE_LEVEL, SENTENCEPIECE, TEXTS, characters_bpe, save  # noqa: E402

from qlora_native.convert.gguf import ARCHITECTURES, export_adapter, export_model  # noqa: E402
from qlora_native.integrations.transformers import KeepQuantized  # noqa: E402
from qlora_native.testing import relative_error  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
TOKENS = models.ids(1, 12)
ROPES = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {"factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_all(tmp_path_factory)


@functools.cache
def library():
    """(cffi's interface, llama.cpp), which writes no log."""
    ffi, lib = bindings.get_ffi(), bindings.get_lib()
    silent = ffi.callback("ggml_log_callback", lambda level, text, data: None)
    library.keeps = silent  # llama.cpp calls it until the end
    lib.llama_log_set(silent, ffi.NULL)
    lib.llama_backend_init()
    return ffi, lib


class LlamaCpp:
    """A GGUF file of a model, with adapters; keys and values are kept in fp32."""

    def __init__(self, path, adapters=()):
        self.ffi, self.lib = library()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model != self.ffi.NULL, "llama.cpp does not load the model"
        options = self.lib.llama_context_default_params()
        options.n_ctx = options.n_batch = 64
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = 0  # GGML_TYPE_F32
        options.flash_attn_type = 0  # none
        self.context = self.lib.llama_init_from_model(self.model, options)
        self._adapters = [self.lib.llama_adapter_lora_init(self.model, str(path).encode()) for path in adapters]
        assert self.ffi.NULL not in self._adapters, "llama.cpp does not load the adapter"
        self.lib.llama_set_adapters_lora(self.context, self._adapters, len(adapters), [1.0] * len(adapters))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def logits(self, tokens):
        """fp32 [tokens, vocabulary]."""
        rows, vocabulary = [], self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        for token in tokens:
            batch = self.lib.llama_batch_get_one(self.ffi.new("llama_token[1]", [token]), 1)
            assert self.lib.llama_decode(self.context, batch) == 0
            rows.append(self.ffi.unpack(self.lib.llama_get_logits_ith(self.context, -1), vocabulary))
        return torch.tensor(rows)

    def tokenize(self, text, special=False):
        """Token ids; `special`: with those that are added to a text, and those that stand in it."""
        data, vocabulary = text.encode(), self.lib.llama_model_get_vocab(self.model)
        tokens = self.ffi.new("llama_token[1000]")
        count = self.lib.llama_tokenize(vocabulary, data, len(data), tokens, 1000, special, special)
        return self.ffi.unpack(tokens, count)


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
    model = models.save_adapter(bases[name], tmp_path / "adapter", target_modules=modules, use_rslora=True, **PATTERNS)
    export_model(bases[name], tmp_path / "m.gguf", "f32", progress=False)
    export_adapter(bases[name], tmp_path / "adapter", tmp_path / "a.gguf")
    adapted = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    assert (adapted - plain).norm() > 0.1 * plain.norm()
    for expected, adapters in ((plain, []), (adapted, [tmp_path / "a.gguf"])):
        with LlamaCpp(tmp_path / "m.gguf", adapters) as loaded:
            assert_close(loaded.logits(TOKENS[0].tolist()), expected)


def quantized(source, out, kind):
    """A file in types that llama.cpp chooses, such as "MOSTLY_Q4_K_M"; "ALL_F32" decodes one that is quantized."""
    ffi, lib = library()
    options = lib.llama_model_quantize_default_params()
    options.nthread, options.ftype, options.allow_requantize = 1, gguf.LlamaFileType[kind].value, True
    options = ffi.new("llama_model_quantize_params *", options)
    assert lib.llama_model_quantize(str(source).encode(), str(out).encode(), options) == 0
    return out


def errors_of_serving(path, adapter, model):
    """The relative errors of llama.cpp's logits over a file alone, and with the adapter of PEFT's `model` beside it."""
    adapted = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    assert (adapted - plain).norm() > 0.1 * plain.norm()
    errors = []
    for expected, adapters in ((plain, []), (adapted, [adapter])):
        with LlamaCpp(path, adapters) as loaded:
            errors.append(relative_error(loaded.logits(TOKENS[0].tolist()), expected))
    return errors


@pytest.mark.parametrize(("kind", "types"), [
    ("MOSTLY_Q4_K_M", {"Q4_K", "Q6_K"}),
    ("MOSTLY_IQ4_XS", {"IQ4_XS", "Q6_K"}),
    ("MOSTLY_IQ4_NL", {"IQ4_NL", "Q6_K"}),
    ("MOSTLY_Q4_0", {"Q4_0", "Q6_K"}),
    ("MOSTLY_Q4_1", {"Q4_1", "Q6_K"}),
    ("MOSTLY_Q5_0", {"Q5_0", "Q6_K"}),
    ("MOSTLY_Q5_1", {"Q5_1", "Q6_K"}),
    ("MOSTLY_Q8_0", {"Q8_0"}),
    ("MOSTLY_Q2_K", {"Q2_K", "Q3_K", "Q6_K"}),
    ("MOSTLY_Q3_K_M", {"Q3_K", "Q4_K", "Q5_K", "Q6_K"}),
])  # fmt: skip
def test_adapter_trained_over_a_file_is_served_over_it(kind, types, tmp_path):
    make("LlamaForCausalLM", hidden_size=256, intermediate_size=512).save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "f16.gguf", "bf16", progress=False)
    path = quantized(tmp_path / "f16.gguf", tmp_path / "model.gguf", kind)
    assert set(kinds(path).values()) - {"F32"} == types
    model = from_gguf(path, quantization_config=KeepQuantized(), dtype=torch.float32)
    copy.deepcopy(model).dequantize().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    for base, name in ((path, "a.gguf"), (tmp_path / "base", "b.gguf")):
        export_adapter(base, tmp_path / "adapter", tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    errors = errors_of_serving(path, tmp_path / "a.gguf", model)
    # llama.cpp rounds activations to 8 bits, and does so over the file alone too.
    assert errors[0] <= 2**-5 and errors[1] <= 2 * errors[0], errors


@pytest.mark.parametrize("architecture", ["mamba", "phi3", "qwen3moe", "qwen35moe"])
def test_adapter_of_any_architecture_is_served_over_its_file(architecture, tmp_path):
    """Joined projections, reordered heads, experts (whose gates are joined with what they gate), and no attention."""
    path, config = tmp_path / "model.gguf", skeleton(architecture).config
    keys = {"tokenizer.ggml.model": "no_vocab", f"{architecture}.vocab_size": models.VOCABULARY}
    if architecture.endswith("moe"):
        keys |= {f"{architecture}.attention.{part}_length": config.head_dim for part in ("key", "value")}
        keys[f"{architecture}.expert_feed_forward_length"] = config.moe_intermediate_size
    write_random(path, architecture, ["F32"], blocks=None, keys=keys)
    model = adapted_model(path, architecture, tmp_path / "adapter")
    export_adapter(path, tmp_path / "adapter", tmp_path / "a.gguf")
    errors = errors_of_serving(path, tmp_path / "a.gguf", model)
    assert max(errors) <= 2**-13, errors  # the recurrence of a gated delta net is summed in another order


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rope_gives_the_same_logits(kind, tmp_path):
    model = make("LlamaForCausalLM", rope_parameters={"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]})
    model.save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    with LlamaCpp(tmp_path / "m.gguf") as loaded:
        assert_close(loaded.logits(TOKENS[0].tolist()), logits(model))


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_text_is_split_alike(kind, tmp_path):
    tokenizer = BYTE_LEVEL[kind]() if kind in BYTE_LEVEL else characters_bpe(**SENTENCEPIECE[kind])
    expected = save(tokenizer, tmp_path / "model", **({} if kind in BYTE_LEVEL else {"unk_token": "<unk>"}))
    export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    with LlamaCpp(tmp_path / "m.gguf") as loaded:
        for text in [*TEXTS, "one</s>two[user]three"]:
            if kind == "metaspace" and text.startswith(" "):  # the export says so
                continue
            assert loaded.tokenize(text, special=True) == expected(text).input_ids, text
