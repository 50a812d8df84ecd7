"""The table of benchmarks: what each needs, how it is asked, converted and scored, and what is left to do by hand.

The folder behind `--data` has the layout of LLaVA-1.5's `playground/data/eval/NAME` (docs/Evaluation.md of upstream);
MMVP, MMStar and OCRBench, which LLaVA-1.5 does not run, have the layout in which they are published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import converters, questions, scorers, truth
from .answers import EvalError, Found, Row


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
    title: str
    needs: tuple[Need, ...]
    headline: str
    """The metric that papers report; for a benchmark without a local score, what the server returns."""
    questions: Callable[..., list[Row]] = questions.llava_questions
    """Reads the question file."""
    runner: str = "model_vqa_loader"
    """Upstream's module in llava.eval."""
    max_new_tokens: int = 128
    """What is generated at most; upstream's model_vqa and model_vqa_mmbench have 1024 built in."""
    lang: str | None = None
    """Language of MMBench's prompt; None for all the others."""
    truth: Callable[[Path, Sequence[Row]], None] | None = None
    """Puts the right answers, where they are in a file of their own, beside the questions."""
    score: Callable[[Sequence[Row]], scorers.Metrics] | None = None
    upload: str | None = None
    """Name of the converted file or folder; {model} is the model's name."""
    convert: Callable[[Path, Sequence[Row], Found], None] | None = None
    converts_alone: bool = False
    """Whether an answers file is enough to convert, without --data."""
    next_step: str = ""
    paper: tuple[float, float] | None = None
    """LLaVA-1.5-7B with OpenAI's CLIP and with CLIP-MoE (CLIP-MoE, table 3)."""
    note: str = ""

    def find(self, data: Path, uses: set[str]) -> Found:
        """The needed files; `data` may be the question file itself.

        Raises EvalError that lists every missing one, where it belongs and where to get it.
        """
        file = data if data.is_file() else None
        data = data.parent if file else data
        hits = {need.use: need.find(data) for need in self.needs}
        if file:
            hits["questions"] = file
        missing = [need for need in self.needs if need.use in uses and not need.optional and hits[need.use] is None]
        if missing:
            lines = [f"{self.title} needs these files, which are not there:"]
            for need in missing:
                places = "\n    or ".join(str(data / path) for path in need.paths)
                lines.append(f"  {places}\n      from {need.origin}")
            raise EvalError("\n".join(lines))
        return {use: path for use, path in hits.items() if path is not None}


def _llava_file(name: str, use: str = "questions") -> Need:
    return Need(use, (name,), "eval.zip of LLaVA-1.5 (linked in docs/Evaluation.md of github.com/haotian-liu/LLaVA)")


def _mmbench(title: str, file: str, lang: str, paper: tuple[float, float] | None) -> Benchmark:
    return Benchmark(
        title,
        (Need("questions", (file,), f"https://download.openmmlab.com/mmclassification/datasets/mmbench/{file}"),),
        headline="circular_accuracy",
        questions=questions.mmbench_questions,
        runner="model_vqa_mmbench",
        max_new_tokens=1024,
        lang=lang,
        score=scorers.mmbench,
        upload="{model}.xlsx",
        convert=converters.mmbench_xlsx,
        converts_alone=True,
        next_step="Submit {upload} to the MMBench server (https://opencompass.org.cn/leaderboard-multimodal) for the "
        "official score; the score here reads the letters without an LLM.",
        paper=paper,
    )


_TEXTVQA = (
    _llava_file("llava_textvqa_val_v051_ocr.jsonl"),
    Need("images", ("train_images",), "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"),
    Need("truth", ("TextVQA_0.5.1_val.json",), "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json"),
)
_GQA = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
_MME_IMAGES = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
_OCRBENCH = "https://github.com/Yuliang-Liu/MultimodalOCR, or the data set echo840/OCRBench on the Hugging Face hub"

BENCHMARKS: dict[str, Benchmark] = {
    "mmbench": _mmbench("MMBench", "mmbench_dev_20230712.tsv", "en", (64.3, 66.1)),
    "mmbench_cn": _mmbench("MMBench-CN", "mmbench_dev_cn_20231003.tsv", "cn", None),
    "mmvet": Benchmark(
        "MM-Vet",
        (_llava_file("llava-mm-vet.jsonl"),
         Need("images", ("images",), "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip")),
        headline="score", runner="model_vqa", max_new_tokens=1024, paper=(30.6, 31.5),
        upload="{model}.json", convert=converters.mmvet_json, converts_alone=True,
        next_step="An LLM judges: give {upload} to mm-vet_evaluator.ipynb of github.com/yuweihao/MM-Vet.",
    ),
    "vizwiz": Benchmark(
        "VizWiz",
        (_llava_file("llava_test.jsonl"),
         Need("images", ("test",), "https://vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip")),
        headline="accuracy", paper=(54.4, 56.5), upload="{model}.json", convert=converters.vizwiz_json,
        next_step="Submit {upload} to https://eval.ai/web/challenges/challenge-page/2185/my-submission.",
    ),
    "pope": Benchmark(
        "POPE",
        (_llava_file("llava_pope_test.jsonl"),
         Need("images", ("val2014",), "COCO 2014, http://images.cocodataset.org/zips/val2014.zip"),
         Need("truth", ("coco",), "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/"
              "output/coco (coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json)")),
        questions=questions.pope_questions, truth=truth.pope, score=scorers.pope, headline="mean_f1",
        paper=(85.9, 86.4),
    ),
    "mme": Benchmark(
        "MME",
        (_llava_file("llava_mme.jsonl"),
         Need("images", ("MME_Benchmark_release_version",), f"the request form on {_MME_IMAGES}"),
         Need("truth", ("MME_Benchmark_release_version",), "the same archive")),
        truth=truth.mme, score=scorers.mme, headline="perception", paper=(1510.7, 1486.2),
        upload="{model}", convert=converters.mme_folder,
        next_step="MME's own calculation.py takes the folder: python calculation.py --results_dir {upload}",
    ),
    "textvqa": Benchmark(
        "TextVQA", _TEXTVQA, truth=truth.textvqa, score=scorers.textvqa, headline="accuracy",
        note="with the OCR tokens of LLaVA-1.5's prompts (LLaVA-1.5-7B: 58.2); CLIP-MoE's table is nearer to "
             "textvqa_no_ocr",
    ),
    "textvqa_no_ocr": Benchmark(
        "TextVQA without OCR tokens", _TEXTVQA, questions=questions.textvqa_without_ocr, truth=truth.textvqa,
        score=scorers.textvqa, headline="accuracy", paper=(46.1, 46.8),
        note="the paper does not say whether its prompts had OCR tokens; its 46.1 for LLaVA-1.5-7B is far below the "
             "58.2 with them",
    ),
    "gqa": Benchmark(
        "GQA",
        (_llava_file("llava_gqa_testdev_balanced.jsonl"), Need("images", ("data/images",), f"{_GQA} (images)"),
         Need("truth", ("data/testdev_balanced_questions.json", "data/questions*/testdev_balanced_questions.json"),
              f"{_GQA} (questions)")),
        truth=truth.gqa, score=scorers.gqa, headline="accuracy", paper=(62.0, 62.6),
        upload="testdev_balanced_predictions.json", convert=converters.gqa_json, converts_alone=True,
        next_step="GQA's own eval.py takes the predictions: python eval/eval.py --tier testdev_balanced, with {upload} "
                  "beside the questions.",
    ),
    "vqav2": Benchmark(
        "VQAv2",
        (_llava_file("llava_vqav2_mscoco_test-dev2015.jsonl"),
         _llava_file("llava_vqav2_mscoco_test2015.jsonl", "split"),
         Need("images", ("test2015",), "http://images.cocodataset.org/zips/test2015.zip")),
        headline="accuracy", paper=(78.5, 79.2), upload="{model}.json", convert=converters.vqav2_json,
        next_step="Submit {upload} to https://eval.ai/web/challenges/challenge-page/830/my-submission (test-dev).",
    ),
    "mmvp": Benchmark(
        "MMVP",
        (Need("questions", ("Questions.csv",), "the data set MMVP/MMVP on the Hugging Face hub"),
         Need("images", ("MMVP Images", "MMVP_Images"), "the same data set")),
        questions=questions.mmvp_questions, score=scorers.pairs, headline="pair_accuracy",
        note="read by the letter; the paper of MMVP lets an LLM read free answers",
    ),
    "mmstar": Benchmark(
        "MMStar",
        (Need("questions", ("mmstar.parquet", "MMStar.tsv", "*.parquet"),
              "the data set Lin-Chen/MMStar on the Hugging Face hub, or MMStar.tsv of VLMEvalKit"),),
        questions=questions.mmstar_questions, score=scorers.choices, headline="accuracy", paper=(33.3, 34.1),
    ),
    "ocrbench": Benchmark(
        "OCRBench",
        (Need("questions", ("OCRBench.json", "OCRBench.tsv", "*.parquet"), _OCRBENCH),
         Need("images", ("OCRBench_Images",), "the same place; OCRBench.json has its pictures there", optional=True)),
        questions=questions.ocrbench_questions, score=scorers.ocrbench, headline="percent", paper=(31.2, 31.8),
        max_new_tokens=1024,
    ),
}  # fmt: skip
