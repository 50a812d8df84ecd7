"""Encoding a data set: right numbers, whatever the batches; resumable after SIGKILL; started over when it must be."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip", reason="the trainer's packages are not installed")

from conftest import REPOSITORY, shake
from PIL import Image

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.tokenizer import open_clip_tokenizer
from llava_clipmoe.transformer_clipmoe import only_expert
from train_encoder.data.decode import BadImage, ImageTransform, normalise
from train_encoder.features import store
from train_encoder.features.encode import NotFinite, encode_images, encode_source, encode_texts, tokenise
from train_encoder.features.store import open_embeddings
from train_encoder.progress import Bar

WORDS = "red green blue square circle left right two three a of with on small large old new bright dark far".split()


def make_bundle(num_experts: int = 1, positions: int = 24, seed: int = 1) -> ClipBundle:
    """A CLIP of two blocks a tower for 24-pixel images, with CLIP's real vocabulary."""
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPMoEConfig(
        text_config={**shared, "max_position_embeddings": positions},
        vision_config={**shared, "image_size": 24, "patch_size": 8},
        projection_dim=16,
        num_experts=num_experts,
    )
    return ClipBundle(shake(CLIPMoEModel(config), seed).eval(), make_tokenizer(positions), name="tiny")


make_tokenizer = functools.cache(open_clip_tokenizer)


class Pictures:
    """`count` noise pictures; number i has 1 + i % 3 captions of 1 to 40 words, so that some are cut."""

    max_pixels = 10**6

    def __init__(self, count: int, fingerprint: str = "pictures", bad: tuple[int, ...] = ()) -> None:
        self.count, self.fingerprint, self.bad = count, fingerprint, bad

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"{i}.png"

    def image(self, i: int) -> Image.Image:
        if i in self.bad:
            raise BadImage("corrupt: torn")
        return Image.fromarray(np.random.default_rng(i).integers(0, 256, (30, 26, 3), np.uint8))

    def captions(self, i: int) -> list[str]:
        rng = np.random.default_rng([7, i])
        return [" ".join(rng.choice(WORDS, rng.integers(1, 41))) for _ in range(1 + i % 3)]


class Counted(Pictures):
    """Remembers the images that were read; `die_at` ends the process there, as a killed run ends."""

    def __init__(self, count: int, log: Path, die_at: int | None = None, **more) -> None:
        super().__init__(count, **more)
        self.log, self.die_at = log, die_at

    def image(self, i: int) -> Image.Image:
        if i == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.log.open("a") as file:
            file.write(f"{i}\n")
        return super().image(i)

    def read(self) -> list[int]:
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []


SETTINGS = {"batch_size": 3, "device": "cpu", "precision": "fp32", "chunk_rows": 6, "captions": "all"}


def one_by_one(bundle: ClipBundle, source: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: every image and every caption alone, through the model's own forward pass."""
    images, texts = [], []
    with torch.no_grad():
        for i in range(len(source)):
            pixels = ImageTransform(24)(source.image(i))[None]
            images.append(bundle.model.get_image_features(normalise(pixels, bundle.image_mean, bundle.image_std)))
            for caption in source.captions(i):
                ids = bundle.tokenizer(caption, truncation=True, max_length=24, return_tensors="pt")["input_ids"]
                texts.append(bundle.model.get_text_features(ids))
    return tuple(torch.nn.functional.normalize(torch.cat(part), dim=-1) for part in (images, texts))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_chunks_and_sorting_change_nothing(tmp_path, workers):
    bundle, source = make_bundle(), Pictures(20)
    settings = {**SETTINGS, "chunk_rows": 7}  # some chunks end between two captions of an image
    found = encode_source(bundle, source, tmp_path, workers=workers, dtype="float32", **settings)
    image, text = one_by_one(bundle, source)
    torch.testing.assert_close(torch.from_numpy(np.array(found.image)), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.from_numpy(np.array(found.text)), text, atol=1e-5, rtol=0)
    assert found.text_image.tolist() == [i for i in range(20) for _ in source.captions(i)]
    assert found.rows.tolist() == list(range(20))


def test_embeddings_are_fp16_on_disk_and_close_to_fp32(tmp_path):
    bundle, source = make_bundle(), Pictures(7)
    found = encode_source(bundle, source, tmp_path, **SETTINGS)
    image, _ = one_by_one(bundle, source)
    assert isinstance(found.image, np.memmap) and found.image.dtype == found.text.dtype == np.float16
    np.testing.assert_allclose(np.array(found.image, np.float32), image.numpy(), atol=1e-3)


def test_first_takes_one_caption_an_image(tmp_path):
    bundle, source = make_bundle(), Pictures(8)
    found = encode_source(bundle, source, tmp_path, **{**SETTINGS, "captions": "first"})
    expected = encode_texts(bundle, [source.captions(i)[0] for i in range(8)])
    assert found.text.shape == (8, 16) and found.text_image.tolist() == list(range(8))
    np.testing.assert_allclose(np.array(found.text, np.float32), expected.numpy(), atol=1e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_none_leaves_the_captions_alone(tmp_path, workers):
    bundle, source = make_bundle(), Pictures(8)
    found = encode_source(bundle, source, tmp_path, workers=workers, **{**SETTINGS, "captions": "none"})
    assert found.text.shape == (0, 16) and found.text_image.shape == (0,)
    image, _ = one_by_one(bundle, source)
    np.testing.assert_allclose(np.array(found.image, np.float32), image.numpy(), atol=1e-3)


def test_rows_leave_bad_images_out(tmp_path):
    bundle, source = make_bundle(), Pictures(9, bad=(4,))
    rows = np.array([0, 1, 2, 3, 5, 6, 7, 8])
    found = encode_source(bundle, source, tmp_path, rows=rows, dtype="float32", **SETTINGS)
    image, text = one_by_one(bundle, Pictures(9))
    captions_before_4 = sum(len(source.captions(i)) for i in range(4))
    text = torch.cat([text[:captions_before_4], text[captions_before_4 + len(source.captions(4)) :]])
    np.testing.assert_allclose(found.image, image[rows].numpy(), atol=1e-5)
    np.testing.assert_allclose(found.text, text.numpy(), atol=1e-5)
    assert found.rows.tolist() == rows.tolist() and found.text_image.max() == 7


def test_a_bad_image_among_the_rows_is_named(tmp_path):
    with pytest.raises(BadImage, match=r"image 4 \(4.png\).*torn"):
        encode_source(make_bundle(), Pictures(6, bad=(4,)), tmp_path, **SETTINGS)


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_features import SETTINGS, Counted, encode_source, make_bundle
source = Counted(20, Path(sys.argv[2]), die_at=int(sys.argv[3]) if len(sys.argv) > 3 else None)
encode_source(make_bundle(), source, sys.argv[1], **SETTINGS)
"""


def run_killed(folder: Path, log: Path, *die_at: int) -> int:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    script = KILLED.format(tests=str(Path(__file__).parent))
    return subprocess.run(
        [sys.executable, "-c", script, str(folder), str(log), *map(str, die_at)], env=environment, timeout=120
    ).returncode


def test_a_killed_run_goes_on_bit_identically_and_repeats_no_finished_chunk(tmp_path):
    folder, log = tmp_path / "features", tmp_path / "log"
    assert run_killed(folder, log, 14) == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match=r"features\.json"):
        open_embeddings(folder)
    before = Counted(20, log).read()
    assert before == list(range(14))
    assert run_killed(folder, log) == 0
    assert Counted(20, log).read()[len(before) :] == list(range(12, 20))  # chunks of 6: 0 to 11 were finished
    # In a process of its own too: what earlier tests have set in this one (numerical libraries) may change last bits.
    assert run_killed(tmp_path / "whole", tmp_path / "log of the whole") == 0
    for name in ("image", "text", "text_image", "rows"):
        assert (folder / f"{name}.npy").read_bytes() == (tmp_path / "whole" / f"{name}.npy").read_bytes()
    assert not list(folder.glob("progress-*"))


def test_progress_names_a_chunk_only_after_its_rows_are_on_disk(tmp_path, monkeypatch):
    seen = []

    def write_json(path, value):
        if path.name.startswith("progress"):
            stored = np.load(tmp_path / "image.npy")
            seen.append(all(stored[a:b].any(axis=1).all() for a, b in value["image"]))
        real(path, value)

    real = store.write_json
    monkeypatch.setattr(store, "write_json", write_json)
    encode_source(make_bundle(), Pictures(20), tmp_path, **SETTINGS)
    assert len(seen) > 4 and all(seen)


def test_finished_features_are_read_and_not_made_again(tmp_path):
    bundle, log = make_bundle(), tmp_path / "log"
    first = np.array(encode_source(bundle, Counted(8, log), tmp_path / "f", **SETTINGS).image)
    (tmp_path / "f" / "progress-0.json").write_text("{}")  # as when killed just before it would have gone
    again = encode_source(bundle, Counted(8, log), tmp_path / "f", **{**SETTINGS, "batch_size": 5})
    assert Counted(8, log).read() == list(range(8))
    assert (first == again.image).all()
    assert not list((tmp_path / "f").glob("progress-*"))


@pytest.mark.parametrize(
    ("change", "source"),
    [
        ({"captions": "first"}, {}),
        ({"rows": np.arange(7)}, {}),
        ({"rows": np.arange(8)[::-1]}, {}),
        ({"precision": "bf16"}, {}),
        ({"dtype": "float32"}, {}),
        ({"model_id": "another"}, {}),
        ({}, {"fingerprint": "another"}),
    ],
    ids=["captions", "rows", "order", "precision", "dtype", "model_id", "data"],
)
def test_other_work_in_the_same_folder_starts_over(tmp_path, change, source):
    bundle, log = make_bundle(), tmp_path / "log"
    encode_source(bundle, Pictures(8), tmp_path / "f", **SETTINGS)
    found = encode_source(bundle, Counted(8, log, **source), tmp_path / "f", **{**SETTINGS, **change})
    assert Counted(8, log).read() == found.rows.tolist() == list(change.get("rows", range(8)))


def test_other_weights_and_one_expert_alone_start_over(tmp_path):
    moe, folder = make_bundle(num_experts=3), tmp_path / "f"
    mixture = np.array(encode_source(moe, Pictures(6), folder, **SETTINGS).image)
    with only_expert(moe.model, 1):
        alone = np.array(encode_source(moe, Pictures(6), folder, **SETTINGS).image)
        pixels = torch.stack([ImageTransform(24)(Pictures(6).image(i)) for i in range(6)])
        np.testing.assert_allclose(alone, encode_images(moe, pixels).numpy(), atol=1e-3)
    other = np.array(encode_source(make_bundle(3, seed=2), Pictures(6), folder, **SETTINGS).image)
    assert np.abs(alone - mixture).max() > 0.01 and np.abs(other - mixture).max() > 0.01


def test_half_a_run_of_another_model_is_not_continued(tmp_path):
    folder, other = tmp_path / "features", make_bundle(seed=2)
    with pytest.raises(BadImage):
        encode_source(make_bundle(), Pictures(20, bad=(14,)), folder, **SETTINGS)
    assert (folder / "progress-0.json").exists()
    found = encode_source(other, Pictures(20), folder, **SETTINGS)
    expected = encode_source(other, Pictures(20), tmp_path / "fresh", **SETTINGS)
    assert (np.array(found.image) == expected.image).all() and (np.array(found.text) == expected.text).all()


def test_half_a_run_over_other_rows_is_not_continued(tmp_path):
    bundle, rows = make_bundle(), np.arange(20)[::-1]
    with pytest.raises(BadImage):
        encode_source(bundle, Pictures(20, bad=(14,)), tmp_path, **SETTINGS)
    found = encode_source(bundle, Pictures(20), tmp_path, rows=rows, **SETTINGS)
    assert found.rows.tolist() == rows.tolist()
    assert found.text_image.tolist() == [i for i, row in enumerate(rows) for _ in Pictures(20).captions(int(row))]


class Processes:
    """`world` threads that stand for the processes of an accelerator."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier = world, threading.Barrier(world, timeout=60)

    def __getitem__(self, rank: int) -> SimpleNamespace:
        return SimpleNamespace(
            process_index=rank,
            num_processes=self.world,
            device=torch.device("cpu"),
            wait_for_everyone=self.barrier.wait,
        )


def test_processes_share_the_rows_and_all_see_the_whole(tmp_path):
    processes, results, logs = Processes(3), {}, [tmp_path / f"log{rank}" for rank in range(3)]

    def work(rank: int) -> None:
        results[rank] = encode_source(
            make_bundle(), Counted(20, logs[rank]), tmp_path / "f", accelerator=processes[rank], **SETTINGS
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    reads = [Counted(20, log).read() for log in logs]
    assert reads == [list(range(0, 6)), list(range(6, 13)), list(range(13, 20))]
    whole = encode_source(make_bundle(), Pictures(20), tmp_path / "whole", **SETTINGS)
    for rank in range(3):
        np.testing.assert_allclose(results[rank].image, whole.image, atol=1e-3)
        np.testing.assert_allclose(results[rank].text, whole.text, atol=1e-3)


def test_nan_weights_are_an_error_and_not_a_feature(tmp_path):
    bundle = make_bundle()
    bundle.model.visual_projection.weight.data[0] = torch.nan
    with pytest.raises(NotFinite, match="image embeddings"):
        encode_source(bundle, Pictures(4), tmp_path, **SETTINGS)


def test_a_full_disk_is_an_error_that_keeps_what_is_done(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    bundle = make_bundle()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="What was finished is kept"):
            encode_source(bundle, Pictures(8), tmp_path, **SETTINGS)
    assert not (tmp_path / "features.json").exists()
    assert len(encode_source(bundle, Pictures(8), tmp_path, **SETTINGS).image) == 8


def test_the_bar_counts_every_image_and_caption(tmp_path):
    bar, source = Bar("features", None), Pictures(10)
    encode_source(make_bundle(), source, tmp_path, progress=bar, **SETTINGS)
    assert bar.done == bar.total == 10 + sum(len(source.captions(i)) for i in range(10))


def test_the_models_mode_and_the_random_state_are_left_alone(tmp_path):
    bundle = make_bundle()
    bundle.model.train()
    state = torch.get_rng_state()
    encode_source(bundle, Pictures(4), tmp_path, **SETTINGS)
    assert bundle.model.training and torch.equal(state, torch.get_rng_state())


def test_captions_keep_their_order_and_are_cut_with_their_end_token():
    bundle = make_bundle()
    captions = ["red " * 60, "blue", "green circle left"]
    together = encode_texts(bundle, captions, batch_size=2)
    alone = torch.cat([encode_texts(bundle, [caption]) for caption in captions])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    ids, lengths = tokenise(bundle.tokenizer, captions, 24)
    assert lengths.tolist() == [24, 3, 5] and (ids[:, -1] == 49407).all()
    assert encode_texts(bundle, []).shape == (0, 16)


def test_embeddings_on_the_gpu_equal_those_on_the_cpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU on this machine")
    cpu = encode_source(make_bundle(), Pictures(20), tmp_path / "cpu", **SETTINGS)
    gpu = encode_source(make_bundle(), Pictures(20), tmp_path / "gpu", workers=2, **{**SETTINGS, "device": "cuda"})
    np.testing.assert_allclose(gpu.image, cpu.image, atol=2e-3)
    np.testing.assert_allclose(gpu.text, cpu.text, atol=2e-3)
