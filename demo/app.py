"""The command `llava-clipmoe demo`: a page that puts the answers of two LLaVAs beside each other.

    llava-clipmoe demo                                             # the two of `make llava-quickstart`
    llava-clipmoe demo --left DIR --right DIR --pairs FOLDER       # any two LLaVA directories, your own mined pairs
    llava-clipmoe demo --language-model LLM --left STAGE1 --right STAGE1     # one language model, two eyes

It listens on this machine only. Votes and scores are kept in --output-dir.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from .models import Generation, Models
from .uploads import Limits

TITLE = "llava-clipmoe: what CLIP cannot see"
QUEUE = 64
"""Events that may wait in the page's queue; one more is told that it is full."""


@dataclass(frozen=True)
class Settings:
    models: Annotated[Models, tyro.conf.arg(name="")] = field(default_factory=Models)
    generation: Annotated[Generation, tyro.conf.arg(name="")] = field(default_factory=Generation)
    pairs: Path | None = None
    """Folder of `llava-clipmoe mine-pairs`. Default: the quick start's held-out drawings, mined when first needed."""
    output_dir: Path = Path("runs/demo")
    """Votes (votes.jsonl), scores (scores.json) and the quick start's pairs are kept there."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own shows the page to your network."""
    port: int | None = None
    """Default: the first free one from 7860."""
    open_browser: bool = True
    """Open the page in this machine's browser, where there is one."""
    upload_limits: Limits = field(default_factory=Limits)


def build_page(demo):
    """The whole page as gr.Blocks."""
    import gradio as gr

    from .tabs import compare, gallery, look, score, vote

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:  # seconds
        left, right = demo.names
        gr.Markdown(f"# What CLIP cannot see\n**{left}** and **{right}** as the eye of LLaVA, side by side.")
        with gr.Tabs(selected="compare") as tabs:
            with gr.Tab("Compare", id="compare"):
                compared = compare.build(demo)
            with gr.Tab("Blind vote", id="vote"):
                vote.build(demo)
            with gr.Tab("Look inside", id="look") as tab:
                look.build(demo, compared, tab)
            with gr.Tab("Pairs", id="pairs"):
                gallery.build(demo, compared, tabs, page)
            with gr.Tab("Scores", id="scores"):
                score.build(demo)
        page.load(lambda: compare.show(demo, 0 if demo.pairs else None), None, compared.show_outputs,
                  show_progress="hidden")  # fmt: skip
    return page


def launch(demo, settings: Settings, block: bool = True):
    """Serve the page; -> its gr.Blocks (which `close()` ends) when not blocking."""
    import gradio as gr

    page = build_page(demo)
    page.queue(max_size=QUEUE, default_concurrency_limit=8, api_open=False)
    page.launch(
        server_name=settings.host,
        server_port=settings.port,
        share=False,
        strict_cors=True,
        inbrowser=settings.open_browser,
        max_file_size=settings.upload_limits.max_bytes,
        allowed_paths=[],
        footer_links=[],
        show_error=False,
        ssr_mode=False,
        prevent_thread_lock=not block,
        theme=gr.themes.Default(),
        css_paths=[Path(__file__).with_name("style.css")],
    )
    return page


def main(argv: list[str] | None = None) -> int:
    """Load both LLaVAs and serve the page until Ctrl-C; -> 0."""
    settings = tyro.cli(Settings, args=argv, prog="llava-clipmoe demo", description=__doc__)
    # Before anything of the hub is imported: nothing here asks it unless the user does.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console()
    launch(prepare(settings, console), settings)
    return 0


def prepare(settings: Settings, console: Console):
    """Everything that comes before the page: models, pairs. -> the Demo."""
    from llava_clipmoe import llava_hook
    from llava_clipmoe.run import prepare as prepare_llava

    from .models import check_models, load_eyes
    from .pairs import read_pairs
    from .quickstart import quickstart_pairs

    check_models(settings.models)
    folder = settings.pairs or quickstart_pairs(settings.models, settings.output_dir / "pairs")
    pairs = read_pairs(folder) if folder else []
    llava_hook.install()
    prepare_llava()
    from .context import Demo

    with console.status("loading both models ..."):
        eyes = load_eyes(settings.models, console.print)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    return Demo(eyes, pairs, settings.output_dir, settings.generation, settings.upload_limits)
