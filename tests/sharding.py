"""Processes of one training: FSDP2 as accelerate sets it up for its users, and the end of a process."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

# torch 2.10 makes every sharded parameter differentiable first, which bytes cannot be.
FSDP_SHARDS_BYTES = torch.__version__ >= "2.11"
needs_fsdp_of_bytes = pytest.mark.skipif(not FSDP_SHARDS_BYTES, reason="FSDP2 of torch 2.10 shards no bytes")


def prepared_by_accelerate(model, **options):
    """As its Accelerator does with `--use_fsdp --fsdp_version 2 --mixed_precision bf16`, which it refuses on a CPU."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options)
    plugin.set_mixed_precision("bf16")
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16",
        device=torch.device("cpu"),
        is_main_process=dist.get_rank() == 0,
    )
    return fsdp2_prepare_model(accelerator, model)


def leave():
    """The end of a process of a group, without that of its interpreter.

    A thread of gloo may still let go of a tensor then, for which it wants the interpreter's lock: it is ended in the
    midst of a destructor, and the process aborts (pytorch/pytorch#179291).
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
