"""Let models of transformers compute attention, blocks and the loss by the ops of this library."""

from ._attention import fuse_attention
from ._blocks import fuse_blocks
from ._loss import fuse_loss

__all__ = ["fuse_attention", "fuse_blocks", "fuse_loss"]
