"""Hides output of other libraries that a user cannot act on. Import it before peft and transformers, which print first.

It hides their warnings about each other, and where stderr is no terminal their bars, of which a log keeps every state.
"""

import logging
import os
import sys
import warnings

for chatty in ("bitsandbytes.backends.cpu.ops", "kernels", "torchao", "torch.utils._pytree"):  # which PEFT imports
    logging.getLogger(chatty).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # PEFT reads transformers' property by an old name

if not sys.stderr.isatty():
    if "TQDM_DISABLE" not in os.environ:
        os.environ["TQDM_DISABLE"] = "1"  # is read when tqdm is imported, and must not reach programs started from here
        import tqdm.auto  # noqa: F401

        del os.environ["TQDM_DISABLE"]
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
