"""Writes the seeds of tests/fuzz/corpus: python tests/fuzz/make_corpus.py. Inputs that crashed are there by hand."""

from __future__ import annotations

from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


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
    for name, data in seeds_of_api().items():
        (CORPUS / "api" / name).write_bytes(data)


if __name__ == "__main__":
    main()
