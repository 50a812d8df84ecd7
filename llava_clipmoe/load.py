"""The way in: a bundle from a model directory, a hub id, a checkpoint file or an open_clip model."""

from __future__ import annotations

from pathlib import Path

from .bundle import ClipBundle
from .conversion import load_checkpoint
from .model_directory import download, load_directory
from .open_clip_models import load_open_clip
from .tower_registry import HUB_ID


def load_bundle(
    source: str | Path,
    *,
    checkpoint: str | Path | None = None,
    quick_gelu: bool | None = None,
    num_experts_per_tok: int | None = None,
) -> ClipBundle:
    """Load a CLIP or CLIP-MoE from whatever `source` names.

    source: a model directory (ours or transformers'), a hub id "org/name", a checkpoint file (official CLIP-MoE or
    OpenAI naming), or, together with `checkpoint`, the name of an open_clip model. `quick_gelu` overrides the
    activation that the source's config says; `num_experts_per_tok` overrides K, and must be given for official
    CLIP-MoE checkpoints, which do not say it.
    Raises ValueError, FileNotFoundError or UnsafeFile, each saying what to do next.
    """
    path = Path(source)
    if checkpoint is not None:
        if path.exists():
            raise ValueError(
                f"{source} exists, and a checkpoint ({checkpoint}) was given too. A checkpoint goes with the NAME of "
                "an open_clip model, such as ViT-L-14-336-quickgelu; give one of the two."
            )
        return load_open_clip(str(source), checkpoint, quick_gelu=quick_gelu)
    if path.is_dir():
        return load_directory(path, path.resolve().name, quick_gelu, num_experts_per_tok)
    if path.is_file():
        return load_checkpoint(path, num_experts_per_tok=num_experts_per_tok, quick_gelu=quick_gelu)
    if isinstance(source, str) and HUB_ID.match(source):
        return load_directory(download(source), source, quick_gelu, num_experts_per_tok)
    raise FileNotFoundError(
        f"{source} is not a model directory or checkpoint file on this machine, nor a hub id (org/name). If it is the "
        "name of an open_clip model, give its checkpoint file as well."
    )
