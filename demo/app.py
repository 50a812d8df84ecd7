"""A page that puts the answers of two LLaVAs beside each other.

    llava-clipmoe demo                                             # the two of `make llava-quickstart`
    llava-clipmoe demo --left DIR --right DIR --pairs FOLDER       # any two LLaVA directories, your own mined pairs
    llava-clipmoe demo --language-model LLM --left STAGE1 --right STAGE1     # one language model, two vision towers

It listens on this machine only. Votes and scores are kept in --output-dir.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from .llava.settings import Generation, Models, check_models
from .mining.pairs import read_pairs
from .uploads import Limits, Uploads

if TYPE_CHECKING:
    import gradio as gr

    from .session import Demo

# Imported inside functions: Gradio, which reads the environment then, and transformers, so that --help answers at once.


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

    @property
    def served(self) -> Path:
        """What the page shows as files: the pictures that Gradio writes, and those uploaded."""
        return (self.output_dir / "served").resolve()


def main(argv: list[str] | None = None) -> int:
    """Load both LLaVAs and serve the page until Ctrl-C; -> 0."""
    settings = tyro.cli(Settings, args=argv, prog="llava-clipmoe demo", description=__doc__)
    os.environ.update(environment(settings))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console()
    page = launch(prepare(settings, console), settings)
    console.print(f"The page is at {page.local_url}  (Ctrl-C ends it)", soft_wrap=True)
    page.block_thread()
    return 0


def environment(settings: Settings) -> dict[str, str]:
    """What Gradio reads from the environment, when it is imported and later."""
    return {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",  # it would keep visitors' pictures in their browsers, or on a hub
        "GRADIO_TEMP_DIR": str(settings.served),
    }


def prepare(settings: Settings, console: Console) -> Demo:
    """Everything that comes before the page: pairs, models. Raises FileNotFoundError or ValueError for what is missing,
    before anything is loaded."""
    from .llava.load import load_llavas, prepare_upstream
    from .mining.quickstart import quickstart_pairs, told_apart
    from .session import Demo

    check_models(settings.models)
    left, right = settings.models.left, settings.models.right
    folder = settings.pairs or quickstart_pairs(left, right, settings.output_dir / "pairs")
    pairs = read_pairs(folder) if folder else []
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    prepare_upstream()
    console.print("loading both models ...")
    llavas = load_llavas(settings.models, console.print)
    uploads = Uploads(settings.served, settings.upload_limits)
    told = () if settings.pairs else told_apart(left, right)
    return Demo(llavas, pairs, settings.output_dir, uploads, settings.generation, told)


def build_page(demo: Demo) -> gr.Blocks:
    """The whole page."""
    import gradio as gr

    from .page import compare, look, pairs, scores, vote

    title, seconds = "llava-clipmoe: what CLIP cannot see", (3600, 86400)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=seconds) as page:
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
                pairs.build(demo, compared, tabs, page)
            with gr.Tab("Scores", id="scores"):
                scores.build(demo)
        opening = partial(compare.show, demo, None, demo.opening)
        page.load(opening, None, compared.show_outputs, show_progress="hidden")
    return page


def launch(demo: Demo, settings: Settings) -> gr.Blocks:
    """Start serving the page, in threads, in a process that has `environment`; -> the page."""
    import gradio as gr

    from .same_origin import middleware

    page = build_page(demo)
    page.queue(max_size=64, default_concurrency_limit=8, api_open=False)
    page.launch(
        server_name=settings.host,
        server_port=settings.port,
        share=False,
        strict_cors=True,
        inbrowser=settings.open_browser,
        max_file_size=settings.upload_limits.max_bytes,
        # same_origin.py serves the files; should it ever let Gradio do so, then these alone. (Not []: Gradio would take
        # the environment's then.)
        allowed_paths=[str(settings.served)],
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        quiet=True,
        prevent_thread_lock=True,
        app_kwargs={"middleware": middleware(settings.host, demo.uploads)},
        # The system's fonts: the theme's own lack their bold on a machine without network.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css_paths=[Path(__file__).parent / "page" / "style.css"],
    )
    return page
