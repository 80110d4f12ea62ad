"""Keeps from the output what a user cannot act on. Import it before peft and transformers, whose imports already speak.

It hides messages of other libraries about each other, and bars of transformers where stderr is no terminal: a log
file would keep every state of a bar.
"""

import logging
import sys
import warnings

# bitsandbytes, which PEFT imports, asks for a package that is of no use here: its kernels do not run.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# torchao, which PEFT imports too, has kernels for other versions of Python and of CUDA beside those that it needs.
logging.getLogger("torchao").setLevel(logging.ERROR)
# It registers a class with torch in a way that torch will drop.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
# PEFT asks transformers for a property under an older name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")

if not sys.stderr.isatty():
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
