"""Conversion of checkpoint files, which hold one tensor at a time in memory: merge, quantize, and export to servers."""
