"""`export_model` and `export_adapter`, which `qlora_native.convert.gguf` has."""

from ..convert.gguf import ADAPTER_TYPES, ARCHITECTURES, MODEL_TYPES, export_adapter, export_model

__all__ = ["ADAPTER_TYPES", "ARCHITECTURES", "MODEL_TYPES", "export_adapter", "export_model"]
