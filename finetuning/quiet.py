"""
Keeps off the terminal what the libraries say and a user can do nothing about. Everything else is let through.
"""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Call before torch and transformers are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at each fork of a data loader
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # "No module named 'kernels'": an optional speed-up
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.*process group.*")
