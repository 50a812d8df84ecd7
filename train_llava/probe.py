"""What common.sh asks the interpreter that is to train: `"$PYTHON" - DEVICE GPUS MODEL CONVERSATION <probe.py`.

Prints one line: whether LLaVA, DeepSpeed and flash attention are there (0 or 1), device, GPUs, stage 2's conversation
template, and why it does not fit the model (the rest of the line). Fails where torch or llava_clipmoe are missing.
On standard input, so that modules are found from the folder where the script was started, as the trainer finds them.
"""

import importlib.util
import sys
from pathlib import Path

from llava_clipmoe.conversations import find_conversation, why_unfit


def main(device: str, gpus: int, model: str, conversation: str) -> None:
    """gpus: 0 for those of this machine."""
    llava = importlib.util.find_spec("llava")  # the package of this name on the index has no train/train.py
    has_llava = bool(llava and llava.origin and (Path(llava.origin).parent / "train" / "train.py").exists())
    # torch and flash_attn take seconds to import: only when they are asked about
    if device == "auto" or (device == "cuda" and not gpus):
        import torch

        count = torch.cuda.device_count()
        device = device if device != "auto" else "cuda" if count else "cpu"
        gpus = gpus or count
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    has_flash = device == "cuda" and _flash_attention_imports()
    if conversation == "auto":
        conversation = find_conversation(model) or "v1"
    gpus = gpus or (0 if device == "cuda" else 1)
    found = int(has_llava), int(has_deepspeed), int(has_flash), device, gpus, conversation
    print(*found, why_unfit(model, conversation) or "")


def _flash_attention_imports() -> bool:
    try:
        import flash_attn  # noqa: F401
    except (ImportError, OSError):  # not installed, or built for another torch or CUDA
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
