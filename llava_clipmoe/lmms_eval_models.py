"""lmms-eval's LLaVA-HF classes on the device that there is. `plugins.lmms_eval_manifest` names them.

Theirs hand transformers an empty device map unless one is given, which transformers 5 refuses; their device is cuda.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from lmms_eval.models.chat.llava_hf import LlavaHf as LlavaHfChat
from lmms_eval.models.simple.llava_hf import LlavaHf


class LlavaClipMoe(LlavaHf):
    """For tasks as text with pictures beside it (`--force_simple`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_placed(**kwargs))


class LlavaClipMoeChat(LlavaHfChat):
    """For tasks as messages, which lmms-eval prefers: the chat template of the exported directory makes the prompt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_placed(**kwargs))


def _placed(device: str | None = None, device_map: str = "", **kwargs: Any) -> dict[str, Any]:
    """The arguments with a device, and a device map where lmms-eval does not make one for each process itself."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not device_map and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        device_map = device
    return {"device": device, "device_map": device_map, **kwargs}
