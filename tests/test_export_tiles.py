"""A LLaVA that cuts pictures into tiles (anyres, spatial_unpad) becomes transformers' LlavaNext: the same logits."""

from __future__ import annotations

import pytest
import torch
import transformers
from PIL import Image
from test_export import (
    PROMPT,
    Exported,
    Upstream,
    change_config,
    check_as_a_stranger,
    dense_tower,  # noqa: F401
    llava,  # noqa: F401
    make_llava,
    moe_tower,  # noqa: F401
    tokenizer_model,  # noqa: F401
)
from test_export_languages import make_llava as make_llava_of
from tiny.exported import TILES

from llava_clipmoe.export import export_hf
from llava_clipmoe.files import load_tensors, save_tensors

pytestmark = pytest.mark.skipif(not hasattr(transformers, "LlavaNextConfig"), reason="4.37 has no LlavaNext")
SETTINGS = {**TILES, "max_position_embeddings": 1024}
"""Its pinpoints are [width, height]: read as [height, width] they would be another set of grids."""
SIZES = [(60, 40), (40, 60), (24, 24), (333, 500), (500, 375), (97, 31), (31, 97), (1, 1), (300, 7), (7, 300)]


class UpstreamWithTiles(Upstream):
    """Asked as llava/eval/model_vqa_loader.py asks: with each picture's size."""

    def logits_of(self, picture: Image.Image, pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model(self.ids(), images=pixels, image_sizes=[picture.size]).logits

    def answer_to(self, picture: Image.Image, pixels: torch.Tensor) -> list[int]:
        with torch.inference_mode():
            out = self.model.generate(
                self.ids(), images=pixels, image_sizes=[picture.size], do_sample=False, max_new_tokens=12
            )
        return out[0].tolist()


def painted(width: int, height: int) -> Image.Image:
    """A gradient both ways with a fine pattern: a tile at another place, turned or cut otherwise, shows."""
    picture = Image.new("RGB", (width, height))
    for y in range(height):
        for x in range(width):
            picture.putpixel((x, y), (255 * x // width, 255 * y // height, 90 * (x // 3 + y // 5) % 256))
    return picture


@pytest.fixture
def source(llava, moe_tower, tokenizer_model, tmp_path):  # noqa: F811
    return make_llava(llava, moe_tower, tokenizer_model, tmp_path / "llava-tiles", **SETTINGS)


def assert_same(upstream: UpstreamWithTiles, exported: Exported, picture: Image.Image) -> None:
    """The same pixels up to one of 255 levels (two ways to resize), and from the same pixels the same logits."""
    pixels, inputs = upstream.pixels(picture), exported.inputs(picture)
    assert inputs["pixel_values"].shape == pixels.shape
    assert (inputs["pixel_values"] - pixels).abs().max() < 0.016  # 1 / 255 / CLIP's standard deviation
    assert (inputs["pixel_values"] - pixels).abs().mean() < 1e-3
    expected, got = upstream.logits_of(picture, pixels), exported.logits({**inputs, "pixel_values": pixels})
    assert got.shape[:2] == expected.shape[:2]
    assert (got[..., : expected.shape[-1]] - expected).abs().max() < 1e-4
    assert (exported.logits(inputs)[..., : expected.shape[-1]] - expected).abs().max() < 0.1  # a level's worth
    assert expected.std() > 0.5


def test_pictures_of_every_shape_give_the_same_logits(llava, source, tmp_path):  # noqa: F811
    config = export_hf(source, tmp_path / "out")
    assert config["image_grid_pinpoints"] == [[48, 24], [48, 48], [24, 72]]
    upstream, exported = UpstreamWithTiles(llava, source), Exported(tmp_path / "out", "LlavaNext")
    tiles = set()
    for size in SIZES:
        picture = painted(*size)
        assert_same(upstream, exported, picture)
        tiles.add(upstream.pixels(picture).shape[1])
    assert tiles == {1 + 2, 1 + 3, 1 + 4}
    for size in SIZES[:2]:
        picture, pixels = painted(*size), upstream.pixels(painted(*size))
        answer = exported.answer(exported.inputs(picture, pixels))
        known = upstream.answer_to(picture, pixels)
        assert answer[: len(known)] == known and len(known) > 1


def test_a_batch_of_pictures_with_different_numbers_of_tiles(source, tmp_path):
    export_hf(source, tmp_path / "out")
    exported = Exported(tmp_path / "out", "LlavaNext")
    pictures = [painted(31, 97), painted(60, 40)]
    batch = dict(exported.processor(text=[PROMPT] * 2, images=pictures, padding=True, return_tensors="pt"))
    logits = exported.logits(batch)
    for row, picture in zip(logits, pictures, strict=True):
        alone = exported.logits(exported.inputs(picture))[0]
        assert (row[-len(alone) :] - alone).abs().max() < 1e-4


def test_a_dense_tower(llava, dense_tower, tokenizer_model, tmp_path):  # noqa: F811
    """Its pinpoints as text, as upstream's trainer saves what it was given on the command line."""
    settings = {**SETTINGS, "image_grid_pinpoints": "[(24, 48), (48, 48), (72, 24)]"}
    source = make_llava(llava, dense_tower, tokenizer_model, tmp_path / "llava-dense", **settings)
    config = export_hf(source, tmp_path / "out")
    assert "auto_map" not in config
    exported = Exported(tmp_path / "out", "LlavaNext")
    assert type(exported.model.model.vision_tower).__name__ == "CLIPVisionModel"
    assert_same(UpstreamWithTiles(llava, source), exported, painted(60, 40))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_newer_language_models(kind, llava, moe_tower, tmp_path):  # noqa: F811
    source = make_llava_of(kind, moe_tower, tmp_path, **TILES)
    export_hf(source, tmp_path / "out")
    upstream = UpstreamWithTiles(llava, source, "AutoTokenizer")
    assert_same(upstream, Exported(tmp_path / "out", "LlavaNext"), painted(60, 40))


def test_trust_remote_code_loads_it_without_the_package(source, tmp_path):
    export_hf(source, tmp_path / "out")
    exported = Exported(tmp_path / "out", "LlavaNext")
    check_as_a_stranger(exported, exported.inputs(painted(60, 40)), tmp_path)


def test_where_upstreams_rounding_falls_short_transformers_keeps_two_rows_more(llava, source, tmp_path):  # noqa: F811
    """98 x 294 pixels: 98 * (6 / 294) is 2 patches, of which floating point makes a little less; here they are columns.
    The export's card says so. At the next size both are the same again."""
    export_hf(source, tmp_path / "out")
    upstream, exported = UpstreamWithTiles(llava, source), Exported(tmp_path / "out", "LlavaNext")
    lengths = {}
    for size in ((98, 294), (98, 295)):
        picture = painted(*size)
        expected = upstream.logits_of(picture, upstream.pixels(picture))
        lengths[size] = exported.logits(exported.inputs(picture)).shape[1] - expected.shape[1]
    assert lengths[98, 295] == 0 and lengths[98, 294] > 0
    assert "two rows" in (tmp_path / "out" / "README.md").read_text()


def test_what_no_llava_next_can_do_is_refused(source, tmp_path):
    for settings, words in [
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'.*always removes the padding"),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type is 'spatial'.*always removes the padding"),
        ({"image_aspect_ratio": "anyres_max_9"}, "anyres_max_9"),
        ({"image_aspect_ratio": "pad"}, "sees no tiles"),
        ({"mm_vision_select_feature": "cls_patch"}, "class token"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints are None"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints are"),
    ]:
        before = (source / "config.json").read_text()
        with pytest.raises(ValueError, match=words):
            export_hf(change_config(source, **settings), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        (source / "config.json").write_text(before)


def test_image_newline_must_be_there(source, tmp_path):
    state = load_tensors(source)
    del state["model.image_newline"]
    save_tensors(source / "model.safetensors", state, {"format": "pt"})
    with pytest.raises(ValueError, match="image_newline"):
        export_hf(source, tmp_path / "out")
