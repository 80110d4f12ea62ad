"""Guards `make sass`: what tools/machine_code.py reads from a listing, and what bench/sass.py calls a fault."""

import copy
import importlib
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def machine_code(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("machine_code")


@pytest.fixture
def sass(machine_code):
    return importlib.import_module("sass")


# As `cuobjdump -sass` prints it, shortened: a loop over tiles around one over steps. For sm_80 a loop may be left by a
# call that does not return; for sm_90 a warp whose lanes diverge branches elsewhere (BRA.DIV).
GEMM = (
    "_ZN12qlora_native4cuda11gemm_kernelINS0_4Bf16ENS0_16WeightRowsOfTileENS0_8GemmTileILi128ELi256ELi32ELb1EEEEEv"
    "NS0_8GemmArgsE"
)
COPY = "_ZN12qlora_native4cuda44_GLOBAL__N__6dc0a13e_7_copy_cu_5e2bc17d_112311copy_kernelIfEEvPKfPf"
LISTING = f"""
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

	code for sm_80
		Function : {GEMM}
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                  /* 0x00000a0000017a02 */
                                                                          /* 0x000fe40000000f00 */
        /*0010*/               @P0 EXIT ;                                  /* 0x000000000000094d */
        /*0020*/                   LDG.E.CONSTANT R4, [R2.64] ;            /* 0x0000000402047981 */
        /*0030*/                   LDSM.16.M88.4 R8, [R3+0x400] ;          /* 0x000400000308783b */
        /*0040*/                   HMMA.16816.F32.BF16 R12, R8, R4, R12 ;  /* 0x00000004080c723c */
        /*0050*/                   IMAD.MOV.U32 R4, RZ, RZ, R20 ;          /* 0x000000ffff047224 */
        /*0060*/                   HMMA.16816.F32.BF16 R16, R8, R4, R16 ;  /* 0x000000040810723c */
        /*0070*/              @!P1 BRA P3, 0x30 ;                          /* 0xfffffffc00ac9947 */
        /*0080*/                   STL [R1+0x4], R12 ;                     /* 0x0000040c01007387 */
        /*0090*/               @P2 CALL.REL.NOINC 0xb0 ;                   /* 0x0000002000002944 */
        /*00a0*/                   BRA 0x20 ;                              /* 0xfffffff400747947 */
        /*00b0*/                   EXIT ;                                  /* 0x000000000000794d */
        /*00c0*/                   BRA 0xc0;                               /* 0xfffffff000007947 */
		..........

	code for sm_90
		Function : {COPY}
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E R4, [R2.64] ;                     /* 0x0000000402047981 */
        /*0020*/                   BRA.DIV UR4, 0xd0 ;                     /* 0x000000a204007947 */
        /*0030*/                   SHFL.BFLY PT, R5, R4, 0x1, 0x1f ;       /* 0x0c201f0004057f89 */
        /*0040*/                   FMNMX R4, R4, R5, !PT ;                 /* 0x0000000504047209 */
        /*0050*/                   STG.E [R6.64], R4 ;                     /* 0x0000000406007986 */
        /*0060*/                   IADD3 R9, R9, 0x1, RZ ;                 /* 0x0000000109097810 */
        /*0070*/                   IADD3 R8, R8, 0x1, RZ ;                 /* 0x0000000108087810 */
        /*0080*/               @P0 BRA 0x70 ;                              /* 0xfffffffc00f80947 */
        /*0090*/                   UIADD3 UR4, UR4, 0x1, URZ ;             /* 0x0000000104047890 */
        /*00a0*/              @!P1 BRA 0x10 ;                              /* 0xfffffffc00d89947 */
        /*00b0*/                   EXIT ;                                  /* 0x000000000000794d */
        /*00c0*/                   BRA 0xc0;                               /* 0xfffffff000007947 */
        /*00d0*/                   WARPSYNC.COLLECTIVE R7, 0xe0 ;          /* 0x0000000007087348 */
        /*00e0*/                   BRA 0x40 ;                              /* 0xfffffffc00d47947 */
"""
USAGE = f"""
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function {GEMM}:
  REG:128 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:720 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def listed(machine_code):
    return {name: code for _, name, code in machine_code.functions(LISTING.splitlines())}


def test_functions_and_their_resources_are_found(machine_code):
    found = [(arch, name, len(code)) for arch, name, code in machine_code.functions(LISTING.splitlines())]
    assert found == [("sm_80", GEMM, 13), ("sm_90", COPY, 15)]
    assert machine_code.resources(USAGE.splitlines()) == {
        ("sm_80", GEMM): {"REG": 128, "STACK": 8, "SHARED": 0, "LOCAL": 0, "TEXTURE": 0, "SURFACE": 0, "SAMPLER": 0}
    }


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt, which comes with g++")
def test_names_lose_types_and_namespaces(machine_code):
    assert machine_code.short_names([GEMM, COPY]) == {
        GEMM: "gemm_kernel<Bf16, WeightRowsOfTile, GemmTile<128, 256, 32, true> >",
        COPY: "copy_kernel<float>",
    }


def test_every_loop_is_found(machine_code):
    bounds = {
        name: sorted((loop[0].address, loop[-1].address, len(loop)) for loop in machine_code.loops(code))
        for name, code in listed(machine_code).items()
    }
    assert bounds[GEMM] == [(0x20, 0xA0, 9), (0x30, 0x70, 5)]
    assert bounds[COPY] == [(0x10, 0xA0, 10), (0x70, 0x80, 2)], "what only a divergent warp runs is not of the loop"


def test_main_loop_is_where_the_tensor_cores_are(machine_code):
    code = listed(machine_code)
    assert machine_code.main_loop(code[GEMM])[0].address == 0x30, "where the tensor cores are, not what is around it"
    assert machine_code.main_loop(code[COPY])[0].address == 0x10, "with the most of its own"
    assert machine_code.main_loop(code[COPY][-4:]) == ()


def test_main_loop_is_over_vectors_rather_than_over_the_rest(machine_code):
    def loop(first, *opcodes):
        addresses = range(first, first + 16 * len(opcodes) + 16, 16)
        branch = machine_code.Instruction(addresses[-1], "P0", "BRA", hex(first))
        return [*(machine_code.Instruction(a, "", op, "R0") for a, op in zip(addresses, opcodes, strict=False)), branch]

    tables = loop(0x00, "LDG.E.128", "LDG.E.128", "STS.128", "STS.128")
    vectors = loop(0x50, "LDG.E.128", "FADD")
    rest = loop(0x80, "LDG.E", "LDG.E", "LDG.E", "FADD", "FADD")
    code = [*tables, *vectors, *rest, machine_code.Instruction(0xE0, "", "EXIT", "")]
    assert machine_code.main_loop(code, "update_kernel<float>")[0].address == 0x50
    assert machine_code.main_loop(code, "another_kernel<float>")[0].address == 0x80


def test_figures_are_those_of_the_listing(machine_code, sass):
    kernel = machine_code.Kernel(
        "gemm_kernel<Bf16, WeightRowsOfTile, GemmTile<128, 256, 32, true> >",
        "sm_80",
        listed(machine_code)[GEMM],
        128,
        8,
    )
    # Two mma of a warp: twice 8 weights a thread, each used for 16 fragments of 8 rows.
    assert sass.figures(kernel) == {
        "registers": 128,
        "local": 1,
        "stack": 8,
        "loop": 5,
        "hmma": 0.4,
        "per_weight": 5.0,
        "kinds": {"tensor core": 2, "shared memory": 1, "move": 1, "control": 1},
    }


def test_each_fault_is_reported(sass):
    figure = {"registers": 100, "local": 0, "stack": 0, "loop": 50, "hmma": 0.4, "per_weight": 5.0}
    committed = {"k": {"sm_80": figure}}

    def faults(same_compiler=True, **changes):
        return sass.faults({"k": {"sm_80": {**figure, **changes}}}, committed, same_compiler)

    assert faults() == []
    assert faults(registers=101, loop=51, hmma=0.396) == [], "within the slack"
    for change in ({"registers": 103}, {"loop": 52}, {"per_weight": 5.2}, {"hmma": 0.38}, {"local": 1}, {"stack": 8}):
        assert len(faults(**change)) == 1, change
    assert faults(False, registers=200) == [], "another compiler's figures are others"
    assert len(faults(False, stack=8)) == 1, "but it must not spill either"
    other = copy.deepcopy(committed)
    other["new"] = {"sm_80": figure}
    assert sass.faults(other, committed) == ["new for sm_80: no committed figure (make sass ARGS=--output writes it)"]


def test_wgmma_that_waits_for_the_one_before_is_a_fault(machine_code, sass):
    def kernel(*operands):
        code = tuple(machine_code.Instruction(16 * i, "", "HGMMA.64x64x16", each) for i, each in enumerate(operands))
        return machine_code.Kernel("wgmma_gemm_kernel<Bf16, WgmmaRows, 64>", "sm_90a", code, 168, 0)

    together, apart = kernel("R24, R152, gdesc[UR8], R24", "R24, gsb0"), kernel("R24, gsb0", "R24, gsb0")
    assert "serialized" not in sass.figures(together)
    figure = sass.figures(apart)
    report = {apart.name: {"sm_90a": figure}}
    assert sass.faults(report, report) == [f"{apart.name} for sm_90a: each wgmma waits for the one before"]


def test_tables_of_the_readmes_are_those_of_the_figures(sass):
    committed = json.loads(sass.RESULTS.read_text())
    for page, shown in sass.SHOWN.items():
        text = page.read_text()
        assert sass.with_part(text, sass.MARK, sass.short_table(committed, shown)) == text, page
