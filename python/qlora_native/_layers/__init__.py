"""The layers that hold a quantized weight, and `quantize_model`. They know no integration."""
