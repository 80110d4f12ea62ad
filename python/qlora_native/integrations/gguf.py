"""`export_model` and `export_adapter`, which `qlora_native.convert.gguf` has."""

from ..convert.gguf import export_adapter, export_model

__all__ = ["export_adapter", "export_model"]
