"""What a mutant is, and the tests that should notice them."""

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
    "emulator": Suite("qln_test_emulator"),
    "product_config": Suite("qln_test_product_config"),
    "gemm_layout": Suite("qln_test_gemm_layout"),
    "code_table": Suite("qln_test_code_table"),
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
    "attention": Suite("qln_test_attention"),
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


def without(text: str, rest: str = "") -> tuple[str, str]:
    """Text that a mistake leaves out, or of which it leaves `rest`: its `find` and `replace`."""
    return text, rest


# Suites of many mutants.
CONCURRENT, CONFORMANCE = ("concurrent",), ("conformance",)
ON_GPU = ("conformance_emulated",)
