"""The command `llava-clipmoe train-encoder RECIPE [--field value ...] --output-dir runs/NAME`.

    llava-clipmoe train-encoder dmu-openmoji --output-dir runs/quickstart      (minutes, 2 cores)
    torchrun --nproc-per-node 8 -m llava_clipmoe.cli train-encoder dmu-vitl14-336-sharegpt4v --output-dir runs/paper

    base -> the method's trainings (methods/dmu.py: stages, upcycling, routers) -> evaluate -> report

Every piece is kept in the run's directory as soon as it is whole; the same command again goes on where it stopped.
"""

from __future__ import annotations

import tyro
from rich.console import Console

from llava_clipmoe.model_card import write_renewed_card

from .evaluate.run import evaluate_run
from .methods import METHODS
from .recipes import RECIPES
from .report.run import summary_table, write_report
from .training.memory import keep_freed_memory
from .training.run import Run, make_accelerator


def main(argv: list[str]) -> int:
    """Train, measure and report one run, by the method of its settings; -> 0."""
    config = tyro.extras.overridable_config_cli(
        RECIPES, args=argv, prog="llava-clipmoe train-encoder", description=__doc__, use_underscores=False
    )
    if config.output_dir is None:
        raise ValueError("say where the run is kept: --output-dir runs/NAME (the same command again resumes it).")
    if config.method not in METHODS:
        raise ValueError(f"there is no method {config.method!r}; there are: {', '.join(METHODS)}.")
    METHODS[config.method].check_packages()
    accelerator = make_accelerator(config)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    run = Run(config, accelerator)
    method = METHODS[config.method](run)
    run.read_data()
    method.check_settings()
    run.make_base()
    method.result = method.make()
    for name in run.folder.trainings():  # left by a process that was killed after it had saved the result
        run.discard(name)
    if accelerator.is_main_process:
        results = evaluate_run(run, method.variants(), method.final, method.describe)
        page = write_report(run.folder.path)
        write_renewed_card(method.output_folder, method.result.model.config)
        console = Console()
        if not console.is_terminal:  # a log has no width: never cut a variant's name
            console = Console(width=160)
        console.print(summary_table(results))
        console.print(f"report: {page}\nmodel:  {method.output_folder}", highlight=False, soft_wrap=True)
    accelerator.wait_for_everyone()
    run.metrics.close()
    return 0
