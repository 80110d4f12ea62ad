"""Mistakes in cuda/product/gemm/ and in what decides its shares of a product."""

from mutant_lists.mutant import CONCURRENT, ON_GPU, Mutant, without

GEMM_BLOCK, STREAM_K, THIN, THIN_SUMS = (
    f"cuda/product/gemm/{name}.cuh" for name in ("gemm", "stream_k", "thin", "thin_sums")
)
STORE = """      store(sums, memory_.sums + std::int64_t{part.run} * kTileSums);
      sync();
      if (thread_index() == 0) signal(memory_.ready + part.run, 1);
"""
WAIT = """      for (int other = part.run + 1 + thread_index(); other <= last; other += kGemmThreads) {
        wait_for(memory_.ready + other, 1);
      }
      sync();
"""
ADD = """#pragma unroll 1
      for (int other = part.run + 1; other <= last; ++other) {
        add(sums, memory_.sums + std::int64_t{other} * kTileSums);
      }
"""

BETWEEN_BLOCKS = [
    Mutant(
        STREAM_K,
        "the flag is raised before the sums are stored",
        STORE,
        """      if (thread_index() == 0) signal(memory_.ready + part.run, 1);
      store(sums, memory_.sums + std::int64_t{part.run} * kTileSums);
      sync();
""",
        CONCURRENT,
    ),
    Mutant(STREAM_K, "no barrier before the flag", STORE, STORE.replace("      sync();\n", ""), CONCURRENT),
    Mutant(
        STREAM_K,
        "the flag is an ordinary store, without release",
        "signal(memory_.ready + part.run, 1)",
        "store_vector<std::uint32_t, 1>(memory_.ready + part.run, {{1}})",
        CONCURRENT,
    ),
    Mutant(
        STREAM_K,
        "sums are read before their flag",
        WAIT + ADD,
        ADD + WAIT,
        CONCURRENT,
    ),
    Mutant(STREAM_K, "no barrier after the wait", WAIT, WAIT.replace("      sync();\n", ""), CONCURRENT),
    Mutant(
        STREAM_K,
        "runs are given out by the blocks' indices",
        "memory_.ticket == nullptr ? static_cast<int>(block_index()) : take_ticket(memory_.ticket)",
        "static_cast<int>(block_index())",
        CONCURRENT,
    ),
    Mutant(STREAM_K, "nobody waits", WAIT, "      sync();\n", CONCURRENT),
    Mutant(
        "cuda/runtime/workspace.h",
        "the tickets of U are not reset",
        "i += block_threads()) at[i] = T{};",
        "i += block_threads()) at[i] = at[i];",
        CONCURRENT,
    ),
    Mutant(
        "cuda/runtime/workspace.h",
        "the flags are not reset",
        "} else if (count > 0) {",
        "} else if (false) {",
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
        "left.inner() < last_inner() ? whole_steps + 1 : whole_steps",
        "left.inner() < last_inner() ? whole_steps : whole_steps",
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
        "for (int k = 0; k * kMmaInner < step_inner; ++k)",
        "for (int k = 0; (k + 1) * kMmaInner <= step_inner; ++k)",
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
        "step < whole_steps || (step == whole_steps && inner < tail)",
        "step < whole_steps",
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
        "bias[j] = to_f32(biases[first + j]);",
        "bias[j] = to_f32(biases[j]);",
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
        "Tile::kGroupFragments * i +\n           vector % Tile::kGroupFragments;",
        "4 * (vector % Tile::kGroupFragments) + i;",
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
