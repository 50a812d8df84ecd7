"""Atomic writes and safe reads: a file or directory is either the old one or the whole new one, never half of each.

Nothing here unpickles: weights are safetensors; a foreign `.pt` goes through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, which does not delete what is in use
    fcntl = None

WEIGHTS = "model.safetensors"


class SaveError(OSError):
    """A write failed; what stood at the path before still stands there."""


class UnsafeFile(ValueError):
    """A foreign file could not be read without running code from it."""


@contextlib.contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, locked while it is worked in and removed at the end; those that killed processes left
    there for the same `path` go first."""
    remove_leftovers(path.parent, path.name)
    with contextlib.ExitStack() as stack:
        while True:  # until it is locked before another process takes it for a leftover
            folder = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
            folder.mkdir(parents=True)
            if stack.enter_context(_locked(folder)):
                break
        stack.callback(_remove, folder)
        yield folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether `path` is nobody else's while the block lasts. The system unlocks what a killed process held."""
    if fcntl is None:
        yield True
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _flock(descriptor) and path.exists()
    finally:
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def flush_to_disk(path: Path) -> None:
    """fsync a file or directory, so that a rename after it cannot outlive the data."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _save_errors(path: Path) -> Iterator[None]:
    """Turn a failing write below into one SaveError that says where, why and what is left."""
    from safetensors import SafetensorError  # here, so that `tower_registry.py` stays light

    try:
        yield
    except (SaveError, FileNotFoundError):
        raise  # a file inside a folder, or a missing input: their own messages say it all
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        raise SaveError(
            f"could not write {path}: {error} ({free / 2**20:,.0f} MiB free there). Nothing was lost: what was there "
            "before is unchanged. Free some space (or point the output elsewhere) and run the same command again."
        ) from error


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a path in a temporary folder beside `path`; renamed to `path` when the block ends well, removed otherwise.

    In a folder of its own, as some writers (safetensors) make further temporary files beside theirs.
    Raises SaveError when the write fails (full disk, quota, permissions); `path` is then what it was.
    """
    path = Path(path)
    with _save_errors(path), _workplace(path) as folder:
        temporary = folder / path.name
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """The same for a whole directory. An existing `path` is replaced only after the new one is complete."""
    path = Path(path)
    with _save_errors(path), _workplace(path) as temporary:  # after an exchange, what is removed is the old one
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                flush_to_disk(file)
        flush_to_disk(temporary)
        if not path.exists():
            os.replace(temporary, path)
        elif not _exchange(temporary, path):
            _replace_in_two_steps(temporary, path)
        flush_to_disk(path.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step (Linux's renameat2), so that there is no moment without `b`.

    False where the system or the file system cannot: a plain rename does not replace a folder that has files.
    """
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # no such function, or no C library to ask (Windows)
        return False
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0


def _replace_in_two_steps(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`. A process killed between the steps leaves `path` missing and the old one
    beside it, which `remove_leftovers` puts back."""
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
    os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(old, path)
        raise
    _remove(old)


def remove_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Delete the temporary files and folders that killed processes left directly in `folder` (those for `name` alone),
    and put back a folder that they had moved aside but not yet replaced. What a live process works at stays."""
    for leftover in leftovers(folder, name):
        with contextlib.suppress(OSError), _locked(leftover) as abandoned:
            if abandoned:
                _remove(leftover)
    for old in leftovers(folder, name, "old"):
        path = old.with_name(old.name[1:].rsplit(".", 2)[0])
        if path.exists():
            _remove(old)
        else:
            os.replace(old, path)


def leftovers(folder: str | Path, name: str | None = None, kind: str = "tmp") -> list[Path]:
    """The temporary files and folders directly in `folder` (those for `name` alone), in use or not."""
    return list(Path(folder).glob(f".{'*' if name is None else glob.escape(name)}.{'[0-9a-f]' * 8}.{kind}"))


_SURROGATE = re.compile(r"[\ud800-\udfff]")
_JSON_ESCAPE = re.compile(
    r"""\\(?: u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}  # a whole pair: one character
          | (?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2}) | .)""",
    re.VERBOSE | re.DOTALL,
)


def replace_surrogates(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair, which no UTF-8 file, tokenizer or terminal takes.

    They come from JSON that was cut inside an emoji ("\\ud83d").
    """
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def parse_json(text: str) -> Any:
    """`json.loads` for what people and models wrote: no string of the value, nor key, has half a surrogate pair.

    Raises ValueError, also where lists or objects are nested too deeply.
    """
    if "\\ud" in text or "\\uD" in text:
        text = _JSON_ESCAPE.sub(lambda escape: r"\ufffd" if escape["half"] else escape[0], text)
    try:
        return json.loads(replace_surrogates(text))
    except RecursionError as error:
        raise ValueError("lists or objects nested too deeply") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file; halves of surrogate pairs, which UTF-8 cannot hold, become U+FFFD."""
    with atomic_file(path) as temporary:
        temporary.write_text(replace_surrogates(text), encoding="utf-8")


def json_text(value: Any) -> str:
    """What `write_json` writes. Halves of surrogate pairs become JSON's escapes: Python has them in the names of files
    that are not UTF-8, and `read_json` gives the same name back."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text if text.isascii() else _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def write_json(path: str | Path, value: Any) -> None:
    """Write `json_text` of a value."""
    write_text(path, json_text(value))


def read_json(path: str | Path) -> Any:
    """Raises ValueError for what is no JSON. A byte order mark before it, which Windows' editors write, is no fault."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of more digits than Python converts
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def save_tensors(path: str | Path, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file atomically. Tensors are made contiguous; any device."""
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(temporary), metadata=metadata)
        temporary.chmod(mode)  # safetensors 0.8 makes files that only their owner can read


def save_shards(tensors: Iterable[tuple[str, Any]], folder: Path, max_bytes: int) -> None:
    """Write tensors as they come, a shard as soon as it is full, then the index; one plain file when that is enough."""
    metadata = {"format": "pt"}  # transformers 4 refuses a file that does not say it
    shards: list[list[str]] = []
    pending: dict[str, Any] = {}
    total = filled = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and filled + size > max_bytes:
            save_tensors(folder / f"{len(shards)}.safetensors", pending, metadata)
            shards.append(list(pending))
            pending, filled = {}, 0
        pending[name] = tensor
        filled += size
        total += size
    if not shards:
        save_tensors(folder / WEIGHTS, pending, metadata)
        return
    save_tensors(folder / f"{len(shards)}.safetensors", pending, metadata)
    weight_map = {}
    for number, names in enumerate([*shards, list(pending)]):  # every name says how many there are, known only now
        file = f"model-{number + 1:05d}-of-{len(shards) + 1:05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    write_json(folder / f"{WEIGHTS}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def weight_files(directory: Path) -> list[Path]:
    """Where a directory's weights are: safetensors, else pytorch_model.bin; one file, or all that its index names.

    Raises FileNotFoundError where there are none, or one of them is missing.
    """
    for single in (WEIGHTS, "pytorch_model.bin"):
        index = directory / f"{single}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{directory} lacks {', '.join(missing)}, which its index names: copy or download all of it again."
                )
            return [directory / name for name in names]
        if (directory / single).is_file():
            return [directory / single]
    raise FileNotFoundError(f"{directory} has no weights: expected {WEIGHTS} or pytorch_model.bin.")


def iter_tensors(path: str | Path, keep: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of one file of weights or of a directory's, one at a time; a .bin is read whole, without code.

    keep: only the tensors whose name it accepts; of safetensors the others cost neither time nor memory.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    for file in weight_files(path) if path.is_dir() else [path]:
        if file.suffix != ".safetensors":
            yield from ((name, tensor) for name, tensor in load_foreign_pt(file).items() if keep(name))
            continue
        try:
            with safe_open(str(file), framework="pt") as content:
                for name in filter(keep, content.keys()):
                    yield name, content.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error


def load_tensors(path: str | Path, keep: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """All that `iter_tensors` gives."""
    return dict(iter_tensors(path, keep))


def load_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a directory's safetensors, from their headers."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(directory):
        try:
            with safe_open(str(file), framework="pt") as content:
                shapes.update((name, tuple(content.get_slice(name).get_shape())) for name in content.keys())
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error
    return shapes


def load_foreign_pt(path: str | Path) -> Any:
    """Read a `.pt`/`.pth`/`.bin` that somebody else wrote, tensors only.

    Raises UnsafeFile when the file needs code to be read (a pickled object, a TorchScript archive).
    """
    import pickle
    import zipfile

    import torch

    try:
        # Mapped, not read: a shard of a 7B model is 10 GB. torch's oldest format cannot be.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, OSError) as error:  # OSError: a cut zip
        if "TorchScript" in str(error):
            reason = "it is a TorchScript archive, which is a program"
            step = "Use the same weights from the hub (transformers format), or save `model.state_dict()` of it."
        else:
            detail = (str(error) or type(error).__name__).splitlines()[0][:200]
            reason = f"it holds more than tensors, or is damaged ({detail})"
            step = "Ask its author for a safetensors file, or for a .pt that holds a plain state_dict."
        raise UnsafeFile(f"{path} was not read: {reason}, and reading it could run code. {step}") from error
