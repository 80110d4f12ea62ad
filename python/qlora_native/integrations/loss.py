"""`fuse_loss`, which `qlora_native.integrations.fuse` has."""

from .fuse import fuse_loss

__all__ = ["fuse_loss"]
