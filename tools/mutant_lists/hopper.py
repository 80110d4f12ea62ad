"""Mistakes in cuda/product/hopper/."""

from mutant_lists.mutant import Mutant, without

HOPPER_GEMM, HOPPER_TILE, HOPPER_WEIGHTS = (f"cuda/product/hopper/{name}.cuh" for name in ("gemm", "tile", "weights"))
HOPPER = ("hopper",)

BY_WGMMA = [
    Mutant(HOPPER_GEMM, "no fence before the products", *without("    wgmma_fence();\n"), HOPPER),
    Mutant(
        HOPPER_GEMM,
        "a full stage has one arrival too few",
        "Tile::kProducerWarps + 1);",
        "Tile::kProducerWarps);",
        HOPPER,
    ),
    Mutant(
        HOPPER_GEMM,
        "an empty stage has one arrival too many",
        "&shared_.empty[i], Tile::kConsumerWarps);",
        "&shared_.empty[i], Tile::kConsumerWarps + 1);",
        HOPPER,
    ),
    Mutant(HOPPER_GEMM, "barriers are not published", *without("      fence_mbarrier_init();\n"), HOPPER),
    Mutant(HOPPER_GEMM, "the parity of an empty stage is stale", "ring_.parity ^ 1);", "ring_.parity);", HOPPER),
    Mutant(
        HOPPER_GEMM,
        "a stage is filled again too soon",
        *without("      wait_for_empty();\n      if (issues_copies()) {\n", "      if (issues_copies()) {\n"),
        HOPPER,
    ),
    Mutant(
        HOPPER_GEMM,
        "a step is decoded before it is there",
        *without("        wait_for_full();\n        Weights::decode(", "        Weights::decode("),
        HOPPER,
    ),
    Mutant(HOPPER_GEMM, "operands change while products run", *without("      wgmma_wait_for(values);\n"), HOPPER),
    Mutant(
        HOPPER_GEMM,
        "sums of the adapter are not waited for",
        *without(
            "      wgmma_wait_for(sums_.sum);\n      arrive_at_empty(ring_.stage);\n",
            "      arrive_at_empty(ring_.stage);\n",
        ),
        HOPPER,
    ),
    Mutant(
        HOPPER_GEMM,
        "a descriptor goes on by twice as much",
        "kWgmmaInner * sizeof(T) / 16;",
        "kWgmmaInner * sizeof(T) / 8;",
        HOPPER,
    ),
    Mutant(
        HOPPER_WEIGHTS,
        "codes are read as without a swizzle",
        "(i ^ lane.col() / 4 % 2) * kVectorBytes",
        "i * kVectorBytes",
        HOPPER,
    ),
    Mutant(
        HOPPER_WEIGHTS,
        "codes of columns are read as without a swizzle",
        "(byte / kVectorBytes ^ lane.t) * kVectorBytes",
        "byte / kVectorBytes * kVectorBytes",
        HOPPER,
    ),
    Mutant(
        HOPPER_WEIGHTS,
        "nibbles of two rows do not change places",
        "(rows[0] << 4 & kHigh) | (rows[1] & ~kHigh)",
        "rows[1]",
        HOPPER,
    ),
    Mutant(
        HOPPER_WEIGHTS,
        "both rows of a pair have the first one's scale",
        "pair.at[1] * scale.at[1];",
        "pair.at[1] * scale.at[0];",
        HOPPER,
    ),
    Mutant(
        HOPPER_WEIGHTS,
        "all columns have the scales of the first 64",
        "lane.col() / kGemmStep * kGemmStep + 2 * lane.t",
        "2 * lane.t",
        HOPPER,
    ),
    Mutant(
        HOPPER_GEMM,
        "codes of too few rows come",
        ".box_rows = Weights::kTileRows",
        ".box_rows = Weights::kTileRows / 2",
        HOPPER,
    ),
    Mutant(
        HOPPER_GEMM,
        "rows of X come without a swizzle",
        ".swizzle = Swizzle::bytes_128",
        ".swizzle = Swizzle::none",
        HOPPER,
    ),
    Mutant(HOPPER_GEMM, "more bytes are expected than come", "row0, r, 0);", "row0, r, Shared::kCodeBytes);", HOPPER),
    Mutant(
        HOPPER_GEMM,
        "a warp arrives before its scales are stored",
        *without("    sync_warp();  // what its lanes have stored is there\n"),
        HOPPER,
    ),
    Mutant(HOPPER_GEMM, "a step has the scale of the next", "finish(raw[0], offset)", "finish(raw[1], offset)", HOPPER),
    Mutant(
        HOPPER_GEMM,
        "U or V is read before it is there",
        *without("      if (issues_copies()) wait_for_kernel_before();  // which makes U or V\n"),
        HOPPER,
    ),
    Mutant(
        HOPPER_GEMM,
        "each part of a tile has the adapter",
        "part.first == 0 ? static_cast<int>(args_.low_rank.cols) : 0",
        "static_cast<int>(args_.low_rank.cols)",
        HOPPER,
    ),
    Mutant(
        HOPPER_GEMM,
        "consumers do not meet around sums of other blocks",
        "[] { sync_some_threads<kConsumerBarrier>(Tile::kConsumers); }",
        "[] {}",
        HOPPER,
    ),
    Mutant(HOPPER_TILE, "rows beyond the last are stored", "if (row < rows)", "if (rows > 0)", HOPPER),
    Mutant(
        HOPPER_TILE,
        "dropout's mask is that of another row",
        "random = dropout_random(dropout.seed, row + row_of(i), col)",
        "random = dropout_random(dropout.seed, row + i, col)",
        HOPPER,
    ),
    Mutant(HOPPER_TILE, "a lane's bias is that of its first column", "to_f32(biases[j])", "to_f32(biases[0])", HOPPER),
]
