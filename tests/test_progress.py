"""metrics.jsonl survives a kill, the bar is readable in a log, memory is measured in bytes."""

from __future__ import annotations

import io
import json
import sys
import types
from contextlib import closing

import pytest
import torch
from rich.console import Console

from train_encoder import progress
from train_encoder.progress import Bar, Rate, clock
from train_encoder.training.memory import peak_memory_bytes, reset_peak_memory
from train_encoder.training.metrics import Metrics, read_metrics


def step(stage: str, number: int, **more) -> dict:
    return {"stage": stage, "step": number, "steps": 10, "loss": 1.0 / number, **more}


def steps_of(run_dir, stage: str) -> list[int]:
    rows, _ = read_metrics(run_dir / "metrics.jsonl")
    return [row["step"] for row in rows if row.get("stage") == stage and "step" in row]


# ---------------------------------------------------------------- metrics.jsonl


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    metrics = Metrics(tmp_path, main=True)
    metrics.log(step("base", 1))
    row = json.loads((tmp_path / "metrics.jsonl").read_text())  # not closed yet
    assert row["loss"] == 1.0 and row["time"] > 0


@pytest.mark.parametrize(
    "tail", [b'{"stage": "base", "ste', b"\0" * 64, b"\0" * 64 + b"\n", b'{"a": 1}\n{"b"\n', b"[1]\n"]
)
def test_a_torn_last_line_is_dropped_and_the_next_one_is_whole(tmp_path, tail):
    with closing(Metrics(tmp_path, main=True)) as metrics:
        metrics.log(step("base", 1))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    rows, unreadable = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["step"] == 1 and unreadable == 1  # a reader beside the run is not disturbed
    with closing(Metrics(tmp_path, main=True)) as metrics:
        metrics.log(step("base", 2))
    assert steps_of(tmp_path, "base") == [1, 2]
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == 0


def test_nothing_is_dropped_from_a_file_that_was_closed_well(tmp_path):
    with closing(Metrics(tmp_path, main=True)) as metrics:
        metrics.log(step("base", 1))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    Metrics(tmp_path, main=True).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_truncate_after_forgets_only_what_that_stage_did_beyond_the_checkpoint(tmp_path):
    with closing(Metrics(tmp_path, main=True)) as metrics:
        for number in range(1, 6):
            metrics.log(step("stage1", number))
        metrics.log({"event": "done", "work": "train", "stage": "stage1", "seconds": 3.0})
        metrics.log({"event": "done", "work": "features", "stage": "stage1", "seconds": 1.0})
        for number in range(1, 6):
            metrics.log(step("stage2", number))
        metrics.truncate_after("stage2", 3)
        metrics.log(step("stage2", 4, loss=42.0))
        assert steps_of(tmp_path, "stage2") == [1, 2, 3, 4]
        assert steps_of(tmp_path, "stage1") == [1, 2, 3, 4, 5]
        metrics.truncate_after("stage1", 2)
        assert steps_of(tmp_path, "stage1") == [1, 2]
    rows, _ = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["work"] for row in rows if "work" in row] == ["features"]
    assert rows[-1]["loss"] == 42.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]  # no temporary file stays


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with closing(Metrics(tmp_path / "run")) as metrics:
        metrics.log(step("base", 1))
        metrics.truncate_after("base", 0)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "0")
    with closing(Metrics(tmp_path / "run")) as metrics:
        metrics.log(step("base", 1))
    assert steps_of(tmp_path / "run", "base") == [1]


def test_a_diverged_loss_is_written_as_strict_json(tmp_path):
    with closing(Metrics(tmp_path, main=True)) as metrics:
        metrics.log(step("base", 1, loss=float("nan"), grad_norm=float("inf"), lr=0.5))
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    json.loads(line, parse_constant=refuse)
    row = read_metrics(tmp_path / "metrics.jsonl")[0][0]
    assert row["loss"] != row["loss"] and row["grad_norm"] == float("inf") and row["lr"] == 0.5


# ---------------------------------------------------------------- trackers


@pytest.mark.parametrize("main", [True, False])
def test_a_missing_tracker_package_is_named_on_every_process(tmp_path, monkeypatch, main):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ImportError, match="pip install trackio"):
        Metrics(tmp_path, trackers=("trackio",), main=main)


def test_no_tracker_is_imported_unless_asked_for(tmp_path, monkeypatch):
    for name in ("tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now fails
    with closing(Metrics(tmp_path, main=True)) as metrics:
        metrics.log(step("base", 1))


def test_wandb_gets_every_stage_on_its_own_axis_and_a_resumed_run_the_same_id(tmp_path, monkeypatch):
    calls: list = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **arguments: calls.append(("init", arguments))
    fake.define_metric = lambda *args, **kwargs: calls.append(("define", args, kwargs))
    fake.log = lambda numbers: calls.append(("log", numbers))
    fake.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        with closing(Metrics(tmp_path, trackers=("wandb",), config={"seed": 3}, main=True)) as metrics:
            metrics.log(step("stage1", 7))
            metrics.log({"event": "done", "work": "train", "stage": "stage1", "seconds": 1.0})
    logged = [call[1] for call in calls if call[0] == "log"]
    assert logged[0]["stage1/step"] == 7 and logged[0]["stage1/loss"] == pytest.approx(1 / 7)
    assert len(logged) == 2  # steps only
    first, second = (call[1] for call in calls if call[0] == "init")
    assert first["config"] == {"seed": 3} and first["id"] == second["id"]
    assert ("define", ("stage1/*",), {"step_metric": "stage1/step"}) in calls
    assert calls[-1] == ("finish",)


def test_tensorboard_draws_no_step_twice_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with closing(Metrics(tmp_path, trackers=("tensorboard",), main=True)) as metrics:
        for number in range(1, 6):
            metrics.log(step("stage1", number))
    with closing(Metrics(tmp_path, trackers=("tensorboard",), main=True)) as metrics:
        metrics.truncate_after("stage1", 3)
        metrics.log(step("stage1", 4, loss=42.0))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "stage1"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert events.Scalars("loss")[-1].value == 42.0


# ---------------------------------------------------------------- the bar


def bar_output(monkeypatch, seconds_a_step: float, **options) -> list[str]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI services do
    file = io.StringIO()
    with Bar("stage 1", 1000, console=Console(file=file), main=True, **options) as bar:
        for _ in range(10):
            now[0] += seconds_a_step
            bar.advance(100, loss=0.5)
    assert not any(ord(c) < 32 and c != "\n" for c in file.getvalue())
    return file.getvalue().splitlines()


def test_a_log_gets_a_plain_line_at_most_every_interval(monkeypatch):
    lines = bar_output(monkeypatch, seconds_a_step=10.0, interval=20.0)
    assert len(lines) == 7  # the start, five in 100 seconds, the end
    assert lines[1] == ("stage 1:  20%  200/1,000 images  10.0 images/s  elapsed 0:00:20  left 0:01:20  loss 0.5")
    assert "100%" in lines[-1] and "left 0:00:00" in lines[-1]


def test_quick_work_leaves_two_lines(monkeypatch):
    assert len(bar_output(monkeypatch, seconds_a_step=0.01)) == 2


def test_resumed_work_counts_in_the_percentage_but_not_in_the_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Bar("x", 1000, completed=500, console=Console(file=io.StringIO()), main=True) as bar:
        now[0] = 10.0
        bar.advance(100)
        assert bar.text() == " 60%  600/1,000 images  10.0 images/s  elapsed 0:00:10  left 0:00:40"


def test_an_unknown_total_shows_no_percentage():
    with Bar("x", None, console=Console(file=io.StringIO()), main=True) as bar:
        bar.advance(3)
        assert "%" not in bar.text() and bar.text().startswith("3 images") and "left -:--:--" in bar.text()


def test_processes_other_than_0_are_silent():
    file = io.StringIO()
    with Bar("x", 10, interval=0, console=Console(file=file), main=False) as bar:
        bar.advance(5)
        bar.write("hello")
    assert file.getvalue() == "" and bar.done == 5


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_moving_bar_and_markup_in_a_name_is_only_text(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with Bar("[red]set[/blue]", 10, console=Console(file=file, force_terminal=True, width=160), main=True) as bar:
        bar.advance(10, loss=0.25)
        bar.write("[bold]note[/bold]")
    assert "\x1b[" in file.getvalue() and "[red]set[/blue]" in file.getvalue() and "loss 0.25" in file.getvalue()
    assert "[bold]note[/bold]" in file.getvalue()


def test_the_speed_forgets_a_slow_start():
    rate = Rate(window=30.0)
    for now, done in [(0, 0), (1000, 10), (1010, 110), (1020, 210), (1030, 310)]:
        rate.add(now, done)
    assert rate.per_second == pytest.approx(10.0)


def test_the_clock():
    assert [clock(x) for x in (0, 61, 3600 * 25, None, float("inf"))] == [
        "0:00:00",
        "0:01:01",
        "1 day, 1:00:00",
        "-:--:--",
        "-:--:--",
    ]


# ---------------------------------------------------------------- memory


def test_peak_memory_is_in_bytes_and_grows_with_an_allocation():
    forgotten = reset_peak_memory("cpu")
    before = peak_memory_bytes("cpu")
    block = torch.ones((0 if forgotten else before // 4) + 50 * 2**20)  # float32; where the old peak stays, above it
    after = peak_memory_bytes("cpu")
    assert after - before >= 0.4 * 200 * 2**20  # KiB taken for bytes would be a thousand times too small
    assert after < 20 * (before + block.nbytes)
