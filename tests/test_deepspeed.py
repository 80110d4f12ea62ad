"""Guards DeepSpeed's ZeRO-3 over a quantized model with an adapter: processes with shards compute what one does."""

import importlib.util

import pytest
import torch

pytest.importorskip("peft")
if importlib.util.find_spec("deepspeed") is None:  # importing it here would change torch.distributed for other tests
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

import models
import process
from lora import assert_close
from safetensors.torch import load_file
from test_distributed import ids, make

pytestmark = models.MARKS
RATE = 1.0  # that of deepspeed_process.py


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_zero_3_computes_what_one_process_does(count, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    environment = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    process.succeed(*launcher, "deepspeed_process.py", tmp_path, **environment)
    written = [torch.load(tmp_path / f"written-{count}-{rank}.pt") for rank in range(count)]
    model = make("llama", double_quant=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=RATE)
    for step in range(2):
        loss = model(input_ids=ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        assert_close(torch.stack([losses[step] for losses, _, _ in written]).mean(), loss.detach(), 1e-6)
        for _, gradients, held in written:
            assert gradients[step].keys() == trained.keys()
            for name, parameter in trained.items():
                # the second step starts where the roundings of the first have led
                assert_close(gradients[step][name], parameter.grad, 1e-5 if step == 0 else 1e-4)
            assert held < 1.1 / count
        optimizer.step()
    for name, tensor in load_file(tmp_path / "adapter-0" / "adapter_model.safetensors").items():
        assert_close(tensor, trained[name.replace(".weight", ".default.weight")].detach(), 1e-5)
