"""The parts of the 8-bit optimizers of optim.py."""
