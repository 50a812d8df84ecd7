"""The import hook that makes upstream LLaVA know our towers. Imports neither torch nor transformers nor upstream.

Upstream has no entry points, and `llava_arch` binds `build_vision_tower` by name when it is imported. So a finder on
`sys.meta_path` waits for the few upstream modules below and changes each right after (or before) it was executed; a
program that never imports `llava` pays one dictionary look-up per import.

Installed by `python -m llava_clipmoe.run`, and by the wheel's `llava_clipmoe.pth` at every Python start.
`LLAVA_CLIPMOE_HOOK=0` turns both off. An error in here is a one-line warning, never a broken program.
"""

import os
import sys

SWITCH = "LLAVA_CLIPMOE_HOOK"

BEFORE = {"llava.train.llava_trainer": ("llava_clipmoe.compat.trainer", "before_import")}
AFTER = {
    "llava.conversation": ("llava_clipmoe.compat.conversations", "add_templates"),
    "llava.model": ("llava_clipmoe.compat.imports", "report_hidden_error"),
    "llava.model.multimodal_encoder.builder": ("llava_clipmoe.compat.architecture", "patch_builder"),
    "llava.model.llava_arch": ("llava_clipmoe.compat.architecture", "patch_architecture"),
    "llava.model.language_model.llava_llama": ("llava_clipmoe.compat.loading", "patch_language_model"),
    "llava.model.builder": ("llava_clipmoe.compat.loading", "patch_load_pretrained_model"),
    "llava.train.llava_trainer": ("llava_clipmoe.compat.trainer", "patch_trainer"),
    "lmms_eval.models": ("llava_clipmoe.plugins", "explain_old_lmms_eval"),
}
"""Upstream module (the last: lmms-eval's) -> our function that is called with it."""


def install() -> bool:
    """Put the hook in place (once); -> whether it is there. Modules that are already imported are changed at once."""
    if os.environ.get(SWITCH, "1") == "0":
        return False
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
        for name, target in AFTER.items():
            if name in sys.modules:
                _call(target, name, sys.modules[name])
    return True


class _Finder:
    """Finds the modules of AFTER where the other finders do, and wraps their loader."""

    def find_spec(self, name, path=None, target=None):
        if name not in AFTER:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """Upstream's loader, and our function before or after the module's code runs."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):  # get_data, get_source, is_package, ...: upstream's
        if name == "_loader":
            raise AttributeError(name)  # a copy (copy, pickle) that is being made has none yet
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        name = module.__name__
        if name in BEFORE:
            _call(BEFORE[name], name, module)
        self._loader.exec_module(module)
        _call(AFTER[name], name, module)


def _call(target, name, module):
    from importlib import import_module

    try:
        getattr(import_module(target[0]), target[1])(module)
    except Exception as error:  # whatever it is, the program that imported upstream goes on
        warn(f"could not prepare {name} ({type(error).__name__}: {error})")


def warn(message):
    """One line on stderr: `warnings` would print the source line too, and may be turned into an error."""
    first = str(message).splitlines()[0]
    print(f"llava-clipmoe: {first} ({SWITCH}=0 turns the hook off)", file=sys.stderr)
