"""Models of transformers compute attention, blocks and the loss by this library's ops.

    fuse_loss(model)        # the loss, without logits
    fuse_blocks(model)      # gated activations and RMS norms, one op each
    fuse_attention(model)   # attention and the rotation of positions, on the CPU

Each changes a model in place, whether it is quantized or not, and leaves what it does not recognise.
"""

from ._attention import fuse_attention
from ._blocks import fuse_blocks
from ._loss import fuse_loss

__all__ = ["fuse_attention", "fuse_blocks", "fuse_loss"]
