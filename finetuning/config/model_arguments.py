"""
The arguments of step 1 about the model. Imports trl, without torch.
"""

import re
from dataclasses import dataclass, fields

from trl import ModelConfig

from finetuning.config.arguments import QUANTISED_TWICE
from finetuning.config.checks import Checked, Limits, argument, needs, refuse, refuse_each

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
QUANT_STORAGE = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
OF_LORA = {f.name: f.default for f in fields(ModelConfig) if "lora" in f.name or f.name == "use_dora"}


@dataclass
class ModelArguments(ModelConfig, Checked):
    """trl's ModelConfig, whose dtype and attention are chosen for the hardware unless they are set."""

    dtype: str | None = argument(
        None,
        "dtype of the weights while training. Unset: float32 for full fine-tuning (bf16 or fp16 mixed precision "
        "computes in the lower one), the compute dtype for the frozen base of LoRA.",
        ["auto", "bfloat16", "float16", "float32"],
    )
    attn_implementation: str | None = argument(
        None,
        f"{', '.join(ATTENTION)}, or a kernel of the Hub. Unset: FlashAttention 2 where it runs, and elsewhere torch's "
        "SDPA, row by row where rows are packed.",
    )
    freeze: list[str] | None = argument(
        None,
        "Modules that are not trained, as regular expressions over parts of their names (`encoder.layers.[0-5]`, "
        "`self_attn`), or the words `embeddings` and `encoder`.",
    )

    LIMITS = {"lora_r": Limits(at_least=1), "lora_alpha": Limits(at_least=1), "lora_dropout": Limits(0, 0.9999999)}
    RULES = (
        QUANTISED_TWICE,
        refuse(lambda model_name_or_path: model_name_or_path is None,
               "model_name_or_path is not set: name a folder with a model, or a model on the Hub"),
        refuse(lambda attn_implementation: attn_implementation not in (None, *ATTENTION)
               and "/" not in attn_implementation,  # which kernels of the Hub have
               "attn_implementation: {attn_implementation} is none of " + ", ".join(ATTENTION)),
        refuse(lambda load_in_4bit, bnb_4bit_quant_storage: load_in_4bit
               and bnb_4bit_quant_storage not in (None, *QUANT_STORAGE),
               "bnb_4bit_quant_storage: {bnb_4bit_quant_storage} is none of " + ", ".join(QUANT_STORAGE)),
        needs("load_in_4bit: true",
              {"use_bnb_nested_quant": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": None},
              lambda load_in_4bit: not load_in_4bit),
        refuse_each({"load_in_8bit": False, "load_in_4bit": False}, lambda use_peft: not use_peft,
                    "{key} freezes the weights, so nothing would train without use_peft: true"),
        refuse(lambda freeze, use_peft: freeze and use_peft,
               "freeze has no effect with use_peft: true, which trains the adapter alone; leave it out"),
        needs("use_peft: true", OF_LORA, lambda use_peft: not use_peft),
        refuse(lambda lora_task_type, use_peft: use_peft and lora_task_type != "CAUSAL_LM",
               "lora_task_type: {lora_task_type} is for models of another kind; leave it out"),
        refuse(lambda lora_target_modules, lora_modules_to_save:
               set(lora_target_modules or []) & set(lora_modules_to_save or []),
               "lora_target_modules and lora_modules_to_save name the same module, which is adapted or trained as a "
               "whole; keep one"),
    )  # fmt: skip

    def __post_init__(self):
        targets = vars(self)["lora_target_modules"]
        super().__post_init__()
        # trl takes a single name out of its list, and peft then for an expression that no module's whole name matches
        if isinstance(targets, list) and len(targets) == 1 and re.fullmatch(r"[\w.]+", targets[0]):
            self.lora_target_modules = targets
        Checked.__post_init__(self)
