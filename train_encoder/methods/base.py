"""The base alone: trained from nothing where asked, measured, and left as it is. What every comparison starts from."""

from __future__ import annotations

from typing import Any

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import active_parameters
from llava_clipmoe.load import load_bundle

from ..training.run import Pipeline, System


class BaseOnly(Pipeline):
    final = "base"

    def make_result(self) -> ClipBundle:
        return load_bundle(self.folder.base)

    def systems(self) -> dict[str, System]:
        return {"base": (lambda: self.result, None)}

    def describe(self) -> dict[str, Any]:
        dense = active_parameters(self.base.model.config)["total"]
        return {"parameters": {"dense": dense, "total": dense, "active": dense}}
