"""Mistakes in attention."""

from mutant_lists.mutant import Mutant

BLOCKS, FORWARD, BACKWARD = (
    f"cpp/src/cpu/attention/attention_{name}-inl.h" for name in ("blocks", "forward", "backward")
)
ELEMENTWISE, EXP = "cpp/src/cpu/elementwise/elementwise-inl.h", "cpp/src/cpu/isa/exp-inl.h"
NOTICE = ("attention",)

ATTENTION = [
    Mutant(
        FORWARD,
        "what was summed before a larger score is not scaled",
        "if (factor[row] == 1.0f) continue;",
        "continue;",
        NOTICE,
    ),
    Mutant(
        FORWARD,
        "a sum of exponentials is not scaled with the result",
        "        sum[row] *= factor[row];\n",
        "",
        NOTICE,
    ),
    Mutant(
        FORWARD,
        "a query without keys gets NaN",
        "factors[i] = of_row == 0.0f ? 0.0f : 1.0f / of_row;",
        "factors[i] = 1.0f / of_row;",
        NOTICE,
    ),
    Mutant(
        FORWARD,
        "the largest score is taken without the scale",
        "largest_of(square + row * kBlock) * in_.scale;",
        "largest_of(square + row * kBlock);",
        NOTICE,
    ),
    Mutant(
        BACKWARD,
        "the gradient of a score is not made smaller by delta",
        "add(load(ds + col), delta)",
        "load(ds + col)",
        NOTICE,
    ),
    Mutant(
        BACKWARD,
        "dQ is not scaled",
        "write(head(g).dq, in_.scale,",
        "write(head(g).dq, 1.0f,",
        NOTICE,
    ),
    Mutant(
        BACKWARD,
        "dK and dV have only the last head that shares them",
        "        for (std::int64_t g = 0; g < group(); ++g)\n          add_gradients",
        "        for (std::int64_t g = group() - 1; g < group(); ++g)\n          add_gradients",
        NOTICE,
    ),
    Mutant(
        BACKWARD,
        "queries that there are not count in dK and dV",
        "__builtin_memset(square + count * kBlock, 0, ",
        "__builtin_memset(square + count * kBlock, 0, 0 * ",
        NOTICE,
    ),
    Mutant(
        BACKWARD,
        "dK is that of the transposed scores",
        "add_transposed(tiles, squares, squares.ds, count, key_count, head.q_columns, keys.dk);",
        "add_transposed(tiles, squares, squares.p, count, key_count, head.q_columns, keys.dk);",
        NOTICE,
    ),
    Mutant(
        BLOCKS,
        "a query sees the keys after its range in its last block",
        "for (std::int64_t i = larger<std::int64_t>(end, 0); i < kBlock; ++i) row[i] = -kInfinity;",
        "",
        NOTICE,
    ),
    Mutant(
        BLOCKS,
        "a query sees the keys before its range in its first block",
        "for (std::int64_t i = 0; i < smaller(first, kBlock); ++i) row[i] = -kInfinity;",
        "",
        NOTICE,
    ),
    Mutant(
        BLOCKS,
        "the block of keys in which the last range ends is left out",
        "begin < end ? ceil_div(end, kBlock) : 0",
        "end / kBlock",
        NOTICE,
    ),
    Mutant(
        BLOCKS,
        "ranges of the first sequence hold for all",
        "in_.key_ranges + b * in_.key_ranges_stride + 2",
        "in_.key_ranges + 2",
        NOTICE,
    ),
    Mutant(
        ELEMENTWISE,
        "the gradient of a rotation turns the same way",
        "if (args.transposed) std::swap(sin1, sin2);\n",
        "if (false) std::swap(sin1, sin2);\n",
        NOTICE,
    ),
    Mutant(
        EXP,
        "NaN becomes the smallest exponential",
        "x = max(set1(-88.0f), x);",
        "x = max(x, set1(-88.0f));",
        NOTICE,
    ),
]
