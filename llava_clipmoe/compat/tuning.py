"""A tower that learns, in upstream's training: its flags, learning rate, balance loss and file (`tower_tuning.py`).

Upstream's stage 2 has no way to train a tower. Without the flags nothing of this does anything.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..model_directory import local_directory, read_config
from ..tower_registry import resolve
from ..tower_tuning import CHOICES, MARK, ONE_OF, TUNED_FILE, Tuning, check_tuning, save_tuned
from ..vision_tower import CLIPMoEVisionTower
from .flags import Flags

RATE, RANK = "mm_vision_tower_lr", "mm_vision_tower_lora_r"
_FLAGS = (
    (MARK, str | None, None, f"Stage 2: train of the vision tower, too: {ONE_OF} (default: it is frozen)."),
    (RATE, float | None, None, f"Learning rate of what --{MARK} trains (default: --learning_rate)."),
    (RANK, int, Tuning.rank, f"Rank of the changes that --{MARK} lora trains; alpha is twice the rank."),
)


# ---------------------------------------------------------------------------------------------------------------- flags


def check_flags(arguments: Any) -> None:
    """Raise ValueError for flags that cannot be meant; `arguments` is upstream's ModelArguments with ours, or more."""
    tuning = tuning_of(arguments)
    if tuning is None:
        if getattr(arguments, RATE, None) is not None:
            raise ValueError(f"--{RATE} needs --{MARK}: without it the vision tower is frozen.")
        return
    if tuning.what in CHOICES and arguments.tune_mm_mlp_adapter:
        raise ValueError(f"--{MARK} belongs to stage 2; stage 1 (--tune_mm_mlp_adapter) trains the projector alone.")
    name = arguments.vision_tower
    tower = resolve(name) if name else None
    if tuning.what in CHOICES and tower is None:
        raise ValueError(f"--{MARK} trains a CLIP-MoE tower, and --vision_tower is {name}.")
    check_tuning(tuning, read_config(local_directory(tower.source)).vision_config if tower else None, name)


FLAGS = Flags(frozenset({"vision_tower", "tune_mm_mlp_adapter"}), _FLAGS, check_flags)


def tuning_of(arguments: Any) -> Tuning | None:
    what = getattr(arguments, MARK, None)
    return what and Tuning(what, getattr(arguments, RATE, None), getattr(arguments, RANK, Tuning.rank))


# ---------------------------------------------------------------------------------------------------------------- model


def tower_of(model: nn.Module) -> CLIPMoEVisionTower | None:
    """The tower of ours in a LLaVA (or in peft's wrapper around it); None where there is none."""
    tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else None
    return tower if isinstance(tower, CLIPMoEVisionTower) else None


def ask(model: Any, arguments: Any) -> None:
    """After upstream's `initialize_vision_modules`: tell the tower what to learn, and the checkpoint's config that its
    tower is not its directory's. `model` is upstream's LlavaMetaModel."""
    tuning, tower = tuning_of(arguments), model.get_vision_tower()
    if tuning is not None:
        check_flags(arguments)  # who calls it without upstream's parser
        if isinstance(model.vision_tower, list):
            raise ValueError(f"--{MARK} does not work with --fsdp, for which LLaVA keeps the tower out of the model.")
        tower.ask_for_tuning(tuning)
        setattr(model.config, MARK, tuning.what)
    elif hasattr(model.config, MARK) and not getattr(tower, "tuned", None):
        delattr(model.config, MARK)  # another tower has taken the place of the one that was trained


def read_beside(model: nn.Module, checkpoint: str) -> None:
    """Let a tower whose weights are still to be read find what `checkpoint` changed of it.

    The tower itself knows the directory that its config came with, and transformers writes there where the language
    model is: with LoRA, another one.
    """
    tower = tower_of(model)
    if tower is not None and getattr(model.config, MARK, None) and not tower.is_loaded:
        tower.tuned_in = checkpoint


def save_beside(model: nn.Module, folder: str | Path) -> None:
    """After `save_pretrained` of a LLaVA whose trained tower was only read (LoRA that was merged): keep it."""
    tower = tower_of(model)
    if tower is not None and tower.tuned and tower.tuning is None:
        save_tuned(Path(folder), tower.changed(), getattr(model.config, MARK, None))


# -------------------------------------------------------------------------------------------------------------- trainer


def wake(trainer_arguments: Any, model: nn.Module | None) -> None:
    """Before a trainer takes the model, when upstream has cast and frozen what it wants to."""
    tower = tower_of(model) if model is not None else None
    if tower is None or tower.tuning is None:
        return
    engine = getattr(trainer_arguments, "deepspeed_plugin", None)  # of --deepspeed, or of accelerate's launcher
    settings = getattr(getattr(engine, "hf_ds_config", None), "config", {})
    if tower.tuning.learning_rate is not None and "optimizer" in settings:
        raise ValueError(f"--{RATE} cannot be used with an optimizer of DeepSpeed's file: take that section out of it.")
    if getattr(trainer_arguments, "n_gpu", 1) > 1:
        raise ValueError(f"--{MARK} needs a process for each GPU (the balance loss is lost otherwise): use torchrun.")
    tower.wake(half=trainer_arguments.bf16 or trainer_arguments.fp16, engine=engine is not None)


def save_tower(trainer: Any, folder: str | Path) -> None:
    """Write what stage 2 changed of the tower beside a checkpoint; every process must call it."""
    tower = tower_of(trainer.model)
    if tower is None or not tower.tuned:
        return
    tensors = tower.changed()
    if trainer.args.should_save:
        save_tuned(Path(folder), tensors, getattr(trainer.model.config, MARK, None))


def check_resumed(trainer: Any, checkpoint: str | Path | bool | None) -> None:
    """Raise ValueError for a checkpoint of a run that trained something else of the tower.

    checkpoint: as `Trainer.train` takes it; True is the newest."""
    from safetensors import safe_open
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint = get_last_checkpoint(trainer.args.output_dir) if checkpoint is True else checkpoint
    if not checkpoint or not trainer.args.should_save:  # another node may not have the file
        return
    tower, file, before = tower_of(trainer.model), Path(checkpoint) / TUNED_FILE, None
    if file.is_file():
        with safe_open(str(file), framework="pt") as opened:
            before = (opened.metadata() or {}).get(MARK)
    now = tower.tuning.what if tower is not None and tower.tuning is not None else None
    began_so = now is None and tower is not None and bool(tower.tuned)  # frozen, as an earlier training left it
    if before != now and not began_so:
        raise ValueError(
            f"{checkpoint} was trained with {f'--{MARK} {before}' if before else f'no --{MARK}'}. Give the same flags "
            "again, or delete the checkpoint to train this stage anew."
        )


def patch_trainer(cls: type) -> None:
    """llava.train.llava_trainer.LLaVATrainer: learning rate, balance loss, and the tower's file at the end."""
    create_optimizer, compute_loss, save_state = cls.create_optimizer, cls.compute_loss, cls.save_state
    train, log = cls.train, cls.log

    @functools.wraps(train)
    def checked(self, resume_from_checkpoint: Any = None, *rest: Any, **named: Any):
        check_resumed(self, resume_from_checkpoint)
        return train(self, resume_from_checkpoint, *rest, **named)

    @functools.wraps(create_optimizer)
    def with_own_rate(self, *rest: Any, **named: Any):
        fresh, optimizer = self.optimizer is None, create_optimizer(self, *rest, **named)
        tower = tower_of(self.model)
        if fresh and tower is not None and tower.tuning is not None and tower.tuning.learning_rate is not None:
            give_own_rate(optimizer, tower, tower.tuning.learning_rate)
        return optimizer

    @functools.wraps(compute_loss)
    def with_balance(self, model: Any, inputs: Any, return_outputs: bool = False, *rest: Any, **named: Any):
        found = compute_loss(self, model, inputs, return_outputs, *rest, **named)
        tower = tower_of(self.model)
        balance = tower.take_balance() if tower is not None else None
        if balance is None:
            return found
        self.balance_loss = balance.detach()
        return (found[0] + balance, *found[1:]) if return_outputs else found + balance

    @functools.wraps(log)
    def with_balance_logged(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
        if "loss" in logs and hasattr(self, "balance_loss"):  # of this process's last batch
            logs["balance_loss"] = round(self.balance_loss.item(), 4)
        log(self, logs, *rest, **named)

    @functools.wraps(save_state)
    def with_tower(self) -> None:
        save_state(self)
        save_tower(self, self.args.output_dir)  # upstream saves the rest right after, in four ways

    cls.create_optimizer, cls.compute_loss, cls.save_state = with_own_rate, with_balance, with_tower
    cls.train, cls.log = checked, with_balance_logged


def give_own_rate(optimizer: torch.optim.Optimizer, tower: nn.Module, rate: float) -> None:
    """Move the tower's parameters into groups of their own, in place; their weight decay stays."""
    own = {id(parameter) for parameter in tower.parameters()}
    groups, optimizer.param_groups = optimizer.param_groups, []
    for group in groups:
        theirs = [parameter for parameter in group["params"] if id(parameter) not in own]
        if theirs or not group["params"]:
            optimizer.add_param_group({**group, "params": theirs})
    for group in groups:
        ours = [parameter for parameter in group["params"] if id(parameter) in own]
        if ours:
            optimizer.add_param_group({**group, "params": ours, "lr": rate})
