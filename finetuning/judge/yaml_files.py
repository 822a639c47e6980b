"""
A YAML file that the user wrote: a rubric, a price table. Imports without torch.
"""

from pathlib import Path

import yaml

from finetuning.errors import InputError


def read_yaml(path: Path, setting: str):
    """What a YAML file holds.

    Args:
        setting: The setting that names the file, for the message.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{setting} {path} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise InputError(f"{setting} {path}: brackets within brackets, too deep to read") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that does not exist
        raise InputError(f"{setting} {path} is no YAML: {' '.join(str(error).split())}") from error
