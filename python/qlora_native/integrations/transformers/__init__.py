"""transformers: quantize a model while it loads, and read and write bitsandbytes' 4-bit files.

    from qlora_native.integrations.transformers import BitsAndBytesConfig      # instead of transformers' own

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(folder)               # bitsandbytes' file format, which stock transformers loads too

Each weight is quantized as soon as it has been read, so memory holds the 4-bit model and one tensor of the checkpoint.
A checkpoint that bitsandbytes has quantized keeps its bytes. It is read by this module if `from_pretrained` gets this
config, or if bitsandbytes is not installed and this module has been imported.
"""

from . import _keep_quantizer as _keep_quantizer  # so that transformers knows the quantizer of KeepQuantized
from . import _save as _save  # so that save_pretrained saves models whose layers quantize_model has replaced
from ._config import BitsAndBytesConfig, KeepQuantized

__all__ = ["BitsAndBytesConfig", "KeepQuantized"]
