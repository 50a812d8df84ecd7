"""The report of a run shows what results.json says, needs nothing but itself, and never fails on a run in progress."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("matplotlib")

from llava_clipmoe.cli import main
from train_encoder.recipes import RECIPES
from train_encoder.report import figures
from train_encoder.report.run import mean_score, reproduce_command, summary_table, write_report
from train_encoder.saved_settings import to_dict

VARIANTS = ["base", "stage1", "stage2", "stage3", "expert0", "expert1", "expert2", "expert3",
           "clip-moe (untrained router)", "clip-moe"]  # fmt: skip
TYPES = ["colour", "quantity", "position, left or right", "state"]
SECTIONS = ["retrieval", "classification", "loss", "clusters", "attributes", "routing", "movement", "cost",
            "parameters", "settings", "reproduce"]  # fmt: skip


def metric_rows(rng: np.random.Generator) -> list[dict]:
    rows = []
    for stage, steps in [("base", 400), ("stage1", 150), ("stage2", 150), ("stage3", 150), ("router", 80)]:
        for step in range(10, steps + 1, 10):
            loss = 1.2 + 2.5 * math.exp(-step / 60) + float(rng.normal(0, 0.12))
            row = {"stage": stage, "step": step, "steps": steps, "loss": loss, "contrastive": loss, "time": 1.0}
            if stage == "router":
                row["balance"] = 1 + 0.6 * math.exp(-step / 30)
            rows.append(row)
        if stage.startswith("stage"):
            rows.append({"event": "done", "work": "features", "stage": stage, "seconds": 21.0, "images": 3400,
                         "peak_memory_bytes": 1 << 30})  # fmt: skip
        rows.append({"event": "done", "work": "train", "stage": stage, "seconds": 95.0, "images": 9600,
                     "peak_memory_bytes": 3 << 29})  # fmt: skip
    return [*rows, {"event": "done", "work": "evaluate", "seconds": 30.5, "peak_memory_bytes": 1 << 29}]


def make_results(rng: np.random.Generator, blocks: int = 6, experts: int = 4) -> dict:
    def retrieval(images: int, captions: int) -> dict:
        table = {}
        for place, system in enumerate(VARIANTS):
            r1 = 0.311 + 0.017 * place
            table[system] = {"i2t_r1": r1, "i2t_r5": r1 + 0.2, "i2t_r10": r1 + 0.3, "t2i_r1": 0.7 - r1}
            table[system] |= {"t2i_r5": r1 + 0.21, "t2i_r10": r1 + 0.31, "images": images, "captions": captions}
        return table

    def classes(place: int) -> dict:
        scores = {"top1": 0.4 + place / 50, "top5": 0.8 + place / 100, "mean_per_class": 0.45 - place / 50}
        return scores | {"images": 150, "classes": 11}

    def accuracy(place: int) -> dict:
        by_type = {t: {"accuracy": ((3 * place + 5 * i) % 11) / 15, "pairs": 15} for i, t in enumerate(TYPES)}
        return {"overall": 0.3 + place / 50, "pairs": 60, "by_type": by_type}

    return {
        "retrieval": {"held-out, long captions": retrieval(400, 400), "held-out, names": retrieval(400, 2000)},
        "zero_shot": {"colours": {system: classes(place) for place, system in enumerate(VARIANTS)}},
        "attributes": {system: accuracy(place) for place, system in enumerate(VARIANTS)},
        "routing": {"vision": rng.dirichlet([2] * experts, blocks).tolist(), "vision_blocks": list(range(blocks)),
                    "text": rng.dirichlet([0.5] * experts, 4).tolist(), "text_blocks": list(range(4))},
        "router_movement": [
            {"block": f"{tower}.{i}", "relative_change": 0.02 + 0.01 * i, "cosine": 0.99, "changed_top1": 0.05 * i}
            for tower, n in (("vision_model", blocks), ("text_model", 4)) for i in range(n)
        ],
        "clusters": [
            {"stage": s, "sizes": rng.multinomial(3400, rng.dirichlet([0.8] * 9**s)).tolist(),
             "batches_by_depth": {str(d): 53 // (1 + s - d) for d in range(s, -1, -1)}} for s in (1, 2, 3)
        ],
        "ffn_change": {"stage1": 0.031, "stage2": 0.04},
        "parameters": {"dense": 12_345_678, "total": 33_000_000, "active": 19_000_000},
    }  # fmt: skip


def make_run(directory: Path) -> Path:
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True)
    config = to_dict(RECIPES["dmu-openmoji"][1]) | {"seed": 7}
    config["evaluation"]["zero_shot"] = ["colours=openmoji-colours"]
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "results.json").write_text(json.dumps(make_results(rng)))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metric_rows(rng)))
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "quickstart")


class Page(HTMLParser):
    """What the tests ask of a page: its sections, tables (as text), references, and whether its tags close."""

    VOID = {"meta", "br", "link", "img", "input", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.section, self.text = "", ""
        self.sections: dict[str, str] = {}
        self.svgs: dict[str, int] = {}
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        self.references += [values[key] for key in ("src", "href", "xlink:href", "action", "data") if key in values]
        if tag == "section":
            self.section = values["id"]
            self.sections[self.section], self.svgs[self.section], self.tables[self.section] = "", 0, []
        if tag == "svg":
            self.svgs[self.section] += 1
        if tag == "table":
            self.tables[self.section].append([])
        if tag == "tr":
            self.tables[self.section][-1].append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1][-1].append("")
        if tag == "b":
            self.handle_data("*")
        if tag == "br":
            self.handle_data(" ")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.section:
            self.sections[self.section] += data
        if {"td", "th"} & set(self.open[-4:]) and "table" in self.open:
            self.tables[self.section][-1][-1][-1] += data


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run whose report is written; tests only read it."""
    run = make_run(tmp_path_factory.mktemp("runs") / "quickstart")
    write_report(run)
    return run


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    return Page((whole / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def no_drawing(monkeypatch) -> None:
    """For tests of what is on the page, not of how figures look: drawing is nearly all of the time."""
    monkeypatch.setattr(figures, "to_svg", lambda figure, name, label: f'<svg id="{name}"></svg>')


def rows_of(table: list[list[str]]) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in table}


# ---------------------------------------------------------------- what it shows


def test_every_section_is_there_in_order_and_none_is_missing(page):
    assert list(page.sections) == SECTIONS
    assert "Missing" not in page.text and "Not on this page" not in page.text
    assert page.open == []
    assert [f"#{name}" for name in SECTIONS] == [r for r in page.references if r[1:] in SECTIONS]
    figures = {name: count for name, count in page.svgs.items() if count}
    assert figures == {"loss": 6, "clusters": 3, "routing": 2, "movement": 2, "cost": 2}


def test_the_headline_equals_results_json_with_delta_and_best_in_bold(whole, page):
    results = json.loads((whole / "results.json").read_text())["retrieval"]
    tables = page.tables["retrieval"]
    assert len(tables) == len(results)
    for table, (_, systems) in zip(tables, results.items(), strict=True):
        rows = rows_of(table)
        assert [name for name in rows if name != "variant"] == VARIANTS
        for system, values in systems.items():
            for place, key in enumerate(["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"]):
                cell = rows[system][place]
                best = values[key] == max(other[key] for other in systems.values())
                assert cell.startswith(f"{'*' if best else ''}{100 * values[key]:.1f}"), (system, key, cell)
                if system != "base":
                    delta = 100 * (values[key] - systems["base"][key])
                    assert cell.endswith(f"{delta:+.1f}".replace("-", "−"))
    # sqrt(.311 * .689 / 400) = 2.3 points; text to image has 2,000 captions: sqrt(.389 * .611 / 2000) = 1.1
    assert rows["base"][0] == "31.1 ±2.3" and rows["base"][3].lstrip("*") == "38.9 ±1.1"


def test_chance_and_counts_are_stated(page):
    assert "400 images, 2,000 captions; chance R@1 is 0.25%." in page.sections["retrieval"]
    assert "chance is 25%" in page.sections["attributes"]


def test_classification_shows_every_variant_with_its_distance_to_the_base(page):
    ((head, *rows),) = page.tables["classification"]
    assert head == ["variant", "top-1", "top-5", "mean per class"] and [row[0] for row in rows] == VARIANTS
    assert rows[0][1].startswith("40.0") and "+2.0" in rows[1][1]
    assert "chance is 9.1%" in page.sections["classification"]


def test_attributes_are_rows_and_variants_columns_with_the_number_of_pairs(whole, page):
    data = json.loads((whole / "results.json").read_text())["attributes"]
    (table,) = page.tables["attributes"]
    assert table[0] == ["attribute", "pairs", *VARIANTS]
    assert [row[0] for row in table[1:]] == [*TYPES, "overall"]
    for row in table[1:-1]:
        values = [data[s]["by_type"][row[0]]["accuracy"] for s in VARIANTS]
        assert row[1] == "15"
        assert row[2:] == [f"{'*' * (v == max(values))}{100 * v:.1f}" for v in values]
    assert table[-1][1] == "60" and table[-1][2].startswith("30.0 ±5.9") and table[-1][-1].startswith("*48.0")


def test_clusters_time_parameters_and_settings_equal_the_files(whole, page):
    results = json.loads((whole / "results.json").read_text())
    clusters = rows_of(page.tables["clusters"][0])
    sizes = [size for size in results["clusters"][1]["sizes"] if size]
    small = sum(size for size in sizes if size < 64) / 3400  # the recipe's global batch
    assert clusters["stage2"][0] == str(len(sizes)) and clusters["stage2"][3] == f"{max(sizes):,}"
    assert clusters["stage2"][4] == f"{100 * small:.1f}%"
    assert clusters["stage"][5:] == [f"batches at depth {d}" for d in (3, 2, 1, 0)]
    assert clusters["stage2"][5:] == ["–", "53", "26", "17"]
    cost = page.tables["cost"][0]
    assert ["stage1", "features", "21.0 s", "3,400", "161.9", "1.00"] in cost
    assert cost[-1][:3] == ["total", "", "9 min 28 s"] and cost[-1][-1] == "1.50"  # 5*95 + 3*21 + 30.5 s
    assert rows_of(page.tables["parameters"][0])["base (dense)"] == ["12.35 M", "1.00×"]
    assert rows_of(page.tables["settings"][0])["mcl.optim.learning_rate"] == [
        str(RECIPES["dmu-openmoji"][1].mcl.optim.learning_rate)
    ]


def test_movement_of_routers_and_experts_equals_the_results(page):
    assert rows_of(page.tables["movement"][0])["vision_model.3"] == ["5.0%", "0.9900", "15.0%"]
    assert "stage1 3.1%, stage2 4.0%" in page.sections["movement"]


def test_routing_percentages_are_in_the_heatmap(whole, page):
    results = json.loads((whole / "results.json").read_text())["routing"]
    text = page.sections["routing"]
    cells = re.findall(r"\b(\d+)%", text)
    for row in results["vision"] + results["text"]:
        for share in row:
            assert f"{100 * share:.0f}" in cells


def test_a_run_that_resumed_adds_up_its_pieces(run, no_drawing):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "done", "work": "features", "stage": "stage1", "seconds": 9.0, "images": 600,
                               "peak_memory_bytes": 1 << 31}) + "\n")  # fmt: skip
    assert ["stage1", "features", "30.0 s", "4,000", "133.3", "2.00"] in page_of(run).tables["cost"][0]


# ---------------------------------------------------------------- the command


def test_the_command_names_the_recipe_and_only_what_differs():
    config = to_dict(RECIPES["dmu-openmoji"][1])
    config["seed"] = 7
    config["engine"]["activation_checkpointing"] = True
    config["data"]["cache_images"] = False
    config["evaluation"]["retrieval"] = ["my set=x.csv", "y"]
    assert reproduce_command(config).split(" \\\n    ") == [
        "llava-clipmoe train-encoder dmu-openmoji", "--data.no-cache-images", "--evaluation.retrieval 'my set=x.csv' y",
        "--engine.activation-checkpointing", "--seed 7",
    ]  # fmt: skip


def test_the_command_gives_the_config_back():
    tyro = pytest.importorskip("tyro")
    import shlex

    config = to_dict(RECIPES["dmu-openmoji"][1])
    config["mcl"]["optim"] |= {"learning_rate": 3e-5, "train_temperature": True, "betas": [0.9, 0.98]}
    config["base"]["text_positions"] = 100
    config["moe"]["vision_layers"] = [1, 3]
    config["evaluation"] |= {"retrieval": [], "attributes": None}
    _, _, recipe, *flags = shlex.split(reproduce_command(config).replace("\\\n", ""))
    default = RECIPES[recipe][1]
    assert to_dict(tyro.cli(type(default), default=default, args=flags)) == config


# ---------------------------------------------------------------- one file, safe, the same twice


def test_nothing_outside_the_page_is_referred_to(whole, page):
    text = (whole / "report.html").read_text(encoding="utf-8")
    assert not {"script", "link", "img", "iframe", "object"} & page.tags
    assert all(reference.startswith("#") for reference in page.references)
    assert not re.search(r"https?:|@import|//cdn|<!ENTITY", text)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique_and_every_inner_reference_has_its_target(whole, page):
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    clips = re.findall(r"url\(#([^)]*)\)", (whole / "report.html").read_text())
    assert clips and set(clips) <= set(page.ids)


def test_what_comes_from_data_is_escaped(run):
    evil = '<script>alert("x")</script>$a_b$&<!--'
    results = json.loads((run / "results.json").read_text())
    results["retrieval"][evil] = results["retrieval"].pop("held-out, names")
    results["attributes"] = {s: row | {"by_type": {evil: row["by_type"]["colour"]}} for s, row in
                             results["attributes"].items()}  # fmt: skip
    results["router_movement"][0]["block"] = f"{evil}.0"
    results["clusters"][0]["stage"] = evil
    results["routing"]["text_blocks"][0] = evil
    results["retrieval"]["held-out, long captions"][evil] = {"i2t_r1": 0.5}
    (run / "results.json").write_text(json.dumps(results))
    config = json.loads((run / "config.json").read_text())
    config["data"]["source"] = evil
    (run / "config.json").write_text(json.dumps(config))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": evil, "step": 1, "loss": 1.0}) + "\n")
        file.write(json.dumps({"event": "done", "work": evil, "stage": evil, "seconds": 1.0}) + "\n")
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text and "<!--" not in text
    assert page.open == []
    for section in ("retrieval", "loss", "clusters", "attributes", "cost", "settings", "reproduce"):
        assert evil in page.sections[section].replace("'\"'\"'", "'"), section
    console = Console(file=io.StringIO(), width=300)
    console.print(summary_table(results))
    assert "<script>" in console.file.getvalue()


def test_two_builds_are_the_same_bytes(whole, tmp_path):
    again = write_report(make_run(tmp_path / "quickstart")).read_bytes()
    assert again == (whole / "report.html").read_bytes()


def test_another_process_draws_the_same_bytes():
    """Hashes of strings, of which an SVG's ids could be made, differ from process to process."""
    bars = ("name", "title", ["row"], {"a": [1], "b": [2]}, "label")
    code = f"from train_encoder.report.figures import stacked_bars; print(stacked_bars(*{bars}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == figures.stacked_bars(*bars)


# ---------------------------------------------------------------- runs in progress


@pytest.mark.parametrize(
    ("absent", "sections"),
    [
        (
            "results.json",
            ["retrieval", "classification", "clusters", "attributes", "routing", "movement", "parameters"],
        ),
        ("metrics.jsonl", ["loss", "cost"]),
        ("config.json", ["settings", "reproduce"]),
    ],
)
def test_a_missing_file_is_named_and_the_rest_is_shown(run, no_drawing, absent, sections):
    (run / absent).unlink()
    page = page_of(run)
    assert list(page.sections) == SECTIONS
    assert f"{absent} is not there yet" in page.text
    assert [name for name in SECTIONS if "Missing" in page.sections[name]] == sections


def test_an_empty_run_gets_a_page(tmp_path):
    page = page_of(tmp_path)
    assert all("Missing" in page.sections[name] for name in SECTIONS)
    assert "No training step has been logged yet" in page.text


@pytest.mark.parametrize(
    "key", ["retrieval", "zero_shot", "attributes", "routing", "router_movement", "clusters", "parameters"]
)
def test_a_part_missing_from_the_results_is_named(run, no_drawing, key):
    results = json.loads((run / "results.json").read_text())
    del results[key]
    (run / "results.json").write_text(json.dumps(results))
    page = page_of(run)
    missing = [name for name in SECTIONS if "Missing" in page.sections[name]]
    assert missing == [{"router_movement": "movement", "zero_shot": "classification"}.get(key, key)]


@pytest.mark.parametrize(("setting", "section"), [("attributes", "attributes"), ("zero_shot", "classification")])
def test_what_nobody_asked_for_is_not_called_missing(run, no_drawing, setting, section):
    config, results = (json.loads((run / name).read_text()) for name in ("config.json", "results.json"))
    config["evaluation"][setting] = None if setting == "attributes" else []
    del results[setting]
    (run / "config.json").write_text(json.dumps(config))
    (run / "results.json").write_text(json.dumps(results))
    page = page_of(run)
    assert list(page.sections) == [name for name in SECTIONS if name != section] and "Missing" not in page.text


def test_a_run_in_progress_says_where_it_is(run, no_drawing):
    (run / "results.json").unlink()
    assert "Last logged: router, step 80 of 80" in page_of(run).text


def test_an_evaluation_in_progress_shows_the_variants_it_has(run, no_drawing):
    results = json.loads((run / "results.json").read_text())
    assert "The run is evaluated" in page_of(run).text
    short = {name: {s: systems[s] for s in VARIANTS[:3]} for name, systems in results["retrieval"].items()}
    (run / "results.json").write_text(json.dumps({"retrieval": short, "attributes": {}}))
    page = page_of(run)
    assert "Evaluation goes on" in page.text
    assert list(rows_of(page.tables["retrieval"][0])) == ["variant", *VARIANTS[:3]]


def test_clusters_of_a_run_in_progress_are_read_from_their_files(run, no_drawing):
    (run / "results.json").unlink()
    (run / "clusters").mkdir()
    first, second = np.arange(100) % 4, np.arange(100) // 50
    np.savez(run / "clusters" / "stage0.npz", labels=first)
    np.savez(run / "clusters" / "stage1.npz", labels=second)
    rows = rows_of(page_of(run).tables["clusters"][0])
    assert rows["stage1"][:4] == ["4", "25", "25", "25"]
    assert rows["stage2"][:4] == ["8", "12", "12", "13"]  # accumulated
    (run / "clusters" / "stage1.npz").write_bytes(b"torn")
    page = page_of(run)
    assert "clusters/stage1.npz cannot be read" in page.text and "stage1" in rows_of(page.tables["clusters"][0])


def test_a_torn_last_line_and_a_damaged_results_file_are_noted(run, no_drawing):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "router", "st')
    (run / "results.json").write_text('{"retrieval": ')
    page = page_of(run)
    assert "1 unreadable line(s) left out" in page.text and "results.json cannot be read" in page.text
    assert page.svgs["loss"] == 6  # the curves are still there


def test_a_loss_that_diverged_is_named_not_drawn_over(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "stage3", "step": 151, "loss": "nan", "contrastive": "nan"}) + "\n")
    page = page_of(run)
    assert "not finite (gaps in the curve): stage3" in page.sections["loss"]
    assert "nan" not in page.sections["loss"]


def test_a_variant_without_some_scores_gets_dashes(run, no_drawing):
    results = json.loads((run / "results.json").read_text())
    results["retrieval"]["held-out, names"]["stage2"] = {"i2t_r1": 0.5}
    (run / "results.json").write_text(json.dumps(results))
    assert rows_of(page_of(run).tables["retrieval"][1])["stage2"][1:] == ["–"] * 5


def test_a_run_that_does_not_exist_is_an_error_with_the_next_step(tmp_path, capsys):
    with pytest.raises(NotADirectoryError, match="--output-dir"):
        write_report(tmp_path / "nowhere")
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report.html'}\n"
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "usage: llava-clipmoe report" in capsys.readouterr().out


# ---------------------------------------------------------------- the terminal


def test_the_summary_has_a_row_a_variant_and_the_numbers_of_the_results(run):
    results = json.loads((run / "results.json").read_text())
    view = summary_table(results)
    columns = [[getattr(cell, "text", cell) for cell in column] for column in zip(*view.rows, strict=True)]
    assert columns[0] == VARIANTS
    colours = results["zero_shot"]["colours"]
    assert len(columns) == 1 + 2 * 2 + 1 + 1 + 1
    names = results["retrieval"]["held-out, names"]
    assert columns[3] == [f"{100 * names[s]['i2t_r1']:.1f}" for s in VARIANTS]
    assert columns[-3] == [f"{100 * colours[s]['top1']:.1f}" for s in VARIANTS]
    assert columns[-2] == [f"{100 * results['attributes'][s]['overall']:.1f}" for s in VARIANTS]
    assert columns[-1] == [f"{100 * mean_score(results, s):.1f}" for s in VARIANTS]
    assert [row[1].best for row in view.rows] == [False] * 9 + [True]


def test_the_mean_weighs_every_kind_of_score_alike():
    results = {
        "retrieval": {"a": {"base": {"i2t_r1": 0.2, "t2i_r1": 0.4}}, "b": {"base": {"i2t_r1": 0.0, "t2i_r1": 0.2}}},
        "zero_shot": {"colours": {"base": {"top1": 0.8}}},
        "attributes": {"base": {"overall": 0.3}},
    }
    assert mean_score(results, "base") == pytest.approx((0.2 + 0.8 + 0.3) / 3)
    assert mean_score(results, "clip-moe") is None, "not measured yet"
    assert mean_score({"retrieval": results["retrieval"]}, "base") is None, "one kind is no mean"
    assert mean_score({**results, "attributes": {}}, "base") == pytest.approx(0.5)
