"""Unmodified upstream LLaVA with `--vision_tower clipmoe-336`, from the wheel, in both environments.

Each environment gets a scratch environment above it into which the wheel is installed, so that neither the checkout
nor an editable install is imported, and Python reads the wheel's `.pth`. In LLaVA's pinned environment upstream's
training, cli and worker run as upstream's scripts start them (`python -m llava...`: the `.pth` alone); its evaluation
runners, which send everything to "cuda", and everything in the current environment run through the launcher.

A process that imports torch, transformers and upstream takes 4 to 10 s: what need not be a process of its own shares
one (`in_one_process`), which calls the launcher's `main` once for each command.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from tiny.llavas import COLOURS, make_data, make_language_model, make_towers, upstream_is_installed

REPOSITORY = Path(__file__).resolve().parent.parent
PINNED = os.environ.get("LLAVA_CLIPMOE_PINNED_PYTHON")

pytestmark = [
    pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed here"),
    pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="`build` is not installed: no wheel"),
]

CHAIN = """
import contextlib, io, json, os, sys
from llava_clipmoe import run

results = []
for argv in json.load(open(sys.argv[1])):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = run.main(argv)
        except (Exception, SystemExit) as error:  # what a real process would end with is a trace and a status of 1
            status = f"{type(error).__name__}: {error}"
    results.append({"status": status, "out": out.getvalue(), "err": err.getvalue()})
print(json.dumps(results))
"""

LOGITS = """
import json, os, sys, shutil
from llava_clipmoe import run
run.main(["-h"])
from llava_clipmoe import llava_hook
llava_hook.install(); run.prepare()
import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.train import llava_trainer, train
from safetensors.torch import load_file, save_file

task = json.load(open(sys.argv[1]))
trained = []

def train_and_keep(self, *args, upstream=llava_trainer.LLaVATrainer.train, **kwargs):
    trained[:] = [self.model]
    return upstream(self, *args, **kwargs)

llava_trainer.LLaVATrainer.train = train_and_keep

def logits(model):
    "[T,V] for a prompt around one picture."
    model.eval()
    ids = torch.tensor([[1, 40, 50, IMAGE_TOKEN_INDEX, 60, 70, 80, 90]])
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, images=pixels, use_cache=False).logits[0].float()

def reload(path, base):
    return load_pretrained_model(path, base, os.path.basename(path), device="cpu")[1]

def off(a, b):
    return (a - b).abs().max().item()

result = {}
for name, base in (("full", None), ("lora", task["base"])):
    sys.argv = ["train.py", *task[name]["arguments"]]
    train.train()
    before = logits(trained[0])
    after = logits(reload(task[name]["output"], base))
    result[name] = {"shape": list(after.shape), "size": before.abs().max().item(), "off": off(before, after)}

before, model = logits(reload(task["full"]["output"], None)), None
for block in (0, 2):  # of three blocks, hidden_states[-2] comes out of block 1: block 2 is never run
    copy = f"{task['tower']}-without-{block}"
    shutil.copytree(task["tower"], copy)
    state = load_file(copy + "/model.safetensors")
    for name, tensor in state.items():
        if name.startswith(f"vision_model.encoder.layers.{block}.mlp.experts."):
            tensor[0] = 0
    save_file(state, copy + "/model.safetensors", {"format": "pt"})
    os.environ["LLAVA_CLIPMOE_TOWERS"] = "clipmoe-336=" + copy
    result[f"without an expert of block {block}"] = off(before, logits(reload(task["full"]["output"], None)))
print(json.dumps(result))
"""


# --------------------------------------------------------------------------------------------------------------- set-up


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """`llama`, `clip-moe`, `clip`, `data/data.json`, `data/images`, and the questions in both formats."""
    folder = tmp_path_factory.mktemp("material")
    make_language_model(folder / "llama")
    make_towers(folder)
    make_data(folder / "data")
    questions = [{"question_id": i, "image": f"{i}.png", "text": "What colour is the square?"} for i in range(2)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    picture = base64.b64encode((folder / "data" / "images" / "0.png").read_bytes()).decode()
    row = ["7", "What colour is the square?", "", *COLOURS, "A", "colour", picture]
    (folder / "mmbench.tsv").write_text("\t".join(header) + "\n" + "\t".join(row) + "\n")
    return folder


class Installed:
    """One environment with the wheel in it; runs commands there, in a folder of its own."""

    def __init__(self, name: str, base: str, wheel: Path, material: Path, folder: Path):
        self.name, self.material, self.folder = name, material, folder
        subprocess.run([base, "-m", "venv", "--without-pip", folder / "env"], check=True, timeout=120)
        self.python = folder / "env" / "bin" / "python"
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(subprocess.run([self.python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
        ask = "import sys; print(*(p for p in sys.path if p.endswith(('site-packages', 'dist-packages'))), sep='\\n')"
        below = subprocess.run([base, "-c", ask], capture_output=True, text=True, check=True).stdout
        (site / "below.pth").write_text(below)  # its packages, but not its own .pth files (an editable install)
        install = [base, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
        done = subprocess.run(install, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    def run(self, *command: object, status: int | None = 0, **more) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST_", "LLAVA_CLIPMOE"))}
        environment.update(
            LLAVA_CLIPMOE_CONFIG_DIR=str(self.folder / "config"), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
            HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_DISABLED="true", TOKENIZERS_PARALLELISM="false",
        )  # fmt: skip
        environment.update(more.pop("environment", {}))
        done = subprocess.run(
            [str(self.python), *map(str, command)],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            **more,
        )
        if status is not None:
            assert done.returncode == status, done.stdout[-1500:] + done.stderr[-4000:]
        return done

    def upstream(self, module: str, *arguments: object, **more) -> subprocess.CompletedProcess:
        """`python -m MODULE` as upstream's scripts do in the pinned environment, the launcher in the current one."""
        launcher = () if self.name == "pinned" else ("-m", "llava_clipmoe.run")
        return self.run(*(launcher or ("-m",)), module, *arguments, **more)

    def in_one_process(self, *commands: list[object]) -> list[dict]:
        """Each command through the launcher; -> status, out and err of each."""
        (self.folder / "chain.py").write_text(CHAIN)
        words = [[self.in_a_later_run(str(word)) for word in command] for command in commands]
        (self.folder / "commands.json").write_text(json.dumps(words))
        return json.loads(self.run("chain.py", "commands.json").stdout.splitlines()[-1])

    def in_a_later_run(self, word: str) -> str:
        """Flags that transformers 5 dropped are renamed once, when upstream's trainer is imported: in one process, the
        second run must say them as they are."""
        return word.replace("--evaluation_", "--eval_") if self.name == "current" else word

    def training(self, output: str, *more: object, **changed: object) -> list[str]:
        """Arguments of `llava.train.train` as LLaVA-1.5's scripts give them (those for the CPU in place of a GPU's)."""
        given = {
            "model_name_or_path": self.material / "llama", "version": "v1", "vision_tower": "clipmoe-336",
            "data_path": self.material / "data" / "data.json", "image_folder": self.material / "data" / "images",
            "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False, "bf16": True, "use_cpu": True, "output_dir": self.folder / output,
            "num_train_epochs": 1, "per_device_train_batch_size": 4, "evaluation_strategy": "no",
            "save_strategy": "steps", "save_steps": 2, "learning_rate": 2e-3,
            "lr_scheduler_type": "cosine", "logging_steps": 1, "model_max_length": 256,
            "gradient_checkpointing": True, "dataloader_num_workers": 0, "lazy_preprocess": True,
            "report_to": "none", **changed,
        }  # fmt: skip
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        return [*words, *map(str, more)]

    def stage1(self, output: str, **changed: object) -> list[str]:
        changed = {"version": "plain", "learning_rate": 1e-3, "tune_mm_mlp_adapter": True, **changed}
        return self.training(output, **changed)

    def stage2(self, output: str, *more: object, **changed: object) -> list[str]:
        projector = self.folder / "llava-pretrain" / "mm_projector.bin"
        settings = {"pretrain_mm_mlp_adapter": projector, "image_aspect_ratio": "pad", "group_by_modality_length": True}
        return self.training(output, *more, **{**settings, **changed})


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("current", marks=pytest.mark.xdist_group("current")),
        pytest.param(
            "pinned",
            marks=[
                pytest.mark.skipif(not PINNED, reason="LLAVA_CLIPMOE_PINNED_PYTHON names no interpreter; `make test`"),
                pytest.mark.xdist_group("pinned"),
            ],
        ),
    ],
)
def installed(request, wheel, material, tmp_path_factory) -> Installed:
    base = {"current": sys.executable, "pinned": PINNED}[request.param]
    here = Installed(request.param, base, wheel, material, tmp_path_factory.mktemp(request.param))
    here.run("-m", "llava_clipmoe.cli", "register", "clipmoe-336", material / "clip-moe")
    return here


@pytest.fixture(scope="module")
def pretrained(installed) -> Path:
    """Stage 1: the projector alone."""
    installed.upstream("llava.train.train", *installed.stage1("llava-pretrain"))
    return installed.folder / "llava-pretrain"


@pytest.fixture(scope="module")
def finetuned(installed, pretrained) -> Path:
    """Stage 2: the whole language model."""
    installed.upstream("llava.train.train", *installed.stage2("llava-tiny"))
    return installed.folder / "llava-tiny"


@pytest.fixture(scope="module")
def lora(installed, pretrained) -> Path:
    """Stage 2 with LoRA."""
    more = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "mm_projector_lr": 1e-2}
    installed.upstream("llava.train.train", *installed.stage2("llava-tiny-lora", **more))
    return installed.folder / "llava-tiny-lora"


def losses(output: Path) -> list[float]:
    return [float(row["loss"]) for row in json.loads((output / "trainer_state.json").read_text())["log_history"][:-1]]


def config_of(output: Path) -> dict:
    return json.loads((output / "config.json").read_text())


# ------------------------------------------------------------------------------------------------------------ the wheel


def test_the_package_that_runs_is_the_wheels(installed):
    code = "import llava_clipmoe, llava_clipmoe.llava_hook, sys; print(llava_clipmoe.__file__, len(sys.meta_path))"
    code += "; print([type(f).__module__ for f in sys.meta_path].count('llava_clipmoe.llava_hook'))"
    file, hooks = (line.split() for line in installed.run("-c", code).stdout.splitlines())
    assert Path(file[0]).is_relative_to(installed.folder / "env") and hooks == ["1"]
    off = installed.run("-c", code, environment={"LLAVA_CLIPMOE_HOOK": "0"}).stdout.splitlines()[1]
    assert off == "0"


# ------------------------------------------------------------------------------------------------------------- training


def test_stage_1_trains_and_saves_the_projector_alone(installed, pretrained):
    # Not that the loss falls: without a seed, as upstream draws first weights and batches, it need not in three steps.
    assert len(losses(pretrained)) == 3 and all(map(math.isfinite, losses(pretrained)))
    projector = torch.load(pretrained / "mm_projector.bin", weights_only=True)
    earlier = torch.load(pretrained / "checkpoint-2" / "mm_projector.bin", weights_only=True)
    assert all(not torch.equal(tensor, earlier[name]) for name, tensor in projector.items())
    shapes = {name.rpartition("mm_projector.")[2]: list(tensor.shape) for name, tensor in projector.items()}
    assert shapes == {"0.weight": [32, 48], "0.bias": [32], "2.weight": [32, 32], "2.bias": [32]}
    config = config_of(pretrained)
    assert (config["mm_vision_tower"], config["mm_hidden_size"], config["mm_vision_select_layer"]) == (
        "clipmoe-336", 48, -2,
    )  # fmt: skip
    assert not list(pretrained.glob("*.safetensors")) and (pretrained / "checkpoint-2" / "mm_projector.bin").is_file()


def test_the_same_command_trains_the_same_projector_and_adapter(installed, pretrained, lora):
    """Upstream draws their first weights before it uses --seed."""
    if installed.name == "pinned":
        pytest.skip("there upstream runs without the launcher, which seeds")
    more = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "mm_projector_lr": 1e-2}
    installed.upstream("llava.train.train", *installed.stage2("llava-tiny-lora-twice", **more))
    twice = installed.folder / "llava-tiny-lora-twice"
    assert losses(twice) == losses(lora)
    assert (twice / "adapter_model.safetensors").read_bytes() == (lora / "adapter_model.safetensors").read_bytes()


def test_stage_2_trains_the_language_model_and_leaves_the_tower_as_it_is(installed, finetuned, material):
    from safetensors.torch import load_file

    assert all(map(math.isfinite, losses(finetuned))) and list(finetuned.glob("checkpoint-*"))
    assert config_of(finetuned)["mm_vision_tower"] == "clipmoe-336"
    saved, start = load_file(finetuned / "model.safetensors"), load_file(material / "llama" / "model.safetensors")
    tower = load_file(material / "clip-moe" / "model.safetensors")
    prefix = "model.vision_tower.vision_tower."
    ours = {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
    assert "vision_model.encoder.layers.1.mlp.experts.fc1.weight" in ours
    assert all(torch.equal(tensor, tower[name].to(tensor.dtype)) for name, tensor in ours.items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(saved[name], start[name].to(saved[name].dtype))


def test_stage_2_with_lora_saves_adapter_and_projector(installed, lora):
    names = {file.name for file in lora.iterdir()}
    assert {"config.json", "non_lora_trainables.bin", "adapter_config.json"} <= names
    others = torch.load(lora / "non_lora_trainables.bin", weights_only=True)
    assert {name.rpartition("mm_projector.")[2] for name in others} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert config_of(lora)["mm_vision_tower"] == "clipmoe-336"


def test_reloaded_logits_are_the_trained_models_and_come_through_the_experts(installed, pretrained, material):
    """In fp32: what the trainer's own model says before saving, and what the saved directory says in a reader's hands.
    Zeroing one expert of a block that runs changes the logits; one of the block that `select_layer` -2 skips, not."""
    exact = {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}
    adapter = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0}
    task = {
        "base": str(material / "llama"),
        "tower": str(shutil.copytree(material / "clip-moe", installed.folder / "clip-moe")),
        "full": {"arguments": installed.stage2("llava-exact", **exact)},
        "lora": {"arguments": installed.stage2("llava-exact-lora", **exact, **adapter)},
    }
    for name, folder in (("full", "llava-exact"), ("lora", "llava-exact-lora")):
        task[name]["arguments"] = [installed.in_a_later_run(word) for word in task[name]["arguments"]]
        task[name]["output"] = str(installed.folder / folder)
    (installed.folder / "logits.py").write_text(LOGITS)
    (installed.folder / "task.json").write_text(json.dumps(task))
    result = json.loads(installed.run("logits.py", "task.json").stdout.splitlines()[-1])
    for name in ("full", "lora"):
        assert result[name]["shape"][0] == 7 + 9 and result[name]["size"] > 1, result
        assert result[name]["off"] <= 1e-5 * result[name]["size"], result
    assert result["without an expert of block 0"] > 1e-2 * result["full"]["size"], result
    assert result["without an expert of block 2"] == 0, result


# ----------------------------------------------------------------------------------------------------------- evaluation


def answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_upstreams_runners_answer_from_every_kind_of_checkpoint(installed, finetuned, pretrained, lora, material):
    base = material / "llama"

    def runner(name: str, model: Path, answers_file: str, *more: object) -> list[object]:
        command = [f"llava.eval.{name}", "--model-path", model, "--temperature", 0, "--conv-mode", "vicuna_v1"]
        return [*command, "--answers-file", installed.folder / answers_file, *more]

    pictures = ["--image-folder", material / "data" / "images", "--question-file", material / "questions.jsonl"]
    short = [*pictures, "--max_new_tokens", 5]
    results = installed.in_one_process(
        runner("model_vqa_loader", finetuned, "loader.jsonl", *short),
        runner("model_vqa", finetuned, "vqa.jsonl", *pictures),
        runner(
            "model_vqa_mmbench", finetuned, "mmb.jsonl",
            "--question-file", material / "mmbench.tsv", "--single-pred-prompt",
        ),
        runner("model_vqa_loader", lora, "lora.jsonl", "--model-base", base, *short),
        runner("model_vqa_loader", pretrained, "stage1.jsonl", "--model-base", base, *short),
    )  # fmt: skip
    assert [result["status"] for result in results] == [0] * 5, results
    loader, vqa = answers(installed.folder / "loader.jsonl"), answers(installed.folder / "vqa.jsonl")
    assert [row["question_id"] for row in loader] == [row["question_id"] for row in vqa] == [0, 1]
    assert all(row["text"] and row["model_id"] == "llava-tiny" for row in loader)
    for five, many in zip(loader, vqa, strict=True):  # the same words, whoever asks
        assert many["text"].startswith(five["text"])
    (mmbench,) = answers(installed.folder / "mmb.jsonl")
    assert mmbench["question_id"] == 7 and mmbench["options"] == list(COLOURS) and mmbench["text"]
    for name in ("lora", "stage1"):
        assert [row["question_id"] for row in answers(installed.folder / f"{name}.jsonl")] == [0, 1]


def test_the_command_line_chat_answers(installed, finetuned, material):
    done = installed.upstream(
        "llava.serve.cli", "--model-path", finetuned, "--image-file", material / "data" / "images" / "0.png",
        "--device", "cpu", "--temperature", 0, "--max-new-tokens", 5, "--conv-mode", "vicuna_v1",
        input="What colour is the square?\n\n",
    )  # fmt: skip
    answer = done.stdout.partition("ASSISTANT: ")[2].partition("\n")[0]
    assert answer.strip() and "exit..." in done.stdout


# -------------------------------------------------------------------------------------------------------------- serving


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def post(port: int, path: str, content: dict | None = None, timeout: float = 60) -> bytes:
    body = json.dumps(content or {}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read()


def wait_for(port: int, path: str, process: subprocess.Popen, log: Path, accept=bool, seconds: float = 280) -> dict:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            answer = json.loads(post(port, path))
            if accept(answer):
                return answer
        except (urllib.error.URLError, ConnectionError):
            pass  # not up yet
        time.sleep(0.3)
    raise AssertionError(f"{path} did not answer in {seconds} s: {log.read_text()[-3000:]}")


@pytest.fixture
def serving(installed):
    """Starts upstream's servers; ends those that it started."""
    started = []

    def start(module: str, *arguments: object) -> tuple[subprocess.Popen, Path]:
        launcher = [] if installed.name == "pinned" else ["-m", "llava_clipmoe.run"]
        log = installed.folder / f"{module}.txt"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LLAVA_CLIPMOE"))}
        environment.update(LLAVA_CLIPMOE_CONFIG_DIR=str(installed.folder / "config"), OMP_NUM_THREADS="1")
        environment.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", no_proxy="*")
        command = [installed.python, *(launcher or ["-m"]), module, *arguments]
        process = subprocess.Popen(
            list(map(str, command)), cwd=installed.folder, env=environment, stdout=log.open("w"), stderr=-2
        )
        started.append(process)
        return process, log

    yield start
    for process in reversed(started):
        process.terminate()
    for process in started:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def test_a_model_worker_serves_it_over_http(installed, finetuned, material, serving):
    """With upstream's controller: a worker without one waits for it for ever at the first request."""
    controller, worker = free_port(), free_port()
    controlling = serving("llava.serve.controller", "--host", "127.0.0.1", "--port", controller)
    wait_for(controller, "list_models", *controlling)
    working = serving(
        "llava.serve.model_worker", "--host", "127.0.0.1", "--port", worker, "--device", "cpu",
        "--controller-address", f"http://127.0.0.1:{controller}",
        "--worker-address", f"http://127.0.0.1:{worker}", "--model-path", finetuned,
    )  # fmt: skip
    wait_for(worker, "worker_get_status", *working, accept=lambda status: status["model_names"] == ["llava-tiny"])
    assert json.loads(post(controller, "list_models")) == {"models": ["llava-tiny"]}
    picture = base64.b64encode((material / "data" / "images" / "0.png").read_bytes()).decode()
    prompt = "A chat. USER: <image>\nWhat colour is the square? ASSISTANT:"
    asked = {"prompt": prompt, "images": [picture], "temperature": 0, "max_new_tokens": 5, "stop": "</s>"}
    parts = [json.loads(part) for part in post(worker, "worker_generate_stream", asked).split(b"\0") if part]
    assert [part["error_code"] for part in parts] == [0] * len(parts) and len(parts) > 1, working[1].read_text()[-2000:]
    assert parts[-1]["text"].startswith(prompt) and len(parts[-1]["text"]) > len(prompt)


# ------------------------------------------------------------------------------------------ other towers, and bad input


def test_scales_and_a_change_of_tower(installed, material):
    """An S2 tower through stage 1; and a base that is a LLaVA with a dense CLIP, trained on with clipmoe-336."""
    installed.run(
        "-m", "llava_clipmoe.cli", "register", "clipmoe-s2", material / "clip-moe", "--s2", "--s2-scales", 24, 48
    )
    dense = {"vision_tower": material / "clip", "save_strategy": "no"}
    onward = {"model_name_or_path": installed.folder / "llava-dense", "save_strategy": "no"}
    results = installed.in_one_process(
        ["llava.train.train", *installed.stage1("llava-s2", vision_tower="clipmoe-s2", save_strategy="no")],
        ["llava.train.train", *installed.training("llava-dense", **dense)],
        ["llava.train.train", *installed.training("llava-changed", **onward)],
    )
    assert [result["status"] for result in results] == [0] * 3, results
    projector = torch.load(installed.folder / "llava-s2" / "mm_projector.bin", weights_only=True)
    assert config_of(installed.folder / "llava-s2")["mm_hidden_size"] == 96
    assert next(t for name, t in projector.items() if name.endswith("0.weight")).shape == (32, 96)
    from safetensors import safe_open

    experts = {}
    for name in ("llava-dense", "llava-changed"):
        with safe_open(str(installed.folder / name / "model.safetensors"), "pt") as file:
            experts[name] = [key for key in file.keys() if "vision_tower" in key and ".experts." in key]
    assert not experts["llava-dense"] and experts["llava-changed"]
    assert config_of(installed.folder / "llava-dense")["mm_vision_tower"] == str(material / "clip")
    assert config_of(installed.folder / "llava-changed")["mm_vision_tower"] == "clipmoe-336"
    assert "clipmoe-336 takes its place" in results[2]["err"]


def test_bad_input_is_one_clear_message_and_nothing_half_written(installed, pretrained, material):
    wide = installed.folder / "wide.bin"
    torch.save({"model.mm_projector.0.weight": torch.zeros(32, 64), "model.mm_projector.0.bias": torch.zeros(32)}, wide)
    cases = [
        installed.stage1("unregistered", vision_tower="clipmoe-448"),
        installed.stage2("other-width", pretrain_mm_mlp_adapter=wide),
        installed.stage2("no-pictures", image_folder=material / "no-such-folder"),
        installed.stage1("dense-by-name", vision_tower="clipmoe-dense"),
    ]
    (installed.folder / "clipmoe-dense").symlink_to(material / "clip")
    unregistered, width, pictures, dense = installed.in_one_process(*(["llava.train.train", *case] for case in cases))
    assert unregistered["status"] == 2 and "llava-clipmoe register clipmoe-448 DIR_OR_HUB_ID" in unregistered["err"]
    assert width["status"] == 2 and "was trained for another tower" in width["err"] and "48 channels" in width["err"]
    assert pictures["status"] == 2 and "not in" in pictures["err"] and "no-such-folder" in pictures["err"]
    assert dense["status"] == 2 and "is no CLIP-MoE model directory" in dense["err"]
    for result in (unregistered, width, pictures, dense):
        assert "Traceback" not in result["err"]
    for name in ("unregistered", "other-width", "no-pictures", "dense-by-name"):
        left = installed.folder / name
        assert not left.exists() or not [f for f in left.rglob("*") if f.suffix in (".bin", ".safetensors", ".json")]


def test_an_unregistered_tower_fails_at_evaluation_with_the_command_that_registers_it(installed, finetuned, material):
    done = installed.upstream(
        "llava.serve.cli", "--model-path", finetuned, "--image-file", material / "data" / "images" / "0.png",
        "--device", "cpu", status=None, input="\n", environment={"LLAVA_CLIPMOE_CONFIG_DIR": str(installed.folder)},
    )  # fmt: skip
    assert done.returncode == (1 if installed.name == "pinned" else 2)
    assert "llava-clipmoe register clipmoe-336 DIR_OR_HUB_ID" in done.stderr


def test_both_stages_go_on_after_they_were_interrupted(installed, pretrained, finetuned):
    """`checkpoint-*` in the output directory: upstream resumes, and ends as the run that went through."""
    again = {}
    for start in (pretrained, finetuned):
        again[start] = shutil.copytree(start, installed.folder / f"{start.name}-again")
        for name in ("model.safetensors", "mm_projector.bin", "trainer_state.json"):
            (again[start] / name).unlink(missing_ok=True)
        later = [path for path in again[start].glob("checkpoint-*") if path.name != "checkpoint-2"]
        for path in later:  # newer versions save after the last step too
            shutil.rmtree(path)
    one, two = installed.in_one_process(
        ["llava.train.train", *installed.stage1(again[pretrained].name)],
        ["llava.train.train", *installed.stage2(again[finetuned].name)],
    )
    assert (one["status"], two["status"]) == (0, 0), (one, two)
    for start, end in again.items():
        assert losses(end) == pytest.approx(losses(start), rel=1e-2), start.name
    weights = [torch.load(path / "mm_projector.bin", weights_only=True) for path in (pretrained, again[pretrained])]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], atol=1e-3, rtol=1e-2)
    assert (again[finetuned] / "model.safetensors").is_file()


def test_an_interrupted_lora_stage_goes_on_with_the_projector_it_had(installed, pretrained, lora):
    """Upstream's LoRA checkpoints hold the adapter alone: resumed, it would go on from stage 1's projector."""
    again = shutil.copytree(lora, installed.folder / "llava-tiny-lora-again")
    for name in ("non_lora_trainables.bin", "adapter_model.safetensors", "trainer_state.json"):
        (again / name).unlink()
    for checkpoint in again.glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-2":
            shutil.rmtree(checkpoint)
    more = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "mm_projector_lr": 1e-2}
    installed.upstream("llava.train.train", *installed.stage2(again.name, **more))
    straight, resumed = (torch.load(path / "non_lora_trainables.bin", weights_only=True) for path in (lora, again))
    start = torch.load(pretrained / "mm_projector.bin", weights_only=True)
    moved = 0.0
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-3, rtol=1e-2)
        before = next(value for key, value in start.items() if name.endswith(key))
        moved = max(moved, (tensor.float() - before.float()).abs().max().item())
    assert moved > 1e-2, "the projector hardly moved: the test shows nothing"
