"""Mistakes in cuda/quantize/, and in the optimizer's search for a code."""

from mutant_lists.mutant import CONCURRENT, ON_GPU, Mutant, without

QUANTIZERS = [
    Mutant(
        "cuda/quantize/nearest_code.cuh",
        "a bucket's own midpoints count as those before",
        "before += bucket_bits(midpoint[m]) < bucket;",
        "before += bucket_bits(midpoint[m]) <= bucket;",
        ("nearest_codes",),
        in_sample=True,
    ),
    Mutant(
        "cuda/quantize/nearest_code.cuh",
        "a bucket with three midpoints is searched in one step",
        "max > 3 ? 4 : max > 1 ? 2 : 1",
        "max > 3 ? 4 : 1",
        ("nearest_codes",),
    ),
    Mutant(
        "cuda/quantize/nearest_code.cuh",
        "midpoints are computed before the values are there",
        *without("        sync_warp();\n        midpoint[i]", "        midpoint[i]"),
        ("nearest_codes",),
    ),
    Mutant(
        "cuda/optimizer/code_table.cuh",
        "a tie takes the level above",
        "while (smallest(cell) > midpoints[code]) ++code;",
        "while (smallest(cell) >= midpoints[code]) ++code;",
        ("code_table",),
    ),
    Mutant(
        "cuda/optimizer/code_table.cuh",
        "a midpoint carries one float too early",
        "(0xFFFFu - lower)",
        "(0x10000u - lower)",
        ("code_table",),
        in_sample=True,
    ),
    Mutant(
        "cuda/quantize/quantize.cu",
        "half of a block's lanes find its largest element",
        "(absmax), 1 << subwarps.lane_bits)",
        "(absmax), (1 << subwarps.lane_bits) / 2)",
        ON_GPU,
    ),
    Mutant(
        "cuda/quantize/quantize.cu",
        "what is not finite is reported at the block's beginning",
        "report(args.non_finite, at + i)",
        "report(args.non_finite, at)",
        ON_GPU,
    ),
    Mutant(
        "cuda/quantize/quantize_absmax.cu",
        "no barrier before the warps' partial sums are added",
        "= value;\n  sync_threads();\n",
        "= value;\n",
        CONCURRENT,
    ),
]
