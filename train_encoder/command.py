"""The command `llava-clipmoe train-encoder RECIPE [--field value ...] --output-dir runs/NAME`.

llava-clipmoe train-encoder dmu-openmoji --output-dir runs/quickstart      (minutes, 2 cores)
torchrun --nproc-per-node 8 -m llava_clipmoe.cli train-encoder dmu-vitl14-336-sharegpt4v --output-dir runs/paper
"""

from __future__ import annotations

import tyro

from .methods import METHODS
from .recipes import RECIPES
from .training.memory import keep_freed_memory
from .training.run import make_accelerator


def main(argv: list[str]) -> int:
    """The command `llava-clipmoe train-encoder RECIPE [--field value ...] --output-dir runs/NAME`."""
    config = tyro.extras.overridable_config_cli(
        RECIPES, args=argv, prog="llava-clipmoe train-encoder", description=__doc__, use_underscores=False
    )
    if config.output_dir is None:
        raise ValueError("say where the run is kept: --output-dir runs/NAME (the same command again resumes it).")
    accelerator = make_accelerator(config)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    METHODS[config.method](config, accelerator).run()
    return 0
