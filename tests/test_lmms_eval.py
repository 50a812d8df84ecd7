"""lmms-eval of the package index runs its tasks on our LLaVAs, without a fork of it.

LLAVA_CLIPMOE_EVALS_PYTHON names the interpreter of an environment that has it; `make test` creates it and sets it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY
from tiny.exported import NEW_TOKENS, QUESTION, answers_of_transformers, make_exported_llava, make_pictures
from tiny.llavas import upstream_is_installed

PYTHON = os.environ.get("LLAVA_CLIPMOE_EVALS_PYTHON")
pytestmark = [
    pytest.mark.skipif(
        not PYTHON, reason="LLAVA_CLIPMOE_EVALS_PYTHON names no environment with lmms-eval; `make test`"
    ),
    pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed"),
    pytest.mark.xdist_group("lmms-eval"),
]

TASK = f"""task: tiny_colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: ROWS
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {NEW_TOKENS}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
VISUAL = "from PIL import Image\n\ndef doc_to_visual(doc):\n    return [Image.open(doc['file']).convert('RGB')]\n"


class Work:
    """A tiny LLaVA in both formats, a task of four pictures on this disk, and what transformers answers to it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.llava, self.exported = make_exported_llava(folder)
        pictures = make_pictures(folder / "pictures")
        self.expected = answers_of_transformers(self.exported, pictures)
        task = folder / "tasks" / "tiny_colours"
        task.mkdir(parents=True)
        # The last answer is the right one, so that the score is neither all nor nothing.
        truth = ["red", "green", "blue", self.expected[3]]
        rows = [{"file": str(f), "question": QUESTION, "answer": a} for f, a in zip(pictures, truth, strict=True)]
        (task / "rows.json").write_text("\n".join(map(json.dumps, rows)))
        (task / "tiny_colours.yaml").write_text(TASK.replace("ROWS", str(task / "rows.json")))
        (task / "utils.py").write_text(VISUAL)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """lmms-eval in its environment, where this package is installed with its entry points and its hook."""
        command = [PYTHON, "-m", "lmms_eval", *arguments, "--tasks", "tiny_colours", "--batch_size", "1"]
        command += ["--include_path", str(self.folder / "tasks"), "--log_samples"]
        environment = {**os.environ, "HF_HOME": str(self.folder / "home"), "HF_HUB_OFFLINE": "1", **environment}
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300)

    def answers(self, name: str, *arguments: str) -> tuple[list[str], float]:
        """-> (what the model answered, the task's score), as lmms-eval writes them under `name`."""
        out = self.folder / "logs" / name
        done = self.run(*arguments, "--output_path", str(out))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (samples,) = out.rglob("*samples_tiny_colours.jsonl")
        (results,) = out.rglob("*results.json")
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
        score = json.loads(results.read_text())["results"]["tiny_colours"]["exact_match,none"]
        return [line["filtered_resps"].strip() for line in lines], score


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    return Work(tmp_path_factory.mktemp("evals"))


@pytest.mark.parametrize("mode", [(), ("--force_simple",)], ids=["messages", "text and pictures"])
def test_llava_clipmoe_is_a_model_of_lmms_eval(work, mode):
    """No more than the directory is named: the entry point brings the name, the device is the one that there is."""
    model = ("--model", "llava_clipmoe", "--model_args", f"pretrained={work.exported}")
    answers, score = work.answers("".join(mode) or "messages", *model, *mode)
    assert answers == work.expected and len(set(answers)) > 1
    assert score == 0.25


def test_upstreams_llava_model_runs_through_the_hook(work):
    """lmms-eval's `llava` imports upstream LLaVA and halves the pictures' precision: close answers may differ."""
    arguments = ["--model", "llava", "--model_args", f"pretrained={work.llava},device_map=auto", "--device", "cpu"]
    answers, _ = work.answers("llava", *arguments)
    same = [answer == expected for answer, expected in zip(answers, work.expected, strict=True)]
    assert sum(same) >= 3, answers


def test_a_version_without_entry_points_says_what_to_do(work):
    old = Path(PYTHON).parent.parent / "lmms-eval-0.5.0"
    if not old.is_dir():
        pytest.skip(f"no lmms-eval 0.5.0 in {old}; `make test` puts it there")
    arguments = ["--model", "llava_clipmoe", "--model_args", f"pretrained={work.exported}"]
    done = work.run(*arguments, "--output_path", str(work.folder / "old"), PYTHONPATH=f"{old}{os.pathsep}{REPOSITORY}")
    assert "this lmms-eval has no entry points" in done.stderr and "pip install -U lmms-eval" in done.stderr
    # Whoever asks for another model is told nothing.
    code = "import sys; sys.argv = ['lmms_eval', '--model', 'llava']; import lmms_eval.models"
    environment = {**os.environ, "PYTHONPATH": f"{old}{os.pathsep}{REPOSITORY}"}
    other = subprocess.run([PYTHON, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert other.returncode == 0 and "no entry points" not in other.stderr, other.stderr[-2000:]
