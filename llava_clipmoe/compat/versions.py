"""Which transformers versions upstream LLaVA works with."""

from __future__ import annotations

import transformers
from packaging.version import Version

# Upstream's generate hands no `cache_position` on, which these versions need; 4.37.2 is LLaVA's own, 5 does without.
BROKEN = (Version("4.40.0"), Version("5.0.0.dev0"))
TESTED = Version("5.24.0")
"""The newest that the test suite passed with."""


class BrokenTransformers(RuntimeError):
    """The installed transformers cannot run upstream LLaVA."""


class NewerTransformers(RuntimeError):
    """Something failed that works with the versions of transformers that were tested."""


def check_transformers() -> None:
    """Raise BrokenTransformers for a version that is known not to work with upstream LLaVA."""
    found = Version(transformers.__version__)
    if BROKEN[0] <= found < BROKEN[1]:
        raise BrokenTransformers(
            f"transformers {found} does not work with upstream LLaVA: versions 4.40 to 4.57 break its generation "
            "(cache_position). Install LLaVA's own, `pip install transformers==4.37.2 tokenizers==0.15.1`, or the "
            "current one, `pip install -U transformers` (5 or newer)."
        )


def newer_than_tested() -> str | None:
    """What to say of a failure under a transformers that nobody has tested; None where the version is a tested one."""
    found = Version(transformers.__version__)
    if found.release <= TESTED.release:
        return None
    return (
        f"transformers {found} is newer than what this version of llava-clipmoe was tested with (up to {TESTED}). If "
        f"that is the cause, `pip install -U llava-clipmoe`, or `pip install transformers=={TESTED}`."
    )
