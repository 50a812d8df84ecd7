"""The command `llava-clipmoe evaluate`.

llava-clipmoe evaluate runs/quickstart/clip-moe retrieval --data openmoji
llava-clipmoe evaluate openai/clip-vit-large-patch14-336 my-clip-moe mmvp --data MMVP_VLM --output mmvp.json
"""

from __future__ import annotations

import inspect
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.files import write_json
from llava_clipmoe.load import load_bundle
from llava_clipmoe.transformer_clipmoe import only_expert

from ..config import DataConfig
from ..data.cache import check_images
from ..data.decode import BadImage
from ..data.formats import open_source
from ..data.pairs import DataError, PairSource
from ..openmoji.drawings import build_openmoji
from ..progress import Bar
from . import benchmarks, mmvp, retrieval, routing, zero_shot


@dataclass(frozen=True)
class _Common:
    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """What is measured, side by side: directories of a CLIP-MoE or a CLIP, hub ids, or an open_clip name (with
    --checkpoint)."""
    data: str
    """What to measure on; see above."""
    output: Path | None = None
    """Also write the results there, as JSON in the format of a run's results.json."""
    device: str = "auto"
    """auto (the GPU where there is one), cpu, cuda, cuda:1, ..."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """bf16 is faster on a GPU and may move a result by a tenth of a point."""
    batch_size: int = 64
    workers: int = 4
    """Processes that decode images; 0 does it in this one."""
    checkpoint: Path | None = None
    """Weights for an open_clip model name (one model only)."""
    quick_gelu: bool | None = None
    """Override the activation of an open_clip model: OpenAI's weights want quick_gelu."""
    num_experts_per_tok: int | None = None
    """Experts a token uses, in the place of the number that the model says (1 to its number of experts)."""

    def settings(self) -> dict[str, Any]:
        return {"device": self.device, "precision": self.precision, "batch_size": self.batch_size}


@dataclass(frozen=True)
class _Rows:
    split: str | None = None
    """Split to read, where the source has several. Held-out images of openmoji when absent."""
    image_root: Path | None = None
    """Folder that relative image paths start from; the data file's own folder when absent."""
    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    limit: int | None = None
    """Use only the first N images."""
    max_bad_fraction: float = 0.01
    """Stop with an error when more than this share of the images is missing or corrupt."""

    def source(self, data: str) -> PairSource:
        split = self.split or ("heldout" if data == "openmoji" else DataConfig().split)
        return open_source(
            DataConfig(
                source=data,
                split=split,
                image_root=self.image_root,
                image_column=self.image_column,
                caption_columns=self.caption_columns,
                limit=self.limit,
                max_bad_fraction=self.max_bad_fraction,
            )
        )

    def good_rows(self, source: PairSource, workers: int) -> np.ndarray:
        """Rows whose image can be read; the list of the others is kept in a temporary folder that a warning names."""
        skipped = Path(tempfile.mkdtemp(prefix="evaluate-")) / "skipped.jsonl"
        with Bar("checking images", len(source)) as bar:
            good = check_images(
                source,
                workers=workers,
                max_bad_fraction=self.max_bad_fraction,
                skipped_path=skipped,
                progress=lambda done, _: bar.advance(done - bar.done),
            )
        if good.all():
            shutil.rmtree(skipped.parent)
        return np.flatnonzero(good)


@dataclass(frozen=True)
class Retrieval(_Rows, _Common):
    """Recall@1/5/10 from images to captions and from captions to images.

    --data is any image-caption source (a CSV/TSV/JSON/JSONL/parquet file, a folder, tar shards, a hub data set,
    `openmoji`), or with --preset the folder of a benchmark's official files.

    Example: llava-clipmoe evaluate my-clip-moe retrieval --preset coco-5k --data /data/coco
    """

    preset: Literal["coco-5k", "flickr30k"] | None = None
    """coco-5k: val2017/ and annotations/captions_val2017.json, or val2014/ and dataset_coco.json. flickr30k: all 31
    thousand images, results_20130124.token, results.csv or dataset_flickr30k.json, and flickr30k-images/."""
    captions: Literal["all", "first"] = "all"
    """Captions of an image that count."""
    experts: bool = False
    """Also measure each expert of a CLIP-MoE alone."""

    def run(self) -> dict[str, Any]:
        source = self.source(self.data) if self.preset is None else benchmarks.PRESETS[self.preset](self.data)
        rows = self.good_rows(source, self.workers) if self.preset is None else None
        found = {}
        for name, bundle in _variants(self, self.experts):
            found[name] = retrieval.evaluate_retrieval(
                bundle,
                source,
                rows=rows,
                captions=self.captions,
                workers=self.workers,
                progress=Bar(name, None, unit="items"),
                **self.settings(),
            )
        return {"retrieval": {self.preset or Path(self.data).name: found}}


@dataclass(frozen=True)
class ZeroShot(_Common):
    """Zero-shot classification: top-1, top-5 and the mean of the classes' top-1.

    --data is a folder with one subfolder of images per class (named after it, `_` for a space, or listed in
    classes.txt), or with --preset the folder of ImageNet's val set or of the BINARY version of CIFAR.

    Example: llava-clipmoe evaluate my-clip-moe zero-shot --preset imagenet --data /data/imagenet
    """

    preset: Literal["imagenet", "cifar10", "cifar100"] | None = None
    templates: Literal["openai", "simple"] = "openai"
    """openai: the mean over OpenAI's 80 ImageNet templates. simple: "a photo of a {}." alone."""
    experts: bool = False
    """Also measure each expert of a CLIP-MoE alone."""

    def run(self) -> dict[str, Any]:
        data = zero_shot.open_classes(self.preset, self.data)
        templates = None if self.templates == "openai" else ("a photo of a {}.",)
        found = {}
        for name, bundle in _variants(self, self.experts):
            found[name] = zero_shot.evaluate_zero_shot(
                bundle,
                data,
                templates=templates,
                workers=self.workers,
                progress=Bar(name, len(data.labels)),
                **self.settings(),
            )
        return {"zero_shot": {self.preset or Path(self.data).name: found}}


@dataclass(frozen=True)
class Mmvp(_Common):
    """Pairs of images that differ in one attribute (MMVP-VLM): a pair counts when both images are matched right.

    --data is a folder with Questions.csv and `MLLM_VLM Images` or `MMVP_VLM_Images`, or `openmoji`. Chance is 25%.

    Example: llava-clipmoe evaluate my-clip-moe mmvp --data /data/MMVP_VLM
    """

    prompt: str = mmvp.PROMPT
    """What stands before each statement."""
    split: str | None = None
    """Only pairs whose two rows have this in the column `split`."""
    experts: bool = True
    """Also measure each expert of a CLIP-MoE alone."""

    def run(self) -> dict[str, Any]:
        folder = Path(self.data)
        if self.data == "openmoji":
            folder = build_openmoji() / "attribute_pairs"
        found = {}
        for name, bundle in _variants(self, experts=False):
            if self.experts and not bundle.model.config.is_dense:
                each = mmvp.evaluate_experts(bundle, folder, self.prompt, split=self.split, **self.settings())
                found.update({_variant_name(name, variant): result for variant, result in each.items()})
            else:
                found[name] = mmvp.evaluate_mmvp(bundle, folder, self.prompt, split=self.split, **self.settings())
        return {"attributes": found}


@dataclass(frozen=True)
class Routing(_Rows, _Common):
    """Which experts the tokens of a CLIP-MoE use, block by block; with --initial how far training moved its routers.

    --data is any image-caption source, as for retrieval. One model.

    Example: llava-clipmoe evaluate my-clip-moe routing --data openmoji
    """

    images: int = 256
    """Images (and their first captions) to look at."""
    initial: Path | None = None
    """The same model before its routers were trained."""

    def run(self) -> dict[str, Any]:
        source = self.source(self.data)
        ((_, bundle),) = _variants(self, experts=False)
        sample = {"images": self.images, **self.settings()}
        found: dict[str, Any] = {"routing": routing.evaluate_routing(bundle, source, **sample)}
        if self.initial is not None:
            initial = load_bundle(self.initial).model.state_dict()
            found["router_movement"] = routing.router_movement(initial, bundle, source, **sample)
        return found


# --- models ---------------------------------------------------------------------------------------------------------


def _variants(task: _Common, experts: bool) -> Iterator[tuple[str, ClipBundle]]:
    """(name, bundle) of every model, one in memory at a time; a CLIP-MoE's experts, each alone, before itself."""
    names = [Path(model).name for model in task.models]
    for model, short in zip(task.models, names, strict=True):
        bundle = load_bundle(
            model, checkpoint=task.checkpoint, quick_gelu=task.quick_gelu, num_experts_per_tok=task.num_experts_per_tok
        )
        name = short if names.count(short) == 1 else model
        if experts and not bundle.model.config.is_dense:
            for expert in range(bundle.model.config.num_experts):
                with only_expert(bundle.model, expert):
                    yield _variant_name(name, f"expert{expert}"), bundle
        yield name, bundle


def _variant_name(name: str, part: str) -> str:
    return name if part == "clip-moe" else f"{name} {part}"


# --- tables ---------------------------------------------------------------------------------------------------------


RECALLS = {f"{way} R@{k}": f"{way.lower()}_r{k}" for way in ("I2T", "T2I") for k in retrieval.RANKS}
ACCURACIES = {"top-1": "top1", "top-5": "top5", "mean per class": "mean_per_class"}


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def tables(results: dict[str, Any]) -> Iterator[tuple[str, Table]]:
    """Results as titled rich tables, in percent."""
    for dataset, variants in results.get("retrieval", {}).items():
        sizes = next(iter(variants.values()))
        counted = f"{sizes['images']:,} images, {sizes['captions']:,} captions"
        title = f"Recall on {dataset} in %: image to text, text to image ({counted})"
        yield _scores(title, variants, RECALLS)
    for dataset, variants in results.get("zero_shot", {}).items():
        sizes = next(iter(variants.values()))
        title = f"Zero-shot on {dataset} in % ({sizes['images']:,} images, {sizes['classes']:,} classes)"
        yield _scores(title, variants, ACCURACIES)
    if variants := results.get("attributes"):
        yield _right_pairs(variants)
    if shares := results.get("routing"):
        for tower in routing.TOWERS:
            if shares[tower]:
                title = f"First choices of {shares[f'{tower}_tokens']:,} {tower} tokens in %"
                labels = [f"block {number}" for number in shares[f"{tower}_blocks"]]
                experts = [f"expert {expert}" for expert in range(len(shares[tower][0]))]
                yield _table(title, dict(zip(labels, shares[tower], strict=True)), experts)
    if moved := results.get("router_movement"):
        rows = {row["block"]: [row["relative_change"], row["changed_top1"]] for row in moved}
        yield _table("Router training in %", rows, ["change of the weights", "tokens with another first choice"])


def _scores(title: str, variants: dict[str, dict], columns: dict[str, str]) -> tuple[str, Table]:
    """A row for every variant. columns: title -> key of the score."""
    rows = {name: [scores[key] for key in columns.values()] for name, scores in variants.items()}
    return _table(title, rows, columns)


def _right_pairs(variants: dict[str, dict]) -> tuple[str, Table]:
    """A row for every type of pairs, a column for every variant."""
    first, rows = next(iter(variants.values())), {}
    for kind, counted in first["by_type"].items():
        rows[f"{kind} ({counted['pairs']})"] = [each["by_type"][kind]["accuracy"] for each in variants.values()]
    rows[f"all ({first['pairs']})"] = [each["overall"] for each in variants.values()]
    return _table("Right pairs in % (number of pairs; chance 25)", rows, variants)


def _table(title: str, rows: dict[str, list[float]], columns: Iterable[str]) -> tuple[str, Table]:
    table = Table(box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for label, values in rows.items():
        table.add_row(label, *map(_percent, values))
    return title, table


# --- the command ----------------------------------------------------------------------------------------------------

TASKS: dict[str, tuple[Any, str]] = {
    "retrieval": (Retrieval, "recall between images and captions"),
    "zero-shot": (ZeroShot, "ImageNet, CIFAR or a folder of classes"),
    "mmvp": (Mmvp, "pairs of images that differ in one attribute (MMVP-VLM)"),
    "routing": (Routing, "which experts the tokens use, block by block"),
}


def overview() -> str:
    """What `llava-clipmoe evaluate --help` says before a task is named."""
    lines = [
        "usage: llava-clipmoe evaluate MODEL [MODEL ...] TASK --data DATA [--output FILE]",
        "",
        "Measures CLIP and CLIP-MoE models, several side by side. MODEL is a directory, a hub id, or the name of",
        "an open_clip model with --checkpoint. TASK is one of:",
        "",
    ]
    lines += [f"  {name:<11}{about}" for name, (_, about) in TASKS.items()]
    return "\n".join([*lines, "", "`llava-clipmoe evaluate TASK --help` explains a task, its data and its settings."])


def _split(argv: list[str]) -> tuple[str | None, list[str]]:
    """`MODEL TASK --flags`, or `TASK MODEL --flags` -> TASK, the rest. TASK is None where help is asked for without
    one. (A model in a folder called like a task is written ./retrieval.)"""
    flags = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    for position, word in enumerate(argv[:flags]):
        if word in TASKS:
            return word, [*argv[:position], *argv[position + 1 :]]
    if not {"-h", "--help"}.isdisjoint(argv):
        return None, argv
    raise ValueError(
        f"which evaluation? Put {', '.join(TASKS)} after the model: llava-clipmoe evaluate "
        f"{' '.join(argv[:flags]) or 'MODEL'} retrieval --data ..."
    )


def _check(task: Any) -> None:
    if not task.models:
        raise ValueError("name at least one model: llava-clipmoe evaluate MODEL TASK --data DATA")
    if len(task.models) > 1 and (task.checkpoint is not None or isinstance(task, Routing)):
        what = "--checkpoint belongs to one model" if task.checkpoint is not None else "routing looks at one model"
        raise ValueError(f"{what}, but {len(task.models)} were given: {', '.join(task.models)}. Evaluate them in turn.")


def main(argv: list[str] | None = None) -> int:
    """Run one evaluation, print its tables and write its JSON; -> 0. Raises ValueError or OSError that a user can
    mend; SystemExit for --help and flags that do not exist."""
    name, rest = _split(list(sys.argv[1:] if argv is None else argv))
    if name is None:
        print(overview())
        return 0
    kind = TASKS[name][0]
    task = tyro.cli(kind, args=rest, prog=f"llava-clipmoe evaluate {name}", description=inspect.getdoc(kind))
    _check(task)
    try:
        results = task.run()
    except BadImage as error:
        raise DataError(str(error)) from error
    console = Console()
    for title, table in tables(results):
        console.print(title, markup=False, highlight=False)
        console.print(table)
    if task.output is not None:
        write_json(task.output, results)
        console.print(f"written to {task.output}", markup=False, highlight=False)
    return 0
