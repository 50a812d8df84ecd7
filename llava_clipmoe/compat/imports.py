"""Shows the import error that upstream hides: llava/model/__init__.py wraps its imports in `except: pass`."""

from __future__ import annotations

from types import ModuleType

LANGUAGE_MODEL = "llava.model.language_model.llava_llama"


def report_hidden_error(module: ModuleType) -> None:
    """After `llava.model` was imported: if its main class is missing, say why.

    Raises the error itself; the hook prints it in one line before upstream fails with "cannot import name
    'LlavaLlamaForCausalLM'", which names no cause.
    """
    if not hasattr(module, "LlavaLlamaForCausalLM"):
        import_language_model()


def import_language_model() -> ModuleType:
    """Import upstream's language model; any error is the real one."""
    from importlib import import_module

    return import_module(LANGUAGE_MODEL)
