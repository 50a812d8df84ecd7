"""The import hook: what it costs a Python start, that it breaks none, and that upstream's modules stay what they are.

Upstream is a folder of small files here, so nothing needs LLaVA; each test looks at a fresh interpreter that has read
`llava_clipmoe.pth` as it does from site-packages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from llava_clipmoe import llava_hook
from llava_clipmoe.tower_registry import CONFIG_DIRECTORY, OVERRIDE, UnknownTower

REPOSITORY = Path(__file__).resolve().parent.parent
PTH = REPOSITORY / "llava_clipmoe" / "llava_clipmoe.pth"
BUILDER = "llava.model.multimodal_encoder.builder"

UPSTREAM = {
    "llava/__init__.py": "",
    "llava/model/__init__.py": "try:\n    from .language_model import LlavaLlamaForCausalLM\nexcept:\n    pass\n",
    "llava/model/language_model.py": "class LlavaLlamaForCausalLM: pass\n",
    "llava/model/multimodal_encoder/__init__.py": "",
    "llava/model/multimodal_encoder/builder.py": (
        "def build_vision_tower(vision_tower_cfg, **kwargs):\n    return 'upstream', vision_tower_cfg, kwargs\n"
        "if __name__ == '__main__':\n    print('builder ran as', __name__)\n"
    ),
    "llava/train.py": f"from {BUILDER} import build_vision_tower\nprint(build_vision_tower('cfg')[0], __name__)\n",
}
PATCH = """
def mark(module):
    module.patched = True
    upstream = module.build_vision_tower
    def build_vision_tower(*args, **kwargs):
        return ("ours",)
    module.build_vision_tower = build_vision_tower

def fail(module):
    raise ValueError("first line\\nsecond line")

def nothing(module):
    pass
"""


@pytest.fixture
def start(tmp_path):
    """`start(arguments, patch="mark")` runs Python with upstream's stand-in, the `.pth`, and `patches.<patch>` in the
    place of what we do to each upstream module."""
    for name, text in UPSTREAM.items():
        file = tmp_path / "upstream" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    site = tmp_path / "site-packages"
    site.mkdir()
    shutil.copy(PTH, site)
    (tmp_path / "upstream" / "patches.py").write_text(PATCH)
    # What `site` does at start with a real site-packages; then the patches are exchanged.
    (tmp_path / "upstream" / "sitecustomize.py").write_text(
        f"import os, site, sys\nsite.addsitedir({str(site)!r})\n"
        "hook = sys.modules.get('llava_clipmoe.llava_hook')\n"
        "if hook and os.environ.get('PATCH'):\n"
        "    hook.AFTER.update({name: ('patches', 'nothing') for name in hook.AFTER})\n"
        f"    hook.AFTER[{BUILDER!r}] = ('patches', os.environ['PATCH'])\n"
    )

    def run(*arguments: str, patch: str = "mark", ours: bool = True, **environment: str) -> subprocess.CompletedProcess:
        paths = [tmp_path / "upstream", *([REPOSITORY] if ours else [])]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LLAVA_CLIPMOE"))}
        environment = {**clean, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PATCH": patch, **environment}
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )

    return run


def said(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------------------ the start


def test_the_hook_imports_nothing_but_itself(start):
    code = "import sys; print(sorted(n for n in sys.modules if n.partition('.')[0] in %s))"
    heavy = {"llava_clipmoe", "torch", "transformers", "numpy", "llava", "typing", "importlib.metadata", "json"}
    assert said(start("-c", code % heavy)) == "['llava_clipmoe', 'llava_clipmoe.llava_hook']"


def test_zero_in_the_environment_turns_it_off(start):
    code = f"import sys, {BUILDER} as b; print('llava_clipmoe' in sys.modules, hasattr(b, 'patched'))"
    assert said(start("-c", code)) == "True True"
    assert said(start("-c", code, LLAVA_CLIPMOE_HOOK="0")) == "False False"


def test_installing_twice_is_installing_once(start):
    code = "import sys; from llava_clipmoe import llava_hook as h; print(h.install(), h.install(),"
    code += " sum(isinstance(f, h._Finder) for f in sys.meta_path))"
    assert said(start("-c", code)) == "True True 1"


# ---------------------------------------------------------------------------------------------- errors break no program


def test_a_package_that_is_gone_is_one_line():
    """Uninstalled by hand, with the `.pth` left behind: no site-packages here, so nothing of ours can be imported."""
    code = f"exec(open({str(PTH)!r}).read()); print('goes on')"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert said(done) == "goes on"
    assert done.stderr.startswith("llava-clipmoe: no hook (ModuleNotFoundError") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["-W", "error"]], ids=["", "warnings are errors"])
def test_an_error_in_a_patch_is_one_line_and_upstream_goes_on(start, flags):
    done = start(*flags, "-m", "llava.train", patch="fail")
    assert said(done) == "upstream __main__"
    assert done.stderr.splitlines() == [
        f"llava-clipmoe: could not prepare {BUILDER} (ValueError: first line (LLAVA_CLIPMOE_HOOK=0 turns the hook off)"
    ]


def test_an_error_of_upstreams_own_is_upstreams(start, tmp_path):
    file = tmp_path / "upstream" / "llava" / "model" / "multimodal_encoder" / "builder.py"
    file.write_text("raise RuntimeError('a defect of upstream')\n")
    done = start("-c", f"import {BUILDER}")
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: a defect of upstream\n")
    assert "llava-clipmoe" not in done.stderr
    done = start("-c", "import llava.model.multimodal_encoder.missing")
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr


def test_what_upstream_hides_is_said(start, tmp_path):
    """`except: pass` around upstream's imports: without the hook only "cannot import name" is left of the cause."""
    (tmp_path / "upstream" / "llava" / "model" / "language_model.py").unlink()
    folder = tmp_path / "upstream" / "llava" / "model" / "language_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .llava_llama import LlavaLlamaForCausalLM\n")
    (folder / "llava_llama.py").write_text("import a_package_that_is_missing\n")
    done = start("-c", "from llava.model import LlavaLlamaForCausalLM", patch="")
    assert done.returncode == 1 and "cannot import name 'LlavaLlamaForCausalLM'" in done.stderr
    assert "ModuleNotFoundError: No module named 'a_package_that_is_missing'" in done.stderr.splitlines()[0]
    silent = start("-c", "from llava.model import LlavaLlamaForCausalLM", patch="", LLAVA_CLIPMOE_HOOK="0")
    assert "a_package_that_is_missing" not in silent.stderr


# ---------------------------------------------------------------------------------------- upstream's modules stay whole


def test_a_name_bound_at_import_is_ours(start):
    """`from builder import build_vision_tower`, as llava_arch does: patched before the importer binds it."""
    assert said(start("-c", "import llava.train")) == "ours llava.train"
    assert said(start("-m", "llava.train")) == "ours __main__"
    assert said(start("-m", "llava.train", LLAVA_CLIPMOE_HOOK="0")) == "upstream __main__"


def test_a_module_that_was_imported_before_is_changed_at_once(start):
    code = f"import {BUILDER} as b; print(hasattr(b, 'patched'))\n"
    code += "from llava_clipmoe import llava_hook as h\n"
    code += f"h.AFTER = {{{BUILDER!r}: ('patches', 'mark')}}\nh.install(); print(b.patched, b.build_vision_tower()[0])"
    switch_on = "import os; os.environ['LLAVA_CLIPMOE_HOOK'] = '1'\n"
    done = start("-c", switch_on + code, LLAVA_CLIPMOE_HOOK="0")
    assert said(done).split() == ["False", "True", "ours"]


def test_upstreams_builder_and_architecture_imported_before_build_our_towers(monkeypatch):
    """llava_arch bound `build_vision_tower` by name: changing the builder alone would not reach it."""
    from llava_clipmoe.compat.architecture import patch_architecture, patch_builder

    builder, architecture = types.ModuleType(BUILDER), types.ModuleType("llava.model.llava_arch")
    builder.build_vision_tower = architecture.build_vision_tower = lambda vision_tower_cfg, **kwargs: "upstream"
    architecture.LlavaMetaModel = type("Model", (), {"initialize_vision_modules": lambda self, args, fsdp=None: None})
    architecture.LlavaMetaForCausalLM = type("CausalLM", (), {"encode_images": lambda self, images: None})
    monkeypatch.setitem(sys.modules, BUILDER, builder)
    patch_builder(builder)
    patch_architecture(architecture)
    assert architecture.build_vision_tower is builder.build_vision_tower


def test_a_hooked_module_can_itself_be_run(start):
    assert said(start("-m", BUILDER)) == "builder ran as __main__"


def test_source_files_reloading_and_resources_work_as_without_the_hook(start):
    code = f"""
import copy, importlib, importlib.resources, importlib.util, inspect, pickle, pkgutil, sys
import {BUILDER} as builder
assert "'upstream', vision_tower_cfg" in inspect.getsource(builder)
assert inspect.getsourcefile(builder) == builder.__file__ and builder.__spec__.origin == builder.__file__
assert builder.__cached__ and builder.__loader__.get_source(builder.__name__)
assert pickle.loads(pickle.dumps(builder.__spec__)).name == builder.__name__
assert copy.copy(builder.__loader__).get_source(builder.__name__)
assert importlib.reload(builder) is builder and builder.build_vision_tower() == ("ours",)
import llava.model
assert [m.name for m in pkgutil.iter_modules(llava.model.__path__)] == ["language_model", "multimodal_encoder"]
assert (importlib.resources.files("llava.model") / "language_model.py").is_file()
assert pkgutil.get_data("llava.model", "language_model.py")
assert importlib.util.find_spec("llava.nothing") is None
importlib.invalidate_caches()
print("whole")
"""
    done = start("-c", code)
    assert said(done) == "whole" and not done.stderr


def test_another_finder_still_finds(start):
    """A checkout's editable finder, or a tracer's: whoever finds the module, it is changed."""
    code = f"""
import importlib.machinery, sys
class Editable:
    def find_spec(self, name, path=None, target=None):
        seen.append(name)
        return importlib.machinery.PathFinder.find_spec(name, path)
seen = []
sys.meta_path.insert(0, Editable()); sys.meta_path.insert(0, sys.meta_path.pop(1))
import {BUILDER} as builder
print(builder.patched, {BUILDER!r} in seen)
"""
    assert said(start("-c", code)) == "True True"


# --------------------------------------------------------------------------------------------------- who builds a tower


@pytest.fixture
def builder(tmp_path, monkeypatch):
    """Upstream's builder module as the hook hands it to `patch_builder`, in this process."""
    from llava_clipmoe.compat.architecture import patch_builder

    monkeypatch.setenv(CONFIG_DIRECTORY, str(tmp_path / "config"))
    monkeypatch.delenv(OVERRIDE, raising=False)
    module = types.ModuleType(BUILDER)
    module.build_vision_tower = lambda vision_tower_cfg, **kwargs: ("upstream", vision_tower_cfg, kwargs)
    patch_builder(module)
    return module


@pytest.mark.parametrize("member", ["vision_tower", "mm_vision_tower"])
def test_upstreams_names_reach_upstreams_function_untouched(builder, member):
    cfg = types.SimpleNamespace(**{member: "openai/clip-vit-large-patch14-336"})
    who, same, kwargs = builder.build_vision_tower(cfg, delay_load=True)
    assert who == "upstream" and same is cfg and kwargs == {"delay_load": True}
    assert vars(cfg) == {member: "openai/clip-vit-large-patch14-336"}


@pytest.mark.parametrize("member", ["vision_tower", "mm_vision_tower"])
def test_our_names_are_ours_and_unknown_ones_fail_with_the_command(builder, member, tmp_path, monkeypatch):
    from tiny.llavas import make_towers

    cfg = types.SimpleNamespace(**{member: "clipmoe-336"}, mm_vision_select_layer=-2)
    with pytest.raises(UnknownTower, match="llava-clipmoe register clipmoe-336"):
        builder.build_vision_tower(cfg)
    monkeypatch.setenv(OVERRIDE, f"clipmoe-336={make_towers(tmp_path)[0]}")
    tower = builder.build_vision_tower(cfg, delay_load=True)
    assert type(tower).__name__ == "CLIPMoEVisionTower" and not tower.is_loaded


def test_the_hook_knows_only_modules_that_it_also_finds():
    assert set(llava_hook.BEFORE) <= set(llava_hook.AFTER)
