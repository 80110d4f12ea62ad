"""The cases that are measured, as data: operation x shape x dtype.

**Shapes** are [N, K] = [out_features, in_features], torch's order for a weight. `4096x14336` is the down projection of
an 8-billion-parameter Llama, which ggml's benchmark calls m=4096, k=14336; `14336x4096` is its gate and up projection.
Weights are NF4 with double quantization and blocksize 64, 0.5159 bytes a weight, where a case names no other format.

**Devices**: "cpu" and "cuda" (a GPU) each have cases of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

OURS = "qlora_native"  # our name among the contestants
BLOCKSIZE = 64
LORA_RANK = 16
LORA_SCALING = 2.0
# {format: its blocksize here}.
BLOCKSIZES = {"nf4": BLOCKSIZE, "mxfp4": 32, "nvfp4": 16}
# bytes a weight: half for the code, one for each scale, four for each 256 scales
BYTES_PER_WEIGHT = {format: 1 / 2 + 1 / size + 4 / (256 * size) for format, size in BLOCKSIZES.items()}

SQUARE = (4096, 4096)
DOWN = (4096, 14336)
UP = (14336, 4096)
LARGE_SQUARE = (8192, 8192)
SHAPES = {"cpu": (SQUARE, DOWN, UP), "cuda": (SQUARE, DOWN, LARGE_SQUARE)}
# How cost grows with the width of a square weight, the rank of the adapter, the rows of x and the threads.
WIDTHS = (512, 1024, 2048, 4096, 8192)
RANKS = (4, 8, 16, 32, 64, 128, 256)
GROWTH_M = 512
# Rows of x on a GPU, from a batch that generates to one that trains.
GPU_MS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
GPU_LORA_M = 4096
# The parameters that optimizer.py steps: the LoRA adapter of a small model, and one large tensor.
ADAMW_ADAPTER, ADAMW_TENSOR = "LoRA adapter", "one tensor"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table.

    operation  quantize | dequantize | forward (Y = X·Wᵀ) | dx (dX = dY·W) | lora_gradients (dA, dB)
    M          rows of X or dY, or 0
    dtype      of the activations, of the source of `quantize`, or of the result of `dequantize`
    via        function: `qn.linear`, or for dx the op itself, like the bare product of the peers
               layer: `Linear4bit.forward` | op: the torch op without its Python wrapper | autograd: the backward pass
    rank       of the adapter inside the product; such a case is compared with our own product without an adapter
    threads    0 means all of the machine's
    format     of the weight; a product with another format than nf4 is compared with our own with nf4
    memory     default: glibc's allocator, with fresh pages from the system for every block of at least 32 MB
               kept: freed memory stays with the process, so that no call pays for page faults (timing.py)
    """

    operation: str
    shape: tuple[int, int]
    M: int = 0
    dtype: str = "bfloat16"
    via: str = "function"
    rank: int = 0
    dropout: float = 0.0
    threads: int = 0
    format: str = "nf4"
    memory: str = "default"

    @property
    def name(self) -> str:
        """The name of the case in the table."""
        parts = [self.operation]
        if self.rank and self.operation != "lora_gradients":
            parts.append(f"+ LoRA r={self.rank}")
        if self.format != "nf4":
            parts.append(self.format)
        if self.dropout:
            parts.append(f"dropout {self.dropout:g}")
        if self.via != "function":
            parts.append(f"({self.via})")
        if self.memory != "default":
            parts.append("(kept memory)")
        if self.threads:
            parts.append(f"({self.threads} thread{'s' if self.threads > 1 else ''})")
        return " ".join(parts)

    @property
    def flops(self) -> float:
        """The floating point operations of the products, with the adapter."""
        N, K = self.shape
        if self.operation == "lora_gradients":
            return 2.0 * self.M * self.rank * (N + K)
        return 2.0 * self.M * (N * K + self.rank * (N + K))  # 0 where M is 0

    @property
    def bytes(self) -> float:
        """The bytes that must move: codes and scales, and the 16- or 32-bit weight if the operation has one."""
        N, K = self.shape
        size = 4 if self.dtype == "float32" else 2
        if self.operation == "lora_gradients":
            return self.M * (N + K) * size
        return N * K * (BYTES_PER_WEIGHT[self.format] + (size if self.operation in ("quantize", "dequantize") else 0))


@dataclass(frozen=True, kw_only=True)
class Row(Case):
    """A case with what was measured.

    us         {contestant: microseconds of a call, the median}
    gb_per_s   the bandwidth of memory while the case ran, in 1e9 bytes/s
    """

    us: dict[str, float]
    gb_per_s: float

    def limit_us(self, limits: dict[str, float]) -> float:
        """The microseconds that the machine's memory or arithmetic takes, whichever takes longer."""
        return max(self.bytes / self.gb_per_s / 1e3, 1e6 * self.flops / matrix_rate(limits, self.dtype))

    def memory_bound(self, limits: dict[str, float]) -> bool:
        """Whether memory takes longer than arithmetic."""
        return self.bytes / self.gb_per_s >= 1e9 * self.flops / matrix_rate(limits, self.dtype)


def matrix_rate(limits: dict[str, float], dtype: str) -> float:
    """The flop/s that a product in `dtype` can reach; `limits` as of machine.limits().

    It is at least float32's, in which numbers of 16 bits can be multiplied too: on a processor without bf16
    instructions torch's product takes several times as long in bfloat16 as in float32.
    """
    return max(limits[dtype], limits.get("float32", 0.0))


def cases(shape: tuple[int, int], device: str = "cpu") -> list[Case]:
    """The cases of a shape on a device. On a CPU the shape UP has only the essential ones."""

    def products(operation: str, Ms: tuple[int, ...], **fields: object) -> list[Case]:
        return [Case(operation=operation, shape=shape, M=M, **fields) for M in Ms]

    if device == "cuda":
        return [
            Case(operation="dequantize", shape=shape),
            *products("forward", (1, 4, 16, *GPU_MS)),
            *products("forward", (1, 64, GROWTH_M, GPU_LORA_M), rank=LORA_RANK),
            *products("dx", GPU_MS),
            *products("dx", (GROWTH_M, GPU_LORA_M), rank=LORA_RANK),
            *products("lora_gradients", (GPU_LORA_M,), rank=LORA_RANK),
            *products("forward", (1, 2048), dtype="float32"),
            *products("dx", (2048,), dtype="float32"),
        ]
    if shape == UP:
        return products("forward", (1, 16, 256, 2048)) + products("dx", (16, 256, 2048))
    found = [
        Case(operation="quantize", shape=shape),
        Case(operation="quantize", shape=shape, memory="kept"),
        Case(operation="dequantize", shape=shape),
        Case(operation="dequantize", shape=shape, memory="kept"),
        Case(operation="dequantize", shape=shape, dtype="float32", memory="kept"),
        *products("forward", (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)),
        *products("forward", (1,), via="layer"),
        *products("forward", (1,), via="op"),
        *products("forward", (1, 4, 16, 64), memory="kept"),
        *products("forward", (1, 16, 64, 256, 512), rank=LORA_RANK),
        *products("forward", (512,), rank=LORA_RANK, dropout=0.05),
        *products("dx", (1, 16, 32, 64, 128, 256, 512, 1024, 2048)),
        *products("dx", (16, 512), via="autograd"),
        *products("dx", (16, 64), memory="kept"),
        *products("dx", (16, 64, 256, 512), rank=LORA_RANK),
        *products("lora_gradients", (512,), rank=LORA_RANK),
        *products("forward", (1, 16, 64, 256, 512), dtype="float32"),
        *products("dx", (16, 64, 256, 512), dtype="float32"),
    ]
    if shape == SQUARE:
        for format in ("mxfp4", "nvfp4"):
            found += products("forward", (1, 16, 256), format=format) + products("dx", (256,), format=format)
    if shape != DOWN:  # where a call takes a second
        for operation in ("forward", "dx"):
            found += products(operation, (2048,), rank=LORA_RANK) + products(operation, (2048,), dtype="float32")
    return found


def growth(shape: tuple[int, int], threads: int) -> list[Case]:
    """The additional cases that show how cost grows. `threads` is the machine's number."""
    found = [Case(operation=operation, shape=shape, M=M) for operation, M in GROWTH_PRODUCTS]
    if shape != SQUARE:
        return found
    found = [Case(operation="forward", shape=shape, M=2)]
    for operation, via in (("forward", "function"), ("dx", "autograd")):
        found += [Case(operation=operation, shape=shape, M=GROWTH_M, rank=rank, via=via) for rank in RANKS]
    for count in (2**i for i in range(threads.bit_length())):
        if count < threads:
            found += [Case(operation=o, shape=shape, M=M, threads=count) for o, M in GROWTH_PRODUCTS]
    ranked = {(case.operation, case.via, case.rank) for case in cases(shape) if case.M == GROWTH_M and not case.dropout}
    return [case for case in found if not case.rank or (case.operation, case.via, case.rank) not in ranked]


GROWTH_PRODUCTS = (("forward", 1), ("forward", GROWTH_M), ("dx", GROWTH_M))


def quick(shape: tuple[int, int], device: str = "cpu") -> list[Case]:
    """A few cases of a shape, which run in seconds."""
    return [
        case
        for case in cases(shape, device)
        if case.M in (0, 1, 16, 256) and case.dtype == "bfloat16" and (case.via, case.memory) == ("function", "default")
    ]


# {training step: arguments of step.measure_alone}.
STEPS = {
    "step": {"processes": 5},
    "step_kept": {"keep_memory": True},
    "step_dropout": {"dropout": 0.05},
    "step_dense": {"dense": True},
}
