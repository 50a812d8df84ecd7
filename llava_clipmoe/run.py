"""Run any module of upstream LLaVA with our towers and on any supported transformers.

    python -m llava_clipmoe.run llava.train.train --vision_tower clipmoe-336 ...
    torchrun --nproc-per-node 8 -m llava_clipmoe.run llava.train.train ...
    deepspeed --module llava_clipmoe.run llava.train.train --deepspeed zero2.json ...
    accelerate launch -m llava_clipmoe.run llava.train.train ...

The module (or a script's path) runs as `__main__`: some of upstream's read module globals that only exist then.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from .cli import DEBUG, raised_by_us
from .conversations import TEMPLATES, find_conversation

USAGE = "usage: python -m llava_clipmoe.run MODULE_OR_SCRIPT [ARGUMENTS ...]     (for instance llava.train.train)"


def main(argv: list[str]) -> int:
    """Install hook and shims, then become the module; -> 2 when it cannot be started."""
    argv = _without_launcher_rank(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__ if argv else USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    target, rest = argv[0], argv[1:]
    from . import llava_hook

    os.environ[llava_hook.SWITCH] = "1"  # who launches us wants the hook, in child processes too
    llava_hook.install()
    try:
        prepare()
    except Exception as error:
        return _fail(error)
    if target.startswith("llava.train."):
        seed(rest)
    sys.argv = [target, *rest, *conversation_flag(target, rest)]
    try:
        if target.endswith(".py"):
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    except Exception as error:
        ours = isinstance(error, (ValueError, RuntimeError, OSError)) and raised_by_us(error)
        if ours and os.environ.get(DEBUG, "0") in ("", "0"):
            return _fail(error)
        from .compat.versions import newer_than_tested

        if not ours and (newer := newer_than_tested()):  # its likely cause, before the trace
            print(f"llava-clipmoe: {newer}", file=sys.stderr)
        raise
    return 0


def _without_launcher_rank(argv: list[str]) -> list[str]:
    """DeepSpeed's launcher puts --local_rank=N before the module's name; the module wants it after."""
    if argv and argv[0].startswith("--local_rank"):
        return [*argv[1:], argv[0]]
    return argv


def seed(arguments: list[str]) -> None:
    """Upstream uses `--seed` only when its Trainer begins. The first weights of projector and LoRA are drawn before it:
    two runs of one command would differ."""
    import torch

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=42)  # transformers' default
    torch.manual_seed(parser.parse_known_args(arguments)[0].seed)


def conversation_flag(target: str, arguments: list[str]) -> list[str]:
    """`--conv-mode` for upstream's programs that ask a model, where nobody gave it and the model's directory says one
    of our templates: upstream chooses by the folder's name, and knows neither Llama 3 nor Qwen."""
    if not target.startswith(("llava.serve.cli", "llava.eval.")):
        return []
    parser = argparse.ArgumentParser(prog=target, add_help=False, allow_abbrev=False)
    for flag in ("--conv-mode", "--model-path", "--model-base"):
        parser.add_argument(flag)
    given = parser.parse_known_args(arguments)[0]
    if given.conv_mode is not None or given.model_path is None:
        return []
    name = find_conversation(given.model_path, given.model_base)
    return ["--conv-mode", name] if name in TEMPLATES else []


def prepare() -> None:
    """Check what upstream would hide or trip over, and let it run without CUDA. Raises the real error."""
    from .compat import cpu, imports, versions

    versions.check_transformers()
    cpu.install()
    cpu.prepare_deepspeed()
    try:
        imports.import_language_model()
    except ImportError as error:
        if error.name == "llava" and isinstance(error, ModuleNotFoundError):
            raise ModuleNotFoundError(
                "upstream LLaVA is not installed here. Install it without its pins: "
                "`pip install --no-deps llava-torch==1.2.2.post1` and `pip install 'llava-clipmoe[llava]'`; or run "
                "this in your LLaVA checkout. (The package called `llava` on the index is another project.)",
                name="llava",
            ) from error
        raise imports.real_error(error) from error


def _fail(error: Exception) -> int:
    print(f"error: {error}\n({type(error).__name__}; {DEBUG}=1 shows the whole trace)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
