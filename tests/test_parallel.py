"""Guards models that libraries shard over processes: each process has its part, and all compute what one does."""

import pytest
import torch
import torch.distributed as dist

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import models  # noqa: E402
import moe  # noqa: E402
import parallel_process  # noqa: E402
import process  # noqa: E402
from lora import assert_close  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

pytestmark = [*models.MARKS, pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")]
counts = pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.thorough)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    parallel_process.save(folder)
    return folder


@pytest.fixture(scope="module")
def written(folder):
    """{number of processes: what each of them wrote}; they start once, for all cases."""

    class Written(dict):
        def __missing__(self, count):
            torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
            process.succeed(*torchrun, "parallel_process.py", folder, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
            self[count] = [torch.load(folder / f"written-{count}-{rank}.pt") for rank in range(count)]
            return self[count]

    return Written()


@counts
@pytest.mark.parametrize("name", parallel_process.MODELS)
def test_processes_with_parts_compute_what_one_with_all_does(name, count, folder, written):
    adapter = folder / f"{name}-adapter"
    expected = parallel_process.results(parallel_process.make(folder, name), adapter)
    for found in (of_process[name] for of_process in written[count]):
        # scales of columns are in fp32: 4.5 bits an element, where they have 4.13
        assert found["bytes"] <= 1.1 * expected["bytes"] / count
        for key in ("logits", "loss", "fused"):
            assert_close(found[key], expected[key], 1e-5)
        for key in ("gradients", "after"):
            assert found[key].keys() == expected[key].keys()
            for parameter, tensor in found[key].items():
                assert_close(tensor, expected[key][parameter], 1e-5)
    one, other = (load_file(f / "adapter_model.safetensors") for f in (adapter, folder / f"{name}-adapter-{count}"))
    models.assert_same_bits(one, other)


@pytest.mark.skipif(not moe.FROM_5_25, reason="transformers before 5.25 refuses one of both sizes")
@counts
@pytest.mark.parametrize("case", parallel_process.ONE_OF_BOTH)
def test_experts_or_layers_may_be_whole_in_each_process(case, count, folder, written):
    expected = parallel_process.results(parallel_process.make(folder, "moe-nf4"), folder / "whole")
    for found in (of_process[case] for of_process in written[count]):
        assert expected["bytes"] / count < found["bytes"] < expected["bytes"]
        for key in ("logits", "loss", "fused"):
            assert_close(found[key], expected[key], 1e-5)
        for parameter, gradient in expected["gradients"].items():
            assert_close(found["gradients"][parameter], gradient, 1e-5)
    one, other = (load_file(folder / name / "adapter_model.safetensors") for name in ("whole", f"{case}-{count}"))
    models.assert_same_bits(one, other)


@counts
def test_adapter_is_loaded_over_parts(count, written):
    for of_process in written[count]:
        assert_close(of_process["loaded"], of_process["llama-nf4"]["logits"], 1e-6)


PART = "expected a model that this process has all of"
REFUSALS = {
    "save_pretrained": PART,
    "dequantize": PART,
    "merge": "merge: expected a layer that this process has all of, got tensor parallelism",
    "experts": "0.mlp.experts.gate_up_proj: tp_plan: expected a style that shards Experts4bit (use ep_size)",
    "adapters of experts": "target_parameters: expected all experts in this process",
    "columns": "0.self_attn.o_proj: expected columns that divide into 2 equal parts of whole blocks of 64 elements",
    "fsdp_size": "distributed_config, fsdp_size: expected 1 for a quantized model",
    "pp_size": "distributed_config, pp_size: expected 1 for a quantized model",
    "heads": "0.self_attn.q_proj: tp_plan: expected a style that shards Linear4bit (name it in llm_int8_skip_modules)",
    "KeepQuantized": "distributed_config: expected none with KeepQuantized",
    "LoraConfig": "DoraLinearVariant: expected plain LoRA over a layer in tensor parallelism",
    "VeraConfig": "VERA: expected LoRA over a layer in tensor parallelism",
    "quantize_model": "weight: expected a tensor of this process, got a DTensor",
    "parallelize_module": "x: expected a tensor of this process, got a DTensor",
}

if not moe.FROM_5_25:
    del REFUSALS["heads"]


@pytest.mark.parametrize("case", REFUSALS)
def test_what_no_part_can_do_is_refused_by_name(case, written):
    for of_process in written[2]:
        assert REFUSALS[case] in of_process["refusals"][case]
    assert of_process["refusals"].keys() == REFUSALS.keys()
