"""The table of benchmarks: what each needs, how it is asked, converted and scored, and what is left to do by hand.

The folder behind `--data` has the layout of LLaVA-1.5's `playground/data/eval/NAME` (docs/Evaluation.md of upstream);
MMVP, MMStar and OCRBench, which LLaVA-1.5 does not run, have the layout in which they are published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import converters, questions, scorers
from .answers import EvalError, Row, read_json, read_jsonl, read_text
from .letters import letter
from .scorers import Choice, Metrics

EVAL_ZIP = "eval.zip of LLaVA-1.5 (linked in docs/Evaluation.md of github.com/haotian-liu/LLaVA)"
TEXTVQA_TRUTH = "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json"
SHORT_PROMPT = "Answer the question using a single word or phrase."

Found = dict[str, Path]
"""What was found in --data, by use."""


@dataclass(frozen=True)
class Need:
    """A file or folder that must be in --data."""

    use: Literal["questions", "images", "truth", "split"]
    paths: tuple[str, ...]
    """Relative to --data, the usual place first; shell patterns are allowed."""
    origin: str
    optional: bool = False
    """Needed only by one of the forms in which the benchmark is published."""

    def find(self, data: Path) -> Path | None:
        return next((hit for path in self.paths for hit in sorted(data.glob(path))), None)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. `questions` reads its file; `score` and `convert` get answers in the order of the questions."""

    title: str
    needs: tuple[Need, ...]
    questions: Callable[..., list[Row]]
    headline: str
    """The metric that papers report; for a benchmark without a local score, what the server returns."""
    runner: str = "model_vqa_loader"
    """Upstream's module in llava.eval."""
    runner_flags: tuple[str, ...] = ()
    max_new_tokens: int = 128
    """What that runner generates at most; upstream's model_vqa and model_vqa_mmbench have 1024 built in."""
    lang: str | None = None
    """Language of MMBench's prompt; None for all the others."""
    score: Callable[[Found, Sequence[Row], Sequence[Row]], Metrics] | None = None
    upload: str | None = None
    """Name of the converted file or folder; {model} is the model's name."""
    convert: Callable[[Path, Found, Sequence[Row], Sequence[Row]], None] | None = None
    converts_alone: bool = False
    """Whether an answers file is enough to convert, without --data."""
    next_step: str = ""
    paper: tuple[float, float] | None = None
    """LLaVA-1.5-7B with OpenAI's CLIP and with CLIP-MoE (CLIP-MoE, table 3)."""
    note: str = ""
    extras: dict[str, Any] = field(default_factory=dict)
    """More arguments of `questions`."""

    def find(self, data: Path, uses: set[str]) -> Found:
        """The needed files. Raises EvalError that lists every missing one, where it belongs and where to get it."""
        if data.is_file():  # the question file itself
            own, data = {"questions": data}, data.parent
        else:
            own = {}
        hits = {need.use: own.get(need.use) or need.find(data) for need in self.needs}
        missing = [need for need in self.needs if need.use in uses and not need.optional and hits[need.use] is None]
        if missing:
            lines = [f"{self.title} needs these files, which are not there:"]
            for need in missing:
                places = "\n    or ".join(str(data / path) for path in need.paths)
                lines.append(f"  {places}\n      from {need.origin}")
            raise EvalError("\n".join(lines))
        return {use: path for use, path in hits.items() if path is not None}


def _pope(found: Found, asked: Sequence[Row], answers: Sequence[Row]) -> Metrics:
    labels: dict[str, list[Row]] = {}
    rows = []
    for question, answer in zip(asked, answers, strict=True):
        category = question["category"]
        if category not in labels:
            file = found["truth"] / f"coco_pope_{category}.json"
            labels[category] = list(reversed(read_jsonl(file, fields=("label", "image"))))
        label = labels[category].pop() if labels[category] else {"image": None}
        if label["image"] != question["image"]:  # the two files are matched by order alone
            raise EvalError(
                f"POPE's labels of category {category} and LLaVA's questions do not belong together (question "
                f"{question['question_id']!r}: image {question['image']} against {label['image']}). Take the labels at "
                "the commit that docs/Evaluation.md of LLaVA names."
            )
        rows.append((category, label["label"], answer["text"]))
    return scorers.pope(rows)


def _mme_rows(found: Found, asked: Sequence[Row], answers: Sequence[Row]) -> list[tuple[str, str, str, str, str]]:
    """-> (task, image, question, truth, answer). Truth: TASK/NAME.txt or TASK/questions_answers_YN/NAME.txt."""
    truths: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
    rows = []
    for question, answer in zip(asked, answers, strict=True):
        task, name = str(question["question_id"]).split("/")[0], Path(question["image"]).stem
        if (task, name) not in truths:
            places = (found["truth"] / task / f"{name}.txt", found["truth"] / task / f"questions_answers_YN/{name}.txt")
            file = next((place for place in places if place.is_file()), None)
            if file is None:
                raise EvalError(f"MME has no answers for {question['image']}: looked for {places[0]} and {places[1]}.")
            lines = [line.split("\t") for line in read_text(file).split("\n") if line.strip()]
            if any(len(line) != 2 for line in lines):
                raise EvalError(f"{file} must have lines of a question, a tab and Yes or No. Download it again.")
            truths[task, name] = {_mme_stem(text): (text, truth) for text, truth in lines}
        stem = _mme_stem(question["text"])
        if stem not in truths[task, name]:
            raise EvalError(f"MME's files have no answer to {question['text']!r} about {question['image']}.")
        rows.append((task, question["image"], *truths[task, name][stem], answer["text"]))
    return rows


def _mme_stem(text: str) -> str:
    """MME's question without what either side adds to it: LLaVA takes one ending off and puts another one on."""
    return " ".join(text.replace(SHORT_PROMPT, "").replace("Please answer yes or no.", "").split())


def _mme(found: Found, asked: Sequence[Row], answers: Sequence[Row]) -> Metrics:
    return scorers.mme([(task, image, truth, text) for task, image, _, truth, text in _mme_rows(found, asked, answers)])


def _textvqa(found: Found, asked: Sequence[Row], answers: Sequence[Row]) -> Metrics:
    try:
        annotations = read_json(found["truth"])["data"]
        people = {
            (row["image_id"], row["question"].lower()): [str(answer) for answer in row["answers"]]
            for row in annotations
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise EvalError(
            f"{found['truth']} is not TextVQA's annotation file: {type(error).__name__}: {error}."
        ) from error
    rows = []
    for question, answer in zip(asked, answers, strict=True):
        lines = [line for line in question["text"].split("\n") if not line.startswith(questions.OCR_TOKENS)]
        key = question["question_id"], lines[0].lower()
        if not people.get(key):
            raise EvalError(f"{found['truth']} has no answers to {lines[0]!r} about image {question['question_id']}.")
        rows.append((answer["text"], people[key]))
    return scorers.textvqa(rows)


def _gqa(found: Found, asked: Sequence[Row], answers: Sequence[Row]) -> Metrics:
    try:
        truth = {}
        for name, row in read_json(found["truth"]).items():
            truth[name] = str((row.get("types") or {}).get("structural", "all")), row["answer"]
    except (KeyError, TypeError, AttributeError) as error:
        raise EvalError(f"{found['truth']} is not GQA's question file: {type(error).__name__}: {error}.") from error
    unknown = [question["question_id"] for question in asked if str(question["question_id"]) not in truth]
    if unknown:
        missing = f"lacks {len(unknown)} of the questions, e.g. id {unknown[0]!r}"
        raise EvalError(f"{found['truth']} {missing}: it is of another split or version.")
    pairs = zip(asked, answers, strict=True)
    return scorers.gqa([(*truth[str(question["question_id"])], answer["text"]) for question, answer in pairs])


def _mmbench(found: Found, asked: Sequence[Row], answers: Sequence[Row]) -> Metrics:
    if any(questions.is_missing(question["answer"]) for question in asked):
        return {}  # the test split: only the server knows the answers
    forms: dict[int, int] = {}
    for question in asked:
        base = question["question_id"] % questions.CIRCULAR_STEP
        forms[base] = forms.get(base, 0) + 1
    rows = []
    for question, answer in zip(asked, answers, strict=True):
        base = question["question_id"] % questions.CIRCULAR_STEP
        shown = dict(zip(sorted(question["option_char"]), question["options"], strict=True))
        said = letter(answer["text"], shown)
        original = None if said is None else question["option_char"][ord(said) - ord("A")]
        rows.append(Choice(base, question["category"], original, question["answer"], forms[base] == question["forms"]))
    return scorers.choices(rows)


def _choices(found: Found, asked: Sequence[Row], answers: Sequence[Row]) -> list[Choice]:
    rows = []
    for question, answer in zip(asked, answers, strict=True):
        said = letter(answer["text"], question["options"])
        rows.append(Choice(question["question_id"], question.get("category", "all"), said, question["answer"]))
    return rows


def _ocrbench(found: Found, asked: Sequence[Row], answers: Sequence[Row]) -> Metrics:
    pairs = zip(asked, answers, strict=True)
    return scorers.ocrbench([(question["category"], answer["text"], question["answers"]) for question, answer in pairs])


def _mmbench_entry(title: str, files: tuple[str, ...], lang: str, paper: tuple[float, float] | None) -> Benchmark:
    return Benchmark(
        title=title,
        needs=(Need("questions", files, f"https://download.openmmlab.com/mmclassification/datasets/mmbench/{files[0]}"),),
        questions=questions.mmbench_questions, extras={"lang": lang}, lang=lang,
        runner="model_vqa_mmbench", runner_flags=("--single-pred-prompt", "--lang", lang), max_new_tokens=1024,
        score=_mmbench, headline="circular_accuracy", upload="{model}.xlsx", converts_alone=True,
        convert=lambda path, found, _, answers: converters.mmbench_xlsx(path, answers, found.get("questions")),
        next_step="Submit {upload} to the MMBench server (https://opencompass.org.cn/leaderboard-multimodal) for the "
                  "official score; the score here reads the letters without an LLM.",
        paper=paper,
    )  # fmt: skip


_TEXTVQA = {
    "needs": (
        Need("questions", ("llava_textvqa_val_v051_ocr.jsonl",), EVAL_ZIP),
        Need("images", ("train_images",), "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"),
        Need("truth", ("TextVQA_0.5.1_val.json",), TEXTVQA_TRUTH),
    ),
    "score": _textvqa,
    "headline": "accuracy",
}

BENCHMARKS: dict[str, Benchmark] = {
    "mmbench": _mmbench_entry("MMBench", ("mmbench_dev_20230712.tsv",), "en", (64.3, 66.1)),
    "mmbench_cn": _mmbench_entry("MMBench-CN", ("mmbench_dev_cn_20231003.tsv",), "cn", None),
    "mmvet": Benchmark(
        title="MM-Vet",
        needs=(
            Need("questions", ("llava-mm-vet.jsonl",), EVAL_ZIP),
            Need("images", ("images",), "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"),
        ),
        questions=questions.llava_questions, runner="model_vqa", max_new_tokens=1024, headline="score",
        upload="{model}.json", converts_alone=True,
        convert=lambda path, found, _, answers: converters.mmvet_json(path, answers),
        next_step="An LLM judges: give {upload} to mm-vet_evaluator.ipynb of github.com/yuweihao/MM-Vet.",
        paper=(30.6, 31.5),
    ),
    "vizwiz": Benchmark(
        title="VizWiz",
        needs=(
            Need("questions", ("llava_test.jsonl",), EVAL_ZIP),
            Need("images", ("test",), "https://vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip"),
        ),
        questions=questions.llava_questions, headline="accuracy", upload="{model}.json",
        convert=lambda path, found, asked, answers: converters.vizwiz_json(path, asked, answers),
        next_step="Submit {upload} to https://eval.ai/web/challenges/challenge-page/2185/my-submission.",
        paper=(54.4, 56.5),
    ),
    "pope": Benchmark(
        title="POPE",
        needs=(
            Need("questions", ("llava_pope_test.jsonl",), EVAL_ZIP),
            Need("images", ("val2014",), "COCO 2014, http://images.cocodataset.org/zips/val2014.zip"),
            Need("truth", ("coco",), "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/"
                 "output/coco (coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json)"),
        ),
        questions=questions.pope_questions, score=_pope, headline="mean_f1", paper=(85.9, 86.4),
    ),
    "mme": Benchmark(
        title="MME",
        needs=(
            Need("questions", ("llava_mme.jsonl",), EVAL_ZIP),
            Need("images", ("MME_Benchmark_release_version",), "the request form on "
                 "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"),
            Need("truth", ("MME_Benchmark_release_version",), "the same archive"),
        ),
        questions=questions.llava_questions, score=_mme, headline="perception", upload="{model}",
        convert=lambda path, *rest: converters.mme_folder(path, _mme_rows(*rest)),
        next_step="MME's own calculation.py takes the folder: python calculation.py --results_dir {upload}",
        paper=(1510.7, 1486.2),
    ),
    "textvqa": Benchmark(
        title="TextVQA", questions=questions.llava_questions, **_TEXTVQA,
        note="with the OCR tokens of LLaVA-1.5's prompts (LLaVA-1.5-7B: 58.2); CLIP-MoE's table is nearer to "
             "textvqa_no_ocr",
    ),
    "textvqa_no_ocr": Benchmark(
        title="TextVQA without OCR tokens", questions=questions.textvqa_without_ocr, paper=(46.1, 46.8), **_TEXTVQA,
        note="the paper does not say whether its prompts had OCR tokens; its 46.1 for LLaVA-1.5-7B is far below the "
             "58.2 with them",
    ),
    "gqa": Benchmark(
        title="GQA",
        needs=(
            Need("questions", ("llava_gqa_testdev_balanced.jsonl",), EVAL_ZIP),
            Need("images", ("data/images",), "https://cs.stanford.edu/people/dorarad/gqa/download.html (images)"),
            Need("truth", ("data/testdev_balanced_questions.json", "data/questions*/testdev_balanced_questions.json"),
                 "https://cs.stanford.edu/people/dorarad/gqa/download.html (questions)"),
        ),
        questions=questions.llava_questions, score=_gqa, headline="accuracy",
        upload="testdev_balanced_predictions.json",
        converts_alone=True, convert=lambda path, found, _, answers: converters.gqa_json(path, answers),
        next_step="GQA's own eval.py takes the predictions: python eval/eval.py --tier testdev_balanced, with {upload} "
                  "beside the questions.",
        paper=(62.0, 62.6),
    ),
    "vqav2": Benchmark(
        title="VQAv2",
        needs=(
            Need("questions", ("llava_vqav2_mscoco_test-dev2015.jsonl",), EVAL_ZIP),
            Need("images", ("test2015",), "http://images.cocodataset.org/zips/test2015.zip"),
            Need("split", ("llava_vqav2_mscoco_test2015.jsonl",), EVAL_ZIP),
        ),
        questions=questions.llava_questions, headline="accuracy", upload="{model}.json",
        convert=lambda path, found, _, answers: converters.vqav2_json(
            path, read_jsonl(found["split"], fields=("question_id",)), answers),
        next_step="Submit {upload} to https://eval.ai/web/challenges/challenge-page/830/my-submission (test-dev).",
        paper=(78.5, 79.2),
    ),
    "mmvp": Benchmark(
        title="MMVP",
        needs=(
            Need("questions", ("Questions.csv",), "the data set MMVP/MMVP on the Hugging Face hub"),
            Need("images", ("MMVP Images", "MMVP_Images"), "the same data set"),
        ),
        questions=questions.mmvp_questions, headline="pair_accuracy",
        score=lambda found, asked, answers: scorers.pairs(_choices(found, asked, answers)),
        note="read by the letter; the paper of MMVP lets an LLM read free answers",
    ),
    "mmstar": Benchmark(
        title="MMStar",
        needs=(Need("questions", ("mmstar.parquet", "MMStar.tsv", "*.parquet"),
                    "the data set Lin-Chen/MMStar on the Hugging Face hub, or MMStar.tsv of VLMEvalKit"),),
        questions=questions.mmstar_questions, headline="accuracy", paper=(33.3, 34.1),
        score=lambda found, asked, answers: scorers.choices(_choices(found, asked, answers)),
    ),
    "ocrbench": Benchmark(
        title="OCRBench",
        needs=(
            Need("questions", ("OCRBench.json", "OCRBench.tsv", "*.parquet"),
                 "https://github.com/Yuliang-Liu/MultimodalOCR, or the data set echo840/OCRBench on the Hugging Face "
                 "hub"),
            Need("images", ("OCRBench_Images",), "the same place; OCRBench.json has its pictures there", optional=True),
        ),
        questions=questions.ocrbench_questions, runner_flags=("--max_new_tokens", "1024"), max_new_tokens=1024,
        score=_ocrbench, headline="percent", paper=(31.2, 31.8),
    ),
}  # fmt: skip
