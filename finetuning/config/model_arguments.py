"""
The arguments of step 1 about the model. Imports trl, without torch.
"""

import re
from dataclasses import dataclass, field

from trl import ModelConfig

from finetuning.config.arguments import Checked


@dataclass
class ModelArguments(ModelConfig):
    """trl's ModelConfig, whose dtype is chosen for the hardware unless it is set."""

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of the weights while training. Unset: float32 for full fine-tuning (bf16 or fp16 mixed "
            "precision computes in the lower one), the compute dtype for the frozen base of LoRA.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )

    def __post_init__(self):
        targets = self.lora_target_modules
        super().__post_init__()
        # trl takes a single name out of its list, and peft then for an expression that no module's whole name matches
        if isinstance(targets, list) and len(targets) == 1 and re.fullmatch(r"[\w.]+", targets[0]):
            self.lora_target_modules = targets
        Checked.__post_init__(self)
