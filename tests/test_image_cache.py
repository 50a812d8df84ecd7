"""The cache of decoded images when its writing goes wrong, for real: a disk that others fill, a process killed."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from PIL import Image

COUNT = 400

# Writes the cache of the images in argv[1] into the folder argv[2]; after the first of its batches, does argv[4].
WRITER = """
import os, signal, sys
from pathlib import Path
from train_encoder.config import DataConfig
from train_encoder.data.decode import ImageTransform
from train_encoder.data.cache import build_image_cache
from train_encoder.data.formats import open_source
from train_encoder.progress import Bar

source, folder = open_source(DataConfig(source=sys.argv[1])), Path(sys.argv[2])

def fill(done):  # the cache itself is a sparse file
    try:
        with open(folder / "filler", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        pass

def die(done):
    os.kill(os.getpid(), signal.SIGKILL)

bar = Bar("caching", len(source))
bar.advance = {"fill": fill, "die": die, "nothing": bar.advance}[sys.argv[4]]
build_image_cache(source, ImageTransform(64), folder / "images.npy", workers=int(sys.argv[3]), bar=bar)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i in range(COUNT):
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(folder / f"{i}.png")
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps({"image": f"{i}.png", "caption": str(i)}) + "\n" for i in range(COUNT)))
    return file


def write(source: Path, folder: Path, workers: int, then: str, before: list[str] | None = None):
    return subprocess.run(
        [*(before or []), sys.executable, "-c", WRITER, source, folder, str(workers), then],
        env=tiny_run.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_others_fill_meanwhile_is_an_error_and_not_a_dead_process(source, tmp_path, workers):
    """A write through a memory map would be SIGBUS there."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        done = write(source, tmp_path, workers, "fill")
        left = [path.name for path in tmp_path.iterdir()]
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
    assert done.returncode == 1, (done.returncode, done.stderr[-2000:])
    assert f"SaveError: could not write {tmp_path}/images.npy: [Errno 28] No space left on device (" in done.stderr
    assert "MiB free there)" in done.stderr and "Free some space" in done.stderr
    assert left == ["filler"]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_killed_process_left_is_gone_when_the_cache_is_there(source, tmp_path, workers):
    assert write(source, tmp_path, workers, "die").returncode == -signal.SIGKILL
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) > COUNT * 64 * 64, (
        "nothing was left: killed too soon"
    )
    done = write(source, tmp_path, 0, "nothing")
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npy", "images.npy.index.npz"]
    pixels = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert (pixels[:, 0] == (np.arange(COUNT) % 256)[:, None, None]).all() and not pixels[:, 1:].any()
