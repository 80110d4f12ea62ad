"""Mistakes in the CUDA products of rows in groups."""

from mutant_lists.mutant import CONCURRENT, ON_GPU, Mutant, without

GEMM_BLOCK = "cuda/product/gemm/gemm.cuh"
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
        *without("      sync_threads();  // no thread needs the tile before any more\n"),
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
        "cuda/product/gemv/gemv_part.cuh",
        "rows of another tile come after the last columns",
        "end_ = last < args_.cols ? last : args_.cols;",
        "end_ = last;",
        ON_GPU,
    ),
]
