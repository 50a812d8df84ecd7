"""Shows the import error that upstream hides: llava/model/__init__.py wraps its imports in `except: pass`."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

LANGUAGE_MODEL = "llava.model.language_model.llava_llama"


def report_hidden_error(module: ModuleType) -> None:
    """After `llava.model` was imported: if its main class is missing, say why.

    Raises the error itself; the hook prints it in one line before upstream fails with "cannot import name
    'LlavaLlamaForCausalLM'", which names no cause.
    """
    if not hasattr(module, "LlavaLlamaForCausalLM"):
        try:
            import_language_model()
        except Exception as error:
            module.hidden_error = error  # for the launcher
            raise


def import_language_model() -> ModuleType:
    """Import upstream's language model."""
    return import_module(LANGUAGE_MODEL)


def real_error(error: ImportError) -> BaseException:
    """The error behind upstream's "cannot import name", as far as it is known."""
    hidden = getattr(sys.modules.get("llava.model"), "hidden_error", None) or error
    while hidden.__cause__ is not None:  # transformers wraps what its lazy imports met
        hidden = hidden.__cause__
    return hidden
