"""Fixtures of tests that ask the demo's two LLaVAs in this process, without a page. A pytest plugin:
`pytest_plugins = ["tiny.loaded_llavas"]` in a test file. They need upstream LLaVA.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tiny.llavas import make_two_llavas, make_two_projectors, upstream_in_this_process

if TYPE_CHECKING:
    from demo.llava.generate import Llava


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
def own(two_llavas) -> tuple[Llava, Llava]:
    """Two LLaVAs, each with a language model of its own."""
    from demo.llava.load import load_llavas
    from demo.llava.settings import Models

    return load_llavas(Models(*two_llavas, device="cpu"), say=lambda line: None)


@pytest.fixture(scope="module")
def shared(two_projectors) -> tuple[Llava, Llava]:
    """Two LLaVAs that share a language model."""
    from demo.llava.load import load_llavas
    from demo.llava.settings import Models

    llm, left, right = two_projectors
    return load_llavas(Models(left, right, llm, device="cpu"), say=lambda line: None)
