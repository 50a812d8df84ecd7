"""llava-clipmoe: a CLIP-MoE for LLaVA. `from llava_clipmoe import CLIPMoEModel, load_bundle, upcycle`.

Importing the package costs nothing: torch and transformers are imported when a name below is first used. Using a
configuration or model class also teaches transformers' Auto classes about CLIP-MoE, so that
`AutoModel.from_pretrained(directory)` works without `trust_remote_code`.
"""

TYPE_CHECKING = False  # type checkers know the name; `typing` itself would cost every Python start 10 ms (llava_hook)

__version__ = "0.1.0"

_HOME = {
    "CLIPMoEConfig": "configuration_clipmoe",
    "CLIPMoETextConfig": "configuration_clipmoe",
    "CLIPMoEVisionConfig": "configuration_clipmoe",
    "CLIPMoEModel": "modeling_clipmoe",
    "CLIPMoETextModel": "modeling_clipmoe",
    "CLIPMoEVisionModel": "modeling_clipmoe",
    "load_bundle": "load",
    "save_bundle": "model_directory",
    "fuse": "upcycling",
    "only_expert": "transformer_clipmoe",
    "upcycle": "upcycling",
    "sparse_upcycle": "upcycling",
}
"""Public name -> the module that defines it."""

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:  # what __getattr__ gives, for editors and type checkers
    from .configuration_clipmoe import CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig
    from .load import load_bundle
    from .model_directory import save_bundle
    from .modeling_clipmoe import CLIPMoEModel, CLIPMoETextModel, CLIPMoEVisionModel
    from .transformer_clipmoe import only_expert
    from .upcycling import fuse, sparse_upcycle, upcycle


def __getattr__(name: str):
    """Import a public name on first use (PEP 562), and register the Auto classes with it."""
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    importlib.import_module(".registration", __name__).register_auto_classes()
    globals()[name] = value  # the next use does not come through here
    return value


def __dir__():
    return sorted({*globals(), *_HOME})
