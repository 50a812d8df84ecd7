"""`--engine.chunk-size auto` in whole runs: measured, kept, resumed, out of memory, in two processes.

Memory is measured as it is on a GPU, by counters of an allocator, the CPU's.
"""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import tiny_run
import torch
from accelerate import Accelerator
from measured_memory import CPUAllocator

from llava_clipmoe.files import load_tensors, read_json
from train_encoder.command import main
from train_encoder.training import loop
from train_encoder.training.chunks import ChunkError, even

pytestmark = pytest.mark.xdist_group("chunked_runs")  # `make test`: its runs are made once


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_run.draw_data(tmp_path_factory.mktemp("data"))


def run(data: Path, folder: Path, *more: str) -> None:
    """3 steps of the base, of one stage and of the routers."""
    flags = tiny_run.arguments(data, folder, "--evaluation.retrieval", "--moe.num-experts", "2", *more)
    assert main(flags) == 0


def weights(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name / "model.safetensors").read_bytes() for name in ("base", "stage1", "clip-moe")}


def measured(monkeypatch, limit: float) -> CPUAllocator:
    gauge = CPUAllocator(limit)
    monkeypatch.setattr(loop, "gauge_of", lambda device: gauge)
    return gauge


def done(folder: Path) -> dict[str, int | None]:
    """The chunk of every training, as the run's lines say it."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["stage"]: row["chunk_size"] for row in rows if row.get("work") == "train"}


def out_of_memory_in(monkeypatch, stage: int, step: int) -> None:
    """Let torch's allocator fail, as it does when there is no more, in a step of the training with that seed."""
    real = loop.forward_backward

    def forward_backward(towers, batch, objective, accelerator, chunk, seed):
        if seed == (stage, step) and isinstance(accelerator, Accelerator):  # not in a trial
            torch.empty(2**46, dtype=torch.uint8)
        return real(towers, batch, objective, accelerator, chunk, seed)

    monkeypatch.setattr(loop, "forward_backward", forward_backward)


def failure(*given) -> str:
    """What a run that fails says; nothing of it is kept alive, its lock neither."""
    try:
        run(*given)
    except ChunkError as error:
        return str(error)
    finally:
        gc.collect()
    raise AssertionError("the run did not fail")


ROUTERS = 1
"""The seed of the routers' training in a run of seed 0 (training/run.py, SEEDS)."""
LIMIT = 2.2e6
"""Bytes that hold a few images of the tiny run, but not its 16, whatever is trained."""


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    """A run whose chunks were measured."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        measured(patch, LIMIT)
        run(data, folder)
    return folder


@pytest.fixture(scope="module")
def broken_off(data, tmp_path_factory) -> tuple[Path, str]:
    """The same, but memory runs out in the third step of the routers -> its folder and what it says."""
    folder = tmp_path_factory.mktemp("runs") / "broken-off"
    with pytest.MonkeyPatch.context() as patch:
        measured(patch, LIMIT)
        out_of_memory_in(patch, ROUTERS, step=2)
        return folder, failure(data, folder)


def test_every_training_measures_its_own_chunk_and_keeps_it(undisturbed):
    kept = {file.stem: read_json(file)["images"] for file in (undisturbed / "chunks").iterdir()}
    assert kept == done(undisturbed) and list(done(undisturbed)) == ["base-early", "base", "stage1", "router"]
    assert kept["base"] < kept["stage1"]  # all of the base is trained
    assert all(1 <= chunk < 16 for chunk in kept.values())
    assert read_json(undisturbed / "config.json")["engine"]["chunk_size"] == "auto"


def test_a_run_that_ran_out_of_memory_goes_on_with_the_chunk_that_it_began_with(
    data, undisturbed, broken_off, tmp_path, monkeypatch
):
    folder, message = broken_off
    shutil.copytree(folder, tmp_path / "run")
    chunk = done(undisturbed)["router"]
    assert f"router ran out of memory in chunks of {chunk}" in message and "--engine.chunk-size" in message
    assert [file.name for file in (tmp_path / "run" / "checkpoints" / "router").iterdir()] == ["step-00000002"]
    larger = measured(monkeypatch, 100 * LIMIT)
    run(data, tmp_path / "run")
    assert larger.works == 0
    assert weights(tmp_path / "run") == weights(undisturbed)


def test_a_run_that_ran_out_of_memory_goes_on_in_the_chunks_that_it_is_given(
    data, undisturbed, broken_off, tmp_path, capsys
):
    shutil.copytree(broken_off[0], tmp_path / "run")
    run(data, tmp_path / "run", "--engine.chunk-size", "2")
    assert "--engine.chunk-size is 2 from here on; it was auto" in capsys.readouterr().out
    assert done(tmp_path / "run")["router"] == 2
    steps = [
        row
        for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if row.get("stage") == "router" and "step" in row
    ]
    assert [row["step"] for row in steps] == [1, 2, 3]
    a, b = load_tensors(tmp_path / "run" / "clip-moe"), load_tensors(undisturbed / "clip-moe")
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5


@pytest.mark.parametrize("before", [None, 5])
def test_a_run_of_before_goes_on_in_its_own_chunks(data, tmp_path, monkeypatch, before):
    """Its settings are null or a number, where the command now says auto."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        out_of_memory_in(patch, 0, step=2)
        failure(data, folder, "--engine.chunk-size", str(before))
    unused = measured(monkeypatch, LIMIT)
    run(data, folder)
    assert set(done(folder).values()) == {before} and unused.works == 0
    assert read_json(folder / "config.json")["engine"]["chunk_size"] == before
    assert not (folder / "chunks").exists()


TWO_CARDS = """
import os, sys
sys.path.insert(0, "tests")
import test_chunked_runs as runs
from measured_memory import CPUAllocator
from train_encoder.training import loop
from train_encoder.command import main

rank = int(os.environ["RANK"])
loop.gauge_of = lambda device: CPUAllocator(runs.LIMIT if rank else 100 * runs.LIMIT)
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_agree_on_what_the_smaller_card_holds(data, undisturbed, tmp_path):
    """Each measures by itself, as often as it needs; neither waits for the other in the middle of a trial."""
    (tmp_path / "train.py").write_text(TWO_CARDS)
    flags = tiny_run.arguments(data, tmp_path / "run", "--evaluation.retrieval", "--moe.num-experts", "2")
    ended = tiny_run.run_two(flags, tmp_path / "train.py")
    two, one = done(tmp_path / "run"), done(undisturbed)
    assert two["base"] in {even(8, most) for most in range(1, 9)}
    assert two["base"] <= one["base"]  # beside it lies what DDP holds
    assert ended.stdout.count("base: chunks of") == 1
    a, b = load_tensors(tmp_path / "run" / "clip-moe"), load_tensors(undisturbed / "clip-moe")
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5
