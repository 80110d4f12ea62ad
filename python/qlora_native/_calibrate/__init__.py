"""Calibrated quantization: codes and scales that keep a layer's output, for inputs of the kind that it will see."""
