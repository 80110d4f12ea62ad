"""Mistakes in cpp/src/paged/."""

from mutant_lists.mutant import Mutant, without

PAGED = ("paged",)
ARENA, UPDATE = "cpp/src/paged/arena.cpp", "cpp/src/paged/update.cpp"
PAGED_OPTIMIZER = [
    Mutant(ARENA, "state moves before the caller has come", *without("  driver_->wait(in_, entered_);\n"), PAGED),
    Mutant(ARENA, "state comes before it is back", *without("  driver_->wait(in_, sent_);\n"), PAGED),
    Mutant(
        ARENA,
        "the update does not wait for its state",
        *without("  driver_->wait(stream, segment.fetched);\n"),
        PAGED,
    ),
    Mutant(
        ARENA,
        "state goes back before it is updated",
        *without("  driver_->wait(out_, segment.updated);\n"),
        PAGED,
    ),
    Mutant(
        ARENA,
        "a slot is filled before it is copied back",
        *without("    if (slot.used) driver_->wait(in_, slot.copied_back);\n"),
        PAGED,
    ),
    Mutant(
        ARENA,
        "the caller does not wait for what goes back",
        *without("  if (pinned_) driver_->wait(stream, sent_);\n"),
        PAGED,
    ),
    Mutant(ARENA, "the ring has two slots", "kSlots = 3;", "kSlots = 2;", PAGED),
    Mutant(
        ARENA,
        "a fetch that was in time counts as a stall",
        "driver_->is_earlier(segment.ready, segment.fetched)",
        "driver_->is_earlier(segment.fetched, segment.ready)",
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
        "segments that share a block of managed memory",
        "array(of_first * state_bytes, is_whole && is_open ? kAlignment : kPage)",
        "array(of_first * state_bytes, kAlignment)",
        PAGED,
    ),
    Mutant(
        UPDATE,
        "the scales of a later segment are the first ones",
        "absmax_of(segment, k) += first / kOptimizer8bitBlocksize;",
        "absmax_of(segment, k) += 0;",
        PAGED,
    ),
    Mutant(
        ARENA,
        "an arena takes the state of an algorithm with more moments for its own",
        *without(" && entry.moments == moments_of(algorithm)"),
        PAGED,
    ),
    Mutant(UPDATE, "nothing is fetched ahead", *without("  fetch(i + 1);\n"), PAGED),
    Mutant(UPDATE, "no room is left for others", "to_come + kSpareBytes;", "to_come;", PAGED),
]
