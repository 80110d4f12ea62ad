"""`python -m qlora_native check`: compares the kernels of this machine with their definitions.

`run` starts a process for each instruction set and each kernel of a GPU, `cases` is what such a process does, and
`reference` has the definitions.
"""
