"""The mutants of mutants.py, as data: a file, the text to find, its replacement, and the test that must notice.

The text to find must occur once in its file, so a refactoring that changes it must change this list too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Suite:
    """A C++ test: its CMake target, and its environment variables."""

    target: str
    environment: Mapping[str, str] = field(default_factory=dict)


EMULATED = {"QLN_BACKEND": "cuda_emulated"}
SUITES = {
    "simt": Suite("qln_test_simt"),
    "product_config": Suite("qln_test_product_config"),
    "gemm_layout": Suite("qln_test_gemm_layout"),
    "code_sums": Suite("qln_test_code_sums"),
    "nearest_codes": Suite("qln_test_nearest_codes"),
    "concurrent": Suite("qln_test_concurrent", EMULATED),
    "core_emulated": Suite("qln_test", EMULATED),
    "conformance_emulated": Suite("qln_test_conformance", EMULATED),
    "panels": Suite("qln_test_panels", EMULATED),
    "paged": Suite("qln_test_paged", EMULATED),
    "row_groups": Suite("qln_test_row_groups", EMULATED),
    "hopper": Suite("qln_test_hopper", EMULATED),
    # These use the best instruction set of the build: AVX2 or Advanced SIMD.
    "core": Suite("qln_test"),
    "conformance": Suite("qln_test_conformance"),
    "conformance_tiles": Suite("qln_test_conformance", {"QLN_FORCE_ISA": "amx_emulated"}),
    "encoder": Suite("qln_test_encoder_avx2"),
}


@dataclass(frozen=True)
class Mutant:
    """A mistake, and the suites that should notice it, the fastest first."""

    file: str
    mistake: str
    find: str
    replace: str
    suites: tuple[str, ...]
    reason: str = ""  # why nothing can notice it; such a mutant must survive
    in_sample: bool = False  # its suite is built from a file or two, in seconds

    def __str__(self) -> str:
        """The name of the mutant in reports."""
        return f"{self.file}: {self.mistake}"


def _without(text: str, rest: str = "") -> tuple[str, str]:
    return text, rest


CONCURRENT, CONFORMANCE, PAGED = ("concurrent",), ("conformance",), ("paged",)
ON_GPU = ("conformance_emulated",)

GEMM_BLOCK, STREAM_K, THIN, THIN_SUMS = (
    f"cuda/product/gemm/{name}.cuh" for name in ("gemm", "stream_k", "thin", "thin_sums")
)
STORE = """      sums.store_partial(memory_.sums + std::int64_t{part.run} * kTileSums);
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
        sums.add_partial(memory_.sums + std::int64_t{other} * kTileSums);
      }
"""

BETWEEN_BLOCKS = [
    Mutant(
        STREAM_K,
        "the flag is raised before the sums are stored",
        STORE,
        """      if (thread_index() == 0) signal(memory_.ready + part.run, 1);
      sums.store_partial(memory_.sums + std::int64_t{part.run} * kTileSums);
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
        STREAM_K,
        "the flags are not reset",
        "if (workspace_.data() != nullptr) {",
        "if (false) {",
        CONCURRENT,
    ),
]

HOPPER_GEMM, HOPPER_TILE, HOPPER_WEIGHTS = (f"cuda/product/hopper/{name}.cuh" for name in ("gemm", "tile", "weights"))
HOPPER = ("hopper",)

BY_WGMMA = [
    Mutant(HOPPER_GEMM, "no fence before the products", *_without("    wgmma_fence();\n"), HOPPER),
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
    Mutant(HOPPER_GEMM, "barriers are not published", *_without("      fence_mbarrier_init();\n"), HOPPER),
    Mutant(HOPPER_GEMM, "the parity of an empty stage is stale", "ring_.parity ^ 1);", "ring_.parity);", HOPPER),
    Mutant(
        HOPPER_GEMM,
        "a stage is filled again too soon",
        *_without("      wait_for_empty();\n      if (issues_copies()) {\n", "      if (issues_copies()) {\n"),
        HOPPER,
    ),
    Mutant(
        HOPPER_GEMM,
        "a step is decoded before it is there",
        *_without("        wait_for_full();\n        Weights::decode(", "        Weights::decode("),
        HOPPER,
    ),
    Mutant(HOPPER_GEMM, "operands change while products run", *_without("      wgmma_wait_for(values);\n"), HOPPER),
    Mutant(
        HOPPER_GEMM,
        "sums of the adapter are not waited for",
        *_without(
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
        *_without("    sync_warp();  // what its lanes have stored is there\n"),
        HOPPER,
    ),
    Mutant(HOPPER_GEMM, "a step has the scale of the next", "finish(raw[0], offset)", "finish(raw[1], offset)", HOPPER),
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

GEMM = [
    Mutant(GEMM_BLOCK, "a step is not waited for", *_without("      cp_async_wait<kStages - 2>();\n"), ON_GPU),
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
        *_without("      sync_threads();  // this step is there for all, and the one before has been read by all\n"),
        CONCURRENT,
    ),
    Mutant(
        GEMM_BLOCK,
        "no barrier between two tiles",
        *_without("    sync_threads();  // the next tile begins with stages that have been read\n"),
        CONCURRENT,
    ),
    Mutant(
        GEMM_BLOCK,
        "no barrier between two parts of the rank",
        *_without("    sync_threads();  // before the stage is filled again\n"),
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
    Mutant(THIN, "a step is not waited for", *_without("      cp_async_wait<kStages - 2>();\n"), ON_GPU),
    Mutant(
        THIN,
        "no barrier in the main loop",
        *_without("      sync_threads();  // this step is there for all, and the one before has been read by all\n"),
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

ON_CHIP = [
    Mutant(
        "cuda/device/weight_chunk.cuh",
        "the level is that of the next block",
        "raw.level = from_.levels[block];",
        "raw.level = from_.levels[block + 1];",
        ON_GPU,
    ),
    Mutant(
        "cuda/device/weight_chunk.cuh",
        "a chunk in two blocks has one scale",
        "scale_.rest = scale_of(scales, block + 1);",
        "scale_.rest = scale_of(scales, block);",
        ON_GPU,
    ),
    Mutant(
        "cuda/device/weight_chunk.cuh",
        "the codes of a byte change places",
        "{{code[byte >> 4], code[byte & 15]}}",
        "{{code[byte & 15], code[byte >> 4]}}",
        ON_GPU,
    ),
    Mutant(
        "cuda/device/decode.cuh",
        "the scale's scale is the first",
        "w_.nested_absmax[block >> scales_.absmax_shift]",
        "w_.nested_absmax[0]",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/low_rank.cuh",
        "the last part of a sum goes beyond its end",
        "all.end - begin < length ? all.end : begin + length",
        "begin + length",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/low_rank.cuh",
        "a part of a shared sum is left out",
        "for (int part = 0; part < count; ++part)",
        "for (int part = 0; part < count - 1; ++part)",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/low_rank.cuh",
        "a shared sum is not scaled",
        "from_f32<T>(sum * scale)",
        "from_f32<T>(sum)",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/general.cuh",
        "no barrier in the main loop",
        *_without("    sync_threads();  // this step is stored, and all threads have read the one before\n"),
        CONCURRENT,
    ),
    Mutant(
        "cuda/product/general.cuh",
        "no barrier between the adapter's part and the weight's",
        *_without("  sync_threads();  // all threads have read what was multiplied before\n"),
        CONCURRENT,
    ),
    Mutant(
        "cuda/product/sources.cuh",
        "the mask of dA is transposed",
        "std::int64_t k, std::int64_t m) const {\n    return dropout.keep(raw, m, k);",
        "std::int64_t k, std::int64_t m) const {\n    return dropout.keep(raw, k, m);",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/dropout.cuh",
        "of two neighbours the other is dropped",
        "i % 2 == 0 ? 0xFFFF0000u : 0x0000FFFFu",
        "i % 2 != 0 ? 0xFFFF0000u : 0x0000FFFFu",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/sources.cuh",
        "the scale's scale is that of another block",
        "scales.absmax[block >> scales.absmax_shift]",
        "scales.absmax[(block + 1) >> scales.absmax_shift]",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/gemv.cu",
        "no barrier before the sums are written again",
        *_without("    sync_threads();  // before the sums are written again\n"),
        CONCURRENT,
    ),
    Mutant(
        "cuda/product/gemv.cu",
        "the second row has the first one's scale",
        "now.chunk[row].decode(decoded[row], i, factors[row], table)",
        "now.chunk[row].decode(decoded[row], i, factors[0], table)",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/gemv.cu",
        "warps take each other's parts of the rank too",
        "r0 < rank; r0 += kGemvWarps * kMmaInner)",
        "r0 < rank; r0 += kMmaInner)",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/panels.cu",
        "the adapter's part of a panel has a row too many",
        "is_below ? row - rows >= rank",
        "is_below ? row - rows > rank",
        ("panels",),
    ),
    Mutant(
        "cuda/product/panels.cu",
        "both panels have one place",
        "i % 2 * panel_elements_",
        "i % 1 * panel_elements_",
        ("panels",),
    ),
    Mutant(
        "cuda/product/side_stream.cpp",
        "a panel is decoded while its place is in use",
        *_without("    driver_->wait(stream_, used_);\n"),
        ("panels",),
    ),
    Mutant(
        "cuda/product/side_stream.cpp",
        "a panel is multiplied before it is decoded",
        *_without("    driver_->wait(caller, prepared_);\n"),
        ("panels",),
    ),
]

GROUPS, TILE_ROWS = "cuda/product/groups.cuh", "cuda/product/gemm/tile_rows.cuh"
ROW_GROUPS = [
    Mutant(
        GROUPS,
        "an offset beyond the rows is taken as it is",
        "return at < 0 ? 0 : at < rows ? at : rows;",
        "return at < 0 ? 0 : at;",
        ("row_groups",),
    ),
    Mutant(
        GROUPS,
        "a lane does not count the tiles of the one before it",
        "if (lane >= distance) prefix_sum",
        "if (lane > distance) prefix_sum",
        ("row_groups",),
    ),
    Mutant(
        GROUPS,
        "tiles of the first 32 groups are forgotten",
        "tiles_before += shfl(prefix_sum, kWarp - 1);",
        "tiles_before = shfl(prefix_sum, kWarp - 1);",
        ("row_groups",),
    ),
    Mutant(
        GROUPS,
        "rows before the first group are in none of the tiles",
        "int first = groups.has_leading_group ? -1 : 0;",
        "int first = 0;",
        ("row_groups",),
    ),
    Mutant(
        "cuda/product/product.cuh",
        "the first adapter of a tile is left out",
        "product.groups.group_of(tile.begin, product.rows) :",
        "product.groups.group_of(tile.begin, product.rows) + 1 :",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/config.h",
        "a tile that is not full is not counted",
        "(rows + std::min(groups, rows) * (tile_rows - 1)) / tile_rows",
        "(rows + (tile_rows - 1)) / tile_rows",
        ("product_config",),
        in_sample=True,
    ),
    Mutant(
        TILE_ROWS,
        "as many tiles as there may be are taken for all that there are",
        "if (args_.own_weights) row_tiles = find_row_tile<kRows>(args_.groups, args_.rows, kNoTile).count;",
        "",
        ON_GPU,
    ),
    Mutant(
        TILE_ROWS,
        "the tile is another one while warps store the one before",
        *_without("      sync_threads();  // no thread needs the tile before any more\n"),
        CONCURRENT,
    ),
    Mutant(
        TILE_ROWS,
        "the bias is that of the first group",
        "return args_.weight_index(tile().group) * args_.cols;",
        "return 0;",
        ON_GPU,
    ),
    Mutant(
        GEMM_BLOCK,
        "the weight is that of the first group",
        "        tile_rows_.weight_offset() +\n",
        "",
        ON_GPU,
    ),
    Mutant(
        GEMM_BLOCK,
        "no barrier between the choice of adapters and their use",
        "      sync_threads();\n      const std::int64_t all = count * padded;",
        "      const std::int64_t all = count * padded;",
        (*CONCURRENT, *ON_GPU),
    ),
    Mutant(
        GEMM_BLOCK,
        "adapters of a step are all the first one",
        "shared_.adapters[place / padded]",
        "shared_.adapters[0]",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/gemm/operands.cuh",
        "an adapter is for all rows of the tile",
        "return row >= first_kept_ && row < end_of_kept_;",
        "return row >= 0;",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/low_rank.cuh",
        "rows before the first group have an adapter",
        "if (rows.group < 0) all.end = 0;",
        "if (rows.group < 0) part.adapter = 0;",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/low_rank.cuh",
        "a gradient is the sum over other rows too",
        "all = p.groups.rows_of(part.adapter, p.inner);",
        "all = {p.groups.rows_of(part.adapter, p.inner).begin, p.inner};",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/gemv_part.cuh",
        "rows of another tile come after the last columns",
        "end_ = last < args_.cols ? last : args_.cols;",
        "end_ = last;",
        ON_GPU,
    ),
]

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
        "most > 3 ? 4 : most > 1 ? 2 : 1",
        "most > 3 ? 4 : 1",
        ("nearest_codes",),
    ),
    Mutant(
        "cuda/quantize/nearest_code.cuh",
        "midpoints are computed before the values are there",
        *_without("        sync_warp();\n        midpoint[i]", "        midpoint[i]"),
        ("nearest_codes",),
    ),
    Mutant(
        "cuda/optimizer/code_sums.cuh",
        "a tie takes the level above",
        "while (least(cell) > midpoints[code]) ++code;",
        "while (least(cell) >= midpoints[code]) ++code;",
        ("code_sums",),
    ),
    Mutant(
        "cuda/optimizer/code_sums.cuh",
        "a midpoint carries one float too early",
        "(0xFFFFu - lower)",
        "(0x10000u - lower)",
        ("code_sums",),
        in_sample=True,
    ),
    Mutant(
        "cuda/quantize/quantize.cu",
        "half of a block's lanes find its largest element",
        "(absmax), 1 << teams.lane_bits)",
        "(absmax), (1 << teams.lane_bits) / 2)",
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
        "no barrier before the warps' sums are added",
        "= value;\n  sync_threads();\n",
        "= value;\n",
        CONCURRENT,
    ),
]

OPTIMIZER = [
    Mutant(
        "cuda/optimizer/step.cu",
        "the flag of unusable gradients is not reset",
        *_without("  fill_bytes(shared.unusable, 0, sizeof(*shared.unusable), stream);\n"),
        CONCURRENT,
    ),
    Mutant(
        "cuda/optimizer/step.cu",
        "the step is that of the last one",
        "const std::int64_t count = *item.counter + 1;",
        "const std::int64_t count = *item.counter;",
        ("core_emulated", *ON_GPU),
    ),
    Mutant(
        "cuda/optimizer/step.cu",
        "a learning rate that is no number is taken",
        *_without("    usable &= is_finite_size(lr_of(group));\n"),
        CONCURRENT,
    ),
    Mutant(
        "cuda/optimizer/step.cu",
        "every launch counts a skipped step",
        *_without("  args.skipped = nullptr;\n"),
        CONCURRENT,
    ),
    Mutant(
        "cuda/optimizer/plan.cuh",
        "the second half of a list is not found",
        "jump = kMost / 2; jump > 0",
        "jump = kMost / 4; jump > 0",
        ON_GPU,
    ),
    Mutant(
        "cuda/optimizer/block.cuh",
        "the last moment's scale is not stored",
        "if (lane_index() < kMoments) *absmax = largest;",
        "if (lane_index() < kMoments - 1) *absmax = largest;",
        ON_GPU,
    ),
    Mutant(
        "cuda/optimizer/block.cuh",
        "what a block lacks is not 0",
        "elements.load_codes(item.state[k], zero_code(k))",
        "elements.load_codes(item.state[k], 0)",
        ON_GPU,
    ),
]

STEP, BACKWARD = "cpp/src/cpu/generic/optimizer-inl.h", "cpp/src/cpu/generic/backward-inl.h"
PRODUCT_NN, PRODUCT_NT = "cpp/src/cpu/generic/product_nn-inl.h", "cpp/src/cpu/generic/product_nt-inl.h"
PIPELINE = "cpp/src/cpu/generic/panel_pipeline-inl.h"
FORWARD_FEW, FORWARD_MANY = "cpp/src/cpu/generic/forward_few-inl.h", "cpp/src/cpu/generic/forward_many-inl.h"
ROWS, SCALES, QUANTIZE = (f"cpp/src/cpu/generic/{name}-inl.h" for name in ("rows", "scales", "quantize"))

ON_CPU = [
    Mutant(
        STEP,
        "what a block lacks is not 0",
        "sizeof(T) == 1 ? zero_code(k) : std::uint8_t{0}",
        "std::uint8_t{0}",
        CONFORMANCE,
    ),
    Mutant(
        STEP,
        "the first moment's largest is not that by size",
        "most[k] = is_signed(k) ? max_abs(most[k], m[k]) : max(most[k], m[k]);",
        "most[k] = max(most[k], m[k]);",
        CONFORMANCE,
    ),
    Mutant(
        STEP,
        "what lies near a midpoint is not compared with it",
        "uncertain |= static_cast<std::uint32_t>(any_low_half_below(least, Encoder<true>::kEdge)) << step;",
        "uncertain |= static_cast<std::uint32_t>(any_low_half_below(least, 0)) << step;",
        CONFORMANCE,
    ),
    Mutant(
        STEP,
        "the sign of a subnormal number is less than 1",
        "mul(mul(x, large), large)",
        "mul(x, large)",
        CONFORMANCE,
    ),
    Mutant(
        STEP,
        "the largest gradient that may be is refused",
        "(reduce_max_i32(most)) <= limit",
        "(reduce_max_i32(most)) < limit",
        ("core",),
    ),
    Mutant(
        BACKWARD,
        "V is not scaled for what is dropped",
        "const float scale = adapted.lora.scaling * dropout_scale(adapted.lora);",
        "const float scale = adapted.lora.scaling;",
        CONFORMANCE,
    ),
    Mutant(
        "cpp/src/cpu/generic/lora-inl.h",
        "V of every block of rows is written to the first one's",
        "args.v = rows_of(args.v, part.begin, rows);",
        "args.v = rows_of(args.v, 0, rows);",
        CONFORMANCE,
    ),
    Mutant(
        BACKWARD,
        "every block of rows has the first one's mask",
        "{low_ranks_, dropout, first_row_}",
        "{low_ranks_, dropout, 0}",
        CONFORMANCE,
    ),
    Mutant(
        BACKWARD,
        "every block of ranks is written to the first one's",
        "write(first_ + row, col, sums);",
        "write(row, col, sums);",
        CONFORMANCE,
    ),
    Mutant(
        FORWARD_MANY,
        "every block of rows has the first one's mask",
        "1.0f, dropout, first_row_ + adapted.begin)",
        "1.0f, dropout, adapted.begin)",
        CONFORMANCE,
    ),
    Mutant(
        FORWARD_MANY,
        "U is what the last block of K gives",
        "sums, c != 0, none)",
        "sums, false, none)",
        CONFORMANCE,
    ),
    Mutant(
        FORWARD_MANY,
        "a piece's sums are those of its strip's first vectors",
        "into.data += (piece.vector - strips_.first(piece.strip)) * kLanes;",
        "",
        CONFORMANCE,
    ),
    Mutant(
        FORWARD_MANY,
        "all rows have the first adapter's B",
        "const LoraView& lora = adapted_[pieces_[i].adapter].lora;",
        "const LoraView& lora = adapted_[0].lora;",
        CONFORMANCE,
    ),
    Mutant(
        PRODUCT_NN,
        "the second adapter of a group takes the place of the first",
        "multiply(tiles, adapter.a, v, own, !covers);",
        "multiply(tiles, adapter.a, v, own, false);",
        CONFORMANCE,
    ),
    Mutant(
        ROWS,
        "every expert has the first one's codes",
        "return (first_row_ + n) * w_.K + c * kChunk;",
        "return n * w_.K + c * kChunk;",
        CONFORMANCE,
    ),
    Mutant(
        PRODUCT_NN,
        "both panels have one place",
        "part.panels + i % 2 * kPanelFloats",
        "part.panels + i % 1 * kPanelFloats",
        CONFORMANCE,
    ),
    Mutant(
        PRODUCT_NN,
        "a total is what its last panels give",
        "add_sums(part, part.sums, part.totals, i != kPanelsOfTotal)",
        "add_sums(part, part.sums, part.totals, false)",
        CONFORMANCE,
    ),
    Mutant(
        PRODUCT_NN,
        "the mask is that of the next row",
        "lora.dropout.keep_bits(lora.first_row + part.all_strips.first(s) + row, c)",
        "lora.dropout.keep_bits(lora.first_row + part.all_strips.first(s) + row + 1, c)",
        CONFORMANCE,
    ),
    Mutant(
        PRODUCT_NT,
        "a chain begins with nothing",
        "sums.row_stride}, accumulate || unit != 0,",
        "sums.row_stride}, accumulate,",
        CONFORMANCE,
    ),
    Mutant(
        PIPELINE,
        "what the products leave of a panel is not decoded",
        "next);\n      next.finish();",
        "next);",
        CONFORMANCE,
    ),
    Mutant(
        ROWS,
        "a chunk in two blocks has one scale",
        "part(scales[++block - first_block])",
        "part(scales[block++ - first_block])",
        CONFORMANCE,
    ),
    Mutant(
        ROWS,
        "the last of an odd row's codes is left out",
        "(count + (odd ? 2 : 1)) / 2",
        "(count + 1) / 2",
        CONFORMANCE,
        reason="a row that begins in a low nibble has an odd number of elements, so both give the same bytes",
    ),
    Mutant(
        SCALES,
        "neighbours in two nested blocks have one scale's scale",
        "if (nested_of(first) == nested_of(first + lanes - 1)) return",
        "if (nested_of(first) == nested_of(first)) return",
        CONFORMANCE,
    ),
    Mutant(
        SCALES,
        "a scale is rounded once, not twice",
        "return add(mul(level, nested), set1(offset_));",
        "return fma(level, nested, set1(offset_));",
        CONFORMANCE,
    ),
    Mutant(
        FORWARD_FEW,
        "rows of U are as long as the rank",
        "load(lora.u + m * lora.padded_rank + r)",
        "load(lora.u + m * lora.b.cols + r)",
        CONFORMANCE,
    ),
    Mutant(
        FORWARD_FEW,
        "rows of W that fill no tile have no adapter",
        "kRows, count - j), x, loras, sums + j * kM);",
        "kRows, count - j), x, {}, sums + j * kM);",
        CONFORMANCE,
    ),
    Mutant(
        QUANTIZE,
        "what is not finite is counted from its block on",
        "found.first = first + i;",
        "found.first = i;",
        CONFORMANCE,
    ),
    Mutant(
        QUANTIZE,
        "a bucket's own midpoint counts as one before",
        "bucket_of(codebook.midpoint[i]) < bucket) ++i;",
        "bucket_of(codebook.midpoint[i]) <= bucket) ++i;",
        CONFORMANCE,
    ),
    Mutant(
        "cpp/src/cpu/generic/dropout-inl.h",
        "the mask is that of the next eight elements",
        "static_cast<std::uint64_t>(chunk * 8 + part)",
        "static_cast<std::uint64_t>(chunk * 8 + part + 1)",
        CONFORMANCE,
    ),
    Mutant(
        "cpp/src/cpu/generic/tiles-inl.h",
        "both columns of tiles are the first",
        "kB = 6 + j % 2;",
        "kB = 6 + j % 1;",
        ("conformance_tiles",),
    ),
    Mutant(
        "cpp/src/cpu/generic/tiles-inl.h",
        "sums of a panel replace those before",
        "    if (accumulate)\n      tiles",
        "    if (false)\n      tiles",
        ("conformance_tiles",),
    ),
]

ARENA, UPDATE = "cpp/src/paged/arena.cpp", "cpp/src/paged/update.cpp"
PAGED_OPTIMIZER = [
    Mutant(ARENA, "state moves before the caller has come", *_without("  driver_->wait(in_, entered_);\n"), PAGED),
    Mutant(ARENA, "state comes before it is back", *_without("  driver_->wait(in_, sent_);\n"), PAGED),
    Mutant(
        ARENA,
        "the update does not wait for its state",
        *_without("  driver_->wait(stream, stretch.fetched);\n"),
        PAGED,
    ),
    Mutant(
        ARENA,
        "state goes back before it is updated",
        *_without("  driver_->wait(out_, stretch.updated);\n"),
        PAGED,
    ),
    Mutant(
        ARENA,
        "a slot is filled before it is copied back",
        *_without("    if (slot.used) driver_->wait(in_, slot.copied_back);\n"),
        PAGED,
    ),
    Mutant(
        ARENA,
        "the caller does not wait for what goes back",
        *_without("  if (pinned_) driver_->wait(stream, sent_);\n"),
        PAGED,
    ),
    Mutant(ARENA, "the ring has two slots", "kSlots = 3;", "kSlots = 2;", PAGED),
    Mutant(
        ARENA,
        "a fetch that was in time counts as a stall",
        "driver_->is_earlier(stretch.ready, stretch.fetched)",
        "driver_->is_earlier(stretch.fetched, stretch.ready)",
        PAGED,
    ),
    Mutant(
        ARENA,
        "state at the very beginning is not found",
        "found->second->data_ <= at",
        "found->second->data_ < at",
        PAGED,
    ),
    Mutant(
        ARENA,
        "stretches that share a block of managed memory",
        "array(of_first * state_bytes, is_whole && is_open ? kAlignment : kPage)",
        "array(of_first * state_bytes, kAlignment)",
        PAGED,
    ),
    Mutant(
        UPDATE,
        "the scales of a later stretch are the first ones",
        "absmax_of(stretch, k) += first / kOptimizer8bitBlocksize;",
        "absmax_of(stretch, k) += 0;",
        PAGED,
    ),
    Mutant(
        ARENA,
        "an arena takes the state of an algorithm with more moments for its own",
        *_without(" && entry.moments == moments_of(algorithm)"),
        PAGED,
    ),
    Mutant(UPDATE, "nothing is fetched ahead", *_without("  fetch(i + 1);\n"), PAGED),
    Mutant(UPDATE, "no room is left for others", "to_come + kSpareBytes;", "to_come;", PAGED),
]

MUTANTS = [*BETWEEN_BLOCKS, *BY_WGMMA, *GEMM, *ON_CHIP, *ROW_GROUPS, *QUANTIZERS, *OPTIMIZER, *ON_CPU, *PAGED_OPTIMIZER]
