"""Train a small language model of bytes on text files, for the C++ trainer to fine-tune.

    python examples/cpp_trainer/make_model.py --data FILE... --out FOLDER
    python -m qlora_native quantize --model FOLDER --out FOLDER-nf4

A Llama of 0.8 M parameters with a vocabulary of 256: a token is a byte. transformers makes it and saves it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM


def train(text: bytes, steps: int, sequence: int = 128, batch: int = 8, lr: float = 3e-3) -> LlamaForCausalLM:
    """A model trained on random windows of `text`, all of it, in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    bar = trange(steps, desc="base model")
    for _ in bar:
        starts = torch.randint(0, len(tokens) - sequence, (batch,))
        windows = torch.stack([tokens[start : start + sequence] for start in starts.tolist()])
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="text files")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the model")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    model = train(b"\n".join(path.read_bytes() for path in args.data), args.steps)
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
