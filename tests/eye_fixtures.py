"""Fixtures of tests that ask the demo's eyes in this process, without a page. A pytest plugin:
`pytest_plugins = ["eye_fixtures"]` in a test file. They need upstream LLaVA.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_llava import make_two_llavas, make_two_projectors, upstream_in_this_process

if TYPE_CHECKING:
    from demo.models import Eye


@pytest.fixture(scope="module")
def upstream() -> Iterator[None]:
    """Upstream LLaVA can be imported, and there is no GPU."""
    with upstream_in_this_process(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def two_llavas(upstream, tmp_path_factory) -> tuple[Path, Path]:
    """Directories of two whole LLaVAs, with CLIP and with CLIP-MoE."""
    return make_two_llavas(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def two_projectors(upstream, tmp_path_factory) -> tuple[Path, Path, Path]:
    """Directories of a language model and of the projectors of two towers."""
    return make_two_projectors(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def own(two_llavas) -> tuple[Eye, Eye]:
    """Two eyes, each with a language model of its own."""
    from demo.models import Models, load_eyes

    return load_eyes(Models(*two_llavas, device="cpu"), say=lambda line: None)


@pytest.fixture(scope="module")
def shared(two_projectors) -> tuple[Eye, Eye]:
    """Two eyes, one language model."""
    from demo.models import Models, load_eyes

    llm, left, right = two_projectors
    return load_eyes(Models(left, right, llm, device="cpu"), say=lambda line: None)
