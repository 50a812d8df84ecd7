"""Whose a directory is: a new run's, that of a run which was killed at any moment of its start, or somebody else's.

The processes that are killed are real, and so is the signal.
"""

import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run

from llava_clipmoe.files import read_json, write_json
from train_encoder.recipes import RECIPES
from train_encoder.run_directory import RunDirectory, RunError

CLAIM = """
    import dataclasses, os, signal, sys, time
    from train_encoder.recipes import RECIPES
    from train_encoder.run_directory import RunDirectory

    def claim(folder):
        directory = RunDirectory(dataclasses.replace(RECIPES["dmu-openmoji"][1], output_dir=folder))
        directory.claim(main_process=True)
        return directory
"""
# Claims argv[1]/1, argv[1]/2, ... in a process each that dies before its 1st, 2nd, ... change of the file system.
AT_EVERY_CALL = """
    def die_at(call):
        def counted(real):
            def inner(*arguments, **named):
                nonlocal call
                call -= 1
                if call == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)
            return inner
        for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))

    killed = True
    call = 0
    while killed:
        call += 1
        child = os.fork()
        if not child:
            die_at(call)
            claim(f"{sys.argv[1]}/{call}")
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
"""
# Is killed while a process that it forked, as a loader's worker is, lives on for two seconds.
WITH_A_WORKER = """
    directory = claim(sys.argv[1])
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(1)
    os.close(2)
    time.sleep(2)
"""


def script(code: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(CLAIM) + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, env=tiny_run.environment(), capture_output=True, text=True, timeout=120)


def directory(folder: Path) -> RunDirectory:
    return RunDirectory(replace(RECIPES["dmu-openmoji"][1], output_dir=str(folder)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_start_that_was_killed_at_any_moment_can_be_repeated(tmp_path):
    done = script(AT_EVERY_CALL, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    folders = sorted(tmp_path.iterdir())
    assert len(folders) > 5 and any(not (folder / "config.json").exists() for folder in folders)
    for folder in folders:
        claimed = directory(folder)
        claimed.claim(main_process=True)
        assert names(folder) == [".lock", "config.json"]
        assert read_json(folder / "config.json") == claimed.config


@pytest.mark.parametrize("stranger", ["thesis.txt", ".thesis.txt.tmp", ".thesis.txt.0123abcd.tmp"])
def test_somebody_elses_folder_is_refused_whatever_lies_beside_it(tmp_path, stranger):
    for name in (stranger, ".config.json.0123abcd.tmp", ".lock"):
        (tmp_path / name).write_text("mine")
    before = names(tmp_path)
    with pytest.raises(RunError, match="is not a run of this trainer"):
        directory(tmp_path).claim(main_process=True)
    assert names(tmp_path) == before


def test_the_workers_of_a_killed_process_are_waited_for(tmp_path):
    """They hold what it held until they notice."""
    assert script(WITH_A_WORKER, tmp_path).returncode == -signal.SIGKILL
    started = time.monotonic()
    directory(tmp_path).claim(main_process=True)
    assert time.monotonic() - started < 4


def test_leftovers_go_before_anything_is_written(tmp_path, monkeypatch):
    """They may be what has filled the disk."""
    directory(tmp_path).claim(main_process=True)
    for place in (".base", "cache/.images.npy", "clusters/.stage0.npz", "features/stage1/.features.json"):
        (tmp_path / f"{place}.0123abcd.tmp").mkdir(parents=True)
    seen = []
    monkeypatch.setattr("train_encoder.run_directory.write_json", lambda *_: seen.append(list(tmp_path.rglob("*.tmp"))))
    directory(tmp_path).claim(main_process=True)
    assert seen == [[]]


def test_a_run_with_a_setting_that_there_is_no_more_goes_on(tmp_path):
    directory(tmp_path).claim(main_process=True)
    settings = read_json(tmp_path / "config.json")
    settings["lora"]["keep"] = False
    write_json(tmp_path / "config.json", settings)
    directory(tmp_path).claim(main_process=True)
    settings["lora"]["rank"] = 3
    write_json(tmp_path / "config.json", settings)
    with pytest.raises(RunError, match=r"lora\.rank: 3"):
        directory(tmp_path).claim(main_process=True)
