"""transformers: quantize a model while it loads, and read and write bitsandbytes' 4-bit files."""

from . import _save as _save  # so that save_pretrained saves models whose layers quantize_model has replaced
from ._config import BitsAndBytesConfig

__all__ = ["BitsAndBytesConfig"]
