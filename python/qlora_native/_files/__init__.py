"""Readers of quantized files: the tensors of a layer become a `QuantizedWeight` that keeps their values to the bit."""
