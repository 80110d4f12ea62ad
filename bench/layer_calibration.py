"""The time and memory of a calibration: of one layer of a large model's shapes, part by part.

    python bench/layer_calibration.py [--shape llama-7b] [--tokens 32768] [--output]

The layer has random weights, because neither time nor memory depends on them. Beside `qn.calibrate` stand the times
that torch takes for one forward of the layer over all tokens in bf16; for the Cholesky factors of the Gram matrices of
its inputs, in fp32; and for a product [N, K] by [K, K] in fp32 for each weight, which is as large as the error feedback
if half of each matrix is not left out. --output writes bench/results/<machine>/calibration.md.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import qlora_native as qn
import torch
from torch import nn

import large
import machine
import report
from tables import table

SEQUENCE, BATCH = 512, 4
RATE_SIZE = 2048  # of the matrices whose product gives torch's rate in fp32


def seconds(call: Callable[[], object]) -> float:
    """The time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def fp32_rate() -> float:
    """Operations a second of torch's product, the best of three."""
    a, b = torch.randn(RATE_SIZE, RATE_SIZE), torch.randn(RATE_SIZE, RATE_SIZE)
    return 2 * RATE_SIZE**3 / min(seconds(lambda: a @ b) for _ in range(3))


def cholesky(K: int) -> float:
    """The time of a Cholesky factor of [K, K] in fp32."""
    matrix = torch.randn(K, K)
    matrix = matrix @ matrix.T
    matrix.diagonal().add_(K)
    return seconds(lambda: torch.linalg.cholesky(matrix))


@torch.no_grad()
def measure(shape: str, tokens: int) -> dict:
    """Time the forward of a layer, and its calibration.

    Raises:
        RuntimeError: the calibration made no error of an output smaller.
    """
    torch.manual_seed(0)
    config = large.config_of(shape, 1)
    model = large.empty_model(config).eval()
    large.fill(model)
    batches = list(torch.randint(config.vocab_size, (tokens // SEQUENCE, SEQUENCE)).split(BATCH))
    linears = [module for module in model.model.layers[0].modules() if isinstance(module, nn.Linear)]
    model.model(batches[0], use_cache=False)
    needed = {"forward": sum(seconds(lambda ids=ids: model.model(ids, use_cache=False)) for ids in batches)}
    # q, k and v have one input, and so have gate and up.
    inputs = [config.hidden_size, linears[3].in_features, config.hidden_size, config.intermediate_size]
    needed["Cholesky factors"] = sum(map(cholesky, inputs))
    feedback = sum(2 * module.out_features * module.in_features**2 for module in linears)
    needed["error feedback"] = feedback / fp32_rate()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calibration = qn.calibrate(model, batches, progress=False)
    if calibration.fallbacks or any(each.after >= each.before for each in calibration.weights):
        raise RuntimeError(f"expected smaller errors of all outputs, got:\n{calibration}")
    return {
        "shape": shape,
        "layers": large.SHAPES[shape][1],
        "tokens": len(batches) * BATCH * SEQUENCE,
        "needed_s": needed,
        "calibrate_s": calibration.seconds,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "peak_before_bytes": 1024 * before,
    }


def page(found: dict) -> str:
    """The result as Markdown."""
    needed = sum(found["needed_s"].values())
    rows = [(name, f"{value:.1f}") for name, value in found["needed_s"].items()]
    rows += [("these together", f"{needed:.1f}"), ("qn.calibrate", f"{found['calibrate_s']:.1f}")]
    whole = found["layers"] * found["calibrate_s"] / 60
    return (
        f"One layer of {found['shape']}, {found['tokens']:,} tokens. qn.calibrate takes "
        f"{found['calibrate_s'] / needed:.2f} times as long as the three parts by torch; all {found['layers']} layers "
        f"would take {whole:.0f} minutes. Peak of the process: {found['peak_bytes'] / 2**30:.1f} GiB "
        f"({found['peak_before_bytes'] / 2**30:.1f} GiB before).\n\n{table(('part', 'seconds'), rows)}"
    )


def main() -> None:
    """The command line."""
    parser = report.parser(__doc__)
    parser.add_argument(
        "--shape", choices=[name for name in large.SHAPES if name.startswith("llama")], default="llama-7b"
    )
    parser.add_argument("--tokens", type=int, default=32_768)
    args = parser.parse_args()
    text = page(measure(args.shape, args.tokens))
    print(text)
    if args.output:
        description = machine.describe()
        head = f"# A calibration\n\n{report.head(description)}; `bench/layer_calibration.py`.\n\n"
        report.write(report.folder_of(description) / "calibration.md", head + text)


if __name__ == "__main__":
    main()
