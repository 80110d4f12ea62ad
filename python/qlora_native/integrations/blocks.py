"""`fuse_blocks`, which `qlora_native.integrations.fuse` has."""

from .fuse import fuse_blocks

__all__ = ["fuse_blocks"]
