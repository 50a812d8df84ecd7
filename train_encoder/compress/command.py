"""The command `llava-clipmoe compress`: a CLIP-MoE whose experts share one FFN a block and differ by little.

    llava-clipmoe compress clip-moe clip-moe-delta --rank 64
    llava-clipmoe compress clip-moe clip-moe-delta --energy 0.99 --calibration captions.json --check dev.json
    llava-clipmoe compress clip-moe --find --calibration openmoji --check openmoji:heldout \\
        --retrieval dev=openmoji:heldout

OUT is a model directory like any other: LLaVA, evaluation, export and AutoModel read it. compress.json and
compress.html in it say what was kept. Nothing is trained; --calibration only looks at which inputs the experts get, and
cuts the differences where these would feel it least. A SOURCE is anything that --data.source of train-encoder takes,
with `:SPLIT` (train when absent) where it has several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.compression import Decomposed, Moments, compress, second_moments
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig, active_parameters
from llava_clipmoe.files import write_json, write_text
from llava_clipmoe.load import load_bundle
from llava_clipmoe.model_card import public_name
from llava_clipmoe.model_directory import save_bundle
from llava_clipmoe.upcycling import moe_config

from ..compare.cost import vision_macs
from ..config import DataConfig
from ..data.decode import BadImage, normalise
from ..data.formats import parse_source
from ..data.pairs import DataError, PairSource
from ..evaluate.options import EncodingOptions, SourceOptions, readable_images
from ..evaluate.retrieval import evaluate_retrieval
from ..features.encode import inference, pick_device, tokenise
from ..progress import Bar
from .report import Trial, best, make_page, verdict


@dataclass(frozen=True)
class Settings(SourceOptions, EncodingOptions):
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """A CLIP-MoE directory."""
    output: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="OUT")] = None
    """Where the compressed model goes; --find needs none."""
    rank: int | None = None
    """Rank of every difference (rounded up to a multiple of 8). This, --energy or --find."""
    energy: float | None = None
    """Choose each matrix's rank: the smallest that keeps this share of every expert's squared difference, as 0.99."""
    find: bool = False
    """Try ranks 8, 16, 32, ... and print what each keeps; with OUT, write the smallest one that is good enough."""
    calibration: str | None = None
    """SOURCE of training pictures and captions; the cut then weighs directions by how much the experts see of them."""
    check: str | None = None
    """SOURCE to compare features with the full model on; --calibration's when absent. Better one not seen there."""
    retrieval: tuple[str, ...] = ()
    """Measure recall before and after on these, NAME=SOURCE each."""
    images: int = 256
    """Pictures (with all their captions) of --calibration and of --check to use, drawn at random, seeded."""
    cosine: float = 0.999
    """--find: the least mean cosine (0 to 1) with each of the full model's features. Lower it for a lower rank."""
    points: float = 0.2
    """--find: the most that mean recall (R@1 and R@5, both ways) may change, in points. Raise it for a lower rank."""
    workers: int = field(default=0, kw_only=True)
    """Processes that decode images for retrieval; 0 decodes them in this one."""

    def open(self, text: str) -> tuple[str, PairSource]:
        """`[NAME=]SOURCE[:SPLIT]` -> a name without any path, and the source. Raises DataError."""
        name, data = parse_source(text, DataConfig())
        return name if "=" in text else f"{public_name(data.source)}, {data.split}", self.open_source(data)


def main(argv: list[str]) -> int:
    """`llava-clipmoe compress DIR OUT --rank 64`; -> exit status. Raises ValueError or OSError that a user can mend."""
    s = tyro.cli(Settings, args=argv, prog="llava-clipmoe compress", description=__doc__, use_underscores=False)
    bundle = load_bundle(s.model)
    check_settings(s, bundle.model.config)
    try:
        study = Study(s, bundle)
        trials = study.find() if s.find else []
        chosen = best(trials, study.before, s.cosine, s.points)
        made = trial = None
        if s.output is not None and not (s.find and chosen is None):
            rank, calibrated = (chosen.rank, chosen.calibrated) if s.find else (s.rank, study.moments is not None)
            made, trial = study.make(rank, s.energy, calibrated)
    except BadImage as error:
        raise DataError(str(error)) from error
    report, console = study.report(trial, trials), Console(soft_wrap=True)
    for section in make_page(report).sections:
        if section.tables:
            console.print(f"\n{section.markdown()}", markup=False, highlight=False)
    if s.find:
        console.print(f"\n{verdict(report)}", markup=False, highlight=False)
    if made is not None:
        write(s.output, made, study, trial, report)
        console.print(f"\nmodel:  {s.output}\nreport: {s.output / 'compress.html'}", markup=False, highlight=False)
    return 0 if made is not None or s.output is None else 1


def check_settings(s: Settings, config: CLIPMoEConfig) -> None:
    """Refuse at once what would fail after minutes of work. Raises ValueError."""
    if config.is_dense:
        raise ValueError(f"{s.model} is dense: it has no experts to compress. Give a CLIP-MoE directory.")
    if config.vision_config.delta_ranks or config.text_config.delta_ranks:
        raise ValueError(f"the experts of {s.model} are compressed already: start from the model it was made from.")
    if sum((s.rank is not None, s.energy is not None, s.find)) != 1:
        raise ValueError("give one of --rank N, --energy SHARE and --find (which tries ranks).")
    if s.rank is not None and s.rank < 1:
        raise ValueError(f"--rank must be at least 1, got {s.rank}.")
    if s.energy is not None and not 0 < s.energy <= 1:
        raise ValueError(f"--energy lies between 0 and 1 (1: everything), got {s.energy}.")
    if s.images < 1:
        raise ValueError(f"--images must be at least 1, got {s.images}.")
    if s.find and s.check is None and s.calibration is None:
        raise ValueError(
            "--find compares features: say on which pictures, with --check SOURCE or --calibration SOURCE."
        )
    out = s.output
    if out is None:
        if not s.find:
            raise ValueError("where should the compressed model go? llava-clipmoe compress DIR OUT --rank 64")
    elif out.resolve() == Path(s.model).resolve():
        raise ValueError(f"{out} is the model itself; it would be replaced. Choose another OUT.")
    elif out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(  # as save_bundle judges, which looks again
            f"{out} exists and is not a CLIP model directory; it would be replaced as a whole. Choose another OUT."
        )


# ------------------------------------------------------------------------------------------------------- a sample


@dataclass(frozen=True)
class Sample:
    """Pictures uint8 [N,3,R,R], and ids [m,T] of captions of one length a batch: there is no padding to count."""

    name: str
    pixels: torch.Tensor
    ids: list[torch.Tensor]

    def facts(self) -> dict[str, Any]:
        return {"source": self.name, "images": len(self.pixels), "captions": sum(map(len, self.ids))}


def load_sample(s: Settings, text: str, bundle: ClipBundle) -> Sample:
    """`s.images` random pictures of a source and all their captions; bad pictures are left out. Raises DataError."""
    name, source = s.open(text)
    chosen = np.sort(np.random.default_rng(0).permutation(len(source))[: s.images])
    pixels, captions = [], []
    with Bar(f"reading {name}", len(chosen)) as bar:
        for row, image in readable_images(source, chosen, bundle.image_size):
            pixels.append(image)
            captions += source.captions(row)
            bar.advance(1)
    if not pixels:
        raise DataError(
            f"{text}: none of the {len(chosen)} pictures that were tried can be read. Check the source and "
            "--image-root."
        )
    ids, lengths = tokenise(bundle.tokenizer, captions, bundle.context_length)
    batches: list[torch.Tensor] = []
    for length in lengths.unique().tolist():
        batches += ids[lengths == length, :length].split(s.batch_size)
    return Sample(name, torch.stack(pixels), batches)


def features_of(s: Settings, bundle: ClipBundle, sample: Sample, title: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(kind, features) batch by batch: "image" [B,P], "patches" [B,N,C] (hidden state -2 as LLaVA reads it) and "text"
    [B,P]. title: of a progress bar."""
    device, model = pick_device(s.device), bundle.model
    size = len(sample.pixels) + sum(map(len, sample.ids))
    bar = Bar(title, size, unit="items", main=None if title else False)
    with inference(bundle, device, s.precision), bar:
        for pixels in sample.pixels.split(s.batch_size):
            pixels = normalise(pixels.to(device), bundle.image_mean, bundle.image_std)
            out = model.vision_model(pixels, output_hidden_states=True)
            yield "image", model.visual_projection(out.pooler_output).float().cpu()
            yield "patches", out.hidden_states[-2][:, 1:].float().cpu()
            bar.advance(len(pixels))
        for ids in sample.ids:
            yield "text", model.get_text_features(ids.to(device)).float().cpu()
            bar.advance(len(ids))


def cosines(s: Settings, bundle: ClipBundle, sample: Sample, full: list[torch.Tensor]) -> dict[str, dict[str, float]]:
    """kind -> mean and minimum over images (captions) of the cosine with the full model's features, a batch each.

    An image's patches count by their mean.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for (kind, features), expected in zip(features_of(s, bundle, sample), full, strict=True):
        cosine = F.cosine_similarity(features.double(), expected.double(), dim=-1)
        parts.setdefault(kind, []).append(cosine.mean(-1) if kind == "patches" else cosine)
    found = {}
    for kind, batches in parts.items():
        cosine = torch.cat(batches)
        found[kind] = {"mean": cosine.mean().item(), "min": cosine.min().item()}
    return found


# -------------------------------------------------------------------------------------------------------- the work


class Study:
    """The full model, what it is compared on, and what it scores there."""

    def __init__(self, s: Settings, bundle: ClipBundle) -> None:
        self.s, self.bundle, self.config = s, bundle, bundle.model.config
        self.calibration = None if s.calibration is None else load_sample(s, s.calibration, bundle)
        self.sample = self.calibration if s.check is None else load_sample(s, s.check, bundle)
        self.sources = dict(map(s.open, s.retrieval))
        self.rows = {
            name: s.readable_rows(source, s.workers, f"checking {name}") for name, source in self.sources.items()
        }
        self.moments: dict[str, Moments] | None = None
        if self.calibration is not None:
            with second_moments(bundle.model) as self.moments:
                for _ in features_of(s, bundle, self.calibration, "calibrating"):
                    pass
        self.full: list[torch.Tensor] = []
        if self.sample is not None:
            self.full = [found for _, found in features_of(s, bundle, self.sample, "features of the full model")]
        self.before = self.recalls(bundle)

    def recalls(self, bundle: ClipBundle) -> dict[str, dict[str, float]]:
        settings = {"workers": self.s.workers, **self.s.encoding}
        return {
            name: evaluate_retrieval(bundle, source, rows=self.rows[name], **settings)
            for name, source in self.sources.items()
        }

    def make(
        self, rank: int | None, energy: float | None, calibrated: bool, decomposed: Decomposed | None = None
    ) -> tuple[ClipBundle, Trial]:
        """A compressed model, and what it keeps and scores. decomposed: kept from trial to trial, under one bar."""
        blocks = len(self.config.vision_config.moe_layers) + len(self.config.text_config.moe_layers)
        with Bar("compressing", blocks, unit="blocks", main=None if decomposed is None else False) as bar:
            model, kept = compress(
                self.bundle.model,
                rank=rank,
                energy=energy,
                moments=self.moments if calibrated else None,
                decomposed=decomposed,
                progress=lambda done, _: bar.advance(done - bar.done),
            )
        made = dataclasses.replace(self.bundle, model=model)
        return made, Trial(
            rank=rank,
            energy=energy,
            calibrated=calibrated,
            kept=[dataclasses.asdict(one) for one in kept],
            cosine=None if self.sample is None else cosines(self.s, made, self.sample, self.full),
            retrieval=self.recalls(made),
            **_size(model.config),
        )

    def find(self) -> list[Trial]:
        """Every rank, plain and (where there is a calibration) calibrated."""
        towers = [tower for tower in (self.config.vision_config, self.config.text_config) if tower.moe_layers]
        full = max(min(tower.hidden_size, tower.intermediate_size) for tower in towers)
        ranks = [2**power for power in range(3, 20) if 2**power < full] + [full]
        kinds = [False, True] if self.moments is not None else [False]
        trials = []
        with Bar("trying ranks", len(ranks) * len(kinds), unit="models") as bar:
            for calibrated in kinds:
                decomposed: Decomposed = {}  # once for all ranks
                for rank in ranks:
                    trials.append(self.make(rank, None, calibrated, decomposed=decomposed)[1])
                    bar.advance(1, rank=rank)
        return sorted(trials, key=lambda trial: (trial.rank, trial.calibrated))

    def report(self, trial: Trial | None, trials: list[Trial]) -> dict[str, Any]:
        """What compress.json holds; shares are fractions of 1."""
        return {
            "model": self.bundle.name,
            "calibration": self.calibration and self.calibration.facts(),
            "check": self.sample and self.sample.facts(),
            "dense": _size(moe_config(self.config, num_experts=1, fusion_gate=False)),
            "full": {**_size(self.config), "retrieval": self.before},
            "compressed": trial and dataclasses.asdict(trial),
            "find": [dataclasses.asdict(one) for one in trials],
            "limits": {"cosine": self.s.cosine, "points": self.s.points},
        }


def _size(config: CLIPMoEConfig) -> dict[str, Any]:
    return {"parameters": active_parameters(config), "vision_macs": vision_macs(config.vision_config)}


def write(output: Path, bundle: ClipBundle, study: Study, trial: Trial, report: dict[str, Any]) -> None:
    """The model directory, its report beside the weights."""
    kind = "input-weighted" if trial.calibrated else "plain"
    kept = f"{100 * trial.energy_mean:.2f}% on average, at least {100 * trial.energy_min:.2f}%"
    card = {
        "name": output.name,
        "base": study.bundle.name,
        "made from": f"{study.bundle.name}, nothing was trained",
        "experts": f"one FFN a block, and differences to it of rank {trial.ranks} ({kind} truncated SVD)",
        "energy kept of the differences": kept,
    }
    if trial.calibrated:
        card["calibration"] = "{source} ({images} images, {captions} captions)".format(**study.calibration.facts())
    save_bundle(dataclasses.replace(bundle, name=output.name), output, card=card)
    write_json(output / "compress.json", report)
    write_text(output / "compress.html", make_page(report).html())
