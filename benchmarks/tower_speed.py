"""Latency, images/s and peak memory of vision towers as LLaVA runs them, against transformers' dense CLIP tower.

    python benchmarks/tower_speed.py                    (ViT-L/14@336, random weights; the GPU where there is one)
    python benchmarks/tower_speed.py --device cpu --batches 1 8 --dtypes fp32 bf16
    python benchmarks/tower_speed.py --variants "ours MoE, loop" "ours delta"    (only these, beside the references)
    python benchmarks/tower_speed.py --tiny

All towers are ONE model: its experts are a base FFN and random differences of rank `--rank`, so that the delta tower
and the whole experts must agree. The dense tower of transformers runs all its blocks and returns hidden_states[-2],
ours run one block less. Turns go through all variants, so that other work on the machine meets all of them; a ratio is
that of one turn, and the table has their median. Every batch has other pictures. `of peak`: the tower's necessary
operations a second, as a share of what one large matrix product reached in this run.

On a CPU every variant is loaded and run in a PROCESS OF ITS OWN, as LLaVA runs one tower: beside others in one process
the allocator keeps what they freed, and each is faster or slower for its company. Peak memory is that of loading and
all batches, above the libraries'; `off by` is the distance of the features from the masked loop's (those of the two
dense towers from each other). On a GPU ONE PROCESS runs them all. Peak memory is there what torch allocated for the
tower and its batch, or what the tower keeps reserved between two batches where that is more (CUDA graphs do); `off by`
is the distance from the same weights in fp32, run the readable way.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import timing
import torch
import tyro
from tower_runner import WARM, Runner, reference_features
from tower_variants import (
    DENSE,
    DTYPES,
    FULL,
    GROUPED,
    MASKED,
    ON_A_CPU,
    ON_A_GPU,
    TINY,
    fast_path,
    make_directories,
    make_tower,
)

from llava_clipmoe.configuration_clipmoe import CLIPMoEVisionConfig
from llava_clipmoe.model_directory import read_config
from train_encoder.compare.cost import vision_macs

TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 3e-2}
"""Largest |ours - reference| / |reference| (norms). In half precision a token between two experts may go to the other
one."""


@dataclass(frozen=True)
class Settings:
    device: timing.Device = "auto"
    batches: tuple[int, ...] = (1, 8, 32)
    dtypes: tuple[Literal["fp32", "fp16", "bf16"], ...] = ()
    """Default: fp32 and bf16 on a CPU, fp16 and bf16 on a GPU."""
    variants: tuple[str, ...] = ()
    """Only those of these names, or that contain one of these; the references always run. Default: all."""
    processes: Literal["auto", "one", "each"] = "auto"
    """All variants in one process, or each in its own. Default: one on a GPU, each on a CPU."""
    experts: int = 4
    top_k: int = 2
    rank: int = 64
    turns: int = 3
    """On a CPU: processes for each variant and batch size."""
    runs: int = 6
    """Batches that are timed in each turn."""
    tiny: bool = False
    """2 blocks of width 64, one batch of 2: does the program work?"""
    folder: Path | None = None
    """Where the towers are written (8 GB at fp32). Default: a temporary folder."""
    output: Path | None = None
    """Append the tables to this file."""


def variants(s: Settings, known: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Those of `known` that are asked for and that this torch can run."""
    asked = {name for part in s.variants for name in known if (name == part if part in known else part in name)}
    return {
        name: (kind, how)
        for name, (kind, how) in known.items()
        if (GROUPED or "grouped_mm" not in how) and (not s.variants or name in asked | {DENSE, MASKED})
    }


# --------------------------------------------------------------------------------------------------------- operations


def tower_macs(config: CLIPMoEVisionConfig, delta: bool, dense: bool, blocks: int) -> int:
    """Multiply-accumulates that one picture needs in `blocks` blocks of this kind, and for its patches."""
    kind = copy.deepcopy(config)
    kind.num_hidden_layers, kind.moe_layers = blocks, [] if dense else list(range(blocks))
    kind.delta_ranks = [config.delta_ranks[0]] * blocks if delta else None
    return vision_macs(kind)


def necessary_macs(config: CLIPMoEVisionConfig, known: Mapping[str, tuple[str, str]]) -> dict[str, float]:
    """Of one picture in every variant: transformers' tower runs all blocks, ours leave out the last."""
    return {
        name: tower_macs(config, kind == "delta", "dense" in kind, config.num_hidden_layers - (kind != "dense"))
        for name, (kind, _) in known.items()
    }


# --------------------------------------------------------------------------------------------------------- measurement


def random_pixels(shape: dict[str, int], batch: int, dtype: str, device: torch.device) -> torch.Tensor:
    side = shape["image_size"]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device, DTYPES[dtype])


@dataclass(frozen=True)
class Seen:
    """What one turn saw of one variant."""

    seconds: float
    """Median time of a batch."""
    peak: int
    """Bytes."""
    features: np.ndarray
    """[patches, width] of a picture that all variants are shown."""


@dataclass
class Found:
    """What a batch size has shown: who was seen, turn by turn, and of the others why not."""

    seen: dict[str, list[Seen]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    off: dict[str, float] = field(default_factory=dict)


def distance(got: np.ndarray, reference: np.ndarray) -> float:
    """Relative to the reference (norms)."""
    return float(np.linalg.norm(got - reference) / np.linalg.norm(reference))


# -------------------------------------------------------------------------------------------- each in its own process


def alone(
    folder: Path, kind: str, how: str, shape: dict[str, int], batch: int, dtype: str, place: str, runs: int
) -> Seen:
    """Load one variant and run it on `runs` batches; called in a process of its own."""
    device = torch.device(place)
    peak = timing.Peak(device)
    with fast_path(how == "fast"):
        tower = make_tower(folder, kind, how, device)
        pixels = random_pixels(shape, batch, dtype, device)
        features = tower(pixels)[0].float().cpu().numpy()
        # Other pictures each time: experts meet groups of other sizes, and some libraries compile for a size.
        warm = WARM if device.type == "cuda" else 1
        found = timing.interleaved({"tower": lambda: tower(pixels)}, runs, device, warm, before=pixels.normal_)
    return Seen(statistics.median(found["tower"]), peak.bytes(), features)


def check(features: dict[str, np.ndarray], dtype: str) -> dict[str, float]:
    """Each tower's distance from its reference. Raises ValueError for one that is too far.

    The dense towers' reference is transformers', that of the others the masked loop.
    """
    found = {}
    for name, got in features.items():
        found[name] = distance(got, features[DENSE if "dense" in name else MASKED])
        if not found[name] <= TOLERANCE[dtype]:
            raise ValueError(f"{name} is off by {found[name]:.1e} in {dtype} (tolerance {TOLERANCE[dtype]:.0e}).")
    return found


def too_large(how: str, shape: dict[str, int], s: Settings, batch: int, dtype: str, device: torch.device) -> bool:
    """Whether transformers' batched_mm would not fit: it gathers a whole weight matrix for every token and choice."""
    if how != "usual batched_mm":
        return False
    tokens = batch * ((shape["image_size"] // shape["patch_size"]) ** 2 + 1) * s.top_k
    need = tokens * shape["hidden_size"] * shape["intermediate_size"] * DTYPES[dtype].itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    return need > 0.25 * free  # a quarter: it copies them, and other programs want memory too


def each_alone(
    s: Settings, known: Mapping[str, tuple[str, str]], folder: Path, dtype: str, device: torch.device
) -> Iterator[tuple[int, Found]]:
    """Yields a batch size and what it has shown, one after the other; a process for every variant and turn."""
    shape = TINY if s.tiny else FULL
    make_directories(folder, shape, s.experts, s.top_k, s.rank, dtype)
    for batch in (2,) if s.tiny else s.batches:
        fits = {n: v for n, v in known.items() if not too_large(v[1], shape, s, batch, dtype, device)}
        seen: dict[str, list[Seen]] = {name: [] for name in fits}
        for turn in range(s.turns):
            for name in list(fits)[:: -1 if turn % 2 else 1]:  # nothing always comes after the same neighbour
                print(f"{dtype}, batch {batch}, turn {turn + 1} of {s.turns}: {name}", file=sys.stderr, flush=True)
                given = (folder, *fits[name], shape, batch, dtype, str(device), s.runs)
                seen[name].append(timing.in_child(alone, *given))
        off = check({name: turns[0].features for name, turns in seen.items()}, dtype)
        yield batch, Found(seen, {name: timing.DOES_NOT_FIT for name in known if name not in fits}, off)


# ------------------------------------------------------------------------------------------------- all in one process


def all_together(
    s: Settings, known: Mapping[str, tuple[str, str]], folder: Path, dtype: str, device: torch.device
) -> Iterator[tuple[int, Found]]:
    """Yields a batch size and what it has shown, one after the other. One model on disk serves all dtypes."""
    shape, number = TINY if s.tiny else FULL, DTYPES[dtype]
    if not (folder / "moe").exists():
        make_directories(folder, shape, s.experts, s.top_k, s.rank, "bf16", device)
    runners = {name: Runner(folder, *variant, device, number) for name, variant in known.items()}
    batches = (2,) if s.tiny else s.batches
    all_pixels = random_pixels(shape, max(2, *batches), dtype, device)
    expected = reference_features(folder, all_pixels[:2], number)
    for batch in batches:
        found, peaks, pixels = Found(), {}, all_pixels[:batch].clone()
        for name, runner in runners.items():
            print(f"{dtype}, batch {batch}: {name}", file=sys.stderr, flush=True)
            try:
                features, peaks[name] = runner.meet(pixels)
            except Exception as error:  # the others still count; the table says what happened
                found.missing[name] = timing.why_not(error)
                runner.tower, runner.held, runner.reserved = None, 0, 0
                continue
            reference = expected[runner.kind.removesuffix("-ours")]
            found.off[name] = distance(features, reference[: len(features)])
            found.seen[name] = []
        works = {name: partial(runners[name], pixels) for name in found.seen}
        with torch.no_grad():
            for _ in range(s.turns):
                times = timing.medians(timing.interleaved(works, s.runs, device, before=pixels.normal_))
                for name, seconds in times.items():
                    found.seen[name].append(Seen(seconds, peaks[name], np.zeros(0)))
        yield batch, found


# --------------------------------------------------------------------------------------------------------------- table


def table(batch: int, ideal: Mapping[str, float], found: Found, weighed: set[str]) -> str:
    """ideal: seconds at the machine's peak, of all variants. weighed: whose memory is told."""
    rows = []
    for name in ideal:
        if name not in found.seen:
            rows.append([name, found.missing[name], *[""] * 7])
            continue
        mine, dense = found.seen[name], found.seen[DENSE]
        ratios = [one.seconds / other.seconds for one, other in zip(mine, dense, strict=True)]
        seconds = statistics.median(turn.seconds for turn in mine)
        peak, dense_peak = (statistics.median(turn.peak for turn in turns) for turns in (mine, dense))
        memory = (f"{peak / dense_peak:.2f}", f"{peak / 2**20:,.0f}") if name in weighed else ("", "")
        rows.append([
            name, f"{statistics.median(ratios):.2f}", " ".join(f"{ratio:.2f}" for ratio in ratios), memory[0],
            f"{1000 * seconds:,.1f}", f"{batch / seconds:.2f}", memory[1], f"{ideal[name] / seconds:.0%}",
            f"{found.off[name]:.0e}",
        ])  # fmt: skip
    columns = ("tower", "time ratio", "by turn", "memory ratio", "ms", "images/s", "peak MiB", "of peak", "off by")
    return timing.markdown(columns, rows)


def problems(found: Found, dtype: str, batch: int) -> list[str]:
    """What makes the run fail, in words: a variant that raised an error, and one of ours that computed something else.
    A variant that does not fit, and somebody else's that is less exact than ours, are in the table and no failure."""
    wrong = [f"{name}: {why}" for name, why in found.missing.items() if why != timing.DOES_NOT_FIT]
    wrong += [
        f"{name} is off by {off:.1e} (tolerance {TOLERANCE[dtype]:.0e})"
        for name, off in found.off.items()
        if name.startswith("ours") and not off <= TOLERANCE[dtype]
    ]
    return [f"{dtype}, batch {batch}: {what}" for what in wrong]


def measure(
    s: Settings, folder: Path, dtype: str, device: torch.device, together: bool, say: Callable[[str], None]
) -> list[str]:
    """All batch sizes of one dtype, a table each -> what went wrong."""
    known, wrong = variants(s, ON_A_GPU if together else ON_A_CPU), []
    if device.type != "cuda":
        known = {name: variant for name, variant in known.items() if not variant[1].endswith("graph")}
    best, macs = timing.peak_flops(device, DTYPES[dtype], 256 if s.tiny else None), None
    for batch, found in (all_together if together else each_alone)(s, known, folder, dtype, device):
        macs = macs or necessary_macs(read_config(folder / "delta").vision_config, known)
        say(f"**{dtype}, batch {batch}** (large product: {best / 1e12:.2f} TFLOP/s)")
        wrong += problems(found, dtype, batch)
        if DENSE not in found.seen:
            say(f"{DENSE}: {found.missing[DENSE]}; there is nothing to compare with.")
            continue
        ideal = {name: 2 * batch * value / best for name, value in macs.items()}
        say(table(batch, ideal, found, set() if together and device.type != "cuda" else set(known)))
    return wrong


def main(argv: Sequence[str] | None = None) -> None:
    s = tyro.cli(Settings, args=argv, description=__doc__, use_underscores=False)
    device = timing.pick_device(s.device)
    together = s.processes == "one" or (s.processes == "auto" and device.type == "cuda")
    model = f"{'2 blocks of width 64' if s.tiny else 'ViT-L/14@336'}, {s.experts} experts, top {s.top_k}, rank {s.rank}"
    turns = "interleaved batches" if together else "batches of a process"
    how = f"medians of {s.turns} turns of {s.runs} {turns}"
    report, wrong = timing.Report(s.output), []
    report.add(timing.command(__file__, argv))
    report.add(f"{model}; {timing.machine(device)}; {how}")
    with timing.heard() as said, tempfile.TemporaryDirectory(dir=s.folder) as folder:
        for dtype in s.dtypes or (("fp16", "bf16") if device.type == "cuda" else ("fp32", "bf16")):
            place = Path(folder) if together else Path(folder) / dtype
            wrong += measure(s, place, dtype, device, together, report.add)
    if said:
        report.add("**The package said:** " + "; ".join(said))
    if wrong or said:
        raise SystemExit("\n".join([*wrong, *said]))


if __name__ == "__main__":
    main()
