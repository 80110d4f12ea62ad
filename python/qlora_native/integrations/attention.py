"""`fuse_attention`, which `qlora_native.integrations.fuse` has."""

from .fuse import fuse_attention

__all__ = ["fuse_attention"]
