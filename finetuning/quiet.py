"""
Keeps off the terminal what the libraries say and a user can do nothing about. Everything else is let through.
"""

import logging
import os
import warnings

from finetuning.ranks import is_main_process


def quiet_libraries() -> None:
    """Call before torch and transformers are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at each fork of a data loader
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # "No module named 'kernels'": an optional speed-up
    warnings.filterwarnings("ignore", message=".*torch.distributed.*process group.*")
    if not is_main_process():  # one rank speaks for all
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def quiet_weight_bars() -> None:
    """No bars for loading and writing weights; downloads keep theirs. Call after transformers is imported."""
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # of embeddings that are set by step 1, or by the adapter that is loaded
    logging.getLogger("transformers.modeling_utils").addFilter(
        lambda record: "The new embeddings will be initialized" not in record.getMessage()
    )
    if is_main_process():
        huggingface_hub.utils.enable_progress_bars()
