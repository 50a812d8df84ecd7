"""A directory written under one transformers loads bit for bit under the other: 5.x and LLaVA's pinned 4.37.2.

LLAVA_CLIPMOE_PINNED_PYTHON names the interpreter of the pinned environment; `make test` creates it and sets it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PINNED = os.environ.get("LLAVA_CLIPMOE_PINNED_PYTHON")

pytestmark = pytest.mark.skipif(
    not PINNED, reason="LLAVA_CLIPMOE_PINNED_PYTHON names no interpreter with LLaVA's pinned versions; `make test` does"
)

SCRIPT = '''
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

sys.path.insert(0, "tests")
from conftest import make_tiny_config, shake
import llava_clipmoe
from llava_clipmoe import CLIPMoEModel, CLIPMoETextModel, CLIPMoEVisionModel

task, folder = sys.argv[1], Path(sys.argv[2])
ids = torch.tensor([[97, 5, 98, 98, 98], [97, 40, 41, 42, 98]])
pixels = torch.linspace(-2, 2, 2 * 3 * 24 * 24).view(2, 3, 24, 24).sin()

def features(model):
    with torch.no_grad():
        if isinstance(model, CLIPMoEVisionModel):
            return {"pooled": model(pixels).pooler_output}
        if isinstance(model, CLIPMoETextModel):
            return {"pooled": model(ids).pooler_output, "tokens": model(ids, output_hidden_states=True)[0]}
        return {"image": model.get_image_features(pixels), "text": model.get_text_features(ids)}

def expected(path):
    merged = {}
    for file in sorted(path.glob("model*.safetensors")):
        merged.update(load_file(file))
    return merged

def check(cls, path, names, only=None):
    """Load `path` with `cls`: every tensor as in the file to the bit, and the features the writer had."""
    model, info = cls.from_pretrained(path, output_loading_info=True)
    model.eval()
    missing, unexpected = list(info["missing_keys"]), list(info["unexpected_keys"])
    state, file = model.state_dict(), expected(path)
    if only is not None:
        file = {name: tensor for name, tensor in file.items() if name.startswith(only)}
    record = load_file(folder / f"{names}.features")
    ours = features(model)
    return {
        "class": type(model).__name__,
        "missing": missing,
        "unexpected": unexpected,
        "same names": state.keys() == file.keys(),
        "same bits": all(torch.equal(state[name], file[name]) for name in file),
        "dtypes": sorted({str(tensor.dtype) for tensor in state.values()}),
        "off": max((ours[name] - record[name]).abs().max().item() for name in record),
        "size": max(tensor.abs().max().item() for tensor in record.values()),
    }

if task == "write":
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    whole = shake(CLIPMoEModel(make_tiny_config(**experts)), seed=1).eval()
    gated = shake(CLIPMoEModel(make_tiny_config(**experts, fusion_gate=True)), seed=1).eval()
    vision = CLIPMoEVisionModel(whole.config.vision_config).eval()
    vision.load_state_dict({k: v for k, v in whole.state_dict().items() if k.startswith("vision_model.")})
    text = CLIPMoETextModel(whole.config.text_config).eval()
    text.load_state_dict({k: v for k, v in whole.state_dict().items() if k.startswith("text_model.")})
    models = {"whole": whole, "sharded": whole, "vision": vision, "text": text, "gated": gated}
    for name, model in models.items():
        model.save_pretrained(folder / name, max_shard_size="100KB" if name == "sharded" else "5GB")
        save_file(features(model), folder / f"{name}.features")
    result = {"shards": len(list((folder / "sharded").glob("*.safetensors")))}
else:
    result = {
        "whole": check(CLIPMoEModel, folder / "whole", "whole"),
        "sharded": check(CLIPMoEModel, folder / "sharded", "sharded"),
        "vision": check(CLIPMoEVisionModel, folder / "vision", "vision"),
        "vision of whole": check(CLIPMoEVisionModel, folder / "whole", "vision", only="vision_model."),
        "text": check(CLIPMoETextModel, folder / "text", "text"),
        "text of whole": check(CLIPMoETextModel, folder / "whole", "text", only="text_model."),
        "auto text": check(AutoModel, folder / "text", "text"),
        "gated": check(CLIPMoEModel, folder / "gated", "gated"),
        "gates": sum(".mlp.fusion_gate." in name for name in expected(folder / "gated")),
        "auto gated": check(AutoModel, folder / "gated", "gated"),
        "auto whole": check(AutoModel, folder / "whole", "whole"),
        "auto vision": check(AutoModel, folder / "vision", "vision"),
        "auto config": type(AutoConfig.from_pretrained(folder / "whole")).__name__,
    }
print(json.dumps({"transformers": transformers.__version__, **result}))
'''


def run(python: str, task: str, folder: Path) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [python, "-W", "ignore", "-c", SCRIPT, task, str(folder)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("writer", ["current", "pinned"])
def test_a_directory_written_by_one_version_loads_bit_for_bit_in_the_other(tmp_path, writer):
    pythons = {"current": sys.executable, "pinned": PINNED}
    reader = "pinned" if writer == "current" else "current"
    written, read = run(pythons[writer], "write", tmp_path), run(pythons[reader], "read", tmp_path)
    versions = {writer: written["transformers"], reader: read["transformers"]}
    assert versions["pinned"] == "4.37.2" and int(versions["current"].split(".")[0]) >= 5, versions
    assert written["shards"] > 1
    assert len([result for result in read.values() if isinstance(result, dict)]) == 11
    assert read["auto config"] == "CLIPMoEConfig" and read["gates"] == 2 * 5
    for case in (name for name, result in read.items() if isinstance(result, dict)):
        result = read[case]
        tower = next((tower for tower in ("vision", "text") if tower in case), "")
        assert result["class"] == f"CLIPMoE{tower.capitalize()}Model", case
        assert not result["missing"] and result["same names"] and result["same bits"], (case, result)
        assert result["dtypes"] == ["torch.float32"], case
        assert result["off"] <= 1e-6 * max(1.0, result["size"]), (case, result)
        if " of whole" not in case:  # there, the other tower is left out on purpose
            assert not result["unexpected"], (case, result)


def test_the_models_own_tests_pass_under_the_pinned_versions():
    names = ("generation", "modeling", "experts", "upcycling", "fusion_gate", "files")
    files = [f"tests/test_{name}.py" for name in names]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for name in list(environment):  # a run of its own, no part of the one that started it
        if name.startswith("PYTEST_"):
            del environment[name]
    done = subprocess.run(
        [PINNED, "-m", "pytest", "-p", "no:cacheprovider", *files],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_the_pinned_environment_holds_the_versions_that_llava_pins():
    """Installing this package there must not have moved one of them."""
    lines = (REPOSITORY / "tests" / "pinned-requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([PINNED, "-c", code, *pins], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    installed = {name: version.partition("+")[0] for name, version in json.loads(done.stdout).items()}
    assert installed == pins
