"""Llama 3, Qwen2 and Qwen3 before a CLIP-MoE tower, through upstream's trainer and loader, in both environments.

Stage 1, then stage 2 whole and with LoRA; what was trained is what is loaded, and an answer ends where it should.
The trainings of one environment share a process (tiny/tower_trainings.py).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny.language_models import ROPE_3_1, make_llama_3, make_qwen_2, make_qwen_3
from tiny.llavas import COLOURS, make_data, make_towers, upstream_in_this_process, upstream_is_installed
from tiny.tower_tasks import LORA, arguments, train

from llava_clipmoe.compat import loading, versions
from llava_clipmoe.conversations import FIELD
from llava_clipmoe.files import load_tensors

PINNED = os.environ.get("LLAVA_CLIPMOE_PINNED_PYTHON")
pytestmark = [
    pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed here"),
    pytest.mark.xdist_group("language_models"),
]
TEMPLATE = {"llama-3": "llama_3", "llama-3.1": "llama_3", "qwen2.5": "qwen_2", "qwen3": "qwen_2"}
MODEL_TYPE = {"llama-3": "llava_llama", "llama-3.1": "llava_llama", "qwen2.5": "llava_qwen2", "qwen3": "llava_qwen3"}
OLD = ("llama-3", "qwen2.5")
"""Those that transformers 4.37 has."""
ENDS = {"llama_3": "<|eot_id|>", "qwen_2": "<|im_end|>"}


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """Language models, towers (`clip-moe`), data for both stages (`data/plain.json`, `data/data.json`)."""
    folder = tmp_path_factory.mktemp("material")
    make_llama_3(folder / "llama-3")
    make_llama_3(folder / "llama-3.1", rope_scaling=ROPE_3_1)
    make_qwen_2(folder / "qwen2.5", base=True)
    make_qwen_3(folder / "qwen3")
    make_towers(folder)
    rows = json.loads(make_data(folder / "data").read_text())
    for row in rows:
        row["conversations"] = [{"from": "human", "value": "<image>"}, row["conversations"][1]]
    (folder / "data" / "plain.json").write_text(json.dumps(rows))
    return folder


def tasks_of(material: Path, folder: Path, name: str) -> list[dict]:
    """Stage 1; stage 2 whole, long enough to learn the colours, and with LoRA."""

    def task(output: str, base: str | None, **changed: object) -> dict:
        words = arguments(material, "", None, model_name_or_path=material / name, **changed)
        words[words.index("--output_dir") + 1] = str(folder / output)
        return {"name": output, "base": base, "output": str(folder / output), "arguments": words}

    own = str(material / name)
    second = {"version": TEMPLATE[name], "pretrain_mm_mlp_adapter": folder / f"llava-{name}-pre" / "mm_projector.bin"}
    plain = {"version": "plain", "data_path": material / "data" / "plain.json", "tune_mm_mlp_adapter": True}
    whole = task(f"llava-{name}", None, **second, num_train_epochs=60, learning_rate=4e-3, save_steps=60)
    return [
        task(f"llava-{name}-pre", own, **plain),
        whole | {"ask": str(material / "data" / "data.json")},
        task(f"llava-{name}-lora", own, **second, **LORA),
    ]


@pytest.fixture(
    scope="module",
    params=[
        "current",
        pytest.param("pinned", marks=pytest.mark.skipif(not PINNED, reason="LLAVA_CLIPMOE_PINNED_PYTHON is not set")),
    ],
)
def trained(request, material, tmp_path_factory) -> tuple[Path, dict[str, dict], tuple[str, ...], str]:
    """The folder of all outputs, what was seen of each, the language models, and the interpreter."""
    python, names = {"current": (sys.executable, tuple(TEMPLATE)), "pinned": (PINNED, OLD)}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tasks = [task for name in names for task in tasks_of(material, folder, name)]
    for wrong in ("v1", "llama_3"):
        refused = tasks_of(material, folder, "qwen2.5")[1] | {"name": f"qwen2.5 {wrong}"}
        refused["arguments"] = [wrong if word == "qwen_2" else word for word in refused["arguments"]]
        tasks.append(refused)
    return folder, train([python], material, tasks, folder), names, python


def test_both_stages_train_what_they_should(trained):
    _, seen, names, _ = trained
    for name in names:
        first, whole, lora = (seen[f"llava-{name}{part}"] for part in ("-pre", "", "-lora"))
        assert first["projector_moved"] and not first["language_model_moved"], name
        assert whole["projector_moved"] and whole["language_model_moved"], name
        assert lora["projector_moved"] and lora["language_model_moved"], name
        for one in (first, whole, lora):
            assert one["moved_in_tower"] == [] and one["peft_in_tower"] == [] and one["not_in_optimizer"] == [], name


def test_what_is_loaded_is_what_was_trained(trained):
    """Whole, and as LoRA before and after it is merged. Upstream rounds stage 1's projector to halves."""
    _, seen, names, _ = trained
    for name in names:
        first, whole, lora = (seen[f"llava-{name}{part}"] for part in ("-pre", "", "-lora"))
        assert whole["size"] > 1 and whole["off"] <= 1e-5 * whole["size"], name
        assert lora["off"] <= 1e-5 * lora["size"] and lora["off_merged"] <= 1e-5 * lora["size"], name
        assert first["off"] <= 5e-3 * first["size"], name


def test_the_checkpoint_says_what_it_is(trained, material):
    folder, _, names, _ = trained
    for name in names:
        config = json.loads((folder / f"llava-{name}" / "config.json").read_text())
        assert config["model_type"] == MODEL_TYPE[name] and config[FIELD] == TEMPLATE[name], name
        assert FIELD not in json.loads((folder / f"llava-{name}-pre" / "config.json").read_text())
        rows = config["vocab_size"], json.loads((material / name / "config.json").read_text())["vocab_size"]
        assert rows[0] == rows[1], name  # of Qwen more than its vocabulary, and upstream's loader would cut them
        written = json.loads((folder / f"llava-{name}" / "tokenizer_config.json").read_text())
        assert written["pad_token"] not in (None, *ENDS.values())


def test_what_was_learned_is_answered_and_ends_there(trained, material):
    """One by one and in a batch; the last token is the template's mark, and not the longest allowed answer's last."""
    _, seen, names, _ = trained
    for name in names:
        one = seen[f"llava-{name}"]
        assert one["answers"] == [f"It is {colour}." for colour in COLOURS], name
        words = json.loads((material / name / "tokenizer.json").read_text())["added_tokens"]
        (mark,) = (entry["id"] for entry in words if entry["content"] == ENDS[TEMPLATE[name]])
        assert one["answer_ids"][-1] == mark and len(one["answer_ids"]) < 24, name


def test_a_template_that_is_not_the_models_stops_the_training(trained):
    _, seen, _, _ = trained
    assert "--version v1 is not how this language model is spoken to" in seen["qwen2.5 v1"]["error"]
    assert "give --version qwen_2" in seen["qwen2.5 v1"]["error"]
    assert "needs a tokenizer with <|eot_id|>" in seen["qwen2.5 llama_3"]["error"]


def test_an_interrupted_training_ends_as_the_one_that_went_through(trained, material):
    folder, _, _, python = trained
    _, whole, lora = tasks_of(material, folder, "qwen2.5")
    tasks = []
    for task, step in ((whole, 120), (lora, 2)):
        again = folder / task["name"].replace("llava", "llava-again")
        shutil.copytree(Path(task["output"], f"checkpoint-{step}"), again / f"checkpoint-{step}")
        words = [str(again) if word == task["output"] else word for word in task["arguments"]]
        tasks.append(task | {"name": again.name, "output": str(again), "arguments": words})
    train([python], material, tasks, folder)
    halfway = load_tensors(folder / "llava-again-qwen2.5" / "checkpoint-120")
    straight, resumed = load_tensors(Path(whole["output"])), load_tensors(folder / "llava-again-qwen2.5")
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor)
    assert any(not torch.equal(halfway[name], tensor) for name, tensor in straight.items())
    for file in ("non_lora_trainables.bin", "adapter_model.safetensors"):
        first, second = (_read(Path(task["output"], file)) for task in (lora, tasks[1]))
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor)


def _read(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True) if file.suffix == ".bin" else load_file(file)


# ------------------------------------------------------------------------------------------ loaded, in this process


@pytest.fixture(scope="module")
def llama():
    with upstream_in_this_process():
        from llava_clipmoe import run

        run.prepare()
        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

        yield LlavaLlamaForCausalLM


@pytest.mark.parametrize("name", TEMPLATE)
def test_without_a_picture_it_is_the_language_model(llama, material, name):
    from transformers import AutoModelForCausalLM

    ids = torch.arange(5, 85)[None]
    model, own = llama.from_pretrained(material / name), AutoModelForCausalLM.from_pretrained(material / name)
    assert model.config_class.model_type == MODEL_TYPE[name]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, own(ids).logits)
    generated = model.generate(ids, do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    expected = own.generate(ids, do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    assert generated[0].tolist() == expected[0, 80:].tolist()


def test_a_kind_without_a_class_is_named(llama, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(ValueError, match=r"is a 'gemma2', and LLaVA has no class for it .*Qwen2\.5"):
        llama.from_pretrained(tmp_path)


def test_upstreams_tokens_around_a_picture_are_refused_where_they_would_lose_their_embeddings(llama, material):
    """It writes those of new tokens into the last rows, which in a Qwen are no token's."""
    from transformers import AutoTokenizer

    flags = SimpleNamespace(mm_use_im_patch_token=True, mm_use_im_start_end=False, tune_mm_mlp_adapter=False)
    model, tokenizer = llama.from_pretrained(material / "qwen2.5"), AutoTokenizer.from_pretrained(material / "qwen2.5")
    rows = model.get_input_embeddings().weight.detach().clone()
    model.initialize_vision_tokenizer(flags, tokenizer)
    assert torch.equal(model.get_input_embeddings().weight, rows) and len(tokenizer) < len(rows)
    flags.mm_use_im_start_end = True
    with pytest.raises(ValueError, match=r"--mm_use_im_start_end True does not work .* give False"):
        model.initialize_vision_tokenizer(flags, tokenizer)


def test_a_name_that_upstream_would_take_for_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava_qwen2", "mm_vision_tower": "clip"}')
    loading.check_name(str(tmp_path), "llava-qwen")
    with pytest.raises(ValueError, match="for a Mistral, and 'llava-not-mistral' is none"):
        loading.check_name(str(tmp_path), "llava-not-mistral")


def test_a_failure_under_an_untested_version_names_the_version(llama, material, monkeypatch):
    model = llama.from_pretrained(material / "qwen2.5")

    def changed(self, *args, **kwargs):
        raise TypeError("forward() missing 1 required keyword-only argument: 'novelty'")

    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "forward", changed)
    monkeypatch.setattr(versions.transformers, "__version__", "5.99.0")
    with pytest.raises(versions.NewerTransformers, match=r"'novelty'.*transformers 5\.99\.0 is newer.*pip install"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)


@pytest.mark.skipif(not PINNED, reason="LLAVA_CLIPMOE_PINNED_PYTHON is not set")
def test_older_transformers_reads_what_it_knows_and_names_what_it_does_not(llama, material, tmp_path):
    """Positions of another base frequency too, which version 5 writes into a field of its own."""
    import subprocess

    for name, config in NEWER.items():  # a LoRA's or a projector's: upstream's loader reads the config alone
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    ids, sums = torch.arange(5, 85)[None], {}
    with torch.no_grad():
        for name in OLD:
            sums[name] = llama.from_pretrained(material / name)(input_ids=ids).logits.double().abs().sum().item()
    code = _SUMS.format(folder=material, names=list(TEMPLATE), newer=list(NEWER))
    done = subprocess.run([PINNED, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=200,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: found[name] for name in OLD} == pytest.approx(sums, rel=1e-6)
    assert "positions of Llama 3.1 and newer" in found["llama-3.1"] and "Llama 3.0 runs here" in found["llama-3.1"]
    assert "is a Qwen3, which transformers 4.37.2 does not know" in found["qwen3"]
    assert "positions of Llama 3.1 and newer" in found["llava-llama-3.1-lora"]
    assert "is a Qwen3, which transformers 4.37.2 does not know" in found["llava-qwen3-lora"]


NEWER = {
    "llava-llama-3.1-lora": {"model_type": "llava_llama", "mm_vision_tower": "clip", "rope_parameters": ROPE_3_1},
    "llava-qwen3-lora": {"model_type": "llava_qwen3", "mm_vision_tower": "clip"},
}

_SUMS = """
import json
from llava_clipmoe import llava_hook, run
llava_hook.install()
run.prepare()
import torch
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
found = {{}}
for name in {names}:
    try:
        model = LlavaLlamaForCausalLM.from_pretrained(f"{folder}/{{name}}")
        with torch.no_grad():
            logits = model(input_ids=torch.arange(5, 85)[None]).logits
        found[name] = logits.double().abs().sum().item()
    except ValueError as error:
        found[name] = str(error)
from llava.model.builder import load_pretrained_model
for name in {newer}:
    try:
        load_pretrained_model(name, f"{folder}/llama-3", name, device="cpu")
    except Exception as error:
        found[name] = str(error)
print(json.dumps(found))
"""
