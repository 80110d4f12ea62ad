"""Guards the C++ trainer against bad files: each ends in one sentence that names it, and nothing is written."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_native as qn

WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 48, 2, 1, 16, 2
CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
UP = "model.layers.1.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model of two small blocks in 4 bits, with double quantization."""
    torch.manual_seed(0)
    q_width, kv_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    tensors = {"model.embed_tokens.weight": torch.randn(256, WIDTH).bfloat16(), "model.norm.weight": torch.ones(WIDTH)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{norm}.weight"] = torch.ones(WIDTH).half()
        for name, shape in {
            "self_attn.q_proj": (q_width, WIDTH),
            "self_attn.k_proj": (kv_width, WIDTH),
            "self_attn.v_proj": (kv_width, WIDTH),
            "self_attn.o_proj": (WIDTH, q_width),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
        }.items():
            tensors |= qn.quantize(0.1 * torch.randn(shape)).to_bitsandbytes(f"{block}{name}.")
    folder = tmp_path_factory.mktemp("whole")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "data.txt").write_bytes(bytes(range(256)) * 4)
    return folder


@pytest.fixture
def model(whole, tmp_path):
    """A copy, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def train(trainer, model, out, *options, **kwargs):
    """One step."""
    command = [trainer, "--model", model, "--data", model / "data.txt", "--out", out]
    command += ["--steps", 1, "--sequence", 8, "--batch", 1, "--rank", 2, *options]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, **kwargs)


def check_refused(done, *parts):
    """Status 1 and one line that has these parts, before anything else was said."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("trainer: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def check_model_is_refused(trainer, model, tmp_path, *parts):
    check_refused(train(trainer, model, tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


def test_undamaged_model_is_trained(trainer, model, tmp_path):
    done = train(trainer, model, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


# ---- config.json ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "model.embed_tokens.weight: expected [256, 64] as config.json says, got [256, 32]"),
        ({"vocab_size": 2000000}, "model.embed_tokens.weight: expected [2000000, 32] as config.json says"),
        ({"head_dim": 4096}, "layers.0.self_attn.q_proj.weight: expected [8192, 32] as config.json says, got [32, 32]"),
        ({"head_dim": 2**40}, "head_dim: expected an integer from 1 to 8388608, got 1099511627776"),
        ({"head_dim": 15}, "head_dim: expected an even size of a head"),
        ({"intermediate_size": 9999}, "mlp.gate_proj.weight: expected [9999, 32] as config.json says, got [48, 32]"),
        ({"num_hidden_layers": 3}, "the checkpoint has no tensor model.layers.2."),
        ({"num_hidden_layers": 1}, "expected 1 layers as config.json says, got one more"),
        ({"num_attention_heads": 3}, "head_dim: expected a number, where num_attention_heads does not divide"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected an integer from 1"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads: expected a divisor"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: expected an integer from 1 to 2, got 4"),
        ({"num_key_value_heads": 2}, "self_attn.k_proj.weight: expected [32, 32] as config.json says, got [16, 32]"),
        ({"tie_word_embeddings": False}, "no tensor lm_head.weight"),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings: expected true or false, got "no"'),
        ({"hidden_size": -32}, "hidden_size: expected an integer from 1 to 16777216, got -32"),
        ({"hidden_size": 32.5}, "hidden_size: expected an integer from 1 to 16777216, got 32.5"),
        ({"hidden_size": 32.0}, "hidden_size: expected an integer"),
        ({"hidden_size": 2**53 + 1}, "hidden_size: expected an integer from 1 to 16777216, got 9007199254740993"),
        ({"hidden_size": 10**40}, "hidden_size: expected an integer"),
        ({"hidden_size": "32"}, 'hidden_size: expected an integer from 1 to 16777216, got "32"'),
        ({"hidden_size": None}, "hidden_size: expected an integer from 1 to 16777216, got null"),
        ({"hidden_size": [32]}, "hidden_size: expected an integer from 1 to 16777216, got an array"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps: expected a number of at least 0"),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps: expected a number that is finite in fp32"),
        ({"rope_theta": 0}, "rope_theta: expected a number above 0"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_parameters.rope_theta: expected a number above 0"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type: expected rotary embeddings without scaling"),
        ({"rope_scaling": {}}, "rope_scaling: expected rotary embeddings without scaling"),
        ({"model_type": "gpt2"}, 'model_type: expected llama, for this trainer, got "gpt2"'),
        ({"model_type": None}, "model_type: expected a string, got null"),
        ({"attention_bias": True}, "attention_bias: expected no biases"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            'quant_method: expected bitsandbytes, for this trainer, got "fp8"',
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "load_in_4bit: expected true, for this trainer, got null",
        ),
        ({"quantization_config": "fp8"}, "quantization_config"),
    ],
)
def test_bad_field_of_the_config_is_named_in_the_error(trainer, model, tmp_path, change, message):
    (model / "config.json").write_text(json.dumps(CONFIG | change))
    check_model_is_refused(trainer, model, tmp_path, message)


@pytest.mark.parametrize("extra", ["weight_scale", "weight_scale_inv", "SCB", "bias"])
def test_tensor_that_would_be_left_out_is_named_in_the_error(trainer, model, tmp_path, extra):
    name = f"model.layers.1.mlp.up_proj.{extra}"
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, name: torch.ones(INNER)}, model / "model.safetensors")
    check_model_is_refused(trainer, model, tmp_path, f"{name}: expected a tensor of this model, got another, F32 [48]")


def test_tensor_that_is_computed_or_tied_may_be_there(trainer, model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors")
    assert train(trainer, model, tmp_path / "out").returncode == 0
    tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, model / "model.safetensors")
    check_model_is_refused(trainer, model, tmp_path / "again", "lm_head.weight: expected the embeddings, to which it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "expected a key at byte 1"),
        ("[]", "expected an object, got an array"),
        ('{"hidden_size": 32, "hidden_size": 64}', "a second key hidden_size at byte 33"),
        ('{"eps": NaN}', "expected a value at byte 8"),
        ('{"eps": -Infinity}', "expected a value at byte 9"),
        ('{"eps": 1e999}', "expected a number that a double can hold at byte 8"),
        ('{"eps": 01}', "expected '}' at byte 9"),
        ('{"eps": 1.}', "expected a value at byte 10"),
        ('{"name": "\\ud83d"}', "expected a pair of surrogates"),
        ('{"name": "\\ude00\\ud83d"}', "expected a pair of surrogates"),
        ('{"name": "\n"}', "expected an escape for a control character"),
        ('{"name": "\\x"}', "expected an escape"),
        ("[" * 1000, "expected fewer levels"),
        ('{"a": 1} x', "expected the end at byte 9"),
        ('{"\\u001b[31m\\n": 1, "\\u001b[31m\\n": 2}', 'a second key "\\u001b[31m\\u000a"'),
    ],
)
def test_bad_json_of_the_config_is_named_in_the_error(trainer, model, tmp_path, text, message):
    (model / "config.json").write_text(text)
    check_model_is_refused(trainer, model, tmp_path, "config.json: ", message)


def test_surrogate_pair_is_one_character(trainer, model, tmp_path):
    (model / "config.json").write_text('{"model_type": "\\ud83d\\ude00"}')
    check_model_is_refused(trainer, model, tmp_path, 'expected llama, for this trainer, got "\U0001f600"')


def test_pipe_is_named_in_the_error(trainer, model, tmp_path):
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    check_model_is_refused(trainer, model, tmp_path, "config.json: is empty, or no file that can be mapped")


# ---- safetensors files ----


def rewrite_header(path, change):
    """The header as a dict, through `change`, into the file again."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = change(json.loads(data[8 : 8 + length]))
    header = (text if isinstance(text, str) else json.dumps(text)).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


NORM = "model.norm.weight"
HALF = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (NORM, {"shape": [2**32, 2**32], "data_offsets": [0, 0]}, "has 0 bytes, which are not F32 [4294967296, 429"),
        (NORM, {"shape": [2**53, 2**53, 0], "data_offsets": [0, 0]}, "has 0 bytes, which are not F32"),
        (NORM, {"shape": [-32]}, f"{NORM}.shape[0]: expected an integer from 0"),
        (NORM, {"shape": [32.5]}, f"{NORM}.shape[0]: expected an integer from 0 to 9007199254740992, got 32.5"),
        (NORM, {"shape": [2**63]}, f"{NORM}.shape[0]: expected an integer from 0"),
        (NORM, {"shape": 32}, f"{NORM}.shape: expected an array, got 32"),
        (NORM, {"shape": [31]}, "has 128 bytes, which are not F32 [31]"),
        (NORM, {"shape": [8, 4]}, f"{NORM}: expected [32] as config.json says, got [8, 4]"),
        (NORM, {"dtype": "F64"}, "has 128 bytes, which are not F64 [32]"),
        (NORM, {"dtype": "I32"}, f"{NORM}: expected F32, BF16 or F16, got I32"),
        (NORM, {"dtype": "U8", "shape": [128]}, f"{NORM}: expected [32] as config.json says, got [128]"),
        (HALF, {"dtype": "I16"}, f"{HALF}: expected F32, BF16 or F16, got I16"),
        (NORM, {"dtype": "F99"}, f'{NORM}.dtype: expected a dtype that is known here, got "F99"'),
        (NORM, {"dtype": "F" + "9" * 1000}, f"{NORM}.dtype: expected a dtype that is known here"),
        (NORM, {"dtype": 32}, f"{NORM}.dtype: expected a string, got 32"),
        (NORM, {"data_offsets": [-128, 0]}, f"{NORM}.data_offsets[0]: expected an integer from 0"),
        (NORM, {"data_offsets": [0.5, 128.5]}, f"{NORM}.data_offsets[0]: expected an integer from 0"),
        (NORM, {"data_offsets": [0, 10**30]}, f"{NORM}.data_offsets[1]: expected an integer from 0"),
        (NORM, {"data_offsets": [128, 0]}, f"{NORM}: lies in bytes 128 ... 0 of the file's"),
        (NORM, {"data_offsets": [2**52, 2**52 + 128]}, f"{NORM}: lies in bytes 4503599627370496 ..."),
        (NORM, {"data_offsets": [0, 128, 256]}, f"{NORM}.data_offsets: expected two numbers"),
        (NORM, {"data_offsets": None}, f"{NORM}.data_offsets: expected an array, got null"),
        (UP, {"dtype": "I8"}, f"{UP}: expected U8, got I8"),
        (f"{UP}.absmax", {"dtype": "BOOL"}, f"{UP}.absmax: expected U8, got BOOL"),
        (STATE, {"dtype": "I8"}, f"{STATE}: expected U8, got I8"),
    ],
)
def test_lie_of_a_header_is_named_in_the_error(trainer, model, tmp_path, name, fields, message):
    def change(header):
        header[name].update(fields)
        return header

    rewrite_header(model / "model.safetensors", change)
    check_model_is_refused(trainer, model, tmp_path, message)


def test_tensor_in_a_header_twice_is_named_in_the_error(trainer, model, tmp_path):
    rewrite_header(
        model / "model.safetensors",
        lambda header: json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}',
    )
    check_model_is_refused(trainer, model, tmp_path, f"model.safetensors: JSON: a second key {NORM} at byte")


def test_tensor_in_two_files_is_named_in_the_error(trainer, model, tmp_path):
    save_file({NORM: torch.ones(WIDTH)}, model / "other.safetensors")
    check_model_is_refused(
        trainer, model, tmp_path, f"other.safetensors: {NORM}: is in another file of the folder, too"
    )


@pytest.mark.parametrize("left", [0, 7, 8, 100, -1])
def test_file_that_is_cut_short_is_named_in_the_error(trainer, model, tmp_path, left):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    check_model_is_refused(trainer, model, tmp_path, "model.safetensors: ")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001])
def test_length_of_a_header_beyond_its_file_is_in_the_error(trainer, model, tmp_path, length):
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    check_model_is_refused(trainer, model, tmp_path, "is cut short or no safetensors file", str(length))


def test_folder_without_tensors_is_called_so_in_the_error(trainer, model, tmp_path):
    (model / "model.safetensors").unlink()
    check_model_is_refused(trainer, model, tmp_path, "there is no *.safetensors file")
    (model / "model.safetensors").mkdir()
    check_model_is_refused(trainer, model, tmp_path, "model.safetensors: is empty, or no file that can be mapped")


def test_link_out_of_the_folder_is_read(trainer, model, tmp_path):
    """Caches of models consist of links, and the files are only read."""
    (model / "model.safetensors").rename(tmp_path / "elsewhere")
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert train(trainer, model, tmp_path / "out").returncode == 0


# ---- weights in 4 bits ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocksize": 0}, f"{STATE}: blocksize: expected an integer from 32 to 4096, got 0"),
        ({"blocksize": -64}, "blocksize: expected an integer from 32 to 4096, got -64"),
        ({"blocksize": 8192}, "blocksize: expected an integer from 32 to 4096, got 8192"),
        ({"blocksize": 64.5}, "blocksize: expected an integer from 32 to 4096, got 64.5"),
        ({"blocksize": 32}, f"{UP}.absmax: expected 48 bytes, got 24"),
        ({"shape": [INNER, WIDTH - 1]}, f"{UP}: expected [48, 32] as config.json says, got [48, 31]"),
        ({"shape": [WIDTH, INNER]}, f"{UP}: expected [48, 32] as config.json says, got [32, 48]"),
        ({"shape": [2**32, 2**32]}, f"{UP}: expected [48, 32] as config.json says, got [4294967296, 4294967296]"),
        ({"shape": [-INNER, -WIDTH]}, "shape[0]: expected an integer from 1"),
        ({"shape": []}, f"{UP}: expected [48, 32] as config.json says, got []"),
        ({"quant_type": "fp4"}, 'quant_type: expected nf4, got "fp4"'),
        ({"nested_blocksize": 0}, "nested_blocksize: expected an integer from 1 to 2147483647, got 0"),
        ({"nested_blocksize": 2**40}, "nested_blocksize: expected an integer from 1 to 2147483647"),
        ({"nested_blocksize": 16}, f"{UP}.nested_absmax: expected [2], got [1]"),
        ({"nested_offset": 1e300}, "nested_offset: expected a number that is finite in fp32"),
        ({"nested_offset": "0"}, 'nested_offset: expected a number, got "0"'),
    ],
)
def test_contradiction_of_a_quant_state_is_named_in_the_error(trainer, model, tmp_path, change, message):
    tensors = load_file(model / "model.safetensors")
    state = json.loads(bytes(tensors[STATE].tolist())) | change
    tensors[STATE] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, model / "model.safetensors")
    check_model_is_refused(trainer, model, tmp_path, message)


def test_blocksize_beside_the_powers_of_two_is_in_the_error(trainer, model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors[STATE] = torch.frombuffer(
        bytearray(bytes(tensors[STATE].tolist()).replace(b'"blocksize": 64,', b'"blocksize": 48,', 1)),
        dtype=torch.uint8,
    )
    tensors[f"{UP}.absmax"] = torch.zeros(32, dtype=torch.uint8)
    save_file(tensors, model / "model.safetensors")
    check_model_is_refused(trainer, model, tmp_path, f"{UP}.blocksize: expected a power of two, 16 ... 4096, got 48")


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("", lambda t: t[:-1], f"{UP}: expected 768 bytes, got 767"),
        ("", lambda t: None, f"no tensor {UP}"),
        (".absmax", lambda t: t[:-1], f"{UP}.absmax: expected 24 bytes, got 23"),
        (".absmax", lambda t: t.float(), f"{UP}.absmax: expected U8, got F32"),
        (".nested_absmax", lambda t: t * torch.nan, f"{UP}.nested_absmax: expected finite values, got nan at 0"),
        (".nested_absmax", lambda t: t.int(), f"{UP}.nested_absmax: expected F32, BF16 or F16, got I32"),
        (".nested_absmax", lambda t: None, f"{UP}.absmax: expected F32, BF16 or F16, got U8"),
        (".nested_quant_map", lambda t: t[:255], f"{UP}.nested_quant_map: expected [256], got [255]"),
        (".nested_quant_map", lambda t: t / 0, f"{UP}.nested_quant_map: expected finite values, got"),
        (".quant_map", lambda t: t.repeat(2), f"{UP}.quant_map: expected [16], got [32]"),
        (".quant_map", lambda t: t / 0, f"{UP}.quant_map: expected finite values, got -inf at 0"),
        (".nested_absmax", lambda t: t * 0 + 3e38, f"{UP}.absmax: expected codes of finite scales"),
        (".quant_state.bitsandbytes__nf4", lambda t: None, f"{UP}: expected nf4 or fp4 of bitsandbytes"),
        (".quant_state.bitsandbytes__nf4", lambda t: t[:-1], f"{STATE}: JSON: expected '}}' at byte"),
    ],
)
def test_missing_or_infinite_part_of_a_weight_is_named_in_the_error(trainer, model, tmp_path, suffix, change, message):
    tensors = load_file(model / "model.safetensors")
    changed = change(tensors.pop(f"{UP}{suffix}"))
    if changed is not None:
        tensors[f"{UP}{suffix}"] = changed
    if "finite scales" in message:
        tensors[f"{UP}.nested_quant_map"] *= 4
        tensors[f"{UP}.absmax"][0] = 255
    save_file(tensors, model / "model.safetensors")
    check_model_is_refused(trainer, model, tmp_path, message)


def test_infinity_in_an_embedding_is_located_in_the_error(trainer, model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][1, 2] = torch.inf
    save_file(tensors, model / "model.safetensors")
    check_model_is_refused(trainer, model, tmp_path, "model.embed_tokens.weight: expected finite values, got inf at 34")


# ---- the text ----


@pytest.mark.parametrize("token", [-1, 256, 2**31 - 1])
def test_token_outside_the_vocabulary_is_located_in_the_error(trainer, model, tmp_path, token):
    """Also one that is only ever predicted."""
    tokens = torch.zeros(1000, dtype=torch.int32)
    tokens[-1] = token
    (model / "data.txt").write_bytes(tokens.numpy().tobytes())
    done = train(trainer, model, tmp_path / "out", "--token-ids")
    check_refused(done, f"data.txt: token {token} at 999 is outside the model's vocabulary of 256")


def test_length_of_token_ids_that_end_within_a_token_is_in_the_error(trainer, model, tmp_path):
    (model / "data.txt").write_bytes(bytes(1001))
    check_refused(train(trainer, model, tmp_path / "out", "--token-ids"), "expected int32 token ids, got 1001 bytes")


# ---- the adapter ----

PARTS = ["adapter_config.json", "adapter_model.safetensors"]


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def limit_files(size, action):
    """For a child: files of at most `size` bytes, a stand-in for a full disk; what a longer write does."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, action)

    return limit


def test_full_disk_leaves_the_adapter_of_before(trainer, model, tmp_path):
    out = tmp_path / "out"
    assert train(trainer, model, out, "--lr", 0.1).returncode == 0
    before = {name: (out / name).read_bytes() for name in PARTS}
    done = train(trainer, model, out, "--seed", 2, preexec_fn=limit_files(4096, signal.SIG_IGN))
    assert (done.returncode, done.stderr) == (1, f"trainer: {out}/adapter_model.safetensors: File too large\n")
    assert "adapter:" not in done.stdout
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root may mount a small disk")
def test_full_disk_is_one_sentence(trainer, model, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mount is not permitted")
    try:
        done = train(trainer, model, disk / "out", "--rank", 64)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "adapter_model.safetensors: No space left on device" in done.stderr
        assert names(disk / "out") == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_killed_run_leaves_no_adapter_and_the_next_replaces_its_leftovers(trainer, model, tmp_path):
    out = tmp_path / "out"
    done = train(trainer, model, out, preexec_fn=limit_files(4096, signal.SIG_DFL))
    assert done.returncode == -signal.SIGXFSZ, "killed while it writes"
    assert names(out) and all(name.endswith(".partial") for name in names(out))
    assert train(trainer, model, out).returncode == 0
    assert names(out) == PARTS
    assert len(load_file(out / "adapter_model.safetensors")) == 2 * 7 * LAYERS


def test_leftover_link_is_replaced_and_its_target_is_kept(trainer, model, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.write_text("kept")
    (out / "adapter_config.json.partial").symlink_to(elsewhere)
    assert train(trainer, model, out).returncode == 0
    assert elsewhere.read_text() == "kept" and names(out) == PARTS


def test_out_that_is_a_file_is_one_sentence(trainer, model, tmp_path):
    (tmp_path / "out").write_text("")
    done = train(trainer, model, tmp_path / "out")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and str(tmp_path / "out") in done.stderr


def test_text_for_a_vocabulary_beyond_bytes_gets_advice(trainer, model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.randn(300, WIDTH)
    save_file(tensors, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 300}))
    check_refused(train(trainer, model, tmp_path / "out"), "and the model's is 300: tokenize it, and give --token-ids")


def test_model_in_16_bits_is_told_how_to_be_quantized(trainer, model, tmp_path):
    tensors = {name: tensor for name, tensor in load_file(model / "model.safetensors").items() if "weight." not in name}
    save_file(tensors, model / "model.safetensors")
    check_model_is_refused(trainer, model, tmp_path, "is quantized first: python -m qlora_native quantize --model")


# ---- what it says ----


def test_help_is_printed(trainer):
    done = subprocess.run([trainer, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith("trainer --model FOLDER --data FILE --out FOLDER")


def test_first_step_is_printed_at_once(trainer, model, tmp_path):
    done = train(trainer, model, tmp_path / "out")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[2].startswith("step 1/"), done.stdout
    assert all(line.count("step ") <= 1 for line in lines)
