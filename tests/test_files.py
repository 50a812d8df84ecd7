"""Writes that fail, for real: a full disk, a file too large, a process killed. And foreign files that hold code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
import torch

from llava_clipmoe.files import (
    SaveError,
    UnsafeFile,
    atomic_directory,
    atomic_file,
    load_foreign_pt,
    load_tensors,
    parse_json,
    read_json,
    remove_leftovers,
    replace_surrogates,
    save_tensors,
    write_json,
    write_text,
)

REPOSITORY = Path(__file__).resolve().parent.parent


def script(code: str, *arguments, before: list[str] | None = None) -> subprocess.CompletedProcess:
    """Run `code` in a Python of its own, with this package on its path; `before` is put in front of the command."""
    command = [*(before or []), sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --------------------------------------------------------------------------------------------------- the writer fails


def test_a_new_file_appears_whole(tmp_path):
    with atomic_file(tmp_path / "deep" / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "deep" / "a.txt").exists()
    assert names(tmp_path / "deep") == ["a.txt"]
    assert (tmp_path / "deep" / "a.txt").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError("the writer's own"), KeyboardInterrupt()])
def test_the_old_file_stays_when_the_writer_fails(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(type(error)), atomic_file(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_the_old_directory_stays_when_the_writer_fails(tmp_path):
    path = tmp_path / "model"
    with atomic_directory(path) as temporary:
        (temporary / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(path) as temporary:
        (temporary / "a.txt").write_text("new")
        raise RuntimeError
    assert (path / "a.txt").read_text() == "old" and names(tmp_path) == ["model"]


@pytest.mark.parametrize("exchange", [True, False], ids=["one-step", "two-steps"])
def test_a_new_directory_replaces_the_old_one_with_all_its_files(tmp_path, monkeypatch, exchange):
    if not exchange:  # as on a system that cannot swap two folders
        monkeypatch.setattr("llava_clipmoe.files._exchange", lambda a, b: False)
    for content in ("old", "new"):
        with atomic_directory(tmp_path / "model") as temporary:
            (temporary / f"{content}.txt").write_text(content)
    assert names(tmp_path / "model") == ["new.txt"] and names(tmp_path) == ["model"]


def test_the_old_directory_comes_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_clipmoe.files._exchange", lambda a, b: False)
    path = tmp_path / "model"
    with atomic_directory(path) as temporary:
        (temporary / "a.txt").write_text("old")
    real = os.replace

    def refuse(source, target):
        if str(source).endswith(".tmp"):
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SaveError, match="Nothing was lost"), atomic_directory(path) as temporary:
        (temporary / "a.txt").write_text("new")
    assert (path / "a.txt").read_text() == "old" and names(tmp_path) == ["model"]


def test_a_missing_permission_is_a_save_error_with_the_next_step(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError, match=r"could not write .*/file/a\.txt: .*point the output elsewhere"):
        write_text(tmp_path / "file" / "a.txt", "a file is no folder")


# -------------------------------------------------------------------------------------------------------- the disk does

WRITERS = """
    import json, resource, sys
    from pathlib import Path
    from llava_clipmoe.files import SaveError, atomic_directory, save_tensors, write_text

    folder, kind = Path(sys.argv[1]), sys.argv[2]
    def write(size):
        if kind == "text":
            return write_text(folder / "kept", "x" * size)
        import torch
        tensors = {"weight": torch.zeros(size, dtype=torch.uint8)}
        if kind == "tensors":
            return save_tensors(folder / "kept", tensors)
        with atomic_directory(folder / "kept") as temporary:
            save_tensors(temporary / "model.safetensors", tensors)
    def bytes_of(path):
        return {str(p.relative_to(folder)): p.read_bytes().hex() for p in path.rglob("*") if p.is_file()}
    write(10)
    before = bytes_of(folder)
    if sys.argv[3] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    try:
        write(2**22)
        message = "no error was raised"
    except SaveError as error:
        message = str(error)
    left = sorted(p.name for p in folder.iterdir())
    print(json.dumps({"message": message, "same": bytes_of(folder) == before, "names": left}))
"""
kinds = pytest.mark.parametrize("kind", ["text", "tensors", "directory"])


def assert_nothing_was_lost(done: subprocess.CompletedProcess, reason: str) -> None:
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["message"].startswith("could not write ") and reason in result["message"]
    assert result["message"].count("could not write") == 1
    assert "what was there before is unchanged. Free some space" in result["message"]
    assert result["same"] and result["names"] == ["kept"]


@kinds
def test_a_file_over_the_size_limit_leaves_the_old_one(tmp_path, kind):
    """RLIMIT_FSIZE makes the kernel refuse the write (EFBIG), as a quota does."""
    assert_nothing_was_lost(script(WRITERS, tmp_path, kind, "limit"), "File too large")


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("unshare") is None, reason="needs Linux's unshare")
@kinds
def test_a_full_disk_leaves_the_old_one(tmp_path, kind):
    """A 1 MiB file system of its own, in a mount namespace that vanishes with the process."""
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" || exit 77; exec "$@"', str(tmp_path)]
    done = script(WRITERS, tmp_path, kind, "disk", before=mount)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"this user may not mount a file system: {done.stderr.strip()[:80]}")
    assert_nothing_was_lost(done, "No space left on device")


# -------------------------------------------------------------------------------------------------- a process killed

KILLED = """
    import os, signal, sys
    from pathlib import Path
    import llava_clipmoe.files as files

    path, kind, fatal = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    real, calls = os.replace, 0
    def replace(source, target):
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
    os.replace = replace
    files.os.replace = replace
    if kind == "file":
        files.write_text(path, "new")
    else:
        files._exchange = lambda a, b: False
        with files.atomic_directory(path) as temporary:
            (temporary / "a.txt").write_text("new")
            (temporary / "b.txt").write_text("new")
"""


def test_a_file_survives_a_kill_before_the_rename(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    assert script(KILLED, path, "file", 1).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 2, "the kill came too late to test anything"
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a.txt"] and path.read_text() == "old"


@pytest.mark.parametrize("rename", [1, 2])
def test_a_directory_survives_a_kill_at_any_rename(tmp_path, rename):
    """Also where two folders cannot be swapped in one step: the next run puts the old one back."""
    path = tmp_path / "model"
    path.mkdir()
    for name in ("a.txt", "b.txt"):
        (path / name).write_text("old")
    assert script(KILLED, path, "directory", rename).returncode == -signal.SIGKILL
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["model"]
    assert {file.name: file.read_text() for file in path.iterdir()} == {"a.txt": "old", "b.txt": "old"}


def test_leftovers_of_others_are_not_touched(tmp_path):
    others = [".hidden", ".thesis.txt.tmp", "model.tmp"]
    for name in others:
        (tmp_path / name).write_text("somebody's own")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == others


WRITING = """
    import sys, time
    from pathlib import Path
    from llava_clipmoe.files import atomic_directory, atomic_file, save_tensors

    path, kind = Path(sys.argv[1]), sys.argv[2]
    if kind == "tensors":
        import torch
        save_tensors(path, {"weight": torch.zeros(2**29, dtype=torch.uint8)})
    with (atomic_directory if kind == "directory" else atomic_file)(path) as temporary:
        (temporary / "a.txt" if kind == "directory" else temporary).write_text("half")
        time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """`writer(kind)`: a process that has begun to write `tmp_path / "kept"`."""
    processes = []

    def begin(kind: str) -> subprocess.Popen:
        command = [sys.executable, "-c", textwrap.dedent(WRITING), str(tmp_path / "kept"), kind]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
        processes.append(process)
        while not bytes_in(tmp_path):
            assert process.poll() is None
            time.sleep(0.001)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def bytes_in(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # a file that was renamed meanwhile
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return 0


@kinds
def test_what_a_killed_process_left_goes_when_the_same_path_is_written_again(tmp_path, writer, kind):
    """A model's output lies in a folder that no command tidies up. Also what safetensors began under its own name."""
    process = writer(kind)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert bytes_in(tmp_path) and "kept" not in names(tmp_path), "the kill came too late to test anything"
    save_tensors(tmp_path / "other", {})  # not the business of another path
    assert bytes_in(tmp_path) > 4
    if kind == "directory":
        with atomic_directory(tmp_path / "kept") as temporary:
            (temporary / "a.txt").write_text("whole")
    else:
        write_text(tmp_path / "kept", "whole")
    assert names(tmp_path) == ["kept", "other"]


@pytest.mark.parametrize("kind", ["text", "directory"])
def test_what_a_live_process_writes_is_no_leftover(tmp_path, writer, kind):
    """As when `compress` writes into a run's folder while the run is resumed there, or one command is started twice."""
    process = writer(kind)
    before = names(tmp_path)
    remove_leftovers(tmp_path)
    write_text(tmp_path / "kept", "by another")
    assert names(tmp_path) == [*before, "kept"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["kept"]


def test_weights_can_be_read_by_whom_other_files_can(tmp_path):
    save_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(1)})
    write_text(tmp_path / "config.json", "{}")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


# -------------------------------------------------------------------------------------------------- JSON and tensors


def test_json_and_tensors_come_back(tmp_path):
    value = {"name": "clip-moe", "caption": "größer 🙂", "sizes": [1, 2]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_tensors(tmp_path / "model.safetensors", tensors)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_tensors(source).items())


@pytest.mark.parametrize(
    ("text", "clean"),
    [("", ""), ("plain", "plain"), ("größer 🙂\u2028\x00\ufffd", "größer 🙂\u2028\x00\ufffd"),
     ("half \ud83d", "half \ufffd"), ("\ude00 half", "\ufffd half"), ("🙂\udfff\ud800é", "🙂\ufffd\ufffdé")],
)  # fmt: skip
def test_half_a_surrogate_pair_is_replaced_and_nothing_else(text, clean):
    assert replace_surrogates(text) == clean
    clean.encode()


@pytest.mark.parametrize(
    ("escaped", "value"),
    [(r'"\ud83d"', "\ufffd"), (r'"\uDE00x"', "\ufffdx"), (r'"\ud83d\ude00"', "😀"), (r'"\uD83D\uDE00"', "😀"),
     (r'"\ud83d\ud83d\ude00"', "\ufffd😀"), (r'"\ude00\ud83d"', "\ufffd\ufffd"), (r'"\\ud83d"', r"\ud83d"),
     (r'"\\\ud83d"', "\\\ufffd"), (r'"\u00e9\n\"\ud83dude00"', 'é\n"\ufffdude00'), ('"\ud83d"', "\ufffd"),
     (r'{"\ud83d": [{"a": "\ud83d "}, 1, null]}', {"\ufffd": [{"a": "\ufffd "}, 1, None]})],
)  # fmt: skip
def test_json_of_people_has_no_half_a_surrogate_pair(escaped, value):
    assert parse_json(escaped) == value


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "1" * 5000])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    """In a text as U+FFFD; in JSON so that it comes back, as in the name of a file that is not UTF-8."""
    write_text(tmp_path / "a.txt", "cut \ud83d, 🙂")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "cut \ufffd, 🙂"
    value = {"path": os.fsdecode(b"/data/caf\xe9"), "🙂": ["größer", "\ud83d"]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert '"🙂"' in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_a_byte_order_mark_before_json_is_no_fault(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "\ufeff"}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": "\ufeff"}


def test_sharded_tensors_come_back(tmp_path):
    for shard in ("x", "y"):
        save_tensors(tmp_path / f"{shard}.safetensors", {shard: torch.ones(2)})
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {s: f"{s}.safetensors" for s in ("x", "y")}})
    assert sorted(load_tensors(tmp_path)) == ["x", "y"]


@pytest.mark.parametrize("text", ["{", "", "\ufeff", "[" * 100_000, "1" * 5000])
def test_what_is_no_json_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no weights: expected model\.safetensors"):
        load_tensors(tmp_path)
    save_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(1000)})
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load_tensors(tmp_path)


# --------------------------------------------------------------------------------------------------------- foreign .pt


class Intruder:
    """Unpickling this creates the file it was made with."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_plain_state_dict_is_read(tmp_path):
    state = {"weight": torch.randn(3), "nested": {"bias": torch.ones(1)}}
    torch.save(state, tmp_path / "plain.pt")
    read = load_foreign_pt(tmp_path / "plain.pt")
    assert torch.equal(read["weight"], state["weight"]) and torch.equal(read["nested"]["bias"], torch.ones(1))


@pytest.mark.parametrize("container", ["torch.save", "pickle"])
def test_a_file_with_code_is_refused_and_the_code_is_not_run(tmp_path, container):
    trace, path = tmp_path / "the code ran", tmp_path / "bad.pt"
    content = {"weight": torch.zeros(1), "more": Intruder(trace)}
    if container == "torch.save":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"more": Intruder(trace)}))
    with pytest.raises(UnsafeFile, match=r"bad\.pt was not read: .*could run code.*safetensors"):
        load_foreign_pt(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if container == "torch.save" else pickle.loads(path.read_bytes())
    assert trace.exists(), "the file was harmless: the refusal above showed nothing"


@pytest.mark.filterwarnings("ignore")  # torch announces TorchScript's end
def test_a_torchscript_archive_is_refused_by_name(tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(UnsafeFile, match="it is a TorchScript archive, which is a program"):
        load_foreign_pt(path)


@pytest.mark.parametrize(
    "content", [b"", b"no pickle at all", b"PK\x03\x04 half an archive"], ids=["empty", "text", "cut"]
)
def test_a_damaged_pt_is_refused(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(UnsafeFile, match=r"bad\.pt was not read"):
        load_foreign_pt(tmp_path / "bad.pt")


def test_a_truncated_pt_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(1000)}, buffer)
    (tmp_path / "bad.pt").write_bytes(buffer.getvalue()[:-200])
    assert not zipfile.is_zipfile(tmp_path / "bad.pt")
    with pytest.raises(UnsafeFile, match="or is damaged"):
        load_foreign_pt(tmp_path / "bad.pt")


def test_a_missing_pt_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_foreign_pt(tmp_path / "none.pt")
