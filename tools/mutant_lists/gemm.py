"""Mistakes in cuda/product/gemm/ and in what decides its shares of a product."""

from mutant_lists.mutant import CONCURRENT, ON_GPU, Mutant, without

GEMM_BLOCK, RUNS, THIN, THIN_SUMS = (f"cuda/product/gemm/{name}.cuh" for name in ("gemm", "runs", "thin", "thin_sums"))
LEAVE = """      sums.leave(shared_.of_runs + std::int64_t{part.run} * kSums);
      meet();
      if (thread_index() == 0) signal(shared_.ready + part.run, 1);
"""
WAIT = """      for (int other = part.run + 1 + thread_index(); other <= last; other += kGemmThreads) {
        wait_for(shared_.ready + other, 1);
      }
      meet();
"""
ADD = """#pragma unroll 1
      for (int other = part.run + 1; other <= last; ++other) sums.add(shared_.of_runs + std::int64_t{other} * kSums);
"""

BETWEEN_BLOCKS = [
    Mutant(
        RUNS,
        "the flag is raised before the sums are stored",
        LEAVE,
        """      if (thread_index() == 0) signal(shared_.ready + part.run, 1);
      sums.leave(shared_.of_runs + std::int64_t{part.run} * kSums);
      meet();
""",
        CONCURRENT,
    ),
    Mutant(RUNS, "no barrier before the flag", LEAVE, LEAVE.replace("      meet();\n", ""), CONCURRENT),
    Mutant(
        RUNS,
        "the flag is an ordinary store, without release",
        "signal(shared_.ready + part.run, 1)",
        "store_vector<std::uint32_t, 1>(shared_.ready + part.run, {{1}})",
        CONCURRENT,
    ),
    Mutant(
        RUNS,
        "sums are read before their flag",
        WAIT + ADD,
        ADD + WAIT,
        CONCURRENT,
    ),
    Mutant(RUNS, "no barrier after the wait", WAIT, WAIT.replace("      meet();\n", ""), CONCURRENT),
    Mutant(
        RUNS,
        "runs are given out by the blocks' indices",
        "shared_.ticket == nullptr ? static_cast<int>(block_index()) : take_ticket(shared_.ticket)",
        "static_cast<int>(block_index())",
        CONCURRENT,
    ),
    Mutant(RUNS, "nobody waits", WAIT, "      meet();\n", CONCURRENT),
    Mutant(
        RUNS,
        "the flags are not reset",
        "if (workspace_.data() != nullptr) fill_bytes(",
        "if (false) fill_bytes(",
        CONCURRENT,
    ),
]

GEMM = [
    Mutant(GEMM_BLOCK, "a step is not waited for", *without("      cp_async_wait<kStages - 2>();\n"), ON_GPU),
    Mutant(
        GEMM_BLOCK,
        "one copy fewer is waited for",
        "cp_async_wait<kStages - 2>();",
        "cp_async_wait<kStages - 1>();",
        ON_GPU,
    ),
    Mutant(
        GEMM_BLOCK,
        "no barrier in the main loop",
        *without("      sync_threads();  // this step is there for all, and the one before has been read by all\n"),
        CONCURRENT,
    ),
    Mutant(
        GEMM_BLOCK,
        "no barrier between two tiles",
        *without("    sync_threads();  // the next tile begins with stages that have been read\n"),
        CONCURRENT,
    ),
    Mutant(
        GEMM_BLOCK,
        "no barrier between two parts of the rank",
        *without("    sync_threads();  // before the stage is filled again\n"),
        (*CONCURRENT, *ON_GPU),
    ),
    Mutant(
        GEMM_BLOCK,
        "the last part of the inner dimension is left out",
        "left.inner() < last_inner() ? whole + 1 : whole",
        "left.inner() < last_inner() ? whole : whole",
        ON_GPU,
    ),
    Mutant(
        GEMM_BLOCK,
        "the mask is that of the next column",
        "row0() + lane.row<Tile>(), col0() + lane.col<Tile>());\n      }",
        "row0() + lane.row<Tile>(), col0() + lane.col<Tile>() + 1);\n      }",
        ON_GPU,
    ),
    Mutant(
        GEMM_BLOCK,
        "a part of the rank that is not whole is left out",
        "for (int k = 0; k * kMmaInner < there; ++k)",
        "for (int k = 0; (k + 1) * kMmaInner <= there; ++k)",
        ON_GPU,
    ),
    Mutant(THIN, "a step is not waited for", *without("      cp_async_wait<kStages - 2>();\n"), ON_GPU),
    Mutant(
        THIN,
        "no barrier in the main loop",
        *without("      sync_threads();  // this step is there for all, and the one before has been read by all\n"),
        CONCURRENT,
    ),
    Mutant(
        THIN_SUMS, "a warp adds its own sums once more", "exchange.at((thread ^ kWarp)", "exchange.at((thread)", ON_GPU
    ),
    Mutant(
        THIN,
        "the end of the inner dimension is left out",
        "step < whole || (step == whole && inner < tail)",
        "step < whole",
        ON_GPU,
    ),
    Mutant(
        THIN_SUMS,
        "chunks of a line meet in a bank",
        "(chunk ^ line / 2 % kChunks)",
        "chunk",
        ("gemm_layout",),
    ),
    Mutant(
        "cuda/product/gemm/sums.cuh",
        "the bias is that of the first group of columns",
        "bias[j] = to_f32(bias_of[first + j]);",
        "bias[j] = to_f32(bias_of[j]);",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/gemm/operands.cuh",
        "vectors of a line meet in a bank",
        "(vector ^ (col % 2 + col / Tile::kLaneCols % 4 * 2))",
        "(vector ^ (col % 2))",
        ("gemm_layout",),
        in_sample=True,
    ),
    Mutant(
        "cuda/product/gemm/operands.cuh",
        "a vector holds the codes of another",
        "return vector / Tile::kGroup * Tile::kGroupCols / 2 + Tile::kGroup * i + vector % Tile::kGroup;",
        "return vector / Tile::kGroup * Tile::kGroupCols / 2 + 4 * (vector % Tile::kGroup) + i;",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/config.h",
        "the steps that no share has are left out",
        "config.rest = config.blocks == 0 ? 0 : static_cast<int>(all % config.blocks);",
        "config.rest = 0;",
        ("product_config",),
        in_sample=True,
    ),
    Mutant(
        "cuda/product/config.cpp",
        "the last part of a long sum is left out",
        "length == 0 ? 1 : ceil_div(inner, length)",
        "length == 0 ? 1 : inner / length",
        ("product_config",),
        in_sample=True,
    ),
]
