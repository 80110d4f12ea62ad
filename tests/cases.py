"""The conformance cases, as data. test_isas.py runs them over every instruction set of this machine."""

import itertools
from dataclasses import dataclass, replace

import torch

import qlora_native as qn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("nf4", "fp4", "int4", "int8", "codebook")
MICROSCALED = {"mxfp4": 32, "nvfp4": 16}  # formats of one blocksize, whose scales have 8 bits
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# A user's codebook: no level is 0, two are equal, and no two distances are.
CODEBOOK = (-1.0, -0.83, -0.61, -0.47, -0.36, -0.21, -0.13, -0.04, 0.02, 0.09, 0.17, 0.29, 0.29, 0.52, 0.71, 1.0)

# [N, K] that straddle: one element, less than a block, one more and one less than 64, odd sizes (a byte in two rows),
# rows of one element, a K that no power of two divides beyond 4.
WEIGHTS = ((1, 1), (1, 64), (5, 63), (3, 65), (7, 1), (48, 96), (65, 128), (33, 3420))
ROWS = (0, 1, 7, 8, 9, 129)
# [M, N, K] around the edges of what a kernel takes at a time: 16 lanes, 64 rows of W, 512 of X, 1024 of K, and one off;
# for small M on a GPU a last round of 32 of K; for up to 64 rows by AMX whole chunks of K, more than 32 of them, an odd
# N, and an X of more than 1 MB.
BLOCKED = (
    (2, 64, 1024),
    (4, 66, 1025),
    (8, 130, 2080),
    (16, 129, 1023),
    (64, 63, 2049),
    (20, 66, 2176),
    (60, 131, 1088),
    (64, 48, 8256),
    (257, 130, 96),
    (513, 66, 1100),
)
# [M, N, K], blocksize, double_quant, rank: forward and backward take a GPU's larger tiles, of which they fill no last
# one. Of 128 rows by 256 columns, or by 128, where blocks of 32 or an odd half of a step want it; of 256 rows.
LARGE = (
    ((70, 200, 192), 256, False, 70),
    ((128, 136, 160), 32, True, 16),
    ((129, 456, 448), 64, True, 20),
    ((255, 136, 96), 32, False, 1),
    ((257, 264, 192), 64, True, 16),
    ((385, 72, 288), 4096, True, 8),
)
RANKS = (0, 1, 16, 70)  # 70: above K in the smaller shapes


@dataclass(frozen=True)
class Product:
    """One product, its adapter and its gradients."""

    M: int
    N: int
    K: int
    dtype: torch.dtype
    format: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    bias: bool = False
    rank: int | None = None  # None: no adapter
    dropout: float = 0.0
    lora_dtype: torch.dtype = torch.float32

    def __str__(self):
        adapter = "" if self.rank is None else f"-r{self.rank}-p{self.dropout}-{_short(self.lora_dtype)}"
        quantization = f"{self.format}-{self.blocksize}{'-dq' if self.double_quant else ''}"
        return f"{self.M}x{self.N}x{self.K}-{_short(self.dtype)}-{quantization}{'-bias' * self.bias}{adapter}"


def _short(dtype):
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]


def products():
    """Every shape; every format with every blocksize; every rank with and without dropout. Each in every dtype."""
    for dtype in DTYPES:
        for M, (N, K) in itertools.product(ROWS, WEIGHTS):
            yield Product(M, N, K, dtype, bias=K % 2 == 1)
        for M, N, K in BLOCKED:
            yield Product(M, N, K, dtype, bias=True, rank=16, dropout=0.125)
            yield Product(M, N, K, dtype, format="int8", blocksize=128, double_quant=False)
        for (M, N, K), blocksize, double_quant, rank in LARGE:
            yield Product(M, N, K, dtype, "nf4", blocksize, double_quant, bias=True, rank=rank, dropout=0.3)
        for format, blocksize, double_quant in itertools.product(FORMATS, BLOCKSIZES, (False, True)):
            for M, N, K in ((1, 34, 190), (9, 37, 333), (40, 64, 256)):
                yield Product(M, N, K, dtype, format, blocksize, double_quant)
        for format, blocksize in MICROSCALED.items():
            for M, N, K in ((1, 34, 190), (9, 37, 333), (40, 64, 256), (129, 136, 160)):
                yield Product(M, N, K, dtype, format, blocksize)
            for M, N, K in ((2, 64, 1024), (64, 63, 2049), (258, 264, 192)):
                yield Product(M, N, K, dtype, format, blocksize, bias=True, rank=16, dropout=0.25)
        # Small blocks, on rows of whole chunks of 64 and on ragged ones, by every kernel that a CPU has for them.
        for format, blocksize in (*MICROSCALED.items(), ("nf4", 32)):
            for M, (N, K) in itertools.product((1, 3, 8, 9, 48, 300), ((70, 320), (37, 333))):
                if dtype != torch.float16:
                    yield Product(M, N, K, dtype, format, blocksize)
        for rank, dropout, (M, N, K) in itertools.product(
            RANKS, (0.0, 0.3), ((0, 5, 9), (1, 80, 96), (9, 3, 65), (129, 80, 200))
        ):
            case = Product(M, N, K, dtype, bias=M == 9, rank=rank, dropout=dropout)
            yield case
            if dtype != torch.float32:
                yield replace(case, lora_dtype=dtype)


def long_sums():
    """(product, results): each of these results has sums of 14336 terms, the longest of the models that matter."""
    for dtype in DTYPES:
        # In 16 bits the rounding of the result hides most of what a sum does: once will do.
        for M in (1, 8, 64) if dtype == torch.float32 else (8,):
            elements = max(1024 // M, 64)  # enough of them that their mean says something
            yield Product(M, elements, 14336, dtype), ("y",)
            yield Product(M, 14336, elements, dtype), ("dx",)
        yield Product(14336, 64, 64, dtype, rank=16), ("da", "db")


def large_m():
    """Products by panels of decoded weight, which torch's dense product multiplies: ragged shapes, several panels, and
    more rows than are copied beside the adapter's at once."""
    for dtype in DTYPES:
        yield Product(769, 130, 333, dtype, bias=True)
        yield Product(1100, 200, 264, dtype, format="int8", blocksize=128, double_quant=False)
        yield Product(800, 96, 203, dtype, bias=True, rank=5, lora_dtype=dtype)
        yield Product(900, 64, 320, dtype, rank=16, dropout=0.25)
        if dtype != torch.float16:  # which a CPU multiplies slowly
            yield Product(769, 9100, 448, dtype, bias=True)
        yield Product(800, 72, 208, dtype, format="nvfp4", blocksize=16, rank=4)
        yield Product(8200, 64, 72, dtype, bias=True, rank=16)


def class_for(options):
    """The class of a linear layer that `quantize` makes with these options."""
    return qn.nn.Linear8bit if options.get("format") == "int8" else qn.nn.Linear4bit
