"""
The arguments of step 1 about the model. Imports trl, without torch.
"""

from dataclasses import dataclass, field

from trl import ModelConfig

from finetuning.configs import Checked


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
        super().__post_init__()
        Checked.__post_init__(self)
