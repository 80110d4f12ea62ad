"""Hides output of other libraries that a user cannot act on. Import it before peft and transformers, which print first.

It hides their warnings about each other. If stderr is not a terminal it also hides their progress bars, because a log
file would keep every state of a bar.
"""

import logging
import os
import sys
import warnings

# bitsandbytes, which PEFT imports, recommends a package whose kernels this program does not run.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# torchao, which PEFT imports too, warns that it does not load its kernels for other versions of Python and of CUDA.
logging.getLogger("torchao").setLevel(logging.ERROR)
# torchao also registers a class with torch in a deprecated way.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
# PEFT reads a property of transformers by its old name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")

if not sys.stderr.isatty():
    # Switches off the bars whose code leaves the choice to tqdm, such as the one over the tensors of a GGUF file. tqdm
    # reads the variable when it is imported. It does not stay set, for programs that this one starts would inherit it.
    if "TQDM_DISABLE" not in os.environ:
        os.environ["TQDM_DISABLE"] = "1"
        import tqdm.auto  # noqa: F401

        del os.environ["TQDM_DISABLE"]
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
