"""demo/visualize.py: what is drawn over a picture is what the tower did with it, at the place where it did it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from tiny.llavas import make_towers, upstream_is_installed

from demo.visualize import (
    Routing,
    as_seen,
    difference,
    difference_overlay,
    expert_colours,
    overlay,
    routing_of,
    shares_figure,
    strip,
)
from llava_clipmoe.experts_clipmoe import Router
from llava_clipmoe.vision_tower import CLIPMoEVisionTower, CLIPMoEVisionTowerS2
from train_encoder.evaluate.routing import NoExperts

needs_upstream = pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA is not installed")
R, PATCH, S, E, K = 24, 8, 3, 4, 2
LIGHT, DARK = Image.new("RGB", (R, R), "white"), Image.new("RGB", (R, R), "black")


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> tuple[Path, Path]:
    """The directories of a tiny CLIP-MoE and of the dense CLIP it was made of: 24 px, patches of 8, 3 blocks."""
    return make_towers(tmp_path_factory.mktemp("towers"))


def settings(layer: int = -2, **more) -> SimpleNamespace:
    return SimpleNamespace(mm_vision_select_layer=layer, **more)


@pytest.fixture(scope="module")
def moe(directories) -> CLIPMoEVisionTower:
    return CLIPMoEVisionTower(str(directories[0]), settings())


@pytest.fixture(scope="module")
def dense(directories):
    """Upstream's own tower with the dense CLIP."""
    if not upstream_is_installed():
        pytest.skip("upstream LLaVA is not installed")
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    return CLIPVisionTower(str(directories[1]), settings())


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(1, 3, R, R, generator=torch.Generator().manual_seed(7))


def routing_like(first_SS: np.ndarray, weight: float = 0.7, experts: int = E) -> Routing:
    """One block in which each patch's strongest expert is given, the next one being second."""
    weights = weight * np.eye(experts)[first_SS] + (1 - weight) * np.eye(experts)[(first_SS + 1) % experts]
    return Routing([5], weights[None].astype(np.float32))


# -------------------------------------------------------------------------------------------------------------- routing


def test_each_patch_is_a_mixture_of_exactly_k_experts(moe, pixels):
    routing = routing_of(moe, pixels)
    assert routing.blocks == [0, 1]  # layer -2: the third block is not even loaded
    assert routing.weights.shape == (2, S, S, E)
    np.testing.assert_allclose(routing.weights.sum(-1), 1, atol=1e-6)
    assert ((routing.weights > 0).sum(-1) == K).all()


def test_routing_is_what_the_routers_themselves_answer(moe, pixels):
    answers = []
    routers = [module for module in moe.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_hook(lambda *call: answers.append(call[2])) for router in routers]
    routing = routing_of(moe, pixels)
    for hook in hooks:
        hook.remove()
    assert len(answers) == 2 and routing.weights.max() < 0.999, "some patches are undecided"
    for layer, (_, weights_TK, experts_TK) in enumerate(answers):
        for patch in range(S * S):
            y, x = divmod(patch, S)
            got = routing.weights[layer, y, x]
            chosen = experts_TK[1 + patch]  # token 0 is the class token
            np.testing.assert_allclose(got[chosen], weights_TK[1 + patch], atol=1e-6)
            assert routing.first[layer, y, x] == chosen[0]


def test_shares_count_patches():
    routing = routing_like(np.array([[0, 0, 0], [0, 0, 2], [2, 2, 3]]))
    np.testing.assert_allclose(routing.shares, [[5 / 9, 0, 3 / 9, 1 / 9]])


def test_the_routing_of_a_place_follows_the_picture(moe, pixels):
    """The first block's router sees little but the patch itself: swapping two patches' content moves the answer."""
    changed = pixels.clone()
    changed[..., :PATCH, -PATCH:] = 3.0
    before, after = routing_of(moe, pixels).weights[0], routing_of(moe, changed).weights[0]
    moved = np.abs(before - after).sum(-1)
    assert np.unravel_index(moved.argmax(), moved.shape) == (0, 2)


def test_a_dense_tower_has_nothing_to_look_at(dense, directories, pixels):
    with pytest.raises(NoExperts, match="dense CLIP"):
        routing_of(dense, pixels)
    with pytest.raises(NoExperts, match="None of the blocks"):
        routing_of(CLIPMoEVisionTower(str(directories[0]), settings(0)), pixels)


def test_s2_shows_its_base_scale(directories, moe):
    tower = CLIPMoEVisionTowerS2(str(directories[0]), settings(s2_scales="24,48"))
    large = torch.nn.functional.interpolate(torch.randn(1, 3, 6, 6), size=(48, 48), mode="bicubic")
    small = torch.nn.functional.interpolate(large, size=(24, 24), mode="bicubic")
    np.testing.assert_array_equal(routing_of(tower, large).weights, routing_of(moe, small).weights)
    assert difference(tower, large, -large).shape == (S, S)


# ----------------------------------------------------------------------------------------------------------- difference


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_identical_pictures_differ_nowhere(name, pixels, request):
    tower = request.getfixturevalue(name)
    np.testing.assert_allclose(difference(tower, pixels, pixels), np.zeros((S, S)), atol=1e-6)


@pytest.mark.parametrize("place", [(0, 0), (0, 2), (2, 1)])
def test_a_change_lies_in_the_cell_that_was_changed(directories, pixels, place):
    y, x = place
    changed = pixels.clone()
    changed[..., y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH] *= -1
    embedding = CLIPMoEVisionTower(str(directories[0]), settings(0))  # hidden state 0: the patches before they mix
    found = difference(embedding, pixels, changed)
    assert found[place] > 0.01
    found[place] = 0
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_difference_is_one_minus_the_cosine_of_what_llava_gets(moe, pixels):
    other = pixels.flip(-1)
    cosines = torch.nn.functional.cosine_similarity(moe(pixels), moe(other), dim=-1).reshape(S, S)
    np.testing.assert_allclose(difference(moe, pixels, other), 1 - cosines, atol=1e-5)


def test_relative_difference_is_measured_in_differences_between_places(moe, pixels):
    other = pixels.flip(-1)
    x, y = (torch.nn.functional.normalize(moe(p)[0], dim=-1) for p in (pixels, other))
    places = [(1 - x[i] @ y[j]).item() for i in range(S * S) for j in range(S * S) if i != j]
    expected = difference(moe, pixels, other) / np.mean(places)
    np.testing.assert_allclose(difference(moe, pixels, other, relative=True), expected, rtol=1e-4)


def test_the_class_token_is_no_patch(directories, moe, pixels):
    tower = CLIPMoEVisionTower(str(directories[0]), settings(mm_vision_select_feature="cls_patch"))
    np.testing.assert_array_equal(difference(tower, pixels, -pixels), difference(moe, pixels, -pixels))


# -------------------------------------------------------------------------------------------------------------- as seen


def coloured(width: int, height: int) -> Image.Image:
    """Top half red, bottom half blue; the left fifth and the right fifth green."""
    picture = Image.new("RGB", (width, height), (220, 30, 30))
    picture.paste((40, 60, 220), (0, height // 2, width, height))
    for left in (0, width - width // 5):
        picture.paste((30, 170, 60), (left, 0, left + width // 5, height))
    return picture


@needs_upstream
def test_a_wide_picture_is_padded_with_the_mean_colour(moe):
    mean = [int(part * 255) for part in moe.image_processor.image_mean]
    seen, _ = as_seen(coloured(96, 32), moe.image_processor, "pad")  # rows 8 to 15 of 24 are the picture
    array = np.asarray(seen)
    assert seen.size == (R, R)
    for rows in (array[:6], array[-6:]):
        assert np.abs(rows.astype(int) - mean).max() <= 1
    assert array[9, 12, 0] > 150 > array[14, 12, 0], "the picture lies in the middle, the right way up"


@needs_upstream
@pytest.mark.parametrize("aspect_ratio", ["pad", None, "square"])
@pytest.mark.parametrize("size", [(96, 32), (32, 96), (24, 24)])
def test_pixels_are_those_that_upstream_gives_the_model(moe, aspect_ratio, size):
    from llava.mm_utils import process_images

    picture = coloured(*size)
    seen, pixels = as_seen(picture, moe.image_processor, aspect_ratio)
    expected = process_images([picture], moe.image_processor, SimpleNamespace(image_aspect_ratio=aspect_ratio))
    assert torch.equal(pixels, expected)
    again = moe.image_processor.preprocess(seen, return_tensors="pt", do_resize=False)["pixel_values"]
    torch.testing.assert_close(again, pixels, atol=1e-5, rtol=0)  # the picture is these pixels, not nearly these


@needs_upstream
def test_anyres_shows_its_base_picture(moe):
    from llava.mm_utils import process_images

    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]])
    picture = coloured(96, 32)
    expected = process_images([picture], moe.image_processor, config)[0][:1]
    _, pixels = as_seen(picture, moe.image_processor, "anyres")
    assert torch.equal(pixels, expected)


@needs_upstream
def test_what_is_cropped_off_is_not_seen(moe):
    seen, _ = as_seen(coloured(96, 32), moe.image_processor, None)  # the middle third: none of the green ends
    assert np.asarray(seen)[..., 1].max() < 100


# ------------------------------------------------------------------------------------------------------------- pictures


def nearest_expert(colour, experts: int = E) -> int:
    """Whose tint a pixel has: the grey below only adds the same to its three parts."""
    tint = np.asarray(colour, float) - np.mean(colour)
    colours = expert_colours(experts) - expert_colours(experts).mean(1, keepdims=True)
    cosines = colours @ tint / (np.linalg.norm(colours, axis=1) * np.linalg.norm(tint) + 1e-9)
    return int(cosines.argmax())


@pytest.mark.parametrize("seen", [LIGHT, DARK], ids=["light", "dark"])
def test_a_cell_has_the_colour_of_its_expert(seen):
    first = np.array([[0, 1, 2], [3, 0, 1], [2, 3, 0]])
    drawn = overlay(seen, routing_like(first, weight=0.55), 5, side=99)
    assert drawn.size == (99, 99)
    for y in range(S):
        for x in range(S):
            assert nearest_expert(drawn.getpixel((x * 33 + 16, y * 33 + 16))) == first[y, x]


def test_a_decided_patch_is_tinted_more():
    first = np.zeros((S, S), int)
    weak, strong = (overlay(LIGHT, routing_like(first, w), 5).getpixel((20, 20)) for w in (0.5, 1.0))
    target = expert_colours(E)[0] * 255
    assert np.abs(strong - target).sum() < np.abs(weak - target).sum() - 100


def test_a_bright_line_parts_two_experts_only():
    first = np.array([[0, 0, 1]] * 3)
    drawn = np.asarray(overlay(DARK, routing_like(first), 5, side=90)).astype(int)
    assert drawn[15, 60].min() > 200  # between expert 0 and expert 1
    assert drawn[15, 30].max() < drawn[15, 25].max()  # within expert 0: a faint dark one


def test_the_overlay_keeps_the_picture_visible():
    picture = Image.new("L", (R, R), 255)
    picture.paste(0, (0, 0, R // 2, R))
    drawn = overlay(picture.convert("RGB"), routing_like(np.zeros((S, S), int), 1.0), 5, side=90).convert("L")
    assert drawn.getpixel((75, 75)) - drawn.getpixel((15, 15)) > 25


@pytest.mark.parametrize("experts", [2, 8, 12])
def test_no_two_experts_share_a_colour(experts):
    colours = expert_colours(experts)
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 9 * np.eye(experts)
    assert colours.shape == (experts, 3) and apart.min() > 0.15
    if experts == 2:
        np.testing.assert_array_equal(colours, expert_colours(8)[:2])


def test_a_difference_is_drawn_where_it_is_and_on_the_given_scale():
    found = np.zeros((S, S))
    found[0, 2], found[2, 0] = 0.5, 1.0
    drawn = np.asarray(difference_overlay(LIGHT, found, scale=1.0, side=90)).astype(int)
    redness = (drawn[..., 0] - drawn[..., 2])[15::30, 15::30]
    assert redness[2, 0] > redness[0, 2] > 100
    assert np.abs(redness[found == 0]).max() == 0, "no difference, no tint"
    half = np.asarray(difference_overlay(LIGHT, found, scale=2.0, side=90)).astype(int)
    np.testing.assert_array_equal(half[75, 15], drawn[15, 75])


def test_a_strip_has_every_block(moe, pixels):
    routing = routing_of(moe, pixels)
    sheet = strip(LIGHT, routing, columns=2, side=90)
    assert sheet.mode == "RGBA" and sheet.width == 2 * 90 + 12
    for i, block in enumerate(routing.blocks):
        part = sheet.crop((i * 102, 0, i * 102 + 90, 90)).convert("RGB")
        assert part.tobytes() == overlay(LIGHT, routing, block, 90).tobytes()
        words = np.asarray(sheet)[90:, i * 102 : i * 102 + 90, 3]
        assert words.max() > 0, "its number stands below"
    assert strip(LIGHT, routing, columns=1, side=90).height > 2 * 90


def test_the_shares_are_the_lengths_of_the_bars():
    routing = routing_like(np.array([[0, 0, 0], [0, 0, 2], [2, 2, 3]]))
    figure = shares_figure(routing)
    axes = figure.axes[0]
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], routing.shares[0])
    assert [bar.get_facecolor()[:3] for bar in axes.patches] == [tuple(c) for c in expert_colours(E)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"expert {i}" for i in range(E)]
    assert axes.get_yticklabels()[0].get_text() == "block 5"


def contrast(a, b) -> float:
    """WCAG's contrast ratio of two colours."""

    def luminance(colour) -> float:
        parts = np.array(to_rgb(colour))
        parts = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(parts @ (0.2126, 0.7152, 0.0722))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_is_readable_on_light_and_on_dark_pages():
    figure = shares_figure(routing_like(np.zeros((S, S), int)))
    axes = figure.axes[0]
    assert figure.get_facecolor()[3] == 0 and axes.get_facecolor()[3] == 0, "the page shows through"
    texts = [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, *figure.legends[0].get_texts()]
    for text in texts:
        assert min(contrast(text.get_color(), page) for page in ("white", "#0b0f19")) > 4
