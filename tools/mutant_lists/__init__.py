"""The mutants of mutants.py, as data: a file, the text to find, its replacement, and the test that must notice.

The text to find must occur once in its file, so a refactoring that changes it must change its mutant too.
"""

from mutant_lists.attention import ATTENTION
from mutant_lists.cpu import ON_CPU
from mutant_lists.gemm import BETWEEN_BLOCKS, GEMM
from mutant_lists.hopper import BY_WGMMA
from mutant_lists.mutant import SUITES, Mutant
from mutant_lists.optimizer import OPTIMIZER
from mutant_lists.paged import PAGED_OPTIMIZER
from mutant_lists.product import ON_CHIP
from mutant_lists.quantize import QUANTIZERS
from mutant_lists.row_groups import ROW_GROUPS

__all__ = ["MUTANTS", "SUITES", "Mutant"]

MUTANTS = [
    *BETWEEN_BLOCKS,
    *BY_WGMMA,
    *GEMM,
    *ON_CHIP,
    *ROW_GROUPS,
    *QUANTIZERS,
    *OPTIMIZER,
    *ON_CPU,
    *ATTENTION,
    *PAGED_OPTIMIZER,
]
