"""Bridges to other libraries. Each module imports its library; none is imported by `import qlora_native`."""
