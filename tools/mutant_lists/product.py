"""Mistakes in cuda/product/ outside of gemm/ and wgmma/, and in what decodes for it."""

from mutant_lists.mutant import CONCURRENT, ON_GPU, Mutant, without

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
        "for (int part = 0; part < p.split.parts; ++part, from",
        "for (int part = 0; part < p.split.parts - 1; ++part, from",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/low_rank.cuh",
        "a shared sum is not scaled",
        "row * p.out.stride + col, sum * p.scale);",
        "row * p.out.stride + col, sum);",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/low_rank.cuh",
        "the parts of a sum are added before all are there",
        "memory.arrived + block_index() / p.split.parts, p.split.parts)",
        "memory.arrived + block_index() / p.split.parts, p.split.parts - 1)",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/low_rank.cuh",
        "a ticket is taken before it is cleared",
        *without("  griddepcontrol_wait();  // which clears the tickets\n"),
        CONCURRENT,
    ),
    *(
        Mutant(
            file,
            "U is read before it is there",
            *without(f"{indent}griddepcontrol_wait();  // which makes U{or_v}\n"),
            CONCURRENT,
        )
        for file, indent, or_v in (
            ("cuda/product/gemv/gemv.cu", 4 * " ", ""),
            ("cuda/product/gemm/gemm.cuh", 4 * " ", " or V"),
            ("cuda/product/gemm/thin.cuh", 4 * " ", ""),
        )
    ),
    Mutant(
        "cuda/product/general.cuh",
        "no barrier in the main loop",
        *without("    sync_threads();  // this step is stored, and all threads have read the one before\n"),
        CONCURRENT,
    ),
    Mutant(
        "cuda/product/general.cuh",
        "no barrier between the adapter's part and the weight's",
        *without("  sync_threads();  // all threads have read what was multiplied before\n"),
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
        "cuda/product/gemv/gemv.cu",
        "no barrier before the sums are written again",
        *without("    sync_threads();  // before the sums are written again\n"),
        CONCURRENT,
    ),
    Mutant(
        "cuda/product/gemv/gemv.cu",
        "the second row has the first one's scale",
        "now.chunk[row].decode(decoded[row], i, factors[row], table)",
        "now.chunk[row].decode(decoded[row], i, factors[0], table)",
        ON_GPU,
    ),
    Mutant(
        "cuda/product/gemv/gemv.cu",
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
        "cuda/runtime/side_stream.cpp",
        "a panel is decoded while its place is in use",
        *without("    driver_->wait(stream_, used_);\n"),
        ("panels",),
    ),
    Mutant(
        "cuda/runtime/side_stream.cpp",
        "a panel is multiplied before it is decoded",
        *without("    driver_->wait(caller, prepared_);\n"),
        ("panels",),
    ),
]
