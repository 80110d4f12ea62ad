"""`convert`, which `qlora_native.convert.merge` has."""

from ..convert.merge import convert

__all__ = ["convert"]
