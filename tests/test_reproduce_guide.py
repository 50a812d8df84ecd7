"""docs/reproduce.md: every command in it parses with the command's own parser, every file and link it names exists.

Bash itself expands the guide's blocks (loops, arrays, variables), one after the other as a reader would paste them,
with the programs replaced by functions that only write down their words.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

GUIDE = REPOSITORY / "docs" / "reproduce.md"
TEXT = GUIDE.read_text(encoding="utf-8")
SETTINGS = ("MODEL", "VISION_TOWER", "GPUS", "PER_DEVICE_BATCH", "BENCH")
"""Variables that the guide gives to shell scripts."""

# A recorded call is the settings in its environment and its words, NUL between them and \1 behind it, on descriptor 3.
RECORDER = r"""
set -eu
record() {
    local name
    for name in SETTINGS; do printf 'env:%s=%s\0' "$name" "${!name-}" >&3; done
    printf '%s\0' "$@" >&3
    printf '\1' >&3
}
for program in llava-clipmoe torchrun bash; do eval "$program() { record $program \"\$@\"; }"; done
python() { echo train_llava; }
command_not_found_handle() { record "unknown program" "$@"; }
PATH=/nowhere
""".replace("SETTINGS", " ".join(SETTINGS))

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def calls(script: str, folder: Path) -> list[tuple[dict[str, str], list[str]]]:
    """(settings, words) of every program that `script` would start."""
    written = folder / "calls"
    environment = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    command = [shutil.which("bash"), "-c", f"exec 3>{written}\n{RECORDER}{script}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = []
    for call in written.read_text().split("\1")[:-1]:
        words = call.split("\0")[:-1]
        settings = dict(word.removeprefix("env:").split("=", 1) for word in words[: len(SETTINGS)])
        found.append(({name: value for name, value in settings.items() if value}, words[len(SETTINGS) :]))
    return found


@pytest.fixture(scope="module")
def guide(tmp_path_factory) -> list[tuple[dict[str, str], list[str]]]:
    return calls("\n".join(blocks("bash")), tmp_path_factory.mktemp("guide"))


def our_command(words: list[str]) -> list[str] | None:
    """The words behind `llava-clipmoe`, however it was started; None for another program."""
    if words[0] == "llava-clipmoe":
        return words[1:]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words[1:])
        assert (parsed.module, parsed.training_script) == (True, "llava_clipmoe.cli"), words
        return parsed.training_script_args
    return None


class Parsed(Exception):
    """Raised in the place of running the command, with what its parser made of the words."""


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch):
    """The settings of a command, by the parser that its own `main` calls. Fails as that does, by SystemExit."""
    import tyro

    from llava_clipmoe import cli

    def then_stop(real):
        def parser(*args, **options):
            raise Parsed(real(*args, **options))

        return parser

    name, *rest = words
    assert name in cli.COMMANDS, f"there is no command {name}"
    with monkeypatch.context() as patch:
        patch.setattr(tyro, "cli", then_stop(tyro.cli))
        patch.setattr(tyro.extras, "overridable_config_cli", then_stop(tyro.extras.overridable_config_cli))
        try:
            cli._load(cli.COMMANDS[name].target)(rest)
        except Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f"{name} was run without asking tyro")


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises for a command that its parser, or a check that needs no data, refuses."""
    settings = parse(words, monkeypatch)
    if words[0] == "eval-llava":
        settings.check()
    if words[0] == "compare":
        from train_encoder.compare.command import check

        check(settings, [])  # recipes that exist, of one scale, at equal cost


def test_every_command_parses(guide, monkeypatch):
    ours = [command for _, words in guide if (command := our_command(words)) is not None]
    assert {command[0] for command in ours} >= {"train-encoder", "compare", "evaluate", "register"}
    refused = []
    for command in {tuple(command) for command in ours}:
        try:
            check_command(list(command), monkeypatch)
        except (SystemExit, ValueError, AssertionError) as error:
            refused.append(f"{' '.join(command)}: {error}")
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize(
    "command",
    [
        "llava-clipmoe train-encoder dmu-vitl14-336-sharegpt4v --engine.chunksize 10 --output-dir x",
        "torchrun --nproc-per-node 8 -m llava_clipmoe.cli train-encoder dmu-vitl14-336 --output-dir x",
        "llava-clipmoe compare dmu direct --scale vitl14-336-sharegpt4v --seeds 1",
        "MODEL=x llava-clipmoe compare dmu --scale vitl14-336 --seeds 1",
        "llava-clipmoe evaluate a/clip-moe retrieval --presets coco-5k --data data/coco",
    ],
)
def test_a_misspelt_command_would_be_found(command, tmp_path, monkeypatch, capsys):
    ((_, words),) = calls(command, tmp_path)
    with pytest.raises((SystemExit, ValueError)):
        check_command(our_command(words), monkeypatch)


def test_every_script_is_there_and_knows_its_settings(guide):
    started = [(settings, words[1]) for settings, words in guide if words[0] == "bash"]
    assert len({script for _, script in started}) > 10  # two stages and ten benchmarks
    for settings, script in started:
        path = REPOSITORY / script
        assert path.is_file(), script
        shared = re.search(r"/([./a-z]+\.sh)", path.read_text()).group(1)  # what the script sources
        known = path.read_text() + (path.parent / shared).read_text()
        unknown = [name for name in settings if f"${{{name}:" not in known]
        assert not unknown, f"{script} does not read {unknown}"


def test_nothing_else_is_started(guide):
    assert {words[0] for _, words in guide} == {"llava-clipmoe", "torchrun", "bash"}


def test_every_recipe_in_the_prose_exists():
    from train_encoder.recipes import RECIPES

    named = set(re.findall(r"\b[a-z][a-z-]*-(?:vitl14-336-\w+|openmoji)\b", TEXT))
    assert named and named <= set(RECIPES), named - set(RECIPES)


def rows_of(heading: str) -> dict[str, str]:
    """First column (or recipe in brackets) -> the whole row, of the tables below a heading."""
    section = TEXT.split(f"\n## {heading}")[1].split("\n## ")[0]
    found = {}
    for line in re.findall(r"^\|.*\|$", section, re.MULTILINE):
        recipe = re.search(r"\(`([a-z-]+)`\)", line)
        found[recipe.group(1) if recipe else line.strip("| ").partition(" |")[0]] = line
    return found


def test_the_figures_that_compare_prints_are_those_of_the_guide():
    """Both were typed from the papers; they must not drift apart."""
    from train_encoder.compare import papers

    def text(values) -> str:
        return " ".join(f"{value:.1f}" for value in values)

    rows = {**rows_of("CLIP-MoE, Table 4"), **rows_of("CLIP-MoE, Table 2")}
    for data in (papers.COCO, papers.FLICKR30K):
        for recipe, scores in data.scores.items():
            if recipe != "fmoe":
                values = [scores[key] for key in papers.RETRIEVAL]
                assert f"| {text(values[:3])} | | {text(values[3:])} |" in rows[recipe], recipe
    fmoe = rows_of("CLIP-FMoE")
    table5 = rows_of("CLIP-MoE, Table 5")
    columns = ("imagenet", "imagenet-o", "imagenet-v2", "cifar10", "cifar100")
    for recipe in ("base", "direct-ft", "sparse-upcycling", "long-clip", "dmu"):
        values = [papers.ZERO_SHOT[name].scores[recipe]["top1"] for name in columns]
        assert "| " + " | | ".join(f"{value:.1f}" for value in values) + " |" in table5[recipe]
    assert (
        "| 74.62 | | 29.58 | | 74.87 |" in fmoe["fmoe"] and papers.ZERO_SHOT["imagenet"].scores["fmoe"]["top1"] == 74.87
    )
    for start, values in papers.TABLE_1.items():
        (row,) = [row for name, row in rows_of("CLIP-MoE, Table 1").items() if name.startswith(start)]
        assert "| " + " | | ".join(f"{value:g}" for value in values) + " |" in row


def test_llavas_13b_rows_are_those_of_the_guide():
    from train_encoder.compare.papers import LLAVA_13B
    from train_llava.eval.benchmarks import BENCHMARKS

    section = TEXT.split("\n13B, Table 3 (P):\n")[1].split("\n## ")[0]
    for name, (clip, moe) in LLAVA_13B.items():
        assert f"| {clip} | | {moe} | |" in section, name
        assert BENCHMARKS[name].paper is not None, "a row of Table 3 has its 7B figures too"


def test_the_snippet_writes_the_benchmarks_that_a_run_measures(tmp_path, monkeypatch):
    (snippet,) = blocks("python")
    coco, flickr = tmp_path / "data" / "coco", tmp_path / "data" / "flickr30k"
    for folder in (coco / "val2017", coco / "annotations", flickr / "flickr30k-images"):
        folder.mkdir(parents=True)
    (coco / "val2017" / "1.jpg").write_bytes(b"")
    (flickr / "flickr30k-images" / "7.jpg").write_bytes(b"")
    captions = [{"image_id": 1, "caption": f"cat {i}"} for i in range(6)]  # a sixth one does not count
    content = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": captions}
    (coco / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    (flickr / "results_20130124.token").write_text("".join(f"7.jpg#{i}\tdog {i}\n" for i in range(5)))
    subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )

    from train_encoder.config import DataConfig
    from train_encoder.data.formats import open_source

    monkeypatch.chdir(tmp_path)
    for name, animal in (("coco-5k", "cat"), ("flickr30k", "dog")):
        source = open_source(DataConfig(source=f"data/{name}.jsonl"))
        assert len(source) == 1 and list(source.captions(0)) == [f"{animal} {i}" for i in range(5)]
