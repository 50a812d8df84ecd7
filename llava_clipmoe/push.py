"""A model directory, or an exported LLaVA, onto the hub with a card that says what it is: `llava-clipmoe push`.

What goes up is what such a directory consists of; whatever else lies in the folder stays. The card is renewed on the
way: it loads from HUB_ID, and says the licence that was given. The directory itself is not changed.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from .export_files import REMOTE_CODE
from .export_tiles import MODEL_TYPES
from .files import load_shapes, read_json, weight_files
from .model_card import CARD, placed_card, renewed_card
from .model_directory import MODELING_FILES, check_shapes, read_config
from .tokenizer import has_tokenizer
from .update import PREPROCESSOR, outdated

_PARTS = (
    *("config.json", PREPROCESSOR, "processor_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("LICENSE*", "compress.json", "compress.html", *MODELING_FILES),
    *("generation_config.json", "chat_template.jinja", "tokenizer.model", REMOTE_CODE),  # of an exported LLaVA
)
_KINDS = (("clip", "clip_moe"), tuple(MODEL_TYPES.values()))
"""`model_type`s that may stand in the place of each other on the hub."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class Upload:
    """What goes up: `files` of the directory as they are, and the `card`; `left` stays."""

    directory: Path
    files: list[Path]
    card: str
    left: list[Path]


def plan(directory: Path, hub_id: str, license: str | None = None) -> Upload:
    """What `push` would upload. Asks nobody but this machine.

    Raises FileNotFoundError or ValueError for what is no whole model directory, or an outdated one.
    """
    if not _HUB_ID.fullmatch(hub_id):
        raise ValueError(f"{hub_id!r} is no hub id: give ORG/NAME, your account or organisation and the model's name.")
    if license is not None and not _LICENSE.fullmatch(license):
        raise ValueError(f"{license!r} is no licence of the hub: give its short name, for instance apache-2.0 or mit.")
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no directory: give the model directory to upload.")
    card = (_check_llava if _is_exported_llava(directory) else _check_model)(directory, hub_id, license)
    entries = sorted(file for file in directory.iterdir() if file.name != CARD)
    files = [file for file in entries if file.is_file() and any(fnmatch(file.name, part) for part in _PARTS)]
    return Upload(directory, files, card, [file for file in entries if file not in files])


def _check_model(directory: Path, hub_id: str, license: str | None) -> str:
    """Of a CLIP's or CLIP-MoE's directory; -> its card. Raises what `plan` raises."""
    config = read_config(directory)
    _check_files(directory, has_tokenizer(directory))
    check_shapes(config, load_shapes(directory), str(directory))
    if not config.is_dense:  # beside a dense one there is no code of ours
        _refuse_outdated(directory)
    return renewed_card(directory, config, hub_id, license)


def _check_llava(directory: Path, hub_id: str, license: str | None) -> str:
    """Of what export-hf wrote; -> its card. Raises what `plan` raises."""
    _check_files(directory, (directory / "tokenizer.json").is_file())
    if (directory / REMOTE_CODE).is_file():  # with a dense tower there is no code of ours
        _refuse_outdated(directory)
    return placed_card(directory, hub_id, license)


def _check_files(directory: Path, has_tokenizer: bool) -> None:
    if not has_tokenizer or not (directory / PREPROCESSOR).is_file():
        raise FileNotFoundError(f"{directory} has no tokenizer or no {PREPROCESSOR}: others could not use it.")
    if any(file.suffix == ".bin" for file in weight_files(directory)):
        raise ValueError(f"{directory} has pickled weights. Write it anew first: llava-clipmoe convert {directory} OUT")


def _is_exported_llava(directory: Path) -> bool:
    """Whether `export-hf` wrote it. Upstream's own directories have no processor."""
    config = directory / "config.json"
    named = config.is_file() and read_json(config).get("model_type") in MODEL_TYPES.values()
    return named and (directory / "processor_config.json").is_file()


def _refuse_outdated(directory: Path) -> None:
    """Raise ValueError where the code beside the weights is another version's."""
    old = [file for file in outdated(directory) if file != CARD]
    if old:
        raise ValueError(
            f"{directory} was written by another version of llava-clipmoe ({', '.join(old[:3])}"
            f"{' ...' if len(old) > 3 else ''}). Bring it up to date first:\n    llava-clipmoe update {directory}"
        )


def push(upload: Upload, hub_id: str, *, private: bool = False) -> str:
    """Upload in one commit, the repository made where there is none; -> the commit's address.

    Raises ValueError where HUB_ID holds another kind of model, OSError where the hub does not answer or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(file.name, file) for file in upload.files]
    operations.append(CommitOperationAdd(CARD, upload.card.encode()))
    api = HfApi()
    with _hub_errors(hub_id):
        api.create_repo(hub_id, private=private, exist_ok=True)
        _refuse_other_models(api, hub_id, read_json(upload.directory / "config.json")["model_type"])
        return api.create_commit(hub_id, operations, commit_message="Upload with llava-clipmoe").commit_url


def _refuse_other_models(api: Any, hub_id: str, own: str) -> None:
    """Raise ValueError where a model of another kind than `own` stands at `hub_id`: both's files would be mixed."""
    if not api.file_exists(hub_id, "config.json"):
        return
    found = read_json(api.hf_hub_download(hub_id, "config.json")).get("model_type")
    if not any(found in kinds and own in kinds for kinds in _KINDS):
        raise ValueError(f"{hub_id} holds another model already (model_type {found!r}). Choose another name.")


@contextlib.contextmanager
def _hub_errors(hub_id: str):
    """Turn what the hub and the connection refuse into one OSError that says what to do."""
    from huggingface_hub.utils import HfHubHTTPError

    try:
        yield
    # A connection that fails raises what the HTTP library of the hub's client raises, and that library has changed.
    except (OSError, *HfHubHTTPError.__bases__) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise OSError(
            f"uploading to {hub_id} failed: {reason} Check the connection, and that you are logged in (hf auth login) "
            "with a token that may write there; the same command again goes on."
        ) from error


@dataclass
class Push:
    """Upload a model directory, or what export-hf wrote of a LLaVA, to the hub, with a model card.

    Example: llava-clipmoe push runs/quickstart/clip-moe ORG/NAME --dry-run
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """A model directory: what a run, `convert` or `compress` wrote; or an exported LLaVA."""
    hub_id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="HUB_ID")]
    """ORG/NAME on the hub. Made where it does not exist."""
    license: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The licence that you give the weights, as the hub names it (apache-2.0, mit, cc-by-nc-4.0, ...)."""
    private: bool = False
    """A repository that is made now is private."""
    dry_run: bool = False
    """Print what would go up, and the card; upload nothing."""


def main(argv: list[str]) -> int:
    """`llava-clipmoe push DIR HUB_ID`."""
    args = tyro.cli(Push, args=argv, prog="llava-clipmoe push")
    upload = plan(args.directory, args.hub_id, args.license)
    print_plan(upload, args.hub_id)
    if args.dry_run:
        print(f"\n{CARD}:\n\n{upload.card}\nNothing was uploaded (--dry-run).")
        return 0
    print(f"uploaded: {push(upload, args.hub_id, private=args.private)}")
    return 0


def print_plan(upload: Upload, hub_id: str) -> None:
    """What goes up, and what stays."""
    table = Table("file", "bytes", box=None)
    table.columns[1].justify = "right"
    for file in upload.files:
        table.add_row(file.name, f"{file.stat().st_size:,}")
    table.add_row(CARD, f"{len(upload.card.encode()):,}")
    print(f"{upload.directory} -> {hub_id}")
    Console().print(table)
    if upload.left:
        print(f"stays here: {', '.join(file.name for file in upload.left)}")
