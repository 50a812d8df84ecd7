"""Upstream's trainer on transformers 5, without DeepSpeed, and resumable in stage 1.

Upstream was written for transformers 4.37 (llava/train/llava_trainer.py, train.py). On 4.37 only the parts that say
so below apply.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ..files import load_foreign_pt, load_tensors, save_tensors
from . import anyres, conversations, tuning
from .data import guard
from .flags import add_flags
from .versions import check_transformers


def before_import(module: ModuleType) -> None:
    """Before llava.train.llava_trainer runs: names and flags that transformers 5 dropped."""
    import transformers
    from torch import nn

    if not hasattr(transformers.trainer, "ALL_LAYERNORM_LAYERS"):
        transformers.trainer.ALL_LAYERNORM_LAYERS = [nn.LayerNorm]
    if not hasattr(transformers.PreTrainedTokenizerBase, "legacy"):
        # train.py asks every tokenizer; only Llama's know. The others tokenise a turn alike wherever it stands.
        transformers.PreTrainedTokenizerBase.legacy = True
    rename_flags(sys.argv, transformers.TrainingArguments)
    add_flags(tuning.FLAGS, anyres.FLAGS)


RENAMED_FLAGS = {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps"}
"""Flags of LLaVA's own scripts -> their names in transformers 5 (where `warmup_steps` below 1 is a ratio)."""


def rename_flags(argv: list[str], arguments: type) -> None:
    """Change flags that the installed TrainingArguments no longer has, in place."""
    fields = getattr(arguments, "__dataclass_fields__", {})
    for position, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        old = flag.removeprefix("--")
        if flag.startswith("--") and old in RENAMED_FLAGS and old not in fields and RENAMED_FLAGS[old] in fields:
            argv[position] = f"--{RENAMED_FLAGS[old]}{equals}{value}"


def patch_trainer(module: ModuleType) -> None:
    """llava.train.llava_trainer.LLaVATrainer: signatures of the installed transformers."""
    check_transformers()
    cls, base = module.LLaVATrainer, module.Trainer
    _patch_init(cls, base)
    _patch_sampler(cls)
    _patch_save_checkpoint(cls, base)
    _patch_load_checkpoint(cls)
    add_flags(tuning.FLAGS, anyres.FLAGS)
    anyres.keep_newline(vars(module))
    tuning.patch_trainer(cls)
    allow_numpy_random_state()


def _patch_init(cls: type, base: type) -> None:
    takes_tokenizer = "tokenizer" in inspect.signature(base.__init__).parameters

    @functools.wraps(base.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not takes_tokenizer and "tokenizer" in kwargs:
            kwargs["processing_class"] = kwargs.pop("tokenizer")
        if kwargs.get("train_dataset") is not None:
            conversations.prepare_training(kwargs["train_dataset"], kwargs.get("model"))
            guard(kwargs["train_dataset"])
            anyres.prepare(kwargs)
        if "args" in kwargs:
            tuning.wake(kwargs["args"], kwargs.get("model"))
            one_dtype(kwargs["args"], kwargs.get("model"))
        base.__init__(self, *args, **kwargs)
        stand_in_for_deepspeed()

    cls.__init__ = __init__


def one_dtype(arguments: Any, model: Any) -> None:
    """What is not sharded yet in the dtype of training, in place, where DeepSpeed's ZeRO-3 trains in half precision.

    It flattens what is trained into one buffer of one dtype. It would cast a model to that itself, but not one that was
    sharded while it was read; what upstream adds afterwards (projector, adapters) is then in fp32, and it stops.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if model is None or not (arguments.bf16 or arguments.fp16) or not is_deepspeed_zero3_enabled():
        return
    import torch

    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id") and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16 if arguments.bf16 else torch.float16)


def _patch_sampler(cls: type) -> None:
    upstream = cls._get_train_sampler

    @functools.wraps(upstream)
    def _get_train_sampler(self, *_: Any):  # transformers 5 hands the data set in; it is the trainer's own
        return upstream(self)

    cls._get_train_sampler = _get_train_sampler


def _patch_save_checkpoint(cls: type, base: type) -> None:
    """A checkpoint of stage 1 gets what resuming needs: upstream's holds the projector alone, and the trainer, which
    is told to resume from it, refuses it."""
    upstream = cls._save_checkpoint
    base_takes_metrics = "metrics" in inspect.signature(base._save_checkpoint).parameters

    @functools.wraps(upstream)
    def _save_checkpoint(self, model: Any, trial: Any, *rest: Any, **named: Any) -> None:
        if _only_projector(self):
            upstream(self, model, trial, *rest, **named)  # mm_projector.bin, config.json
        if not base_takes_metrics:
            rest, named = (), {}
        base._save_checkpoint(self, model, trial, *rest, **named)  # optimizer, schedule, random state, trainer_state
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        tuning.save_tower(self, checkpoint)
        if _lora_beside_others(self) and self.args.should_save:
            save_tensors(checkpoint / NOT_LORA, trained_beside_lora(self.model))

    cls._save_checkpoint = _save_checkpoint


def _patch_load_checkpoint(cls: type) -> None:
    upstream = cls._load_from_checkpoint

    @functools.wraps(upstream)
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not _only_projector(self):
            upstream(self, resume_from_checkpoint, model)
            if _lora_beside_others(self):
                load_beside_lora(self.model, Path(resume_from_checkpoint))
            return
        weights = load_foreign_pt(Path(resume_from_checkpoint) / "mm_projector.bin")
        found = (model or self.model).load_state_dict(weights, strict=False)
        if found.unexpected_keys:
            raise ValueError(
                f"{resume_from_checkpoint} belongs to another model ({', '.join(found.unexpected_keys[:3])}). Give "
                "another --output_dir, or delete the checkpoint to start anew."
            )

    cls._load_from_checkpoint = _load_from_checkpoint


NOT_LORA = "non_lora_trainables.safetensors"


def _lora_beside_others(trainer: Any) -> bool:
    """LoRA training, whose checkpoints hold the adapter alone; DeepSpeed's own checkpoints hold everything."""
    return bool(getattr(trainer.args, "lora_enable", False)) and not trainer.is_deepspeed_enabled


def trained_beside_lora(model: Any) -> dict[str, Any]:
    """What stage 2 trains besides the adapter, by name: the projector, and what it was asked to of the tower."""
    named = model.named_parameters()
    return {name: tensor for name, tensor in named if tensor.requires_grad and "lora_" not in name}


def load_beside_lora(model: Any, checkpoint: Path) -> None:
    """Put the projector of a LoRA checkpoint back; without it a resumed run would go on from stage 1's, silently."""
    if not (checkpoint / NOT_LORA).is_file():
        raise ValueError(
            f"{checkpoint} holds LoRA's adapter alone, not the projector that was trained with it: it was written "
            "without llava-clipmoe. Delete the checkpoint to train this stage anew."
        )
    import torch

    parameters = trained_beside_lora(model)
    with torch.no_grad():
        for name, tensor in load_tensors(checkpoint / NOT_LORA).items():
            parameters[name].copy_(tensor)


def _only_projector(trainer: Any) -> bool:
    return bool(getattr(trainer.args, "tune_mm_mlp_adapter", False))


def allow_numpy_random_state() -> None:
    """Let torch >= 2.6 read the checkpoints of transformers 4.37, whose rng_state.pth holds numpy's state."""
    import numpy as np
    import torch

    if hasattr(torch.serialization, "add_safe_globals"):  # torch >= 2.4
        rebuild = np.zeros(1).__reduce__()[0]
        torch.serialization.add_safe_globals([rebuild, np.ndarray, np.dtype, type(np.dtype("uint32"))])


def stand_in_for_deepspeed() -> None:
    """Let upstream's `maybe_zero_3` import the two names that it asks for where DeepSpeed is not installed.

    Upstream imports them whenever it saves a projector; without DeepSpeed no parameter has a `ds_id`, so they are
    never used. Called after the trainer was made: by then everybody has asked whether DeepSpeed is there.
    """
    if "deepspeed" in sys.modules or importlib.util.find_spec("deepspeed") is not None:
        return
    names = ("deepspeed", "deepspeed.zero", "deepspeed.runtime", "deepspeed.runtime.zero")
    for name in (*names, "deepspeed.runtime.zero.partition_parameters"):
        stand_in = ModuleType(name)
        stand_in.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        stand_in.__path__ = []
        sys.modules[name] = stand_in
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, stand_in)
    sys.modules["deepspeed.runtime.zero.partition_parameters"].ZeroParamStatus = None
