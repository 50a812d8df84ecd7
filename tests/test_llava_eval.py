"""`eval-llava` without a model: scorers, converters, question files, and what it says about bad input."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from llava_clipmoe.files import read_json
from train_llava.eval import converters, questions, scorers
from train_llava.eval import run as command
from train_llava.eval.answers import EvalError, merge, read_answers, write_jsonl
from train_llava.eval.benchmarks import BENCHMARKS
from train_llava.eval.letters import letter
from train_llava.eval.runners import Run, _split, _write_tsv
from train_llava.eval.settings import EvalLlava
from train_llava.eval.truth import SHORT_PROMPT

REPOSITORY = Path(__file__).resolve().parent.parent
PICTURE = b"\x89PNG not looked into"


def upstream(name: str) -> ModuleType:
    """A module of upstream's llava.eval, loaded alone: the package itself would import the whole model."""
    package = importlib.util.find_spec("llava")
    if package is None or package.origin is None:
        pytest.skip("upstream LLaVA is not installed")
    spec = importlib.util.spec_from_file_location(name, Path(package.origin).parent / f"eval/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluate(*words: object) -> dict:
    """The command with these words; -> its results.json."""
    assert command.main(list(map(str, words))) == 0
    return read_json(Path(words[words.index("--output-dir") + 1]) / "results.json")


def score(name: str, answers: Path, data: Path, out: Path, *more: str) -> dict:
    """The results of an answers file."""
    return evaluate(name, "--answers", answers, "--data", data, "--output-dir", out, *more)


def table(path: Path, rows: list[dict]) -> Path:
    lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def saying(*texts: str) -> list[dict]:
    return [{"question_id": i, "text": text, "model_id": "llava-x"} for i, text in enumerate(texts)]


def rows_of(names: str, *rows: tuple) -> list[dict]:
    """Answered questions with these fields."""
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


# --- POPE -----------------------------------------------------------------------------------------------------------


def test_pope_by_hand():
    rows = [("random", "yes", "Yes"), ("random", "yes", "No, it is not."), ("random", "no", "Yes, there is."),
            ("random", "no", "no"), ("popular", "no", "There is none. No."), ("popular", "yes", "Sure")]  # fmt: skip
    found = scorers.pope(rows_of("category label said", *rows))
    assert found["by_category"]["random"] == {
        "accuracy": 50, "precision": 50, "recall": 50, "f1": 50, "yes_ratio": 50, "n": 4,
    }  # fmt: skip
    # only the first sentence is read: "There is none" has neither "no" nor "not", and so is a yes
    popular = found["by_category"]["popular"]
    assert (popular["precision"], popular["recall"], popular["yes_ratio"]) == (50, 100, 100)
    assert found["mean_f1"] == pytest.approx((50 + 200 / 3) / 2) and found["mean_accuracy"] == 50


def test_pope_where_nothing_is_yes_scores_zero():
    rows = rows_of("category label said", ("random", "yes", "no"), ("random", "no", "no"))
    assert scorers.pope(rows)["by_category"]["random"]["f1"] == 0


def test_pope_equals_upstreams_script(tmp_path):
    draw = random.Random(0)
    words = ["yes", "No", "no", "not", "Yes", "a", "nothing,", "there. no", "No, it", "not.", "NO"]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(400)]
    labels = [draw.choice(["yes", "no"]) for _ in texts]
    write_jsonl(tmp_path / "labels.json", [{"label": label} for label in labels])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        upstream("eval_pope").eval_pope([{"text": text} for text in texts], tmp_path / "labels.json")
    theirs = dict(line.split(": ") for line in printed.getvalue().splitlines() if ": " in line)
    rows = rows_of("category label said", *(("all", *pair) for pair in zip(labels, texts, strict=True)))
    ours = scorers.pope(rows)["by_category"]["all"]
    names = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "f1",
             "Yes ratio": "yes_ratio"}  # fmt: skip
    for their_name, our_name in names.items():
        assert ours[our_name] == pytest.approx(100 * float(theirs[their_name])), our_name
    assert 30 < ours["yes_ratio"] < 70


@pytest.fixture
def pope(tmp_path) -> Path:
    folder = tmp_path / "pope"
    (folder / "coco").mkdir(parents=True)
    rows = [{"question_id": i, "image": f"{i}.jpg", "text": "Is it?", "category": "random"} for i in range(3)]
    write_jsonl(folder / "llava_pope_test.jsonl", rows)
    labels = [{"image": f"{i}.jpg", "label": label} for i, label in enumerate(("yes", "no", "no"))]
    write_jsonl(folder / "coco/coco_pope_random.json", labels)
    return folder


def test_pope_from_files_matches_labels_by_the_questions_order_not_the_answers(pope, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", reversed(saying("Yes", "No", "Yes")))
    out = tmp_path / "out"
    results = score("pope", tmp_path / "a.jsonl", pope, out)
    assert results["metrics"]["by_category"]["random"]["accuracy"] == pytest.approx(200 / 3)
    assert (results["n"], results["model"], results["headline"]) == (3, "llava-x", "mean_f1")
    assert results["paper"] == {"llava-1.5-7b": 85.9, "llava-1.5-7b + CLIP-MoE": 86.4} and results["seconds"] >= 0


def test_pope_labels_of_another_version_are_refused(pope, tmp_path):
    labels = [{"image": f"{i}.jpg", "label": "no"} for i in (0, 2, 1)]
    write_jsonl(pope / "coco/coco_pope_random.json", labels)
    write_jsonl(tmp_path / "a.jsonl", saying("Yes", "No", "Yes"))
    with pytest.raises(EvalError, match=r"question 1: image 1\.jpg against 2\.jpg"):
        score("pope", tmp_path / "a.jsonl", pope, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- MME ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mme(tmp_path) -> Path:
    """Two tasks of MME in both of its folder layouts, with LLaVA's question file over them."""
    folder = tmp_path / "MME"
    release = folder / "MME_Benchmark_release_version"
    (release / "count").mkdir(parents=True)
    (release / "artwork/questions_answers_YN").mkdir(parents=True)
    rows = []
    for task, name, image in (("count", "1", "count/1.jpg"), ("count", "2", "count/2.jpg"),
                              ("artwork", "3", "artwork/images/3.jpg")):  # fmt: skip
        place = release / task / ("questions_answers_YN" if task == "artwork" else "")
        asked = ("Is it one?", "Yes"), ("Is it two?", "No")
        (place / f"{name}.txt").write_text("".join(f"{text} Please answer yes or no.\t{a}\n" for text, a in asked))
        rows += [{"question_id": f"{task}/{name}.jpg", "image": image, "text": f"{text}\n{SHORT_PROMPT}"} for text, _ in
                 asked]  # fmt: skip
    write_jsonl(folder / "llava_mme.jsonl", rows)
    return folder


def test_mme_scores_and_files_by_hand(mme, tmp_path):
    asked = questions.llava_questions(mme / "llava_mme.jsonl")
    texts = ["Yes", "No", "yes.", "Yes, it is", "I see\ta yes", "no"]
    answers = [
        {"question_id": q["question_id"], "prompt": q["text"], "text": t} for q, t in zip(asked, texts, strict=True)
    ]
    write_jsonl(tmp_path / "llava-m.jsonl", answers)
    metrics = score("mme", tmp_path / "llava-m.jsonl", mme, tmp_path / "out")["metrics"]
    assert metrics["by_category"]["count"] == {"score": 125, "acc": 75, "acc_plus": 50, "n": 4}
    assert metrics["by_category"]["artwork"] == {"score": 50, "acc": 50, "acc_plus": 0, "n": 2}, "'i se' is neither"
    assert (metrics["perception"], metrics["cognition"], metrics["total"]) == (175, 0, 175)
    lines = (tmp_path / "out/upload/llava-m/artwork.txt").read_text().splitlines()
    assert lines == ["3.jpg\tIs it one? Please answer yes or no.\tYes\tI see a yes",
                     "3.jpg\tIs it two? Please answer yes or no.\tNo\tno"]  # fmt: skip


def test_mme_cognition_and_a_single_question_under_limit():
    rows = [
        ("code_reasoning", "a", "Yes", "yes"),
        ("code_reasoning", "a", "No", "no"),
        ("code_reasoning", "b", "No", "no"),
    ]
    assert scorers.mme(rows_of("task image truth said", *rows)) == {
        "perception": 0, "cognition": 200, "total": 200,
        "by_category": {"code_reasoning": {"score": 200, "acc": 100, "acc_plus": 100, "n": 3}},
    }  # fmt: skip


# --- short answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "normal"),
    [("The two dogs.", "2 dogs"), ("Dont, know?", "don't know"), ("10,000", "10000"), ("3.5 kg.", "3.5 kg"),
     ("black/white", "black white"), ("black / white", "black  white".replace("  ", " ")), ("Joe's", "joe 's"),
     ("None", "0"), ("an  apple\nand a pear", "apple and pear"), ("", "")],
)  # fmt: skip
def test_normalise_by_hand(said, normal):
    assert scorers.normalise(said) == normal


def test_normalise_equals_upstreams_processor():
    module = upstream("m4c_evaluator")
    processor = module.EvalAIAnswerProcessor()
    draw = random.Random(0)
    parts = [*"ab '.,?!-/()19\n\t\"", "'s", "the ", "two ", "none ", "mr. ", *(f"{w} " for w in processor.CONTRACTIONS)]
    for _ in range(5000):
        text = "".join(draw.choices(parts, k=draw.randint(0, 12)))
        assert scorers.normalise(text) == processor(text), repr(text)
    lower = {key: value for key, value in processor.CONTRACTIONS.items() if key == key.lower() and key != value}
    assert lower == scorers.CONTRACTIONS


def test_vqa_accuracy_by_hand():
    people = ["red"] * 2 + ["Blue."] * 8
    # of ten leave-one-outs: two see one other "red" (1/3), eight see two (2/3)
    assert scorers.vqa_accuracy("red", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert scorers.vqa_accuracy("the blue", people) == 1 and scorers.vqa_accuracy("green", people) == 0


def test_textvqa_equals_upstreams_evaluator():
    draw = random.Random(1)
    words = ["stop", "Stop.", "the stop", "two", "2", "go", "dont", "don't"]
    rows = [(draw.choice(words), draw.choices(words, k=10)) for _ in range(200)]
    theirs = upstream("m4c_evaluator").TextVQAAccuracyEvaluator().eval_pred_list(
        [{"pred_answer": text, "gt_answers": people} for text, people in rows]
    )  # fmt: skip
    assert (
        scorers.textvqa(rows_of("said answers", *rows))["accuracy"] == pytest.approx(100 * theirs)
        and 20 < 100 * theirs < 80
    )


def test_textvqa_knows_its_questions_by_image_and_words(tmp_path):
    """Questions share their image's id, and the line of OCR tokens stands between question and instruction."""
    texts = [f"What {w}?\nReference OCR token: A, B\n{SHORT_PROMPT}" for w in "ab"]
    asked = [{"question_id": "img", "image": "img.jpg", "text": text} for text in texts]
    write_jsonl(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", asked)
    people = [{"image_id": "img", "question": f"what {w.upper()}?", "answers": [w] * 10} for w in "ab"]
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": people}))
    answers = [
        {"question_id": "img", "prompt": texts[1], "text": "B"},
        {"question_id": "img", "prompt": texts[0], "text": "b"},
    ]
    write_jsonl(tmp_path / "a.jsonl", answers)
    assert score("textvqa", tmp_path / "a.jsonl", tmp_path, tmp_path / "out")["metrics"]["accuracy"] == 50
    without = questions.textvqa_without_ocr(tmp_path / "llava_textvqa_val_v051_ocr.jsonl")
    assert without[0]["text"] == "What a?\nAnswer the question using a single word or phrase."


def test_gqa_predictions_and_accuracy(tmp_path):
    asked = [{"question_id": str(i), "image": "x.jpg", "text": "?"} for i in range(3)]
    write_jsonl(tmp_path / "llava_gqa_testdev_balanced.jsonl", asked)
    truth = {str(i): {"answer": a, "types": {"structural": t}} for i, (a, t) in enumerate((("yes", "verify"),
             ("red", "query"), ("cat", "query")))}  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "data/testdev_balanced_questions.json").write_text(json.dumps(truth))
    answers = [{"question_id": str(i), "text": text} for i, text in enumerate(("Yes.", "blue", "Cat"))]
    write_jsonl(tmp_path / "a.jsonl", answers)
    results = score("gqa", tmp_path / "a.jsonl", tmp_path, tmp_path / "out")
    assert results["metrics"] == {"accuracy": pytest.approx(200 / 3), "by_category": {"verify": 100, "query": 50}}
    assert json.loads(Path(results["upload"]).read_text())[2] == {"questionId": "2", "prediction": "cat"}


def test_vqav2_fills_the_rest_of_the_split_and_vizwiz_names_images(tmp_path):
    rows = rows_of("question_id image said", (0, "0.jpg", "The two dogs."), (1, "1.jpg", "Dont know"))
    write_jsonl(tmp_path / "split.jsonl", rows_of("question_id", (1,), (5,), (0,)))
    converters.vqav2_json(tmp_path / "v.json", rows, {"split": tmp_path / "split.jsonl"})
    said = json.loads((tmp_path / "v.json").read_text())
    assert said == [{"question_id": 1, "answer": "don't know"}, {"question_id": 5, "answer": ""},
                    {"question_id": 0, "answer": "2 dogs"}]  # fmt: skip
    converters.vizwiz_json(tmp_path / "w.json", rows, {})
    assert json.loads((tmp_path / "w.json").read_text())[0] == {"image": "0.jpg", "answer": "2 dogs"}
    with pytest.raises(EvalError, match=r"1 answered questions are not in test2015, e\.g\. id 1"):
        write_jsonl(tmp_path / "split.jsonl", rows_of("question_id", (0,)))
        converters.vqav2_json(tmp_path / "x.json", rows, {"split": tmp_path / "split.jsonl"})


# --- OCRBench, MMStar, MMVP -----------------------------------------------------------------------------------------


def test_ocrbench_reads_all_its_forms_and_scores(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    official = [
        {
            "dataset_name": "IIIT5K",
            "type": "Regular Text Recognition",
            "question": "q",
            "answers": "Stop",
            "image_path": "a/1.png",
        },
        {"dataset_name": "HME100k", "type": "HMER", "question": "q", "answers": ["x ^ 2"], "image_path": "b.png"},
    ]
    (tmp_path / "OCRBench.json").write_text(json.dumps(official))
    asked = questions.ocrbench_questions(tmp_path / "OCRBench.json")
    assert asked[0]["image"] == "a/1.png"
    picture = {"bytes": PICTURE, "path": None}
    hub = [{"dataset": row["dataset_name"], "question_type": row["type"], "question": "q", "image": picture,
            "answer": list(q["answers"])} for row, q in zip(official, asked, strict=True)]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(hub), tmp_path / "test.parquet")
    encoded = base64.b64encode(PICTURE).decode()
    rows = [
        {"index": i, "image": encoded if i == 0 else 0, "question": "q", "answer": answer, "category": category}
        for i, (answer, category) in enumerate(
            (("['Stop']", asked[0]["category"]), ("['x ^ 2']", asked[1]["category"]))
        )
    ]
    table(tmp_path / "OCRBench.tsv", rows)
    for name in ("test.parquet", "OCRBench.tsv"):
        other = questions.ocrbench_questions(tmp_path / name)
        assert [(q["category"], q["answers"]) for q in other] == [(q["category"], q["answers"]) for q in asked]
        questions.repeat_images(other, tmp_path / name)
        questions.extract_images(other, tmp_path / name[:4])
        assert {(tmp_path / name[:4] / q["image"]).read_bytes() for q in other} == {PICTURE}
    rows = [(q["category"], text, q["answers"]) for q, text in zip(asked, ("it says STOP.", "X^2"), strict=True)]
    assert scorers.ocrbench(rows_of("category said answers", *rows)) == {
        "score": 1, "percent": 50,
        "by_category": {"Regular Text Recognition": 1, scorers.HANDWRITTEN_MATHS: 0},
    }  # fmt: skip
    assert scorers.ocrbench_right(scorers.HANDWRITTEN_MATHS, "= x^2", ["x ^ 2"])


def test_mmstar_by_category(tmp_path):
    encoded = base64.b64encode(PICTURE).decode()
    rows = [{"index": i, "question": f"Which?{inline}", "image": encoded, "answer": "B", "category": category}
            for i, (inline, category) in enumerate(((" Options: A: one, B: two, C: three, D: 4", "math"),
                                                    (" Options: A: one, B: two", "math"), ("", "logic")))]  # fmt: skip
    table(tmp_path / "MMStar.tsv", rows)
    asked = questions.mmstar_questions(tmp_path / "MMStar.tsv")
    assert asked[0]["options"] == {"A": "one", "B": "two", "C": "three", "D": "4"}
    assert asked[0]["text"].endswith("D: 4\nAnswer with the option's letter from the given choices directly.")
    write_jsonl(tmp_path / "a.jsonl", saying("B", "two", "A dog"))
    metrics = score("mmstar", tmp_path / "a.jsonl", tmp_path, tmp_path / "out")["metrics"]
    assert metrics == {"accuracy": pytest.approx(200 / 3), "unread": 1, "by_category": {"math": 100, "logic": 0}}


def test_mmvp_counts_pairs(tmp_path):
    lines = [
        "Index,Question,Options,Correct Answer",
        '1,"Open, or closed?",(a) Open (b) Closed,(a)',
        "2,Open or closed?,(a) Open (b) Closed,(b)",
        "3,Left?,(a) Yes (b) No,(a)",
        "4,Left?,(a) Yes (b) No,(b)",
    ]
    (tmp_path / "Questions.csv").write_text("\n".join(lines))
    asked = questions.mmvp_questions(tmp_path / "Questions.csv")
    assert asked[0]["image"] == "1.jpg" and asked[0]["text"].startswith("Open, or closed? (a) Open (b) Closed\nAnswer")
    answers = [{"question_id": i, "text": text} for i, text in zip(range(1, 5), ("(a)", "B", "Yes", "A"), strict=True)]
    write_jsonl(tmp_path / "a.jsonl", answers)
    metrics = score("mmvp", tmp_path / "a.jsonl", tmp_path, tmp_path / "out")["metrics"]
    assert metrics == {"pair_accuracy": 50, "accuracy": 75, "pairs": 2, "unread": 0}
    (tmp_path / "Questions.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(EvalError, match="3 rows: two consecutive rows are a pair"):
        questions.mmvp_questions(tmp_path / "Questions.csv")


@pytest.mark.parametrize(
    ("text", "named"),
    [("B", "B"), ("b.", "B"), ("(B)", "B"), ("B. a dog", "B"), ("B: x", "B"), ("The answer is B.", "B"),
     ("Answer: (c)", "C"),
     ("The correct option is A", "A"), ("a cat", "A"), ("Two birds.", "C"), ("A bird", None), ("E", None),
     ("", None), ("A dog", "B")],
)  # fmt: skip
def test_the_letter_of_an_answer(text, named):
    assert letter(text, {"A": "a cat", "B": "a dog", "C": "two birds"}) == named


COLOURS = {"A": "red", "B": "blue", "C": "green", "D": "yellow"}


@pytest.mark.parametrize("text", [
    "B", "b", "(B)", "[B]", "{B}", "B.", "B!", "B;", "B?", "B...", '"B"', "'B'", "“B”", "B</s>", "<s> B", "B\n",
    "- B", "### B", "B\n\nThe circle is blue.", "B\n\nA is wrong because the circle is not red.",
    "B. Option A is wrong.", "B. blue", "B) blue", "b) blue", "B blue", "B: blue", "B - blue", "B (blue)", "B, blue",
    "B.blue", "B: it has vitamin C", "**B**", "**B.** blue", "*B*", "__B__", "`B`", "**B", "The answer is **B**.",
    "**Answer: B**", "**Answer:** B", "The correct answer is **B. blue**", "\\boxed{B}", "$\\boxed{B}$",
    "\\boxed{\\text{B}}", "\\(B\\)", "<answer>B</answer>", "Blue", "blue.", "**blue**", "blue!", "“Blue”",
    "The answer is blue.", "Answer: blue", "It is blue.", "Answer: B", "Answer:\nB", "Answer B", "Final Answer: (B)",
    "Option B", "Choice B", "option B is correct.", "ASSISTANT: B", "The answer is B", "The answer is (B) blue.",
    "the answer is b.", "I think the answer is B.", "I think it is B.", "The answer to the question is B.",
    "The correct answer is option B: blue.", "The answer is B because it is blue.", "B is correct",
    "B is the right answer.", "B, because it is blue", "I would choose B.", "I choose option B",
    "It is round and blue. Therefore, the answer is B.", "It is blue, so the correct option is (B).",
    "Red is wrong: \\boxed{B}", "A. red\nB. blue\nC. green\nD. yellow\nAnswer: B", "Ｂ", "Ⓑ", "（B）", "【B】",
    "「B」", "B。", "B、蓝色", "B．蓝色", "B：蓝", "答案是B", "答案：B", "答案：（B）", "【答案】B", "答案为 B",
    "答案B", "选B", "选项B", "选择B", "应选B", "故选B。", "我选择B", "正确答案是B。", "正确的选项是B", "B选项",
    "B选项是正确的", "B是正确的", "选B因为它是蓝色",
])  # fmt: skip
def test_one_letter_is_read_in_whatever_form_it_is_given(text):
    assert letter(text, COLOURS) == "B"


@pytest.mark.parametrize("text", [
    "", ".", "**", "Answer:", "The answer is", "none of the above", "A dog", "a dog.", "A cat is here", "I see a cat",
    "I see a...", "A red car", "B dog", "A is for apple", "I am A fan", "The answer is A dog", "The answer is a dog",
    "People answer a question", "C is visible.", "A is right behind the tree", "A-frame house", "D'oh!", "A's", "A+",
    "C#", "C++", "B2", "BB", "A.I. is here", "D.C. is the capital", "E", "(E)", "The answer is E.", "B or E",
    "Both A and B", "A and B", "A, B", "A,B", "A/B", "A & B", "A; B", "A B", "AB", "ABCD", "(A) (B)", "A\nB",
    "B or C", "B、C", "B? C?", "A. red\nB. blue", "A. red B. blue", "(A) red (B) blue (C) green (D) yellow",
    "A: red, B: blue", "A red, a blue", "The answer is B or C.", "The answer is B, C", "The answer is either A or B",
    "The answer is B. No, the answer is C.", "It is B, not A", "I think it is B, but it could be C",
    "Between A and C, the answer could be either", "blue or red", "Not B", "B is wrong", "B is not correct",
    "Option B is incorrect.", "The answer is not B.", "The answer isn't B", "I don't think the answer is B.",
    "Neither B is correct", "If the answer is B, it is blue", "unlike option C, it is blue", "A和B", "选A和B",
    "选B或C", "选B还是C", "不选B", "不应选B", "答案不是B", "选项B是错误的", "B选项是错的", "B是错的", "选项A和B都对",
])  # fmt: skip
def test_what_names_no_option_or_two_is_unread(text):
    assert letter(text, COLOURS) is None


def test_an_options_own_text_is_no_second_letter():
    options = {"A": "Washington, D.C.", "B": "Vitamin C", "C": "C", "D": "A and B"}
    for text, named in (("Washington, D.C.", "A"), ("B. Vitamin C", "B"), ("The answer is B: Vitamin C.", "B"),
                        ("Vitamin C", "B"), ("A and B", "D"), ("D. A and B", "D"), ("B Vitamin C", "B"),
                        ("A. D.", None)):  # fmt: skip
        assert letter(text, options) == named, text
    assert letter("B. A", {"A": "C", "B": "A", "C": "B"}) == "B", "letters are options of many puzzles"
    assert letter("A", dict.fromkeys("ABCD", "")) == "A" and letter("A a+(b", {"A": "a+(b"}) == "A"


def test_a_long_answer_is_read_in_a_moment():
    start = time.monotonic()
    for text in (
        "*a " * 3000,
        "final " * 2000,
        "\n" * 9000,
        "*" * 9000,
        "the answer is " * 900,
        "B" + " " * 9000 + "x",
    ):
        assert letter(text, COLOURS) is None
    assert time.monotonic() - start < 10


# --- MMBench --------------------------------------------------------------------------------------------------------

HEAD = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
        "comment", "split")  # fmt: skip


def _row(index: int, options: list[str], answer: str, category: str = "colour", hint: str = "") -> dict:
    cells = (index, "Which?", hint, *options, *[""] * (4 - len(options)), answer, category, "aa", "s", "l2", "c", "dev")
    return dict(zip(HEAD, cells, strict=True))


def test_mmbench_circular_copies_count_together_and_a_cut_group_does_not(tmp_path):
    rows = [_row(1, ["red", "blue"], "A"), _row(2, ["x", "y"], "B", "shape"), _row(1_000_001, ["blue", "red"], "B"),
            _row(1_000_002, ["y", "x"], "A", "shape")]  # fmt: skip
    table(tmp_path / "t.tsv", rows)
    answers = [
        {"question_id": row["index"], "text": text} for row, text in zip(rows, ("A", "B", "red", "B"), strict=True)
    ]
    write_jsonl(tmp_path / "a.jsonl", answers)
    words = "mmbench", tmp_path / "a.jsonl", tmp_path / "t.tsv", tmp_path / "out"
    metrics = score(*words)["metrics"]
    assert (metrics["accuracy"], metrics["circular_accuracy"], metrics["circular_questions"]) == (75, 50, 2)
    assert metrics["circular_by_category"] == {"colour": 100, "shape": 0}
    metrics = score(*words, "--limit", "3")["metrics"]
    assert (metrics["accuracy"], metrics["circular_accuracy"], metrics["circular_questions"]) == (100, 100, 1)


def test_mmbench_all_rounds_read_the_letter_of_the_turned_options(tmp_path):
    table(tmp_path / "t.tsv", [_row(7, ["red", "blue", "green"], "B", hint="Look.")])
    asked = questions.mmbench_questions(tmp_path / "t.tsv", all_rounds=True)
    assert asked[1]["text"] == "Look.\nWhich?\nA. blue\nB. green\nC. red" and asked[1]["option_char"] == ["B", "C", "A"]
    answers = [{"question_id": 7, "round_id": r, "text": text} for r, text in enumerate("BAC")]
    write_jsonl(tmp_path / "a.jsonl", answers)
    assert (
        score("mmbench", tmp_path / "a.jsonl", tmp_path / "t.tsv", tmp_path / "out")["metrics"]["circular_accuracy"]
        == 100
    )


def test_mmbench_xlsx_is_upstreams_table(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("openpyxl")
    table(tmp_path / "t.tsv", [_row(1, ["red", "7"], "A"), _row(2, ["None", "y"], "B")])
    answers = rows_of("question_id said", (1, "=A1\x07\uffff"), (2, "B"))
    converters.mmbench_xlsx(tmp_path / "ours.xlsx", answers, {"questions": tmp_path / "t.tsv"})
    ours = pandas.read_excel(tmp_path / "ours.xlsx")
    assert list(ours.columns) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert list(ours["prediction"]) == ["=A1\ufffd", "B"], "no formula, no control characters, none that XML forbids"
    assert list(ours["index"]) == [1, 2] and pandas.isna(ours["A"][1]), "'None' is empty, as in upstream's table"


def _with_images(file: Path, cells: dict[int, object]) -> Path:
    return table(file, [{**_row(index, ["red", "blue"], "A"), "image": cell} for index, cell in cells.items()])


ONE, TWO = (base64.b64encode(PICTURE + number).decode() for number in (b"1", b"2"))


def test_a_row_may_repeat_the_picture_of_another_through_any_number_of_rows(tmp_path):
    file = _with_images(tmp_path / "t.tsv", {1_000_001: 2_000_001, 2_000_001: 1, 1: ONE, 2: TWO, 1_000_002: 2})
    for rounds in (False, True):
        asked = questions.mmbench_questions(file, all_rounds=rounds)
        questions.repeat_images(asked, file)
        found = {question["question_id"]: questions.image_bytes(question) for question in asked}
        assert found == {1: PICTURE + b"1", 2: PICTURE + b"2", 1_000_001: PICTURE + b"1", 2_000_001: PICTURE + b"1",
                         1_000_002: PICTURE + b"2"}  # fmt: skip
    mmstar = [{"index": i, "question": "q", "image": cell, "answer": "A", "category": "c"} for i, cell in
              enumerate((ONE, "0"))]  # fmt: skip
    for name, rows in (("m.tsv", mmstar), ("m.json", [{**row, "image": ONE if i == 0 else 0} for i, row in
                                                     enumerate(mmstar)])):  # fmt: skip
        table(tmp_path / name, rows) if name == "m.tsv" else (tmp_path / name).write_text(json.dumps(rows))
        asked = questions.mmstar_questions(tmp_path / name)
        questions.repeat_images(asked, tmp_path / name)
        assert [questions.image_bytes(question) for question in asked] == [PICTURE + b"1"] * 2


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({1: ONE, 1_000_001: 7}, r"row with index 1000001 repeats .* index 7, which is not there"),
        ({1: ONE, 2: 3, 3: 9}, r"row with index 3 repeats .* index 9, which is not there"),
        ({1: 1}, r"row with index 1 repeats .* index 1, and that leads back to it"),
        ({1: 2, 2: 3, 3: 2}, r"row with index 3 repeats .* index 2, and that leads back to it"),
    ],
)
def test_a_row_that_repeats_no_picture_is_named_before_a_model_is_asked(tmp_path, cells, message):
    file = _with_images(tmp_path / "t.tsv", cells)
    words = ("mmbench", "--model-path", "llava", "--data", file, "--output-dir", tmp_path / "out", "--limit", "1")
    for more in ((), ("--batch-size", "2")):
        with pytest.raises(EvalError, match=rf"t\.tsv: the {message}"):
            evaluate(*words, *more)
    assert not (tmp_path / "out").exists()
    answers = [{"question_id": index, "text": "A"} for index in cells]
    write_jsonl(tmp_path / "a.jsonl", answers)
    score("mmbench", tmp_path / "a.jsonl", file, tmp_path / "out")


@pytest.mark.parametrize("cell", ["", "None", "not base64", "größer"])
def test_a_row_without_a_picture_is_named_before_a_model_is_asked(tmp_path, cell):
    file = _with_images(tmp_path / "t.tsv", {1: ONE, 2: cell})
    for more in ((), ("--batch-size", "2")):
        words = ("mmbench", "--model-path", "llava", "--data", file, "--output-dir", tmp_path / "out", *more)
        with pytest.raises(EvalError, match=r"question 2 (has no picture|is no base64)"):
            evaluate(*words)


def test_pictures_of_rows_with_one_index_or_of_another_table_are_not_mixed_up(tmp_path):
    for image in (b"1", b"2"):
        asked = [{"question_id": i, "image_data": PICTURE + image + tail} for i, tail in
                 (("a/../b", b""), ("*", b"x"), ("*", b"y"), ("1", b"z"), ("1.5", b"z"))]  # fmt: skip
        expected = [question["image_data"] for question in asked]
        questions.extract_images(asked, tmp_path / "images")
        assert [(tmp_path / "images" / question["image"]).read_bytes() for question in asked] == expected
    assert len(list((tmp_path / "images").iterdir())) == 8 and len(list(tmp_path.iterdir())) == 1


def test_upstreams_runner_gets_the_rows_as_they_are_with_their_own_pictures(tmp_path):
    """A share of the rows, whose pictures stand in others; cells with what a table may hold. The row behind them keeps
    pandas from making numbers of options."""
    pandas = pytest.importorskip("pandas")
    rows = [{**_row(index, ["1", "2"], "A", hint="a\rb"), "image": cell, "question": f'{index} "?"\n\u2028\t'}
            for index, cell in ((1, ONE), (2, TWO), (1_000_001, "1"), (1_000_002, "2"))]  # fmt: skip
    file = tmp_path / "t.tsv"
    pandas.DataFrame(rows).to_csv(file, sep="\t", index=False, quoting=1)
    asked = questions.mmbench_questions(file)
    questions.repeat_images(asked, file)
    run = Run(EvalLlava("mmbench"), BENCHMARKS["mmbench"], asked, file, tmp_path, ("",))
    _write_tsv(run, asked[2:], tmp_path / "share.tsv")
    share = pandas.read_table(tmp_path / "share.tsv", keep_default_na=False)
    assert list(share["index"]) == [1_000_001, 1_000_002, -1] and list(share["A"]) == ["1", "1", "text"]
    share = share[:2]
    assert list(share["image"]) == [ONE, TWO]
    expected = pandas.DataFrame(rows[2:]).drop(columns="image")
    pandas.testing.assert_frame_equal(share.drop(columns="image"), expected)


def test_golden_mmbench_xlsx_of_llava_15(shared_data, tmp_path, capsys):
    """LLaVA's published answers give LLaVA's published upload, with the tsv and without; and its 67.7 points."""
    pandas = pytest.importorskip("pandas")
    golden = pandas.read_excel(shared_data / "llava_eval/mmbench/upload-llava-v1.5-13b.xlsx")
    file = shared_data / "llava_eval/mmbench/answers-llava-v1.5-13b.jsonl"
    tsv = golden.drop(columns="prediction").assign(hint="", category="all", image="aa", comment="", source="")
    tsv["l2-category"] = ""
    tsv.to_csv(tmp_path / "mmbench_dev_20230712.tsv", sep="\t", index=False)
    results = score("mmbench", file, tmp_path, tmp_path / "out")
    pandas.testing.assert_frame_equal(pandas.read_excel(results["upload"]), golden)
    assert results["n"] == 4377 and results["metrics"]["circular_accuracy"] == pytest.approx(67.7, abs=0.05)

    results = evaluate("mmbench", "--answers", file, "--output-dir", tmp_path / "alone")
    alone = pandas.read_excel(results["upload"])
    same = ["index", "A", "B", "C", "D", "prediction"]
    pandas.testing.assert_frame_equal(alone[same], golden[same])
    ends = [a.endswith(b) for a, b in zip(alone["question"], golden["question"], strict=True)]
    assert all(ends), "the question stands behind its hint"
    assert results["metrics"] == {} and "Not scored" in capsys.readouterr().out


def test_golden_mmvet_json_of_llava_15(shared_data, tmp_path):
    folder = shared_data / "llava_eval/mm-vet"
    file = folder / "answers-llava-v1.5-13b.jsonl"
    golden = json.loads((folder / "results-llava-v1.5-13b.json").read_text())
    for name, words in (("with", ("--data", folder)), ("alone", ())):
        results = evaluate("mmvet", "--answers", file, "--output-dir", tmp_path / name, *words)
        assert json.loads(Path(results["upload"]).read_text()) == golden
        assert results["upload"].endswith("llava-v1.5-13b.json") and "mm-vet_evaluator" in results["next_step"]


# --- text as editors and models leave it -----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path) -> Path:
    """A folder NAME for each benchmark: its data, and answers.jsonl with an answer to every question."""
    yes_no, what = ["Is it one?", "Is it two?"], ["What is it?", "Where is it?"]
    image = base64.b64encode(PICTURE).decode()
    for name in BENCHMARKS:
        folder = tmp_path / name
        folder.mkdir()
        texts = {"pope": yes_no, "mme": [f"{text}\n{SHORT_PROMPT}" for text in yes_no]}.get(name, what)
        ids = {"mme": ["count/1.jpg"] * 2, "textvqa": ["i", "i"], "textvqa_no_ocr": ["i", "i"],
               "mmbench": [0, 1_000_000], "mmbench_cn": [0, 1_000_000]}.get(name, [0, 1])  # fmt: skip
        asked = [{"question_id": i, "image": f"{i}", "text": text, "category": "random"} for i, text in
                 zip(ids, texts, strict=True)]  # fmt: skip
        write_jsonl(folder / "answers.jsonl", [{"question_id": row["question_id"], "prompt": row["text"],
                                                "text": "A" if name.startswith("mm") and name != "mme" else "Yes"}
                                               for row in asked])  # fmt: skip
        file = folder / BENCHMARKS[name].needs[0].paths[-1]
        if name.startswith("mmbench"):
            table(file, [_row(i, ["red", "blue"], "A") for i in ids])
        elif name == "mmstar":
            table(folder / "MMStar.tsv", [{"index": i, "question": "q", "image": image, "answer": "A", "category": "c"}
                                          for i in range(2)])  # fmt: skip
        elif name == "ocrbench":
            rows = [{"index": i, "question": "q", "image": image, "answers": ["yes"], "type": "t"} for i in range(2)]
            (folder / "OCRBench.json").write_text(json.dumps(rows))
        elif name == "mmvp":
            rows = [f"{i},Open?,(a) Yes (b) No,(a)\n" for i in range(2)]
            file.write_text("Index,Question,Options,Correct Answer\n" + "".join(rows))
            (folder / "MMVP Images").mkdir()
        else:
            write_jsonl(file, asked)
    (tmp_path / "pope/coco").mkdir()
    write_jsonl(tmp_path / "pope/coco/coco_pope_random.json", [{"image": str(i), "label": "yes"} for i in range(2)])
    place = tmp_path / "mme/MME_Benchmark_release_version/count"
    place.mkdir(parents=True)
    (place / "1.txt").write_text("".join(f"{text} Please answer yes or no.\tYes\n" for text in yes_no))
    for name in ("textvqa", "textvqa_no_ocr"):
        people = [{"image_id": "i", "question": text, "answers": ["yes"] * 10} for text in what]
        (tmp_path / name / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": people}))
    (tmp_path / "gqa/data").mkdir()
    truth = {str(i): {"answer": "yes", "types": {"structural": "verify"}} for i in range(2)}
    (tmp_path / "gqa/data/testdev_balanced_questions.json").write_text(json.dumps(truth))
    write_jsonl(tmp_path / "vqav2/llava_vqav2_mscoco_test2015.jsonl", [{"question_id": i} for i in range(2)])
    return tmp_path


def scored(folder: Path, out: Path) -> tuple[dict, bytes | None]:
    """The metrics of one of `small`'s folders, and the file to upload where it is one and always the same."""
    results = score(folder.name, folder / "answers.jsonl", folder, out)
    upload = Path(results.get("upload", out))
    return results["metrics"], upload.read_bytes() if upload.suffix == ".json" else None


@pytest.mark.parametrize("name", BENCHMARKS)
def test_byte_order_marks_change_nothing(name, small, tmp_path):
    """Windows' editors put one before each text that they save: answers, questions, labels, truth."""
    before = scored(small / name, tmp_path / "plain")
    marked = [file for file in (small / name).rglob("*.*") if file.is_file()]
    for file in marked:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert scored(small / name, tmp_path / "marked") == before and len(marked) >= 2
    assert before[1] or before[0][BENCHMARKS[name].headline] > 0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_half_an_emoji_in_an_answer_is_written_as_a_replacement(name, small, tmp_path):
    """As a model leaves it whose answer was cut between the two escapes."""
    file = small / name / "answers.jsonl"
    text = file.read_text()
    file.write_text(text.replace('"text": "', r'"text": "\ud83d ', 1))
    _, upload = scored(small / name, tmp_path / "cut")
    if upload:
        assert "\ufffd" in str(json.loads(upload))
    file.write_text(text.replace('"text": "', '"text": "\ufffd ', 1), encoding="utf-8")
    assert scored(small / name, tmp_path / "written")[1] == upload


def test_files_whose_names_are_not_utf8_are_evaluated_and_their_names_kept(small, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    (small / "pope").rename(folder)
    (folder / "answers.jsonl").rename(answers := folder / os.fsdecode(b"r\xe9ponses.jsonl"))
    results = score("pope", answers, folder, folder / "out")
    assert results["metrics"]["mean_f1"] == 100 and results["settings"]["answers"] == str(answers)
    assert "caf\ufffd/out/results.json" in capsys.readouterr().out


def test_half_an_emoji_in_a_question_is_the_same_in_its_answer_and_truth(small, tmp_path):
    for file in (small / "textvqa").iterdir():
        file.write_text(file.read_text().replace("What is it?", r"What is \uD83D it?"))
    assert scored(small / "textvqa", tmp_path / "out")[0] == {"accuracy": 100}


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn", "mmstar", "mmvp"])
def test_every_benchmark_of_letters_reads_their_forms(name, small, tmp_path):
    file = small / name / "answers.jsonl"
    file.write_text(file.read_text().replace('"text": "A"', '"text": "**答案是A。**"'), encoding="utf-8")
    metrics, _ = scored(small / name, tmp_path / "out")
    assert metrics["accuracy"] == 100 and metrics["unread"] == 0


def test_mme_truth_may_hold_any_character_in_a_line(small, tmp_path):
    """str.splitlines would split at them."""
    odd = "Is it\u2028\x0b\x85 one?"
    for file in (small / "mme").rglob("*.*"):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            text = text.replace("Is it one?", odd if file.suffix == ".txt" else json.dumps(odd)[1:-1])
            file.write_text(text.replace("\n", "\r\n") if file.suffix == ".txt" else text, encoding="utf-8")
    assert scored(small / "mme", tmp_path / "out")[0]["perception"] == 200


def test_text_in_another_encoding_is_named(small, tmp_path):
    for name, file in (("pope", "coco/coco_pope_random.json"), ("mme", "MME_Benchmark_release_version/count/1.txt")):
        (small / name / file).write_bytes("Größe\tYes\n".encode("utf-16"))
        with pytest.raises(EvalError, match=rf"{file} is not UTF-8 text"):
            scored(small / name, tmp_path / "out")


# --- bad input ------------------------------------------------------------------------------------------------------

GOOD = ['{"question_id": 0, "text": "Yes"}', '{"question_id": 1, "text": "No"}', '{"question_id": 2, "text": "No"}']


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"a\.jsonl is empty"),
        ([*GOOD[:2], GOOD[2][:20]], r"a\.jsonl, line 3 is not valid JSON.*cut or damaged"),
        ([*GOOD[:2], '{"question_id": 2}'], r"line 3 has no 'text'"),
        ([*GOOD[:2], "[" * 100_000], r"line 3 is not valid JSON"),
        ([*GOOD[:2], '{"question_id": ' + "1" * 5000 + ', "text": "No"}'], r"line 3 is not valid JSON"),
        ([*GOOD[:2], '{"question_id": [2], "text": "No"}'], r"line 3: 'question_id' must be a text, and is \[2\]"),
        ([*GOOD[:2], '{"question_id": 2, "text": "No", "round_id": {}}'], r"round_id of question 2 is no number"),
        ([*GOOD[:2], '{"question_id": 2, "text": null}'], r"line 3: 'text' must be a text, and is None"),
        ([*GOOD, '{"question_id": 9, "text": "No"}'], r"1 questions that are not in the benchmark, e\.g\. id 9"),
        ([*GOOD, GOOD[0]], r"answers 1 questions twice, e\.g\. id 0"),
        (GOOD[:2], r"answers to 2 of 3 questions; 1 are missing, e\.g\. id 2.*--limit"),
    ],
)
def test_bad_answers_files_are_named_and_nothing_is_written(pope, tmp_path, lines, message):
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(EvalError, match=message):
        score("pope", tmp_path / "a.jsonl", pope, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_limit_scores_the_first_questions_of_an_incomplete_set(pope, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(GOOD[:2]))
    results = score("pope", tmp_path / "a.jsonl", pope, tmp_path / "out", "--limit", "2")
    assert results["n"] == 2 and results["limited"] and results["metrics"]["mean_f1"] == 100


def test_a_second_answer_is_refused_without_the_questions_too(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join([*GOOD, GOOD[1]]))
    with pytest.raises(EvalError, match=r"answers 1 questions twice, e\.g\. id 1"):
        evaluate("mmvet", "--answers", tmp_path / "a.jsonl", "--output-dir", tmp_path / "out")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_data_is_listed_with_its_place_and_origin(name, tmp_path):
    with pytest.raises(EvalError) as error:
        evaluate(name, "--model-path", "llava", "--data", tmp_path, "--output-dir", tmp_path / "out")
    for need in BENCHMARKS[name].needs:
        listed = str(tmp_path / need.paths[0]) in str(error.value) and need.origin in str(error.value)
        assert listed != need.optional
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pope"], "--model-path .* or --answers"),
        (["pope", "--model-path", "m", "--answers", "a"], "one of them"),
        (["pope", "--model-path", "m"], "--data is needed: POPE's folder"),
        (["pope", "--model-path", "m", "--data", "d", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["pope", "--model-path", "m", "--data", "d", "--all-rounds"], "--all-rounds is for mmbench"),
    ],
)
def test_contradicting_settings(words, message):
    with pytest.raises(EvalError, match=message):
        evaluate(*words)


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        ("pope", "coco/coco_pope_random.json", '"label": "yes"', '"label": true', "line 1: 'label' must be a text"),
        ("pope", "llava_pope_test.jsonl", '"category": "random"', '"category": []', "line 1: 'category' must be"),
        ("mme", "llava_mme.jsonl", '"image": "count/1.jpg"', '"image": 1', "line 1: 'image' must be a text"),
        ("textvqa", "TextVQA_0.5.1_val.json", '"question": "What is it?"', '"question": null', "is not TextVQA's"),
        ("textvqa", "TextVQA_0.5.1_val.json", '"answers"', '"people"', "is not TextVQA's annotation file.*answers"),
        ("textvqa", "TextVQA_0.5.1_val.json", '["yes"' + ', "yes"' * 9 + "]", "[]", "has no answers to 'What is it"),
        ("gqa", "data/testdev_balanced_questions.json", '"answer"', '"said"', "is not GQA's question file.*answer"),
        ("gqa", "data/testdev_balanced_questions.json", '{"0"', '[{"0"', "is not valid JSON"),
        ("vqav2", "llava_vqav2_mscoco_test2015.jsonl", "0", '"zero"', r"1 answered questions are not in test2015"),
        ("mmstar", "MMStar.tsv", "\tA\t", "\t\t", "the answer of row 0 is '', and must be one of A to D"),
        ("mmstar", "MMStar.tsv", "0\tq", "nan\tq", "the index 'nan' is no number"),
        ("mmstar", "MMStar.tsv", "category", "index", "more than one column 'index'"),
        ("mmstar", "MMStar.tsv", "\tc\n", '\t"c\n', "a quote opens a cell in row 1 and is never closed"),
        ("mmvp", "Questions.csv", "Open?", '"Open?', "a quote opens a cell in row 1 and is never closed"),
        ("ocrbench", "OCRBench.json", '"index": 0', '"index": []', r"the id of row 0 must be .*, and is \[\]"),
        ("ocrbench", "OCRBench.json", '["yes"]', "NaN", "row 0 has no answer"),
        ("ocrbench", "OCRBench.json", '["yes"]', '""', "row 0 has no answer"),
    ],
)  # fmt: skip
def test_bad_data_is_named(small, tmp_path, name, file, old, new, message):
    text = (small / name / file).read_text()
    assert old in text
    (small / name / file).write_text(text.replace(old, new, 1))
    with pytest.raises(EvalError, match=message):
        scored(small / name, tmp_path / "out")
    assert not (tmp_path / "out/results.json").exists()


def test_ids_of_both_kinds_and_a_prompt_that_is_no_text(small, tmp_path):
    """MME with numbers for ids has no tasks' names; a benchmark whose ids repeat compares prompts."""
    for file in ("answers.jsonl", "llava_mme.jsonl"):
        text = (small / "mme" / file).read_text().replace('"question_id": "count/1.jpg"', '"question_id": 1')
        (small / "mme" / file).write_text(text)
    with pytest.raises(EvalError, match=r"MME has no answers for count/1\.jpg"):
        scored(small / "mme", tmp_path / "out")
    file = small / "textvqa/answers.jsonl"
    file.write_text(file.read_text().replace('"prompt": "What is it?"', '"prompt": ["What is it?"]'))
    with pytest.raises(EvalError, match=r"1 questions that are not in the benchmark, e\.g\. id 'i' with this prompt"):
        scored(small / "textvqa", tmp_path / "out")


def test_a_damaged_parquet_file_is_named_and_suffixes_have_any_case(small, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (small / "mmstar/mmstar.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(EvalError, match=r"mmstar\.parquet is damaged or not a parquet file"):
        scored(small / "mmstar", tmp_path / "out")
    rows = pyarrow.table([[0], [1.5]], names=["index", "index"])
    parquet.write_table(rows, small / "mmstar/mmstar.parquet")
    with pytest.raises(EvalError, match=r"more than one column 'index'"):
        scored(small / "mmstar", tmp_path / "out")
    parquet.write_table(pyarrow.table({"index": [1.5], "question": ["q"], "answer": ["A"]}), small / "float.Parquet")
    with pytest.raises(EvalError, match=r"the index 1\.5 is no whole number"):
        questions.mmstar_questions(small / "float.Parquet")
    (small / "mmstar/MMStar.tsv").rename(small / "MMSTAR.TSV")
    assert len(questions.mmstar_questions(small / "MMSTAR.TSV")) == 2


def test_a_table_with_a_cut_row_is_named(tmp_path):
    table(tmp_path / "t.tsv", [_row(1, ["red", "7"], "A")])
    with (tmp_path / "t.tsv").open("a") as file:
        file.write("2\tWhich?")
    with pytest.raises(EvalError, match=r"t\.tsv, line 3: 14 cells are needed"):
        questions.mmbench_questions(tmp_path / "t.tsv")


# --- one file from several ------------------------------------------------------------------------------------------


def test_merge_keeps_the_first_answer_and_the_questions_order():
    asked = [{"question_id": i} for i in (3, 1, 2)]
    first, second = {"question_id": 1, "text": "old"}, {"question_id": 1, "text": "new"}
    stranger = {"question_id": 8, "text": "other"}
    assert merge(asked, [first], [second, stranger, {"question_id": 3, "text": "x"}]) == [
        {"question_id": 3, "text": "x"}, first,
    ]  # fmt: skip


def test_shares_are_never_empty_and_keep_the_rounds_of_a_question_together():
    rows = [{"question_id": i} for i in (0, 0, 0, 1, 2)]
    assert [[row["question_id"] for row in share] for share in _split(rows, 4)] == [[0, 0, 0], [1, 2]]
    assert [len(share) for share in _split([{"question_id": i} for i in range(5)], 4)] == [2, 2, 1]
    assert len(_split(rows[:1], 8)) == 1


def test_a_cut_last_line_of_a_killed_process_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes("\n".join([*GOOD[:2], GOOD[2][:25]]).encode() + b"\xc3")
    assert len(read_answers(tmp_path / "a.jsonl", cut_end=True)) == 2


def test_scoring_needs_neither_torch_nor_upstream(pope, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(GOOD))
    words = ["pope", "--answers", str(tmp_path / "a.jsonl"), "--data", str(pope), "--output-dir", str(tmp_path / "out")]
    code = (f"import sys; from train_llava.eval.run import main; main({words!r}); "
            "sys.exit(str([m for m in ('torch', 'transformers', 'llava') if m in sys.modules] or ''))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stderr.strip() == "" and (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize("script", sorted((REPOSITORY / "train_llava/eval").glob("*.sh")), ids=lambda path: path.stem)
def test_each_script_runs_its_benchmark_and_explains_itself(script, tmp_path):
    program = tmp_path / "llava-clipmoe"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)

    def output(*words: str, **settings: str) -> str:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **settings}
        return subprocess.run(
            ["bash", script, *words], capture_output=True, text=True, check=True, env=environment
        ).stdout

    words = output("--limit", "3", MODEL="my llava", DATA="d").splitlines()
    assert words == ["eval-llava", script.stem, "--model-path", "my llava", "--data", "d", "--limit", "3"]
    assert script.stem in BENCHMARKS
    explained = output("--help")
    assert f"{script.name} [FLAG VALUE ...]" in explained and "now playground/data/eval/" in explained
