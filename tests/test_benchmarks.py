"""Every benchmark of speed runs at its tiny size on a CPU and prints ratios; what they time is what they say it is.

Their figures are not judged here: a busy machine would fail such a test, a broken benchmark would not.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
import tyro
from tiny.llavas import upstream_is_installed

from train_encoder.recipes import RECIPES

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


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
    assert spent == {8}, "all pass over the data equally often"

    def run(**scores: float) -> dict:
        names = ("i2t_r1", "t2i_r1", "i2t_r5", "t2i_r5")
        values = {name.replace("_", "-"): dict.fromkeys(names, score) for name, score in scores.items()}
        return {"result": "clip-moe", "retrieval": {"held-out": values}}

    runs = [run(clip_moe=0.2, expert1=0.1), run(clip_moe=0.4, expert1=0.3)]
    cells = ablations.row("mine", runs, [0.1, 0.2])
    assert cells == ["mine", "30.00 ± 14.14", "20.0 40.0", "15.00 ± 7.07", "20.00", "", "", ""]


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


def test_encoder_training_prints_ratios_and_the_parts_of_a_step(benchmark, capsys):
    benchmark("encoder_training").main(["--tiny", "--device", "cpu", "--precision", "fp32"])
    rows = rows_of(capsys.readouterr().out, "step")
    assert rows[""][:2] == ["time ratio", "memory ratio"]
    assert rows["dense, all parameters"][:2] == ["1.00", "1.00"]
    columns = dict(zip(rows[""], rows["MCL step (FFNs only)"], strict=True))
    assert {"encode", "forward", "backward", "optimiser", "rest"} <= set(columns)
    trained = {name: float(cells[rows[""].index("trained M")]) for name, cells in rows.items() if name}
    assert trained["MCL step (FFNs only)"] < trained["dense, all parameters"]


@pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed")
def test_llava_first_token_takes_every_tower_through_upstream(benchmark, capsys):
    benchmark("llava_first_token").main(["--tiny", "--device", "cpu", "--dtype", "fp32", "--rounds", "1"])
    rows = rows_of(capsys.readouterr().out, "LLaVA with")
    assert set(rows) == {"", "CLIP", "CLIP-MoE", "delta"}
    assert rows["CLIP"][0] == "1.000" and all(float(cells[0]) > 0 for name, cells in rows.items() if name)


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
    tower_speed = benchmark("tower_speed")

    def seen(*seconds: float, peak: int) -> list:
        return [tower_speed.Seen(value, peak, torch.zeros(1).numpy()) for value in seconds]

    turns = {tower_speed.DENSE: seen(1.0, 2.0, 1.0, peak=2**20), "ours delta": seen(1.1, 2.2, 1.2, peak=3 * 2**20)}
    ideal = dict.fromkeys([*turns, "ours delta, compiled"], 0.5)
    printed = tower_speed.table(4, ideal, turns, set(turns), dict.fromkeys(turns, 0.0))
    rows = rows_of(printed, "tower")
    assert rows["ours delta"] == ["1.10", "1.10 1.10 1.20", "3.00", "1,200.0", "3.33", "3", "42%", "0e+00"]
    assert rows["ours delta, compiled"][0] == "does not fit"


def test_operations_are_those_of_the_papers_towers(benchmark):
    """DESIGN, section 3: 191 and 308 GMACs at 577 tokens, all 24 blocks."""
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
