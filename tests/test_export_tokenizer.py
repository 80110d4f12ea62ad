"""Guards the tokenizer in an exported GGUF file; test_llama_cpp.py shows that llama.cpp splits text alike by it."""

import json

import pytest

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from gguf_files import fields, make  # noqa: E402
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
    """As transformers converts SentencePiece's BPE (Llama 2, Mistral): every pair that is a token is a merge."""
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


@pytest.mark.parametrize("pre", BYTE_LEVEL)
@pytest.mark.parametrize("bos", [False, True])
def test_byte_level_tokenizer_is_described(pre, bos, tmp_path):
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


SENTENCEPIECE = {
    "metaspace": {"pre": pre_tokenizers.Metaspace(prepend_scheme="always", split=False)},
    "normalizer": {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])},
}


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_tokenizer_of_characters_is_described(kind, tmp_path):
    save(characters_bpe(**SENTENCEPIECE[kind]), tmp_path / "model", unk_token="<unk>")
    report = export_model(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert ("llama.cpp puts a space in front of every text" in str(report)) == (kind == "metaspace")
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    types = found["tokenizer.ggml.token_type"]
    assert types[:3] == [2, 3, 3] and types[3:259] == [6] * 256 and types[259] == 1


def unigram():
    trainer = trainers.UnigramTrainer(special_tokens=["<s>", "</s>"], show_progress=False)
    return trained(kinds_of_tokenizer.Unigram(), pre_tokenizers.Metaspace(), trainer)


UNSUPPORTED = {
    "punctuation": (
        lambda: bytes_bpe(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), WORDS])),
        "expected one of gpt-2, smol",
    ),
    "space in front": (lambda: bytes_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)), "expected one of gpt-2"),
    "merges within words": (lambda: bytes_bpe(split(LLAMA3)), "pre_tokenizer: expected one of gpt-2"),
    "whitespace": (lambda: characters_bpe(pre=pre_tokenizers.Whitespace()), "expected those of SentencePiece"),
    "other merges": (
        lambda: characters_bpe(**SENTENCEPIECE["metaspace"], all_pairs=False),
        "merges: expected all pairs of tokens",
    ),
    "unigram": (unigram, "model: expected BPE for GGUF, got Unigram"),
}


@pytest.mark.parametrize(("tokenizer", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
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
