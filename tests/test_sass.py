"""Guards `make sass`: what tools/machine_code.py reads from a listing, what bench/sass.py calls a fault, and what
bench/cuda_model.py makes of it for whole products."""

import copy
import dataclasses
import importlib
import itertools
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
# call that does not return; for sm_90 a warp whose lanes have parted takes a way of its own (BRA.DIV).
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
    assert bounds[COPY] == [(0x10, 0xA0, 10), (0x70, 0x80, 2)], "what only a parted warp runs is not of the loop"


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
        "instructions": 13,
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
        return machine_code.Kernel("hopper_gemm_kernel<Bf16, HopperRows, 64>", "sm_90a", code, 168, 0)

    together, apart = kernel("R24, R152, gdesc[UR8], R24", "R24, gsb0"), kernel("R24, gsb0", "R24, gsb0")
    assert "serialized" not in sass.figures(together)
    figure = sass.figures(apart)
    report = {apart.name: {"sm_90a": figure}}
    assert sass.faults(report, report) == [f"{apart.name} for sm_90a: each wgmma waits for the one before"]


def test_tables_of_the_readmes_are_those_of_the_figures(sass):
    committed = json.loads(sass.RESULTS.read_text())
    for page, shown in sass.SHOWN.items():
        text = page.read_text()
        assert sass.with_table(text, sass.short_table(committed, shown)) == text, page


def test_shared_memory_is_counted_by_the_width_of_each_access(machine_code):
    cycles = importlib.import_module("cycles")
    opcodes = {
        "LDS": 1, "LDS.64": 2, "LDS.128": 4, "LDS.U8": 1, "STS.128": 4, "LDSM.16.M88.4": 4, "LDSM.16.MT88.2": 2,
        "LDGSTS.E.BYPASS.128": 4, "LDGSTS.E": 1, "LDG.E.128": 0, "HMMA.16816.F32.BF16": 0,
    }  # fmt: skip
    for opcode, expected in opcodes.items():
        assert cycles.shared_cycles([machine_code.Instruction(0, "", opcode, "")]) == expected, opcode


def test_vectors_that_lanes_share_take_half_as_long(machine_code):
    cycles = importlib.import_module("cycles")
    loop = [machine_code.Instruction(0, "", opcode, "") for opcode in ("LDS.128", "LDS.64")]
    assert [cycles.shared_cycles(loop, lanes_share_vectors=shared) for shared in (False, True)] == [4 + 2, 2 + 2]


def test_step_is_bound_by_the_resource_that_takes_longest(machine_code):
    cycles = importlib.import_module("cycles")
    loop = [("LDSM.16.M88.4", "")] * 32 + [("HMMA.16816.F32.BF16", "")] * 128 + [("BRA", "`(.L_0)")]
    code = tuple(machine_code.Instruction(16 * i, "", *each) for i, each in enumerate(loop))
    kernel = machine_code.Kernel(
        "gemm_kernel<Bf16, DecodedRows, GemmTile<256, 128, true>, false>", "sm_90", code, 255, 0
    )
    step = cycles.step_of(kernel.name, cycles.count_step(kernel), cycles.DEVICES["sm_90"])
    assert step.bound == "tensor"
    assert step.cycles["tensor"] == 256 * 128 * 64 / (0.62 * 2048) and round(step.share, 4) == 0.62
    assert cycles.count_step(machine_code.Kernel("gemv_kernel<Bf16, 8, 4, true, false>", "sm_90", code, 255, 0)) is None


def test_step_by_wgmma_counts_what_no_consumer_loads(machine_code):
    cycles = importlib.import_module("cycles")
    products = [*["HGMMA.64x256x16.F32.BF16"] * 4, "LDS.128", "PRMT", "BRA"]
    asks, asks_for_pair = ["SYNCS", *["UTMALDG.2D"] * 2, "BRA"], ["SYNCS", "IADD3", *["UTMALDG.2D"] * 2, "BRA"]
    opcodes = [*products, *asks, *asks_for_pair, "SYNCS", "LDG.E", "LOP3.LUT", "BRA", "EXIT"]
    operands = {6: "0x0", 10: "0x70", 15: "0xb0", 19: "0x100"}
    code = tuple(machine_code.Instruction(16 * i, "P0", name, operands.get(i, "")) for i, name in enumerate(opcodes))
    kernel = machine_code.Kernel("hopper_gemm_kernel<Bf16, HopperRows, 256>", "sm_90a", code, 168, 0)
    step = cycles.step_of(kernel.name, cycles.count_step(kernel), cycles.DEVICES["sm_90a"])
    assert step.cycles["tensor"] == 1024
    # X is written once and read by both warpgroups; 8 warps load vectors that lanes share, and codes come in 32 x 128.
    assert step.cycles["shared memory"] == 3 * 256 + 8 * 2 + 32
    assert step.cycles["issue"] == round((8 * 7 + 5 + 2 * 4) / 4)
    assert step.cycles["ALU"] == round(2 * (8 + 1 + 2) / 4), "two cycles for each PRMT, IADD3 and LOP3"


# ---- the account of whole products -----------------------------------------------------------------------------------


@pytest.fixture
def account(sass):
    return importlib.import_module("cuda_account")


@pytest.fixture
def model(account):
    return importlib.import_module("cuda_model")


def test_account_is_that_of_the_committed_figures_and_choices(sass, account):
    kernels = json.loads(sass.RESULTS.read_text())["kernels"]
    assert account.PAGE.read_text() == account.committed_page(kernels)


def test_choices_have_every_product_and_way_of_the_account(account, model):
    choices = account.read_choices(account.CHOICES.read_text())
    products = [product for weight in account.WEIGHTS for product in account.products(weight) if not product.rank]
    assert len(products) == 80
    for product in products:
        assert choices[product, "chosen"].way in ("wgmma", "panels")
        for rows in account.WGMMA_ROWS:
            assert choices[product, f"wgmma-{rows}"].runs().tile_rows == rows
        for asked in ("dense", "dense-with-adapter"):
            dense = choices[product, asked]
            assert dense.way != "panels" or model.Panels(**dense.numbers).rows > 0


def figures_of(model, cycles):
    """Machine code of which a step takes this many cycles of shared memory."""
    step = {"step": {"shared memory": cycles, "issue": 1, "ALU": 1}}
    wgmma = itertools.product(("HopperRows", "HopperColumns"), (64, 256))
    return {
        **{f"hopper_gemm_kernel<Bf16, {layout}, {rows}>": {"sm_90a": step} for layout, rows in wgmma},
        "gemm_kernel<Bf16, DecodedRows, GemmTile<64, 128, true>, false>": {"sm_90": step},
        "panel_kernel<Bf16, 4>": {"sm_90": {"per_element": 20.0}},
    }


def test_blocks_with_whole_tiles_take_their_steps_and_store_their_results(model):
    clock, product = model.H100.clock, model.Product("forward", 64, 128 * 132, 6400)
    runs = model.Runs("wgmma", 64, 128, tiles=132, steps=100, blocks=132, share=0, rest=0, cluster=1)
    assert runs.longest == 100 and not runs.splits_a_tile
    seconds = model.Model(figures_of(model, 2000), model.H100).fused(product, runs)
    cycles = 700 + 101 * 2000 + 64 * 128 * 2 / 32
    assert seconds == pytest.approx(cycles / clock + 1e-6)
    # With twice as many tiles, a block has two. The kernels of gemm/ begin anew with each, and fill their table before
    # anything else.
    product = dataclasses.replace(product, cols=2 * product.cols)
    of_gemm = model.Runs("gemm", 64, 128, tiles=264, steps=100, blocks=132, share=200, rest=0)
    for twice, more in ((dataclasses.replace(runs, tiles=264), 0), (of_gemm, 700 + 700 + 2000)):
        seconds = model.Model(figures_of(model, 2000), model.H100).fused(product, twice)
        assert seconds == pytest.approx((700 + 201 * 2000 + 2 * 512 + more) / clock + 1e-6)


def test_blocks_that_share_a_tile_exchange_its_sums(model):
    product = model.Product("forward", 64, 128, 6400)
    runs = model.Runs("wgmma", 64, 128, tiles=1, steps=100, blocks=2, share=50, rest=0)
    seconds = model.Model(figures_of(model, 2000), model.H100).fused(product, runs)
    sums = 64 * 128 * 4 / 64  # stored by one block, and loaded by the other
    cycles = 291 + 700 + 51 * 2000 + sums + 291 + sums + 291 + 512  # first there is the ticket
    assert seconds == pytest.approx(cycles / model.H100.clock + 2e-6), "a kernel and a memset"


@pytest.mark.parametrize(
    ("count", "bandwidth", "turns"), [(2, 3.3e12, 4), (4, 2.65e12, 2), (8, 2.65e12 / 3.3 * 2.65, 1)]
)
def test_blocks_of_a_cluster_exchange_parts_of_their_sums(model, count, bandwidth, turns):
    product = model.Product("forward", 64, 128, 64 * 101)
    runs = model.Runs("wgmma", 64, 128, tiles=1, steps=101, blocks=count, share=0, rest=0, cluster=count)
    assert runs.longest == {2: 51, 4: 26, 8: 13}[count] and not runs.splits_a_tile
    seconds = model.Model(figures_of(model, 2000), model.H100).fused(product, runs)
    sums = 64 * 128 * 4
    # The sums of a turn are added while those of the next one come, which takes longer.
    cycles = 700 + (runs.longest + 1) * 2000 + 200 + 200 + (sums / 128 + 512 / count) / turns
    stored = sums * (count - 1) / count / (bandwidth / 114)
    assert seconds == pytest.approx(cycles / model.H100.clock + stored + 1e-6), "a kernel without a memset"


@pytest.mark.parametrize(("rows", "cluster", "given"), [(64, 1, 1 / 2), (64, 2, 1 / 2), (256, 1, 1 / 4), (256, 2, 0)])
def test_warpgroups_of_dx_exchange_sums_unless_a_cluster_does(model, rows, cluster, given):
    runs = model.Runs("wgmma", rows, 128, tiles=1, steps=100, blocks=cluster, share=0, rest=0, cluster=cluster)
    of = model.Model(figures_of(model, 2000), model.H100)
    forward, dx = (of.fused(model.Product(direction, rows, 128, 6400), runs) for direction in ("forward", "dX"))
    cycles = 2 * given * 2 * rows * 128 * 4 / 128  # each stores this part of the tile's sums, and loads as many
    assert (dx - forward) * model.H100.clock == pytest.approx(cycles, abs=1e-3)


def test_pairs_load_rows_of_x_once_and_meet_at_a_barrier(model):
    product = model.Product("forward", 64, 256, 64 * 100)
    alone = model.Runs("wgmma", 64, 128, tiles=2, steps=100, blocks=2, share=0, rest=0, cluster=1)
    in_pairs = dataclasses.replace(alone, pairs=1)
    of = model.Model(figures_of(model, 2000), model.H100)
    of_x = 64 * 64 * 2 * 132 / (6.65e12 / model.H100.clock)
    assert of.step(product, alone)["L2"] - of.step(product, in_pairs)["L2"] == pytest.approx(of_x / 2)
    # Shared memory bounds a step, so that the barrier is all that differs.
    for cluster in (1, 2):
        runs = [dataclasses.replace(each, cluster=cluster, blocks=2 * cluster) for each in (alone, in_pairs)]
        more = of.fused(product, runs[1]) - of.fused(product, runs[0])
        assert more == pytest.approx(200 / model.H100.clock)


def test_memory_bounds_a_product_of_few_rows(model):
    product = model.Product("forward", 64, 128 * 132, 6400)
    runs = model.Runs("wgmma", 64, 128, tiles=132, steps=100, blocks=132, share=0, rest=0, cluster=1)
    for bandwidth in (1e12, 2e12):
        device = dataclasses.replace(model.H100, bandwidth=bandwidth)
        parts = model.Model(figures_of(model, 1), device).parts(product, runs)
        assert parts["steps"] == pytest.approx(product.bytes / device.bandwidth)
        assert product.limit(device) == pytest.approx(product.bytes / device.bandwidth)


def test_panels_take_between_one_and_all_of_their_decoding(model):
    product = model.Product("forward", 2048, 4096, 4096)
    best, worst = model.Model(figures_of(model, 1), model.H100).panels(product, model.Panels(1024, 2048))
    decoding = 4096 * 4096 * 20.0 / (128 * 132 * model.H100.clock)
    assert worst - best == pytest.approx(decoding * 3 / 4)
    dense = 4 * 132 * 128 * 128 * 4096 / 395e12  # four panels of one wave each
    assert dense < best < 1.2 * dense


def test_sm_100_is_bound_by_shared_memory_until_pairs_share_a_tall_tile(sass):
    sm100 = importlib.import_module("sm100")
    shares = [taken["tensor"] / max(taken.values()) for taken in (sm100.step(v, 347, 200) for v in sm100.VARIANTS)]
    assert shares[0] < shares[1] < shares[3] < shares[4] == 1
    assert all(sm100.words(variant) <= sm100.WORDS for variant in sm100.VARIANTS)
