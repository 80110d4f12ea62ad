"""What is measured: operation x shape x dtype, and what the figures should reach. Data, no code that runs anything.

**Shapes** are [N, K] = [out_features, in_features], torch's order for a weight. `4096x14336` is the down projection of
an 8-billion-parameter Llama, which ggml's benchmark calls m=4096, k=14336; `14336x4096` is its gate and up projection.
All weights are NF4 with double quantization and blocksize 64: 0.5159 bytes a weight.

**Devices** have cases and goals of their own: "cpu", and "cuda", a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCKSIZE = 64
LORA_RANK = 16
LORA_SCALING = 2.0
# bytes a weight: half for the code, one for each scale, four for each 256 scales
BYTES_PER_WEIGHT = 1 / 2 + 1 / BLOCKSIZE + 4 / (256 * BLOCKSIZE)

SQUARE = (4096, 4096)
DOWN = (4096, 14336)
UP = (14336, 4096)
LARGE_SQUARE = (8192, 8192)
SHAPES = {"cpu": (SQUARE, DOWN, UP), "cuda": (SQUARE, DOWN, LARGE_SQUARE)}
# How cost grows: with the width of a square weight, the rank of the adapter, the rows of x and the threads.
WIDTHS = (512, 1024, 2048, 4096, 8192)
RANKS = (4, 8, 16, 32, 64, 128, 256)
GROWTH_M = 512
# Tokens on a GPU: of a batch that generates, and of one that trains.
GPU_MS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
GPU_LORA_M = 4096
# What optimizer.py steps: the LoRA adapter of a small model, and one tensor.
ADAMW_ADAPTER, ADAMW_TENSOR = "LoRA adapter", "one tensor"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table.

    operation  quantize | dequantize | forward (Y = X·Wᵀ) | dx (dX = dY·W) | lora_gradients (dA, dB)
    M          rows of X or dY; 0 where there are none
    dtype      of the activations; of the source of `quantize`, of the result of `dequantize`
    via        function: `qn.linear`, and for dx the op called directly, as the peers' bare product is
               layer: `Linear4bit.forward` | op: the torch op without its Python wrapper | autograd: the backward pass
    rank       of the adapter inside the product. Such a case is compared with our own product without it
    threads    0: all of the machine's
    memory     default: as glibc's allocator comes, fresh pages from the system for every block of 32 MB and more
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
    memory: str = "default"

    @property
    def name(self) -> str:
        """For the table."""
        parts = [self.operation]
        if self.rank and self.operation != "lora_gradients":
            parts.append(f"+ LoRA r={self.rank}")
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
        """Floating point operations of the products, adapter included."""
        N, K = self.shape
        if self.operation == "lora_gradients":
            return 2.0 * self.M * self.rank * (N + K)
        return 2.0 * self.M * (N * K + self.rank * (N + K))  # 0 where M is 0

    @property
    def bytes(self) -> float:
        """Bytes that must move: codes and scales, and the 16- or 32-bit weight where the operation has one."""
        N, K = self.shape
        size = 4 if self.dtype == "float32" else 2
        if self.operation == "lora_gradients":
            return self.M * (N + K) * size
        return N * K * (BYTES_PER_WEIGHT + (size if self.operation in ("quantize", "dequantize") else 0))


def cases(shape: tuple[int, int], device: str = "cpu") -> list[Case]:
    """Every case of a shape on a device; on a CPU the essential ones of UP, and all of any other shape."""

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
        *products("forward", (1, 4, 16, 64, 256, 512, 1024, 2048)),
        *products("forward", (1,), via="layer"),
        *products("forward", (1,), via="op"),
        *products("forward", (1, 4, 16, 64), memory="kept"),
        *products("forward", (1, 16, 64, 256, 512), rank=LORA_RANK),
        *products("forward", (512,), rank=LORA_RANK, dropout=0.05),
        *products("dx", (1, 16, 64, 256, 512, 1024, 2048)),
        *products("dx", (16, 512), via="autograd"),
        *products("dx", (16, 64), memory="kept"),
        *products("dx", (16, 64, 256, 512), rank=LORA_RANK),
        *products("lora_gradients", (512,), rank=LORA_RANK),
        *products("forward", (1, 16, 64, 256, 512), dtype="float32"),
        *products("dx", (16, 64, 256, 512), dtype="float32"),
    ]
    if shape != DOWN:  # where a call takes a second
        for operation in ("forward", "dx"):
            found += products(operation, (2048,), rank=LORA_RANK) + products(operation, (2048,), dtype="float32")
    return found


def growth(shape: tuple[int, int], threads: int) -> list[Case]:
    """What `cases` lacks to see how cost grows; `threads`: of the machine."""
    found = [Case(operation=operation, shape=shape, M=M) for operation, M in GROWTH_PRODUCTS]
    if shape != SQUARE:
        return found
    found = [Case(operation="forward", shape=shape, M=M) for M in (2, 8, 32, 128)]
    for operation, via in (("forward", "function"), ("dx", "autograd")):
        found += [Case(operation=operation, shape=shape, M=GROWTH_M, rank=rank, via=via) for rank in RANKS]
    for count in (2**i for i in range(threads.bit_length())):
        if count < threads:
            found += [Case(operation=o, shape=shape, M=M, threads=count) for o, M in GROWTH_PRODUCTS]
    ranked = {(case.operation, case.via, case.rank) for case in cases(shape) if case.M == GROWTH_M and not case.dropout}
    return [case for case in found if not case.rank or (case.operation, case.via, case.rank) not in ranked]


GROWTH_PRODUCTS = (("forward", 1), ("forward", GROWTH_M), ("dx", GROWTH_M))


def quick(shape: tuple[int, int], device: str = "cpu") -> list[Case]:
    """A few cases of a shape, to see in seconds that all is well."""
    return [
        case
        for case in cases(shape, device)
        if case.M in (0, 1, 16, 256) and case.dtype == "bfloat16" and (case.via, case.memory) == ("function", "default")
    ]


# Training steps: how step.measure_alone takes them.
STEPS = {"step": {"processes": 5}, "step_kept": {"keep_memory": True}, "step_dropout": {"dropout": 0.05}}


# --------------------------------------------------------------------------------------------------- what to reach


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One line of the table of goals: which cases, which figure, and what it must reach.

    figure   "limit": fraction of the machine's limit | the name of a peer: times as fast as it | "lora": slowdown
             against the product without the adapter | "step": tokens/s over bitsandbytes + PEFT
             "memory": extra bytes of one call | "published": times as fast as PUBLISHED_US
    operation  of a case; or one of STEPS, "memory", or what optimizer.py steps
    isa      None: any but those that have goals of their own
    shape    None: any
    """

    label: str
    figure: str
    must: float | None
    aim: float | None = None
    operation: str
    Ms: tuple[int, ...] = (0,)
    dtype: str = "bfloat16"
    rank: int = 0
    memory: str = "default"
    isa: str | None = None
    shape: tuple[int, int] | None = None
    device: str = "cpu"


LARGE = (256, 512, 1024, 2048)
# ggml's IQ4_NL at M=1 with 8-bit activations, on a machine of the same kind; measured once, not by this program.
PUBLISHED_US = {DOWN: 2420.0}

GOALS = [
    Goal(label="quantize from bf16", figure="bitsandbytes", must=60, operation="quantize"),
    Goal(label="quantize from bf16", figure="limit", must=None, aim=0.60, operation="quantize", memory="kept"),
    Goal(label="dequantize to bf16", figure="limit", must=0.75, aim=0.95, operation="dequantize", memory="kept"),
    Goal(label="forward, M=1", figure="limit", must=0.60, aim=0.90, operation="forward", Ms=(1,)),
    Goal(label="forward, M=1", figure="torch_dense", must=4, operation="forward", Ms=(1,)),
    Goal(label="forward, M=1", figure="bitsandbytes", must=20, operation="forward", Ms=(1,)),
    Goal(
        label="forward, M=1, against ggml's IQ4_NL", figure="published", must=None, aim=2, operation="forward", Ms=(1,)
    ),
    Goal(label="forward, M=4", figure="torch_dense", must=2.5, aim=3.5, operation="forward", Ms=(4,)),
    Goal(label="forward, M=16", figure="torch_dense", must=1.4, aim=1.8, operation="forward", Ms=(16,)),
    Goal(label="forward, M=64", figure="torch_dense", must=1.1, aim=1.2, operation="forward", Ms=(64,)),
    Goal(label="dX, M=16", figure="torch_dense", must=1.7, aim=2.2, operation="dx", Ms=(16,)),
    Goal(label="dX, M=64", figure="torch_dense", must=1.2, aim=1.35, operation="dx", Ms=(64,)),
    Goal(label="forward, M=256…2048", figure="torch_dense", must=0.97, aim=1.05, operation="forward", Ms=LARGE),
    Goal(label="dX, M=256…2048", figure="torch_dense", must=0.97, aim=1.05, operation="dx", Ms=LARGE),
    Goal(
        label="LoRA r=16 inside the forward product",
        figure="lora",
        must=0.08,
        aim=0.04,
        operation="forward",
        Ms=(1, 16, 64, *LARGE),
        rank=LORA_RANK,
    ),
    Goal(
        label="LoRA r=16 inside dX",
        figure="lora",
        must=0.08,
        aim=0.04,
        operation="dx",
        Ms=(16, 64, *LARGE),
        rank=LORA_RANK,
    ),
    Goal(label="a training step of SmolLM2", figure="step", must=1.4, aim=1.8, operation="step"),
    Goal(label="the same", figure="step", must=None, operation="step_kept", memory="kept"),
    Goal(label="the same with LoRA dropout 0.05", figure="step", must=None, operation="step_dropout"),
    Goal(label="AdamW8bit, 4.9 M in 360 tensors", figure="bitsandbytes", must=8, operation=ADAMW_ADAPTER),
    Goal(label="AdamW8bit, 4.9 M in 360 tensors", figure="torch_fused", must=1, operation=ADAMW_ADAPTER),
    Goal(label="AdamW8bit, one tensor of 100 M", figure="limit", must=0.60, operation=ADAMW_TENSOR),
    Goal(label="extra memory of one call", figure="memory", must=1, operation="memory"),
    Goal(
        label="fp32 forward, M=256…2048", figure="torch_dense", must=0.9, operation="forward", Ms=LARGE, dtype="float32"
    ),
    Goal(label="fp32 dX, M=256…2048", figure="torch_dense", must=0.9, operation="dx", Ms=LARGE, dtype="float32"),
    Goal(
        label="fp32 forward, M up to 512",
        figure="bitsandbytes",
        must=1,
        operation="forward",
        Ms=(1, 16, 64, 256, 512),
        dtype="float32",
    ),
    Goal(
        label="fp32 dX, M up to 512",
        figure="bitsandbytes",
        must=1,
        operation="dx",
        Ms=(16, 64, 256, 512),
        dtype="float32",
    ),
    Goal(
        label="AVX2, fp32 forward, M=1",
        figure="torch_dense",
        must=3,
        operation="forward",
        Ms=(1,),
        dtype="float32",
        isa="avx2",
    ),
    Goal(
        label="AVX2, fp32 forward, M=256…2048",
        figure="torch_dense",
        must=0.85,
        operation="forward",
        Ms=LARGE,
        dtype="float32",
        isa="avx2",
    ),
    Goal(
        label="AVX2, fp32 dX, M=256…2048",
        figure="torch_dense",
        must=0.85,
        operation="dx",
        Ms=LARGE,
        dtype="float32",
        isa="avx2",
    ),
]

# On a GPU. What is in µs is that of an H100 (copy 3.0 TB/s, 790 TFLOP/s bf16): its limit over the goal.
H100_US = {
    ("dequantize", SQUARE, 0): (14.1, 16.5),
    ("forward", SQUARE, 1): (2.9, 4.5),
    ("forward", DOWN, 1): (10.1, 13.0),
    ("forward", LARGE_SQUARE, 1): (11.6, 14.5),
    ("forward", LARGE_SQUARE, 64): (11.6, 22.0),
    ("forward", LARGE_SQUARE, 128): (21.7, 36.0),
    ("forward", LARGE_SQUARE, 256): (43.5, 70.0),
    ("forward", LARGE_SQUARE, 512): (87.0, 125.0),
}
OF_CUBLAS = {1024: 0.80, 2048: 0.88, 4096: 0.93, 8192: 0.96}
H100_ADAMW_PS = (3.35, 4.3)  # a parameter in bf16

GOALS += [
    Goal(
        label=f"{operation}, M={M}" if M else f"{operation} to bf16",
        figure="limit",
        must=limit / goal,
        operation=operation,
        Ms=(M,),
        shape=shape,
        device="cuda",
    )
    for (operation, shape, M), (limit, goal) in H100_US.items()
]
GOALS += [
    Goal(label=f"{label}, M={M}", figure="torch_dense", must=part, operation=operation, Ms=(M,), device="cuda")
    for operation, label in (("forward", "forward"), ("dx", "dX"))
    for M, part in OF_CUBLAS.items()
]
GOALS += [
    Goal(
        label="LoRA r=16 inside the forward product, M=4096",
        figure="lora",
        must=0.03,
        operation="forward",
        Ms=(GPU_LORA_M,),
        rank=LORA_RANK,
        device="cuda",
    ),
    Goal(
        label="AdamW8bit, bf16, one tensor of 100 M",
        figure="limit",
        must=H100_ADAMW_PS[0] / H100_ADAMW_PS[1],
        operation=ADAMW_TENSOR,
        device="cuda",
    ),
]
