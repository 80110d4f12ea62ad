"""The quantized weight, the products and what a model computes around them, with their checks. It knows no layer."""
