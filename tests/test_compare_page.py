"""What the page of a comparison says: sentences, classification, CLIP-FMoE's claims, LLaVA columns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from train_encoder.compare.command import main
from train_encoder.compare.llava import llava_section, read_llavas
from train_encoder.compare.runs import Cell, Cost
from train_encoder.compare.summary import fmoe_claims, paired, sentence
from train_encoder.compare.tables import CONTROL, make_page
from train_encoder.evaluate.zero_shot import open_zero_shot


def cell(score: float, seconds: float = 60.0, clusters: float = 1.0, experts: int = 0) -> Cell:
    """A run whose every score is `score`."""
    systems = {"clip-moe": {key: score for key in ("i2t_r1", "t2i_r1", "i2t_r5", "t2i_r5")}
               | {"images": 10, "captions": 20}}  # fmt: skip
    classes = {"clip-moe": {"top1": score, "top5": score, "mean_per_class": score, "images": 9, "classes": 3}}
    pairs = {"overall": score, "by_type": {"Colour": {"accuracy": score}}}
    results = {
        "result": "clip-moe", "retrieval": {"held|out": systems}, "zero_shot": {"shapes": classes},
        "attributes": {"clip-moe": pairs, **{f"expert{e}": pairs for e in range(experts)}},
        "parameters": {"total": 1e6, "active": 1e6},
        "routing": {"vision": [[1 / experts] * experts] * 2} if experts else None,
    }  # fmt: skip
    other = {"features": 2.0, "clusters": clusters} if clusters else {}
    return Cell(results, Cost(10, 100, seconds, other, 2**30), 10**9, 1e12)


@pytest.fixture
def cells() -> dict[str, list[Cell]]:
    return {
        "base": [cell(score, 0.0, 0.0) for score in (0.10, 0.11, 0.12)],
        "dmu": [cell(score, 100.0, 4.0, experts=4) for score in (0.30, 0.32, 0.34)],
        "fmoe": [cell(score, 40.0, 1.0, experts=3) for score in (0.29, 0.31, 0.33)],
    }


@pytest.fixture
def no_drawing(monkeypatch) -> None:
    """For tests of what is on the page, not of how figures look: drawing is nearly all of the time."""
    svg = "train_encoder.report.figures.to_svg"
    monkeypatch.setattr(svg, lambda figure, name, label: f'<svg id="{name}"></svg>')


# ------------------------------------------------------------------------------------------------------------ sentences


def test_a_difference_is_paired_by_seed():
    found = paired([0.5, 0.3, 0.1], [0.4, 0.2, 0.1])
    assert found.mean == pytest.approx(0.2 / 3) and (found.wins, found.seeds) == (2, 3)
    assert found.error == pytest.approx(math.sqrt(((1 / 30) ** 2 * 2 + (2 / 30) ** 2) / 2 / 3))
    assert not found.clear, "one seed is a draw"


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        ([0.29, 0.305, 0.33], "ahead in 3 of 3 seeds: more than the spread"),
        ([0.28, 0.319, 0.34], "ahead in 2 of 3 seeds: within the spread"),
    ],
)
def test_a_lead_is_called_clear_only_beyond_the_spread(second, verdict):
    assert verdict in sentence("Score", {"a": [0.30, 0.32, 0.34], "b": second})


def test_one_seed_is_not_called_clear():
    said = sentence("Score", {"base": [0.1], "a": [0.3], "b": [0.2]}, "base")
    assert "one seed says nothing of the spread" in said and "clearly" not in said


def test_the_base_may_be_first():
    assert sentence("Score", {"base": [0.3, 0.3], "a": [0.2, 0.2]}, "base").startswith("**Score**: base is first")


def test_the_page_opens_with_three_to_five_sentences(cells, no_drawing):
    said = make_page(cells, {}, ["x"]).points
    assert 3 <= len(said) <= 5
    assert said[0].startswith("**Retrieval, held|out**: dmu is first with 32.0, 1.0 above fmoe")
    assert "21.0 above the base, clearly" in said[0]
    assert "fmoe takes least time (43.0 s" in said[-1] and "dmu most (1 min 46 s)" in said[-1]


# --------------------------------------------------------------------------------------------------------------- tables


def test_claims_of_clip_fmoe_stand_beside_the_papers_figures(cells):
    (_, clustering, paper), (_, seen, _), (_, total, reported), (_, alone, _) = fmoe_claims(cells)
    assert (clustering, paper) == ("4.00 ± 0.00x", "4.15x as fast")
    assert seen == "2.00 ± 0.00x"  # (4 + 2) / (1 + 2)
    assert total.startswith("−59.4") and reported == "−72.5%"  # (40 + 2 + 1) / (100 + 2 + 4)
    assert alone.startswith("−60.0")
    assert not fmoe_claims({"dmu": cells["dmu"]}), "both must be compared"


def test_a_data_set_that_a_cell_was_not_measured_on_is_left_out(cells, no_drawing):
    del cells["fmoe"][1].results["zero_shot"]["shapes"]
    page = make_page(cells, {}, ["x"]).markdown()
    assert "shapes" not in page and "Zero-shot" not in page and "held\\|out" not in page.split("##")[0]


def test_experts_are_rows_of_the_attributes_and_columns_of_the_routing(cells, no_drawing):
    page = make_page(cells, {}, ["x"]).markdown()
    assert "| dmu: expert3 | **32.0 ± 2.0** |" in page
    assert "| fmoe | 33.3 ± 0.0 | 33.3 ± 0.0 | 33.3 ± 0.0 | – |" in page and "\n| base | 0" not in page


def test_nothing_of_a_name_becomes_markup(cells):
    cells["<script>"] = cells.pop("fmoe")
    page = make_page(cells, {}, ["<b>"]).html()
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>'" not in page


def with_control(cell: Cell, score: float, name: str = "clip-moe (untrained router)") -> Cell:
    """The run, with a variant of which every score is `score`."""
    results = cell.results
    for kind in ("retrieval", "zero_shot"):
        for variants in results[kind].values():
            (shown,) = variants.values() if len(variants) == 1 else [variants["clip-moe"]]
            variants[name] = {key: score if isinstance(value, float) else value for key, value in shown.items()}
    results["attributes"][name] = {"overall": score, "by_type": {"Colour": {"accuracy": score}}}
    results.setdefault("done", []).append(name)
    return cell


def test_every_table_has_a_mixtures_random_router_as_its_control(cells, no_drawing):
    for recipe in ("dmu", "fmoe"):
        for seed, one in enumerate(cells[recipe]):
            with_control(one, 0.2 + seed / 100)
    sections = {section.anchor: section for section in make_page(cells, {}, ["x"]).sections}
    for anchor in ("retrieval", "classification", "attributes"):
        (table,) = sections[anchor].tables
        rows = {row[0]: row[1] for row in table.rows}
        assert rows["dmu: random router (control)"].text == "21.0 ± 1.0"
        names = [name for name in rows if "expert" not in name]
        assert names == ["base", *(name + more for name in ("dmu", "fmoe") for more in ("", CONTROL))]
    assert "dmu is first with 32.0" in make_page(cells, {}, ["x"]).points[0], "a control takes no part in the ranking"


def test_where_routers_start_otherwise_the_control_is_the_random_one(cells):
    (one, *_) = cells["dmu"]
    assert one.control is None, "not measured"
    assert with_control(one, 0.2).control == "clip-moe (untrained router)"
    assert with_control(one, 0.1, "clip-moe (random router)").control == "clip-moe (random router)"
    assert with_control(cells["base"][0], 0.2).control is None, "a dense model has no routers"


# ----------------------------------------------------------------------------------------------------- papers' figures


def named(cells: dict[str, list[Cell]], kind: str, name: str, images: int) -> None:
    """Give the one data set of a kind in all cells another name and size."""
    for run in cells.values():
        for one in run:
            (variants,) = one.results[kind].values()
            for scores in variants.values():
                scores["images"] = images
            one.results[kind] = {name: variants}


def test_the_papers_figures_stand_beside_ours_where_the_data_set_is_the_papers(cells, no_drawing):
    named(cells, "retrieval", "coco-5k", 5000)
    named(cells, "zero_shot", "imagenet-v2", 10_000)
    cells["long-clip"] = cells["base"]
    page = make_page(cells, {}, ["x"]).markdown()
    assert (
        "| dmu | **32.0 ± 2.0 [65.0]** | **32.0 ± 2.0 [46.8]** | **32.0 ± 2.0 [86.0]** | **32.0 ± 2.0 [71.7]** |"
        in page
    )
    assert "| fmoe | 31.0 ± 2.0 [65.6] | 31.0 ± 2.0 [47.7] | 31.0 ± 2.0 | 31.0 ± 2.0 |" in page
    assert "| base | 11.0 ± 1.0 [69.9] | 11.0 ± 1.0 |" in page and "| long-clip | 11.0 ± 1.0 [67.9] |" in page
    assert "in brackets: CLIP-MoE paper, Table 2" in page and "in brackets: CLIP-MoE paper, Table 5" in page


@pytest.mark.parametrize(("name", "images"), [("coco-5k", 500), ("my-coco", 5000)])
def test_a_part_of_a_data_set_and_a_stranger_have_no_paper(cells, no_drawing, name, images):
    named(cells, "retrieval", name, images)
    page = make_page(cells, {}, ["x"]).markdown()
    assert "brackets" not in page and "[65" not in page


def test_table_1_stands_beside_the_experts_on_the_135_pairs_alone(cells, no_drawing):
    assert "[" not in make_page(cells, {}, ["x"]).sections[2].markdown()
    for run in cells.values():
        for one in run:
            for scores in one.results["attributes"].values():
                scores["pairs"] = 135
                scores["by_type"] = {"Color and Appearance": {"accuracy": 0.2}, "Texts": {"accuracy": 0.3}}
    page = make_page(cells, {}, ["x"]).sections[2].markdown()
    assert "| dmu: expert3 | **32.0 ± 2.0** | **20.0 ± 0.0 [6.7]** | **30.0 ± 0.0 [40.0]** |" in page
    assert "| fmoe: expert2 | 31.0 ± 2.0 | **20.0 ± 0.0** |" in page, "not the paper's experts"
    assert "Table 1" in page


def test_captions_that_differ_little_have_a_section(cells, no_drawing):
    for run in cells.values():
        for one in run:
            overall = one.results["retrieval"]["held|out"]["clip-moe"]["i2t_r1"]
            kinds = {"Object": {"accuracy": overall, "pairs": 2}}
            scores = {"overall": overall, "text": 0.5, "image": 0.4, "pairs": 2, "by_type": kinds}
            one.results["composition"] = {"winoground": {"clip-moe": scores}}
    page = make_page(cells, {}, ["x"])
    assert [section.anchor for section in page.sections][:4] == [
        "retrieval",
        "classification",
        "composition",
        "attributes",
    ]
    assert "| dmu | **32.0 ± 2.0** | **50.0 ± 0.0** | **40.0 ± 0.0** | **32.0 ± 2.0** |" in page.sections[2].markdown()


# ---------------------------------------------------------------------------------------------------------------- LLaVA


def measured(folder: Path, benchmark: str, value: float | None, n: int = 100, **more) -> None:
    folder.mkdir(parents=True)
    result = {"benchmark": benchmark, "n": n, "limited": False, "headline": "accuracy", "model": "m",
              "metrics": {} if value is None else {"accuracy": value}, "paper": None, **more}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(result))


@pytest.fixture
def results(tmp_path) -> Path:
    """Two LLaVAs where eval-llava puts them, a third one in a folder of its own."""
    default = tmp_path / "runs" / "eval-llava"
    paper = {"llava-1.5-7b": 85.9, "llava-1.5-7b + CLIP-MoE": 86.4}
    measured(default / "pope" / "llava-a", "pope", 85.0, paper=paper)
    measured(default / "pope" / "llava-b", "pope", 86.25, paper=paper)
    measured(default / "gqa" / "llava-a", "gqa", 62.0)
    measured(default / "gqa" / "llava-b", "gqa", 60.0, n=99)
    measured(tmp_path / "third" / "mmvet", "mmvet", None)
    measured(tmp_path / "third" / "pope", "pope", 80.0, paper=paper)
    (tmp_path / "third" / "other").mkdir()
    (tmp_path / "third" / "other" / "results.json").write_text('{"seconds": 3}')
    return tmp_path


def test_llavas_are_columns_and_benchmarks_rows(results):
    entries = ["checkpoints/llava-a", "moe=checkpoints/llava-b", str(results / "third")]
    llavas = read_llavas(entries, results / "runs" / "eval-llava")
    section = llava_section(llavas)
    (table,) = section.tables
    assert table.head == ["benchmark", "metric", "llava-a", "moe", "third", "paper: 7B, with CLIP-MoE"]
    assert table.rows == [
        ["pope", "accuracy", "85.0", "86.2 (+1.2)", "80.0 (−5.0)", "85.9 → 86.4"],
        ["mmvet", "accuracy", "–", "–", "–", "–"],
        ["gqa", "accuracy", "62.0", "60.0 (−2.0)", "–", "–"],
    ]
    assert "gqa: not the same number of questions (llava-a 100, moe 99)" in section.blocks[-1]
    assert "mmvet: not scored here for third" in section.blocks[-1]


def test_a_13b_llava_stands_beside_the_papers_13b_rows(results):
    for file in (results / "runs").rglob("results.json"):
        file.write_text(file.read_text().replace('"model": "m"', '"model": "checkpoints/llava-v1.5-13b"'))
    (table,) = llava_section(read_llavas(["llava-a"], results / "runs" / "eval-llava")).tables
    assert table.head[-1] == "paper: 13B, with CLIP-MoE"
    assert {row[0]: row[-1] for row in table.rows} == {"pope": "85.9 → 86.5", "gqa": "63.2 → 63.8"}


def test_a_llava_without_results_is_an_error_that_says_how_to_measure_it(results):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder.*eval-llava pope --model-path nowhere"):
        read_llavas(["nowhere"], results)
    (results / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no results of eval-llava"):
        read_llavas([str(results / "empty")], results)


def test_a_folder_of_several_llavas_and_two_of_one_name_are_refused(results):
    with pytest.raises(ValueError, match=r"two results of (pope|gqa).*llava-a.*llava-b"):
        read_llavas([str(results / "runs")], results)
    with pytest.raises(ValueError, match="two LLaVAs are called 'third'"):
        read_llavas([str(results / "third")] * 2, results)


def test_llavas_alone_make_a_page_without_training_anything(results, capsys):
    out = results / "out"
    default = ["--llava-results", str(results / "runs" / "eval-llava")]
    assert main(["--llava", "a=llava-a", "b=llava-b", *default, "--output-dir", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["llava.html", "llava.md"]
    assert "| pope | accuracy | 85.0 | 86.2 (+1.2) |" in (out / "llava.md").read_text()
    assert "86.2 (+1.2)" in (out / "llava.html").read_text() and "llava.html" in capsys.readouterr().out


def test_llavas_join_the_page_of_the_recipes(cells, results, no_drawing):
    page = make_page(cells, read_llavas([str(results / "third")], results), ["x"])
    assert [section.anchor for section in page.sections][-3:] == ["cost", "llava", "reproduce"]
    assert "| pope | accuracy | 80.0 |" in page.markdown()


# --------------------------------------------------------------------------------------------------- what is classified


def test_what_is_classified_is_named_with_its_folder(tmp_path):
    with pytest.raises(ValueError, match="NAME=FOLDER"):
        open_zero_shot("imagenet")
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    name, (classes, templates) = open_zero_shot(f"pets={tmp_path}")
    assert (name, classes.names, templates) == ("pets", ["cat", "dog"], None)
