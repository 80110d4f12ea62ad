"""Write a tokenizer of transformers into a GGUF file.

llama.cpp has two kinds of BPE. "gpt2" works over bytes, and splits text into words in one of a fixed list of ways, each
with a name. "llama" works over characters, and uses single bytes for characters that the vocabulary lacks. A tokenizer
that llama.cpp would not reproduce is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from transformers import AutoTokenizer

from .._core.errors import bad

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = ("bytes", "words")  # ByteLevel, with the split of GPT-2 inside it

# {(how text is split before tokens are merged, whether a whole word may be a token without merges): llama.cpp's name}.
_SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    (_GPT2, False): "gpt-2",
    (("digits", *_GPT2), False): "smollm",
    ((f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}", "bytes"), True): "llama-bpe",
    ((f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}", "bytes"), False): "qwen2",
}


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> str:
    """Write the tokenizer of a model's folder, if there is one, and its chat template.

    Rows of the embedding beyond the vocabulary become unused tokens.

    Returns:
        A note for the user: that there is no tokenizer, or which texts llama.cpp splits differently. "" if there is
            none.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        if (folder / "tokenizer.model").exists():
            expected = "tokenizer.json beside tokenizer.model, as a tokenizer's save_pretrained writes it"
            raise bad(str(folder), expected, "none")
        writer.add_tokenizer_model("none")
        return "no tokenizer.json in the folder: the file has no tokenizer and takes token ids only"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        added = tokenizer.added_tokens_decoder
        bare, whole = (list(tokenizer("a", add_special_tokens=special).input_ids) for special in (False, True))
    except Exception as error:  # transformers and tokenizers raise errors of many types on damaged files
        text = " ".join(str(error).split())
        raise bad(str(path), "a tokenizer of transformers", f"something else ({text})") from None
    model = state["model"]
    if model["type"] != "BPE":
        raise bad(f"{path}: model", "BPE for GGUF", model["type"])
    tokens, types = _tokens(path, vocabulary, added, vocab_size)
    note = ""
    if model.get("byte_fallback"):
        note = _add_characters(writer, path, state, tokens, types)
    else:
        _add_bytes(writer, path, state)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, path, tokenizer, bare, whole)
    return note


def _merges(state: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs of tokens that are merged, in order of priority."""
    return [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in state["model"]["merges"]]


def _tokens(path: Path, vocabulary: dict[str, int], added: dict[int, Any], size: int) -> tuple[list[str], list[int]]:
    """The texts and the types of all `size` tokens."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, number in vocabulary.items():
        if number >= size:
            raise bad(str(path), f"tokens below {size}, the rows of the embedding", f"{number} ({token!r})")
        if types[number] != gguf.TokenType.UNUSED:
            raise bad(str(path), "one token for each id", f"{tokens[number]!r} and {token!r} for {number}")
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
        if number in added:
            types[number] = gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED
    return tokens, types


def _add_bytes(writer: gguf.GGUFWriter, path: Path, state: dict[str, Any]) -> None:
    """Write BPE over bytes, which llama.cpp calls "gpt2"."""
    splits = _splits(state["pre_tokenizer"]), bool(state["model"].get("ignore_merges"))
    normalizer = (state["normalizer"] or {}).get("type")
    if splits not in _SPLITS or normalizer not in (None, "NFC"):
        raise bad(
            f"{path}: pre_tokenizer", "one of " + ", ".join(_SPLITS.values()) + ", as llama.cpp calls them", "another"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_SPLITS[splits])
    writer.add_token_merges([" ".join(pair) for pair in _merges(state)])


def _splits(pre: dict[str, Any] | None) -> tuple[str, ...]:
    """The steps by which text is split before tokens are merged, as in _SPLITS."""
    if pre is None:
        return ()
    if pre["type"] == "Sequence":
        return tuple(step for part in pre["pretokenizers"] for step in _splits(part))
    if pre["type"] == "ByteLevel" and not pre["add_prefix_space"]:
        return _GPT2 if pre["use_regex"] else ("bytes",)
    if pre["type"] == "Digits" and pre["individual_digits"]:
        return ("digits",)
    if pre["type"] == "Split" and pre["behavior"] == "Isolated" and not pre["invert"]:
        return (pre["pattern"].get("Regex", ""),)
    return (json.dumps(pre),)


def _add_characters(
    writer: gguf.GGUFWriter, path: Path, state: dict[str, Any], tokens: list[str], types: list[int]
) -> str:
    """Write BPE over characters, which llama.cpp calls "llama"; a byte without a token of its own is "<0x0A>".

    llama.cpp has no list of merges here. It joins the two adjacent tokens whose joint token has the highest score. A
    token's first position in the list of merges, negated, is a score with the same effect if all pairs that form a
    token are in the list, as with SentencePiece's BPE. Returns a note (see `add_tokenizer`).
    """
    spaces = _prefix_space(state)
    if spaces is None:
        raise bad(f"{path}: normalizer, pre_tokenizer", "those of SentencePiece, with ▁ for a space", "others")
    pairs = _merges(state)
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    joined, known = set(pairs), set(state["model"]["vocab"])
    for token in ranks:
        for at in range(1, len(token)):
            pair = token[:at], token[at:]
            if known.issuperset(pair) and pair not in joined:
                raise bad(f"{path}: merges", "all pairs of tokens that are one together, as of SentencePiece", pair)
    for added in state["added_tokens"] if state["normalizer"] is not None else ():
        if added["normalized"] and not added["special"]:
            raise bad(f"{path}: added_tokens", "normalized=false, as llama.cpp finds them", added["content"])
    for number, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and types[number] == gguf.TokenType.NORMAL:
            types[number] = gguf.TokenType.BYTE
        elif token == state["model"].get("unk_token"):
            types[number] = gguf.TokenType.UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([float(-ranks.get(token, len(pairs))) for token in tokens])
    writer.add_add_space_prefix(spaces)
    if spaces and state["pre_tokenizer"] is not None:
        return "llama.cpp puts a space in front of every text; transformers does not, where a text begins with one"
    return ""


def _prefix_space(state: dict[str, Any]) -> bool | None:
    """Whether the tokenizer puts a space in front of a text, or None if it is not SentencePiece's BPE."""
    pre, normalizer = state["pre_tokenizer"], state["normalizer"]
    if normalizer is None and pre is not None and pre["type"] == "Metaspace" and pre["replacement"] == "▁":
        return None if pre.get("split") else pre["prepend_scheme"] != "never"
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if pre is None and steps in ([prepend, replace], [replace]):
        return len(steps) == 2
    return None


def _add_special(writer: gguf.GGUFWriter, path: Path, tokenizer: Any, bare: list[int], whole: list[int]) -> None:
    """Write the special tokens, those that a text gets (`whole` is `bare` with them), and the chat template."""
    ids = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "unk", "pad")}
    for kind, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    starts, ends = whole[:1] == [ids["bos"]] != bare[:1], whole[-1:] == [ids["eos"]] != bare[-1:]
    if whole != [ids["bos"]] * starts + bare + [ids["eos"]] * ends:
        raise bad(f"{path}: post_processor", "one that adds bos_token, eos_token or nothing", tokenizer.decode(whole))
    writer.add_add_bos_token(starts)
    writer.add_add_eos_token(ends)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    elif isinstance(tokenizer.chat_template, dict):
        templates = tokenizer.chat_template.items()
        writer.add_chat_template([{"name": name, "template": template} for name, template in templates])
