"""One flat training loop for every stage: the base from scratch, the FFN-only stages and the routers.

    get batch -> forward -> loss over the global batch -> backward -> step -> log -> checkpoint

What is trainable and which batches come are all that one stage has different from another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel

from ..config import EngineConfig, OptimConfig
from ..data.dataset import Batch, EncoderDataset, collate
from ..data.pairs import DataError
from ..progress import Bar
from .alone import Alone
from .checkpoint import MOMENTS, load_checkpoint, save_checkpoint
from .chunks import Card, Trial, choose_chunk, gauge_of, out_of_memory_names_the_flag
from .losses import make_objective
from .memory import reset_peak_memory
from .metrics import Began, Metrics
from .optimizer import learning_rate, limit_temperature, make_optimizer, optimizer_step
from .sampler import InClusterBatchSampler
from .step import TwoTowers, forward_backward


@dataclass
class Stage:
    """One training: which tensors of `bundle.model` are trainable, on which batches, with which settings."""

    name: str  # "base", "stage1", ..., "router"
    bundle: ClipBundle
    dataset: EncoderDataset
    rows: np.ndarray  # [N] dataset rows that may be used
    cluster_ids: np.ndarray  # [N,S] their accumulated clusters; [N,0] for plain shuffled batches
    trainable: Callable[[str], bool]  # by parameter name
    optim: OptimConfig
    seed: int


def train(
    stage: Stage, accelerator: Accelerator, engine: EngineConfig, metrics: Metrics, checkpoints: Path, chunk_file: Path
) -> None:
    """Train `stage.bundle.model` in place. Resumes from `checkpoints`, which the caller clears once it has saved.

    After a kill the same call goes on from the last checkpoint and ends with the same bits (CPU) as one that was
    never stopped. chunk_file: where the chunk is kept that was measured for this training.
    """
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    clip, o, size = stage.bundle.model.to(device), stage.optim, stage.optim.global_batch_size
    clip._set_gradient_checkpointing(engine.activation_checkpointing)
    trained = _set_trainable(clip, stage)
    optimizer = make_optimizer(trained, o)
    start = load_checkpoint(checkpoints, trained, optimizer)
    metrics.truncate_after(stage.name, start)
    sampler = InClusterBatchSampler(stage.cluster_ids, size, o.epochs, stage.seed, rank, world, start, stage.rows)
    towers = accelerator.prepare_model(TwoTowers(stage.bundle).train())
    objective = make_objective(o, rank, world)
    gauge, share = gauge_of(device), size // world
    trials = partial(step_trials, stage, towers, optimizer, accelerator, share)
    chunk = choose_chunk(engine.chunk_size, stage.name, share, chunk_file, accelerator, gauge, trials)
    reset_peak_memory(device)
    began, truncated = Began(), 0
    explained = out_of_memory_names_the_flag(stage.name, chunk, share, gauge)
    with explained, Bar(f"training {stage.name}", sampler.steps * size, completed=start * size) as bar:
        for step, batch in enumerate(_loader(stage, sampler, engine, device), start=start):
            _refuse_bad_images(batch)
            truncated += batch.truncated
            losses = forward_backward(towers, batch, objective, accelerator, chunk, (stage.seed, step))
            rate, last = learning_rate(o, step, sampler.steps), step + 1 == sampler.steps
            logs = (step + 1) % engine.log_every == 0 or last or step == start
            norm = optimizer_step(optimizer, accelerator, o, rate, logs)
            limit_temperature(clip, o)
            if logs:
                values = {name: float(accelerator.reduce(value, "mean")) for name, value in losses.items()}
                _check_finite(values, stage.name, step)
                place = {"step": step + 1, "steps": sampler.steps, "epoch": (step + 1) / sampler.steps_per_epoch}
                values |= {"learning_rate": rate, "grad_norm": float(norm), "images_per_second": bar.rate.per_second}
                metrics.log({"stage": stage.name, **place, **values, "time": time.time()})
                bar.values["loss"] = values["loss"]
            bar.advance(size)
            if (step + 1) % engine.checkpoint_every == 0 or last:
                if accelerator.is_main_process:
                    save_checkpoint(checkpoints, step + 1, trained, optimizer)
                accelerator.wait_for_everyone()
    clip.requires_grad_(False).eval()
    accelerator.unwrap_model(towers, keep_fp32_wrapper=False)
    accelerator.free_memory()
    images, cut = len(sampler) * size, int(accelerator.reduce(torch.tensor(truncated, device=device), "sum"))
    if cut:
        bar.write(f"{cut} of {images} captions were longer than {stage.bundle.context_length} tokens: cut")
    chunk = None if chunk is None or chunk >= share else chunk
    metrics.done("train", stage.name, began, device, images=images, truncated_captions=cut, chunk_size=chunk)


def _set_trainable(clip: CLIPMoEModel, stage: Stage) -> dict[str, nn.Parameter]:
    """Set the temperature, and let gradients flow to the stage's trainable tensors -> these, by name."""
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(1 / stage.optim.temperature))
    trained = {}
    for name, parameter in clip.named_parameters():
        trainable = stage.trainable(name) if name != "logit_scale" else stage.optim.train_temperature
        parameter.requires_grad_(trainable)
        if trainable:
            trained[name] = parameter
    return trained


def _loader(stage: Stage, sampler: InClusterBatchSampler, engine: EngineConfig, device: torch.device) -> DataLoader:
    return DataLoader(
        stage.dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=engine.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=engine.workers > 0,
    )


def step_trials(
    stage: Stage, towers: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, share: int, gauge: Card
) -> Trial:
    """-> a trial, which measures a step of this training in chunks of a given size, of a process's `share` images.

    A trial is a real step on random pictures and captions of the full length: two chunks (the second one meets the
    gradients of the first), beside the share's other pictures and the moments that the optimiser has yet to make. It
    is this process's alone, waits for no other one, and leaves neither gradients nor a change of the random state.
    """
    alone, towers = Alone(accelerator), accelerator.unwrap_model(towers)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    objective = make_objective(stage.optim)

    def step(chunk: int) -> None:
        device, images = alone.device, min(2 * chunk, share)
        batch = _longest_batch(images, towers.clip.config, stage, objective.captions)
        rest = torch.empty((share - images, *batch.pixel_values.shape[1:]), dtype=torch.uint8, device=device)
        moments = [torch.empty_like(p) for p in trained if p not in optimizer.state for _ in MOMENTS]
        forward_backward(towers, batch, objective, alone, chunk, (stage.seed, 0))
        del rest, moments

    def measured(chunk: int) -> int | None:
        with torch.random.fork_rng([alone.device] if alone.device.type == "cuda" else []):
            peak = gauge.peak(lambda: step(chunk))
        optimizer.zero_grad(set_to_none=True)
        return peak

    measured(1)  # libraries make their workspaces, and kernels are tuned, when they first run
    return measured


def _longest_batch(size: int, config: CLIPMoEConfig, stage: Stage, captions: int) -> Batch:
    """Random pictures, and captions that fill the text tower: what takes the most memory."""
    vision, text = config.vision_config, config.text_config
    pixels = torch.randint(0, 256, (size, 3, vision.image_size, vision.image_size), dtype=torch.uint8)
    end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id  # as in `end_of_text`
    ids = torch.randint(0, max(end, 1), (size, stage.bundle.context_length))
    ids[:, -1] = end
    return Batch(pixels, ids, torch.arange(size), [], 0, ids if captions == 2 else None)


def _refuse_bad_images(batch: Batch) -> None:
    if batch.bad:
        row, error = batch.bad[0]
        raise DataError(
            f"image {row} could be read when the run started, but not now: {error}. "
            "Restore it (or delete skipped.npz in the run's folder so that images are checked again) and run the "
            "same command: training goes on from the last checkpoint."
        )


def _check_finite(values: dict[str, float], name: str, step: int) -> None:
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(
            f"the loss of {name} is {values['loss']} at step {step + 1}. Lower its learning rate, or use "
            "--engine.precision fp32. The last checkpoint is kept."
        )
