"""The command `llava-clipmoe evaluate`.

llava-clipmoe evaluate runs/quickstart/clip-moe retrieval --data openmoji
llava-clipmoe evaluate openai/clip-vit-large-patch14-336 my-clip-moe mmvp --data MMVP_VLM --output mmvp.json
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.files import write_json
from llava_clipmoe.load import load_bundle
from llava_clipmoe.transformer_clipmoe import only_expert

from ..config import DataConfig
from ..data.decode import BadImage
from ..data.pairs import DataError, PairSource
from ..progress import Bar
from . import benchmarks, composition, mmvp, retrieval, routing, zero_shot
from .classes import PRESETS, open_classes
from .judge import ACCURACIES, COMPOSITION
from .options import EncodingOptions, SourceOptions


@dataclass(frozen=True)
class _Task(EncodingOptions):
    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """What is measured, side by side: directories of a CLIP-MoE or a CLIP, hub ids, or an open_clip name (with
    --checkpoint)."""
    data: str
    """What to measure on; see above."""
    output: Path | None = None
    """Also write the results there, as JSON in the format of a run's results.json."""
    checkpoint: Path | None = None
    """Weights for an open_clip model name (one model only)."""
    quick_gelu: bool | None = None
    """Override the activation of an open_clip model: OpenAI's weights want quick_gelu."""
    num_experts_per_tok: int | None = None
    """Experts a token uses, in the place of the number that the model says (1 to its number of experts)."""

    def named_models(self) -> Iterator[tuple[str, ClipBundle]]:
        """(name, bundle) of every model, one in memory at a time."""
        names = [Path(model).name for model in self.models]
        for model, name in zip(self.models, names, strict=True):
            bundle = load_bundle(
                model,
                checkpoint=self.checkpoint,
                quick_gelu=self.quick_gelu,
                num_experts_per_tok=self.num_experts_per_tok,
            )
            yield name if names.count(name) == 1 else model, bundle


@dataclass(frozen=True)
class _Scored(_Task):
    experts: bool = False
    """Also measure each expert of a CLIP-MoE alone."""

    def each(self, measure: Callable[[str, ClipBundle], dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """What `measure` gives for every model and, before a CLIP-MoE, for each of its experts, by their names."""
        found = {}
        for name, bundle in self.named_models():
            config = bundle.model.config
            for expert in range(config.num_experts) if self.experts and not config.is_dense else ():
                with only_expert(bundle.model, expert):
                    found[f"{name} expert{expert}"] = measure(f"{name} expert{expert}", bundle)
            found[name] = measure(name, bundle)
        return found


@dataclass(frozen=True)
class _FromSource(SourceOptions):
    split: str | None = None
    """Split to read, where the source has several. Held-out images of openmoji when absent."""
    limit: int | None = None
    """Use only the first N images."""

    def open(self, data: str) -> PairSource:
        split = self.split or ("heldout" if data == "openmoji" else DataConfig.split)
        return self.open_source(DataConfig(source=data, split=split, limit=self.limit))


@dataclass(frozen=True)
class Retrieval(_FromSource, _Scored):
    """Recall@1/5/10 from images to captions and from captions to images.

    --data is any image-caption source (a CSV/TSV/JSON/JSONL/parquet file, a folder, tar shards, a hub data set,
    `openmoji`), or with --preset the folder of a benchmark's official files.

    Example: llava-clipmoe evaluate my-clip-moe retrieval --preset coco-5k --data /data/coco
    """

    preset: Literal[tuple(benchmarks.PRESETS)] | None = None
    """coco-5k: val2017/ and annotations/captions_val2017.json, or val2014/ and dataset_coco.json. flickr30k: all 31
    thousand images, results_20130124.token, results.csv or dataset_flickr30k.json, and flickr30k-images/. urban1k:
    image/ and caption/. iiw, iiw-400: ImageInWords' PART/data.jsonl and its images."""
    captions: Literal["all", "first"] = "all"
    """Captions of an image that count."""

    def run(self) -> dict[str, Any]:
        if self.preset is None:
            source = self.open(self.data)
            rows = self.readable_rows(source, self.workers)
        else:
            source, rows = benchmarks.PRESETS[self.preset](self.data), None
        settings = {"rows": rows, "captions": self.captions, "workers": self.workers, **self.encoding}

        def measure(name: str, bundle: ClipBundle) -> dict[str, Any]:
            bar = Bar(name, None, unit="items")
            return retrieval.evaluate_retrieval(bundle, source, progress=bar, **settings)

        return {"retrieval": {self.preset or Path(self.data).name: self.each(measure)}}


@dataclass(frozen=True)
class ZeroShot(_Scored):
    """Zero-shot classification: top-1, top-5 and the mean of the classes' top-1.

    --data is a folder with one subfolder of images per class (named after it, `_` for a space, or listed in
    classes.txt), or with --preset the folder of a benchmark as its own archive unpacks (of CIFAR the BINARY version).

    Example: llava-clipmoe evaluate my-clip-moe zero-shot --preset imagenet --data /data/imagenet
    """

    preset: Literal[tuple(PRESETS)] | None = None
    """The data set whose files --data holds; a folder of classes when absent."""
    templates: Literal["openai", "simple"] = "openai"
    """openai: the mean over OpenAI's 80 ImageNet templates. simple: "a photo of a {}." alone."""

    def run(self) -> dict[str, Any]:
        data = open_classes(self.preset, self.data)
        templates = None if self.templates == "openai" else ("a photo of a {}.",)
        settings = {"templates": templates, "workers": self.workers, **self.encoding}

        def measure(name: str, bundle: ClipBundle) -> dict[str, Any]:
            bar = Bar(name, len(data.labels))
            return zero_shot.evaluate_zero_shot(bundle, data, progress=bar, **settings)

        return {"zero_shot": {self.preset or Path(self.data).name: self.each(measure)}}


@dataclass(frozen=True, kw_only=True)
class Composition(_Scored):
    """Captions that differ little: SugarCrepe (a right and a wrong one of each image; chance 50) and Winoground (two
    images, two captions of the same words; chance 25 a way, 16.7 for both).

    --data is a folder in the layout of the preset.

    Example: llava-clipmoe evaluate my-clip-moe composition --preset sugarcrepe --data /data/sugarcrepe
    """

    preset: Literal[tuple(composition.PRESETS)]
    """sugarcrepe: its seven JSON files (also in data/) and COCO's val2017/. winoground: examples.jsonl and images/
    (also in data/)."""

    def run(self) -> dict[str, Any]:
        def measure(name: str, bundle: ClipBundle) -> dict[str, Any]:
            return composition.evaluate_composition(
                bundle, self.preset, self.data, workers=self.workers, **self.encoding
            )

        return {"composition": {self.preset: self.each(measure)}}


@dataclass(frozen=True)
class Mmvp(_Scored):
    """Pairs of images that differ in one attribute (MMVP-VLM).

    A pair counts when both of its images are matched right; chance is 25%. --data is a folder with Questions.csv and
    `MLLM_VLM Images` or `MMVP_VLM_Images`, or `openmoji`.

    Example: llava-clipmoe evaluate my-clip-moe mmvp --data /data/MMVP_VLM
    """

    prompt: str | None = None
    """What stands before each statement."""
    split: str | None = None
    """Only pairs whose two rows have this in the column `split`."""
    experts: bool = True
    """Also measure each expert of a CLIP-MoE alone."""

    def run(self) -> dict[str, Any]:
        def measure(_: str, bundle: ClipBundle) -> dict[str, Any]:
            return mmvp.evaluate_mmvp(bundle, self.data, self.prompt, split=self.split, **self.encoding)

        return {"attributes": self.each(measure)}


@dataclass(frozen=True)
class Routing(_FromSource, _Task):
    """Which experts the tokens of a CLIP-MoE use, block by block; with --initial how far training moved its routers.

    --data is any image-caption source, as for retrieval. One model.

    Example: llava-clipmoe evaluate my-clip-moe routing --data openmoji
    """

    images: int = 256
    """Images (and their first captions) to look at."""
    initial: Path | None = None
    """The same model before its routers were trained."""

    def run(self) -> dict[str, Any]:
        source, sample = self.open(self.data), {"images": self.images, **self.encoding}
        ((_, bundle),) = self.named_models()
        found: dict[str, Any] = {"routing": routing.evaluate_routing(bundle, source, **sample)}
        if self.initial is not None:
            initial = load_bundle(self.initial).model.state_dict()
            found["router_movement"] = routing.router_movement(initial, bundle, source, **sample)
        return found


# --- tables ---------------------------------------------------------------------------------------------------------


def tables(results: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Results as titled rich tables, in percent."""
    for dataset, variants in results.get("retrieval", {}).items():
        sizes = next(iter(variants.values()))
        counted = f"{sizes['images']:,} images, {sizes['captions']:,} captions"
        yield f"Recall on {dataset} in %: image to text, text to image ({counted})", _scores(variants, RECALLS)
    for dataset, variants in results.get("zero_shot", {}).items():
        sizes = next(iter(variants.values()))
        counted = f"{sizes['images']:,} images, {sizes['classes']:,} classes"
        yield f"Zero-shot on {dataset} in % ({counted})", _scores(variants, ACCURACIES)
    for dataset, variants in results.get("composition", {}).items():
        yield f"Captions that differ little, {dataset}, right in % (number)", _right_pairs(variants)
    if variants := results.get("attributes"):
        yield "Right pairs in % (number of pairs; chance 25)", _right_pairs(variants)
    if shares := results.get("routing"):
        for tower in filter(shares.get, routing.TOWERS):
            rows = {f"block {n}": row for n, row in zip(shares[f"{tower}_blocks"], shares[tower], strict=True)}
            experts = [f"expert {expert}" for expert in range(len(shares[tower][0]))]
            yield f"First choices of {shares[f'{tower}_tokens']:,} {tower} tokens in %", _table(rows, experts)
    if moved := results.get("router_movement"):
        rows = {row["block"]: [row["relative_change"], row["changed_top1"]] for row in moved}
        yield "Router training in %", _table(rows, ["change of the weights", "tokens with another first choice"])


RECALLS = {f"{way.lower()}_r{k}": f"{way} R@{k}" for way in ("I2T", "T2I") for k in retrieval.RANKS}


def _scores(variants: Mapping[str, dict], columns: Mapping[str, str]) -> Table:
    """A row for every variant. columns: key of a score -> title."""
    rows = {name: [scores[key] for key in columns] for name, scores in variants.items()}
    return _table(rows, columns.values())


def _right_pairs(variants: Mapping[str, dict]) -> Table:
    """A row for every type of pairs, and for Winoground's two scores; a column for every variant."""
    first, rows = next(iter(variants.values())), {}
    for kind, counted in first["by_type"].items():
        rows[f"{kind} ({counted['pairs']})"] = [each["by_type"][kind]["accuracy"] for each in variants.values()]
    rows[f"all ({first['pairs']})"] = [each["overall"] for each in variants.values()]
    for key in ("text", "image"):
        if key in first:
            rows[COMPOSITION[key]] = [each[key] for each in variants.values()]
    return _table(rows, variants)


def _table(rows: Mapping[str, list[float]], columns: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for label, shares in rows.items():
        table.add_row(label, *(f"{100 * share:.1f}" for share in shares))
    return table


# --- the command ----------------------------------------------------------------------------------------------------

TASKS = {"retrieval": Retrieval, "zero-shot": ZeroShot, "composition": Composition, "mmvp": Mmvp, "routing": Routing}
USAGE = """\
usage: llava-clipmoe evaluate MODEL [MODEL ...] TASK --data DATA [--output FILE]

Measures CLIP and CLIP-MoE models, several side by side. MODEL is a directory, a hub id, or the name of
an open_clip model with --checkpoint. TASK is one of:
"""


def overview() -> str:
    """What `llava-clipmoe evaluate --help` says before a task is named."""
    tasks = [f"  {name:<12}{inspect.getdoc(task).splitlines()[0]}" for name, task in TASKS.items()]
    more = "`llava-clipmoe evaluate TASK --help` explains a task, its data and its settings."
    return "\n".join([USAGE, *tasks, "", more])


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


def _check(task: _Task) -> None:
    if not task.models:
        raise ValueError("name at least one model: llava-clipmoe evaluate MODEL TASK --data DATA")
    if len(task.models) > 1 and (task.checkpoint is not None or isinstance(task, Routing)):
        what = "--checkpoint belongs to one model" if task.checkpoint is not None else "routing looks at one model"
        raise ValueError(f"{what}, but {len(task.models)} were given: {', '.join(task.models)}. Evaluate them in turn.")


def main(argv: list[str]) -> int:
    """Run one evaluation, print its tables and write its JSON; -> 0. Raises ValueError or OSError that a user can
    mend; SystemExit for --help and flags that do not exist."""
    name, rest = _split(argv)
    if name is None:
        print(overview())
        return 0
    kind = TASKS[name]
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
