"""A DMU run small enough for tests: drawn pictures, a CLIP of two blocks, seconds a stage. Used by several tests."""

import contextlib
import gc
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from llava_clipmoe.cli import main

COLOURS = ("red", "green", "blue", "yellow", "black", "purple")
SHAPES = ("circle", "square", "line")
REPOSITORY = Path(__file__).resolve().parents[1]


def draw_data(folder: Path, count: int = 60, size: int = 32) -> Path:
    """`count` coloured shapes and a captions file -> the path of the JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    rows = []
    for i in range(count):
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        picture = Image.new("RGB", (size, size), "white")
        x, y, r = rng.randint(6, size - 6), rng.randint(6, size - 6), rng.randint(3, 6)
        box = (x - r, y - r, x + r, y + r)
        pen = ImageDraw.Draw(picture)
        {"circle": pen.ellipse, "square": pen.rectangle, "line": pen.line}[shape](box, fill=colour)
        name = f"{i:03d}.png"
        picture.save(folder / name)
        place = "left" if x < size / 2 else "right"
        rows.append(
            {
                "image": name,
                "short": f"a {shape}",
                "caption": [f"a {colour} {shape} on the {place}", f"{shape}, {colour}, {place}, picture {i}"],
            }
        )
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    """Flags of a tiny run on `data`: 3 experts, 3 + 3 + 2 x 3 + 3 steps of 16 images."""
    optim = {"base.scratch.early-optim": (1e-3, 1), "base.scratch.optim": (1e-3, 1)}
    optim |= {"mcl.optim": (1e-3, 1), "moe.optim": (1e-2, 1)}
    flags = [
        "dmu-openmoji",
        "--data.source",
        str(data),
        "--data.caption-columns",
        "caption",
        "--base.scratch.early-caption-columns",
        "caption",
        "--base.scratch.locked-text-epochs",
        "0",
        "--base.scratch.caption-columns",
        "short",
        "--base.scratch.image-size",
        "32",
        "--base.scratch.patch-size",
        "8",
        "--base.scratch.vision-width",
        "32",
        "--base.scratch.text-width",
        "32",
        "--base.scratch.head-width",
        "16",
        "--base.scratch.vision-layers",
        "2",
        "--base.scratch.text-layers",
        "2",
        "--base.scratch.projection-dim",
        "16",
        "--moe.caption-columns",
        "caption",
        "short",
        "--moe.num-experts",
        "3",
        "--engine.precision",
        "fp32",
        "--engine.checkpoint-every",
        "2",
        "--engine.log-every",
        "1",
        "--evaluation.retrieval",
        f"same={data}",
        "--evaluation.attributes",
        "None",
        "--evaluation.zero-shot",  # none
        "--evaluation.routing-images",
        "16",
        "--output-dir",
        str(output),
    ]
    for name, (rate, epochs) in optim.items():
        flags += [
            f"--{name}.learning-rate",
            str(rate),
            f"--{name}.epochs",
            str(epochs),
            f"--{name}.global-batch-size",
            "16",
            f"--{name}.epsilon",
            "1e-4",
        ]
    return [*flags, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(args: list[str]) -> list[str]:
    return [sys.executable, "-m", "llava_clipmoe.cli", "train-encoder", *args]


def run_two(args: list[str], program: Path | None = None) -> subprocess.CompletedProcess:
    """The command (or a program of the test's) in two processes that train together."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    started = [str(program)] if program else ["-m", "llava_clipmoe.cli", "train-encoder"]
    words = [*launcher, *started, *args]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600)
    return _checked(done)


def run(args: list[str], check: bool = True) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    done = subprocess.run(command(args), env=environment(), capture_output=True, text=True, timeout=600)
    return _checked(done) if check else done


def run_here(args: list[str], check: bool = True) -> subprocess.CompletedProcess:
    """The command in this process, which has the libraries loaded: seconds less. As `run`, it uses one thread."""
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["train-encoder", *args])
    except SystemExit as stopped:  # --help, and flags that do not exist
        status = int(stopped.code or 0)
    finally:
        torch.set_num_threads(threads)
        gc.collect()  # the run's lock goes with the run
    done = subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())
    return _checked(done) if check else done


def _checked(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    if done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every weight file of a run."""
    names = ("base", "stage1", "stage2", "clip-moe")
    return {name: (folder / name / "model.safetensors").read_bytes() for name in names}
