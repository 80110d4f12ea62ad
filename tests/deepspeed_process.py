"""One of several processes of a training by DeepSpeed with ZeRO-3. test_deepspeed.py reads what it writes.

torchrun --nproc-per-node 2 deepspeed_process.py FOLDER
"""

import sys
import warnings
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from sharding import leave
from test_distributed import ids, make

RATE = 1.0
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # 0: small parameters are sharded too
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": 0.0,
}


def main(folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    deepspeed.init_distributed("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    model = make("llama", double_quant=True)
    codes = [p for p in model.parameters() if p.dtype == torch.uint8]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    rows = ids().chunk(count)[rank]
    losses, gradients = [], []
    for _ in range(2):
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        losses.append(loss.detach())
        gradients.append({name: safe_get_full_grad(p).clone() for name, p in trained.items()})
        engine.step()
    held = sum(p.ds_tensor.numel() for p in codes) / sum(p.ds_numel for p in codes)
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        model.save_pretrained(folder / f"adapter-{rank}", save_embedding_layers=False)
    torch.save((losses, gradients, held), folder / f"written-{count}-{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
