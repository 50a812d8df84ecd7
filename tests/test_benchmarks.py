"""Every benchmark of speed runs at its tiny size on a CPU and prints ratios; what they time is what they say it is.

Their figures are not judged here: a busy machine would fail such a test, a broken benchmark would not.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro

from train_encoder.recipes import RECIPES

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
"""Where programs of this environment are, and then all others."""


@pytest.fixture
def benchmark(monkeypatch):
    """Import a program of benchmarks/ by its name, as running it does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str):
        return importlib.import_module(name)

    yield load
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def rows_of(text: str, first: str) -> dict[str, list[str]]:
    """The Markdown table whose first column is called `first`: its rows by that column. The columns are under ""."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    start = next(i for i, cells in enumerate(lines) if cells[0] == first)
    return {"": lines[start][1:]} | {cells[0]: cells[1:] for cells in lines[start + 2 :]}


# ------------------------------------------------------------------------------------------------------ the programs


def test_an_ablation_changes_what_it_says_and_is_set_against_a_recipe(benchmark):
    ablations = benchmark("openmoji_ablations")

    def parse(*flags: str):
        return tyro.extras.overridable_config_cli(RECIPES, args=["dmu-openmoji", *flags])

    plain, changed = parse(), {name: parse(*flags) for name, (_, flags) in ablations.VARIANTS.items()}
    assert all(config != plain for config in changed.values()) and len(set(map(str, changed.values()))) == len(changed)
    spent = {3 * c.mcl.optim.epochs + c.moe.optim.epochs for c in (plain, *changed.values())}
    assert spent == {13}, "all pass over the data equally often"

    def run(**pairs: float) -> dict:
        systems = {name.replace("_", "-"): share for name, share in pairs.items()}
        retrieval = {name: {"i2t_r1": 0.2, "t2i_r1": 0.4} for name in systems}
        zero_shot = {name: {"top1": 0.6} for name in systems}
        attributes = {name: {"overall": share} for name, share in systems.items()}
        scores = {"retrieval": {"held-out": retrieval}, "zero_shot": {"nouns": zero_shot}, "attributes": attributes}
        return {"result": "clip-moe", **scores}

    runs, others = [run(clip_moe=0.2, expert1=0.1), run(clip_moe=0.4, expert1=0.3)], [run(clip_moe=0.1)] * 2
    cells = ablations.row("mine", runs, others, ablations.pair_score)
    assert cells == ["mine", "30.00 ± 14.14", "20.0 40.0", "20.00 ± 14.14", "20.00", "", "", ""]
    assert ablations.mean_score(runs[1], "expert1") == pytest.approx((0.3 + 0.3 + 0.6) / 3)


def test_tower_speed_compares_every_way_to_run_one_model(benchmark, capsys, tmp_path):
    arguments = ["--tiny", "--device", "cpu", "--turns", "2", "--runs", "1", "--dtypes", "fp32"]
    benchmark("tower_speed").main([*arguments, "--output", str(tmp_path / "table.md")])
    printed = capsys.readouterr().out
    rows = rows_of(printed, "tower")
    assert rows[""][:3] == ["time ratio", "by turn", "memory ratio"]
    assert rows["transformers dense"][:3] == ["1.00", "1.00 1.00", "1.00"]
    wanted = {"ours dense", "ours MoE, loop", "ours delta", "ours delta, loop", "MoE, masked loop with index_add_",
              "MoE, transformers batched_mm"}  # fmt: skip
    assert wanted <= set(rows)
    assert all(float(cells[0]) > 0 for name, cells in rows.items() if name)
    assert "python benchmarks/tower_speed.py --tiny" in printed and f"torch {torch.__version__}" in printed
    assert rows_of((tmp_path / "table.md").read_text(), "tower") == rows


def test_scaling_varies_one_thing_at_a_time(benchmark, capsys, tmp_path):
    curves = tmp_path / "curves.svg"
    benchmark("scaling").main(["--tiny", "--device", "cpu", "--dtype", "fp32", "--rounds", "1", "--plot", str(curves)])
    rows = rows_of(capsys.readouterr().out, "varied")
    assert rows[""][:4] == ["MoE : dense", "operations", "delta : dense", "operations"]
    assert [name.split(" = ")[0] for name in rows if name] == [
        part for part in ("experts E", "experts a token K", "image side (px)", "batch") for _ in range(2)
    ]
    assert float(rows["experts a token K = 2"][1]) > float(rows["experts a token K = 1"][1])  # a second expert costs
    assert "<svg" in curves.read_text()


def assert_parts_of_a_step(rows: dict[str, list[str]]) -> None:
    """The table of encoder_training.py."""
    assert rows[""][:2] == ["time ratio", "memory ratio"]
    assert rows["dense, all parameters"][:2] == ["1.00", "1.00"]
    columns = dict(zip(rows[""], rows["MCL step (FFNs only)"], strict=True))
    assert {"encode", "forward", "backward", "optimiser", "rest"} <= set(columns)
    trained = {name: float(cells[rows[""].index("trained M")]) for name, cells in rows.items() if name}
    assert trained["MCL step (FFNs only)"] < trained["dense, all parameters"]


def assert_every_tower_is_timed(rows: dict[str, list[str]]) -> None:
    """The table of llava_first_token.py."""
    assert set(rows) == {"", "CLIP", "CLIP, our tower", "CLIP-MoE", "delta"}
    assert rows["CLIP"][0] == "1.000" and all(float(cells[0]) > 0 for name, cells in rows.items() if name)


# ------------------------------------------------------------------------------------------- all of them on one card


def run_gpu_sh(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(BENCHMARKS / "gpu.sh"), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_gpu_sh_runs_every_part(tmp_path):
    done = run_gpu_sh("--tiny", str(tmp_path / "out"), PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout[-5_000:] + done.stderr[-5_000:]
    text = (tmp_path / "out" / "gpu.md").read_text()
    names = {
        "checks": "check",
        "towers": "tower",
        "first_token": "LLaVA with",
        "training": "step",
        "chunks": "images/s",
    }
    tables = {}
    for part, first_column in names.items():
        assert (tmp_path / "out" / f"{part}.log").exists()
        own = (tmp_path / "out" / f"{part}.md").read_text()
        assert own in text and "failed" not in own and "command: `python benchmarks/" in own.lower()
        tables[part] = rows_of(own, first_column)
    assert tables["checks"]["all kernels, fp32"][0] == "as the loop"
    assert "passed" in tables["checks"]["tests/kernel_tests.py tests/fast_tests.py"][0]
    assert {"MoE, as the official code", "ours delta, LLAVA_CLIPMOE_FAST=0"} <= set(tables["towers"])
    assert_every_tower_is_timed(tables["first_token"])
    assert_parts_of_a_step(tables["training"])
    assert tables["chunks"][""][0] == "auto over 2"
    assert f"torch {importlib.metadata.version('torch')}" in text and "TINY" in text and "- commit " in text
    results = [cells[-1] for name, cells in rows_of(text, "part").items() if name]
    assert results == [*["done"] * 5, "left out: needs a GPU", "0 failed"]


STAND_IN = """#!/usr/bin/env bash
[[ $1 == - ]] && exit 0  # what asks for the card and the versions
file=${!#}               # the last argument, after --output
echo "$@" >> "$ASKED"
case $1 in $FAILS) echo "| some | table |" > "$file"; echo "it broke"; exit "$STATUS" ;; esac
echo "| table of | $1 |" > "$file"
"""
"""In the place of Python: writes a table for every part, and fails for some."""


@pytest.mark.parametrize(
    ("fails", "status", "flags", "asked"),
    [("*/tower_speed.py", "7", (), 6), ("*/kernel_checks.py", "1", (), 1), ("*/kernel_checks.py", "1", ("--force",), 6),
     ("*/kernel_checks.py", "3", (), 6), ("*/tower_speed.py", "7", ("--only", "towers,tiles"), 3)],
    ids=["a part fails", "kernels are wrong", "wrong, but forced", "tests unfinished", "two parts alone"],
)  # fmt: skip
def test_gpu_sh_on_a_card_goes_on_after_a_failure_but_not_with_wrong_kernels(tmp_path, fails, status, flags, asked):
    stand_in, log = tmp_path / "python", tmp_path / "asked"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    given = {"PYTHON": str(stand_in), "ASKED": str(log), "FAILS": fails, "STATUS": status, "OUT": str(tmp_path / "out")}
    done = run_gpu_sh(*flags, **given)
    text, lines = (tmp_path / "out" / "gpu.md").read_text(), log.read_text().splitlines()
    assert done.returncode == 1 and "FAILED: " in done.stderr and "it broke" in done.stderr
    assert len(lines) == asked and ("nothing was timed" in done.stderr) == (asked == 1)
    assert "| some | table |" in text and f"exit status {status}" in text and "1 failed" in text
    assert text.count("| table of |") == asked - 1
    if asked == 6:
        assert "--language vicuna-7b" in lines[2] and lines[-1].startswith("benchmarks/kernel_tiles.py --output")
    limits = [int(cells[0]) for name, cells in rows_of(text, "part").items() if name]
    assert limits == sorted(limits) and limits[-1] == 840  # what one part leaves, the next one may use


def test_gpu_sh_says_what_is_missing(tmp_path):
    if not torch.cuda.is_available():
        done = run_gpu_sh(str(tmp_path / "out"), PYTHON=sys.executable)
        assert done.returncode == 2 and "sees no GPU" in done.stderr and "--tiny" in done.stderr
    assert run_gpu_sh("--quick").returncode == 2


@pytest.mark.skipif(shutil.which("shellcheck", path=SCRIPTS) is None, reason="shellcheck is not installed")
def test_gpu_sh_is_clean():
    program = shutil.which("shellcheck", path=SCRIPTS)
    done = subprocess.run([program, str(BENCHMARKS / "gpu.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# -------------------------------------------------------------------------------------------------------- their parts


def test_a_variant_that_computes_something_else_is_not_timed(benchmark):
    tower_speed = benchmark("tower_speed")
    right = torch.ones(4, 3).numpy()
    features = {tower_speed.DENSE: 2 * right, tower_speed.MASKED: right}
    assert tower_speed.check({**features, "ours delta": right, "ours dense": 2 * right}, "fp32")["ours delta"] == 0
    with pytest.raises(ValueError, match=r"ours delta is off by 1\.0e-02 in fp32"):
        tower_speed.check({**features, "ours delta": 1.01 * right}, "fp32")


def test_a_ratio_is_taken_within_a_turn(benchmark):
    """The second turn met a machine half as fast: every variant took twice as long, and no ratio changes."""
    tower_speed, timing = benchmark("tower_speed"), benchmark("timing")

    def seen(*seconds: float, peak: int) -> list:
        return [tower_speed.Seen(value, peak, torch.zeros(1).numpy()) for value in seconds]

    turns = {tower_speed.DENSE: seen(1.0, 2.0, 1.0, peak=2**20), "ours delta": seen(1.1, 2.2, 1.2, peak=3 * 2**20)}
    ideal = dict.fromkeys([*turns, "ours MoE", "ours dense"], 0.5)
    why_not = {"ours MoE": timing.why_not(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")),
               "ours dense": timing.why_not(RuntimeError("no | kernel\nof this kind"))}  # fmt: skip
    found = tower_speed.Found(turns, why_not, dict.fromkeys(turns, 0.0) | {"ours delta": 0.5})
    rows = rows_of(tower_speed.table(4, ideal, found, set(turns)), "tower")
    assert rows["ours delta"] == ["1.10", "1.10 1.10 1.20", "3.00", "1,200.0", "3.33", "3", "42%", "5e-01"]
    assert rows["ours MoE"] == ["does not fit", *[""] * 7]
    assert rows["ours dense"][0] == "failed: RuntimeError: no / kernel"
    wrong = tower_speed.problems(found, "fp16", 4)  # what does not fit is no failure of the run
    assert wrong == ["fp16, batch 4: ours dense: failed: RuntimeError: no / kernel",
                     "fp16, batch 4: ours delta is off by 5.0e-01 (tolerance 3e-02)"]  # fmt: skip


def test_what_runs_without_the_fast_path_does_so_wherever_it_is_called(benchmark, monkeypatch, tmp_path):
    """The variable is looked at in the tower at every call, and is afterwards what it was."""
    variants, runner = benchmark("tower_variants"), benchmark("tower_runner")
    monkeypatch.setenv(variants.FAST, "1")
    seen = []
    monkeypatch.setattr(runner, "make_tower", lambda *_: lambda pixels: seen.append(os.environ.get(variants.FAST)))
    for how in ("auto", "fast", "usual eager"):
        one = runner.Runner(tmp_path, "moe", how, torch.device("cpu"), torch.float32)
        one(torch.zeros(1))
        one(torch.zeros(1))
    assert seen == ["0", "0", None, None, "0", "0"] and os.environ[variants.FAST] == "1"


def test_a_tower_in_one_process_that_fails_is_named_and_the_others_are_timed(benchmark, capsys, monkeypatch):
    tower_speed, runner = benchmark("tower_speed"), benchmark("tower_runner")
    make = runner.make_tower

    def some_fail(folder, kind, how, *place):
        if how == "usual official":
            raise RuntimeError("a broken variant")
        if how == "usual grouped_mm":
            raise torch.OutOfMemoryError("CUDA out of memory")
        tower = make(folder, kind, how, *place)
        return (lambda pixels: 1.1 * tower(pixels)) if (kind, how) == ("delta", "fast") else tower

    monkeypatch.setattr(runner, "make_tower", some_fail)
    with pytest.raises(SystemExit) as stopped:
        tower_speed.main("--tiny --device cpu --processes one --dtypes fp32 --turns 1 --runs 1".split())
    rows = rows_of(capsys.readouterr().out, "tower")
    assert rows["MoE, as the official code"][0] == "failed: RuntimeError: a broken variant"
    assert rows["MoE, transformers grouped_mm"][0] == "does not fit"
    assert float(rows["ours MoE"][0]) > 0 and float(rows["ours MoE"][-1]) < 1e-5
    assert str(stopped.value).splitlines() == [
        "fp32, batch 2: MoE, as the official code: failed: RuntimeError: a broken variant",
        "fp32, batch 2: ours delta is off by 1.0e-01 (tolerance 1e-04)",
    ]


def test_a_table_of_the_fast_path_says_when_the_slow_one_ran(benchmark, capsys, monkeypatch):
    tower_speed, runner = benchmark("tower_speed"), benchmark("tower_runner")
    make = runner.make_tower

    def warning(*given):
        logging.getLogger("llava_clipmoe").warning("the kernels are not used: %s", "no reason")
        return make(*given)

    monkeypatch.setattr(runner, "make_tower", warning)
    arguments = "--tiny --device cpu --processes one --dtypes fp32 --turns 1 --runs 1 --variants".split()
    with pytest.raises(SystemExit, match="the kernels are not used: no reason"):
        tower_speed.main([*arguments, "ours dense"])
    assert "**The package said:** the kernels are not used: no reason" in capsys.readouterr().out


def test_a_training_step_that_does_not_fit_or_fails_is_one_row(benchmark):
    training = benchmark("encoder_training")
    s = training.Settings(images=64)
    one = {"seconds": [0.5], "peak": 2**30, "libraries": 0, "trained": 10**6, "chunk": 10,
           "parts": [dict.fromkeys(training.PARTS, 0.1)]}  # fmt: skip
    small = {"dense": [one], "MCL": "does not fit", "router": training.NOT_THERE}
    rows = rows_of(training.table(s, small), "step")
    assert rows["dense"][:2] == ["1.00", "1.00"] and rows["dense"][-1] == "0.10"
    assert rows["MCL"][:2] == ["does not fit", ""] and rows["router"][0] == training.NOT_THERE
    large = {"dense": [{**one, "seconds": [0.25]}], "MCL": [one], "router": "does not fit"}
    assert rows_of(training.by_chunk(s, {10: small, "auto": large}), "images/s") == {
        "": ["auto over 10", "images/s, chunks of 10", "images/s, chunks of auto"],
        "dense": ["2.00", "128.00", "256.00"], "MCL": ["", "", "128.00"], "router": ["", "", ""],
    }  # fmt: skip


def test_operations_are_those_of_the_papers_towers(benchmark):
    """By hand: 191 and 308 GMACs at 577 tokens, all 24 blocks."""
    tower_speed = benchmark("tower_speed")
    from llava_clipmoe.configuration_clipmoe import CLIPMoEVisionConfig

    config = CLIPMoEVisionConfig(**tower_speed.FULL, num_experts=4, delta_ranks=[[64, 64]] * 24)
    dense, moe, delta = (tower_speed.tower_macs(config, delta, dense, 24) for delta, dense in ((0, 1), (0, 0), (1, 0)))
    assert dense / 1e9 == pytest.approx(191, abs=1) and moe / 1e9 == pytest.approx(308, abs=1)
    assert 1.05 < delta / dense < 1.12


def test_rounds_are_interleaved_and_the_warm_one_is_not_counted(benchmark):
    timing = benchmark("timing")
    seen: list[str] = []
    works = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    found = timing.interleaved(works, 2, torch.device("cpu"), before=lambda: seen.append("new"))
    assert seen == ["new", "a", "b", "new", "a", "b", "new", "b", "a"]
    assert {name: len(found[name]) for name in found} == {"a": 2, "b": 2}
    assert len(timing.interleaved(works, 9, torch.device("cpu"), limit=0.0)["a"]) == 1


def test_memory_of_a_child_is_its_own(benchmark):
    """The parent holds 200 MB more than the child takes: the child's peak does not see it."""
    timing = benchmark("timing")
    held = torch.ones(50_000_000)
    peak = timing.in_child(_peak_of, 100)
    assert 100 * 2**20 <= peak < 100 * 2**20 + held.nbytes / 2


def _peak_of(megabytes: int) -> int:
    import timing

    peak = timing.Peak(torch.device("cpu"))
    block = bytearray(megabytes * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    return peak.bytes()
