"""The wheel, the import and the command: what is shipped, what is light, and what a user reads when something fails."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

import llava_clipmoe
from llava_clipmoe import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("llava_clipmoe", "train_encoder", "train_llava", "demo")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)


# ----------------------------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the sources so that the working tree stays clean."""
    for module in ("build", "hatchling"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f'{module} is not installed: pip install "llava-clipmoe[dev]"')
    out = tmp_path_factory.mktemp("wheel")
    done = python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPOSITORY))
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_the_packages_the_hook_the_licence_and_nothing_else(wheel):
    names = wheel.namelist()
    shipped = {name for name in names if ".dist-info/" not in name}
    sources = {
        str(file.relative_to(REPOSITORY))
        for package in PACKAGES
        for ending in ("py", "sh", "json", "css", "j2", "jinja")
        for file in (REPOSITORY / package).rglob(f"*.{ending}")
    }
    assert sources <= shipped
    assert {name.partition("/")[0] for name in shipped} == {*PACKAGES, "llava_clipmoe.pth"}
    assert not [name for name in names if "test" in name or "__pycache__" in name]
    licence = next(name for name in names if name.endswith("licenses/LICENSE"))
    assert "Apache License" in wheel.read(licence).decode()[:200]


def test_the_wheel_says_its_version_licence_and_command(wheel):
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    assert f"\nVersion: {llava_clipmoe.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    entry_points = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "llava-clipmoe = llava_clipmoe.cli:main" in entry_points
    assert "[lmms_eval.models]\nllava_clipmoe = llava_clipmoe.plugins:lmms_eval_manifest" in entry_points
    assert "[vllm.general_plugins]\nllava_clipmoe = llava_clipmoe.plugins:register_vision_model" in entry_points


# ---------------------------------------------------------------------------------------------------------- the import


@pytest.mark.parametrize(
    "use", ["import llava_clipmoe", "from llava_clipmoe import cli; cli.main(['--help'])"], ids=["import", "help"]
)
def test_importing_and_helping_are_light(use):
    done = python(
        "-c", f"import sys; {use}; print(sorted({{'torch', 'transformers', 'numpy', 'tyro'}} & set(sys.modules)))"
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


def test_every_public_name_is_there():
    for name in llava_clipmoe.__all__:
        assert getattr(llava_clipmoe, name) is not None
    assert set(llava_clipmoe.__all__) == {*llava_clipmoe._HOME, "__version__"} <= set(dir(llava_clipmoe))
    with pytest.raises(AttributeError, match="has no attribute 'CLIPMoeModel'"):
        _ = llava_clipmoe.CLIPMoeModel


def test_using_a_class_teaches_the_auto_classes(tmp_path):
    """In a fresh interpreter: before, transformers does not know `clip_moe`; after one class was touched, it does."""
    code = """
import sys
from transformers import AutoConfig, AutoModel, AutoImageProcessor, CLIPImageProcessor, CLIPConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
import llava_clipmoe
folder = sys.argv[1]
try:
    AutoConfig.for_model("clip_moe")
    sys.exit("known before")
except ValueError:
    pass
tiny = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
config = llava_clipmoe.CLIPMoEConfig(
    text_config=dict(tiny, vocab_size=99), vision_config=dict(tiny, image_size=16, patch_size=8), projection_dim=8
)
llava_clipmoe.CLIPMoEModel(config).save_pretrained(folder)
CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
print(type(AutoModel.from_pretrained(folder)).__name__, type(AutoImageProcessor.from_pretrained(folder)).__name__)
llava_clipmoe.registration.register_auto_classes()                        # any number of times
assert TOKENIZER_MAPPING[type(config)] == TOKENIZER_MAPPING[CLIPConfig]
vision = llava_clipmoe.CLIPMoEVisionModel.from_pretrained(folder)
vision.save_pretrained(folder + "/vision")
print(type(AutoModel.from_pretrained(folder + "/vision")).__name__)
"""
    done = python("-W", "ignore", "-c", code, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    model, processor, vision = done.stdout.split()[-3:]
    assert (model, vision) == ("CLIPMoEModel", "CLIPMoEVisionModel")
    assert processor.startswith("CLIPImageProcessor")


# --------------------------------------------------------------------------------------------------------- the command


def test_help_lists_every_command_with_an_example(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in text and command.help in text and f"$ {command.example}" in text
        assert f"{command.example} ".startswith(f"llava-clipmoe {name} ")


def test_version_and_the_empty_command_line(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llava-clipmoe {llava_clipmoe.__version__}\n"
    assert cli.main([]) == 2
    assert "usage: llava-clipmoe COMMAND" in capsys.readouterr().err


def test_an_unknown_command_suggests_the_nearest(capsys):
    assert cli.main(["train-encodr", "x"]) == 2
    assert "no command 'train-encodr'. Did you mean `llava-clipmoe train-encoder`?" in capsys.readouterr().err
    assert cli.main(["zzz"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


EXPLAIN = """
import os, sys, traceback
import torch, transformers  # once for all: most of the time that a fresh interpreter takes
from llava_clipmoe import cli
folder, *commands = sys.argv[1:]
for command in commands:
    child = os.fork()
    if not child:
        status = 1
        try:
            os.dup2(os.open(f"{folder}/{command}", os.O_WRONLY | os.O_CREAT), 1)
            status = cli.main([command, "--help"])
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{command} failed")
"""


def test_every_command_exists_and_explains_itself(tmp_path):
    """`COMMAND --help` in an interpreter that has none of our modules: exit 0, and words on standard output."""
    done = python("-W", "ignore", "-c", EXPLAIN, str(tmp_path), *cli.COMMANDS)
    assert done.returncode == 0, done.stderr[-2000:]
    for command in cli.COMMANDS:
        assert "usage" in (tmp_path / command).read_text().lower(), command


def run_fake(monkeypatch, function) -> int:
    """Run `llava-clipmoe fake a b`, whose room is `function`."""
    room = types.ModuleType("fake_room")
    room.main = function
    monkeypatch.setitem(sys.modules, "fake_room", room)
    monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("fake_room:main", "", ""))
    monkeypatch.delenv(cli.DEBUG, raising=False)
    return cli.main(["fake", "a", "b"])


def raising(error: BaseException):
    def main(argv):
        raise error

    return main


def our_error(kind: type, message: str) -> Exception:
    """An error class that a room of ours defined."""
    return type("DataError", (kind,), {"__module__": "train_encoder.data"})(message)


def test_a_command_gets_its_arguments_and_its_status_is_returned(monkeypatch):
    seen = []
    assert run_fake(monkeypatch, lambda argv: seen.append(argv) or 7) == 7
    assert seen == [["a", "b"]]


@pytest.mark.parametrize(
    "error", [our_error(ValueError, "the file has no captions"), our_error(OSError, "the file has no captions")]
)
def test_our_own_errors_are_one_message_without_a_trace(monkeypatch, capsys, error):
    assert run_fake(monkeypatch, raising(error)) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: the file has no captions\n") and "Traceback" not in text
    assert f"set {cli.DEBUG}=1" in text


def test_a_plain_valueerror_raised_by_our_code_is_one_message(monkeypatch, capsys):
    from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig

    assert run_fake(monkeypatch, lambda argv: CLIPMoEConfig(num_experts=0)) == 2
    assert capsys.readouterr().err.startswith("error: num_experts must be at least 1")


def test_a_missing_file_is_one_message(monkeypatch, capsys):
    assert run_fake(monkeypatch, lambda argv: open("no-such-file.csv")) == 2
    assert "no-such-file.csv" in capsys.readouterr().err


def test_a_defect_keeps_its_trace(monkeypatch):
    """A ValueError out of another library, and any other kind of error, is nothing a user can mend."""
    import json

    for function, kind in ((lambda argv: json.loads("{"), ValueError), (raising(TypeError("x")), TypeError)):
        with pytest.raises(kind):
            run_fake(monkeypatch, function)
    with pytest.raises(ModuleNotFoundError):
        run_fake(monkeypatch, raising(ModuleNotFoundError("no", name="train_encoder.mistyped")))


def test_debug_shows_the_trace(monkeypatch):
    def main(argv):
        monkeypatch.setenv(cli.DEBUG, "1")
        raise our_error(ValueError, "x")

    with pytest.raises(ValueError):
        run_fake(monkeypatch, main)


def test_an_interrupted_command_exits_with_130(monkeypatch, capsys):
    assert run_fake(monkeypatch, raising(KeyboardInterrupt())) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("module", "line"), [("sklearn.cluster", "llava-clipmoe[train]"), ("tyro", "llava-clipmoe")])
def test_a_missing_package_names_the_line_to_install_it(monkeypatch, capsys, module, line):
    assert run_fake(monkeypatch, raising(ModuleNotFoundError("no", name=module))) == 2
    assert f'pip install "{line}"' in capsys.readouterr().err


def test_the_extra_named_for_a_missing_package_really_brings_it():
    def distributions(requirements):
        return {r.split(";")[0].strip().split(">")[0].split("=")[0].lower().replace("_", "-") for r in requirements}

    extras = {name: distributions(r) for name, r in PROJECT["optional-dependencies"].items()}
    extras[None] = distributions(PROJECT["dependencies"])
    for module, (distribution, extra) in cli.OPTIONAL_MODULES.items():
        assert distribution.lower().replace("_", "-") in extras[extra], f"{module}: {distribution} is not in {extra}"


def test_a_closed_pipe_is_quiet():
    command = f'"{sys.executable}" -m llava_clipmoe.cli --help | true; echo "${{PIPESTATUS[0]}}"'
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() in ("0", "141")
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


# -------------------------------------------------------------------------------------------------------- the makefile


def test_the_makefile_names_no_command_that_is_not_there():
    text = (REPOSITORY / "Makefile").read_text()
    assert "llava-clipmoe train-encoder dmu-openmoji --output-dir runs/quickstart" in text
    assert text.isascii() and "http" not in text
    listed = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, timeout=30).stdout
    for target in ("quickstart", "test", "lint", "clean"):
        assert f"make {target} " in listed
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)
