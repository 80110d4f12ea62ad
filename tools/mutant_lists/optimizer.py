"""Mistakes in cuda/optimizer/."""

from mutant_lists.mutant import CONCURRENT, ON_GPU, Mutant, without

OPTIMIZER = [
    Mutant(
        "cuda/optimizer/step.cu",
        "the flag of unusable gradients is not reset",
        *without("  fill_bytes(shared.unusable, 0, sizeof(*shared.unusable), stream);\n"),
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
        *without("    usable &= is_finite_size(lr_of(group));\n"),
        CONCURRENT,
    ),
    Mutant(
        "cuda/optimizer/step.cu",
        "every launch counts a skipped step",
        *without("  args.skipped = nullptr;\n"),
        CONCURRENT,
    ),
    Mutant(
        "cuda/optimizer/plan.cuh",
        "the second half of a list is not found",
        "jump = kMax / 2; jump > 0",
        "jump = kMax / 4; jump > 0",
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
