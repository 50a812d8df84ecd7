"""A run's settings as its config.json keeps them: written, compared with those of a resumed run, fingerprinted."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from .config import TrainConfig

FREE_TO_CHANGE = (
    "output_dir",
    "evaluation",
    "engine.workers",
    "engine.checkpoint_every",
    "engine.log_every",
    "engine.trackers",
    "engine.chunk_size",
    "engine.activation_checkpointing",
    "data.max_bad_fraction",
    "data.cache_images",
)
"""Settings that change neither the data nor a weight beyond rounding: a resumed run may differ in these."""
GONE = ("lora.keep",)
"""Settings of older runs that there are no more; none of them changed a weight."""


def to_dict(config: TrainConfig) -> dict:
    """The config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two `to_dict`s differ, those that are free to change left out.

    A setting that the old one does not have is younger than that run, which was made with its default.
    """
    found = []
    if not prefix:
        old = filled(old, to_dict(TrainConfig()))
    for key in sorted(set(old) | set(new)):
        name, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if name in FREE_TO_CHANGE or name in GONE:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {a!r} -> {b!r}")
    return found


def filled(given: dict, defaults: dict) -> dict:
    """`given` with what it lacks from `defaults`, at every level."""
    both = {**defaults, **given}
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(both[key], dict):
            both[key] = filled(both[key], default)
    return both


def digest(*parts: object) -> str:
    """A short stable hash of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
