"""Routers that start from centroids: whose tokens they are, which experts own which clusters, and that the random start
and its control stay what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip", reason="the trainer's packages are not installed")

from test_features import Pictures, make_bundle
from test_methods import flags
from tiny_run import draw_data, run_two

from llava_clipmoe.files import load_tensors, read_json
from llava_clipmoe.load import load_bundle
from llava_clipmoe.upcycling import moe_config, upcycle
from train_encoder.command import main
from train_encoder.data.decode import ImageTransform, normalise
from train_encoder.methods.centroids import best_experts, in_cluster_fit, routers, rows_of, token_means

CPU = {"device": "cpu", "precision": "fp32"}
ROWS, OWNERS = np.array([0, 2, 3, 5, 8]), np.array([1, 0, 1, 1, 0])
CENTROIDS = ["--moe.router-init", "centroids"]


# --- centroids ------------------------------------------------------------------------------------------------------


def tokens_by_hand(bundle, source: Pictures, row: int, block: int) -> dict[str, torch.Tensor]:
    """What the FFN of a block is given for one image and its first caption, each alone: [T,D] by tower."""
    pixels = ImageTransform(bundle.image_size)(source.image(row))[None]
    ids = bundle.tokenizer(source.captions(row)[0], truncation=True, max_length=24, return_tensors="pt")["input_ids"]
    inputs = {"vision_model": normalise(pixels, bundle.image_mean, bundle.image_std), "text_model": ids}
    found = {}
    for tower, given in inputs.items():
        model = getattr(bundle.model, tower)
        x, layer = model(given, output_hidden_states=True).hidden_states[block], model.encoder.layers[block]
        x = x + layer.self_attn(layer.layer_norm1(x), None, tower == "text_model")
        found[tower] = layer.layer_norm2(x)[0]
    return found


@pytest.mark.parametrize("batch_size", [2, 64])
@torch.no_grad()
def test_a_centroid_is_the_mean_token_of_its_images_and_captions_without_padding(batch_size):
    bundle, source = make_bundle(), Pictures(9)
    blocks = [(tower, block) for tower in ("vision_model", "text_model") for block in (0, 1)]
    found = token_means(bundle, blocks, source, ROWS, OWNERS, 2, batch_size=batch_size, **CPU)
    assert set(found) == set(blocks)
    for tower, block in blocks:
        for expert in (0, 1):
            mine = [tokens_by_hand(bundle, source, row, block)[tower] for row in ROWS[expert == OWNERS].tolist()]
            torch.testing.assert_close(found[tower, block][expert].float(), torch.cat(mine).mean(0))


def test_an_expert_without_an_image_is_refused():
    with pytest.raises(ValueError, match=r"expert\(s\) \[2\]"):
        token_means(make_bundle(), [], Pictures(9), ROWS, OWNERS, 3, **CPU)


def test_rows_send_each_clusters_tokens_to_its_expert_and_prefer_none_for_the_mean_token():
    generator = torch.Generator().manual_seed(0)
    shared, own = 20 * torch.randn(16, generator=generator), 5 * torch.randn(3, 16, generator=generator)
    centroids = (
        shared + own * torch.tensor([[1.0], [0.2], [3.0]])
    ).double()  # one that stands out, one that hardly does
    rows = rows_of(centroids, 0.5)
    assert rows.norm(dim=1).tolist() == pytest.approx([0.5] * 3)
    torch.testing.assert_close(rows @ centroids.mean(0), torch.zeros(3).double())
    tokens = centroids[:, None] + 0.1 * torch.randn(3, 50, 16, generator=generator)
    assert ((tokens @ rows.T).argmax(-1) == torch.arange(3)[:, None]).all()
    assert rows_of(centroids[[0, 0, 0]], 0.5).abs().max() == 0, "no difference, no preference"


def test_the_routers_of_a_mixture_have_the_names_and_lengths_of_random_ones():
    bundle = make_bundle()
    config = moe_config(bundle.model.config, {"vision_model": [1], "text_model": [0, 1]}, num_experts=2)
    made = routers(bundle, config, Pictures(9), ROWS, OWNERS, **CPU)
    names = {
        name for name in upcycle(bundle.model, [bundle.model.state_dict()], config).state_dict() if "router" in name
    }
    assert set(made) == names and len(names) == 3
    for weight in made.values():
        assert weight.shape == (2, 32) and weight.dtype == torch.float32
        assert weight.norm(dim=1).tolist() == pytest.approx([config.router_initializer_range * 32**0.5] * 2)


# --- whose cluster is whose -----------------------------------------------------------------------------------------


def test_a_pair_fits_where_it_is_told_apart_from_its_own_cluster():
    image = np.eye(4, dtype=np.float32)
    text = image[[0, 1, 3, 2]]  # pairs 2 and 3 have each other's captions
    fit = in_cluster_fit(image, text, np.array([0, 0, 1, 1]), 0.1)
    assert fit[:2] == pytest.approx(-np.log1p(np.exp(-10)), abs=1e-6) and fit[2:] == pytest.approx(-10, abs=1e-3)
    alone = in_cluster_fit(image, text, np.array([0, 0, 1, 2]), 0.1)
    assert alone[2:] == pytest.approx(0), "captions of other clusters are no negatives"


def test_a_cluster_belongs_to_the_expert_that_is_better_there_than_elsewhere():
    clusters = np.repeat([0, 1, 2, 3], 5)
    fits = np.array([[-1.0, -1, -1, -1], [-0.1, -0.9, -0.5, -0.5], [-3, -1.5, -3, -3]])  # the second is best everywhere
    assert best_experts(fits.repeat(5, 1), clusters)[::5].tolist() == [1, 2, 0, 0]


def test_no_expert_is_left_without_a_cluster():
    fits = np.array([[-1.0, -1, -1], [-1.0, -1, -1], [-1.0, -1, -1]])
    assert sorted(best_experts(fits, np.arange(3)).tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"2 clusters for 3 experts.*image-clusters"):
        best_experts(fits, np.array([0, 1, 1]))


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """`runs(method, *flags)`: the folder of a finished run of it, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(method: str, *more: str) -> Path:
        key = (method, *more)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(method) / "run"
            assert main([*flags(method, data, made[key]), *more]) == 0
        return made[key]

    return run


def random_routers(run: Path) -> dict[str, torch.Tensor]:
    """The routers of a DMU run as `upcycle` draws them from the run's seed."""
    result = load_bundle(run / "clip-moe").model
    stages = [load_tensors(run / f"stage{number}" / "model.safetensors") for number in (1, 2)]
    state = upcycle(load_bundle(run / "base").model, stages, result.config, seed=0).state_dict()
    return {name: tensor for name, tensor in state.items() if ".router." in name}


def moved_from(run: Path, start: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far the routers of the result are from `start`, by the names of results.json."""
    now = load_bundle(run / "clip-moe").model.state_dict()
    found = {}
    for name, before in start.items():
        tower, _, _, block, *_ = name.split(".")
        found[f"{tower}.{block}"] = ((now[name] - before).norm() / before.norm()).item()
    return found


def reported(run: Path) -> dict[str, float]:
    return {row["block"]: row["relative_change"] for row in read_json(run / "results.json")["router_movement"]}


def test_by_default_routers_start_random_from_the_seed_and_nothing_more_is_made(runs):
    run = runs("dmu")
    assert reported(run) == pytest.approx(moved_from(run, random_routers(run)))
    assert not (run / "router-init").exists()
    assert "clip-moe (random router)" not in read_json(run / "results.json")["done"]


@pytest.mark.parametrize("method", ["dmu", "fmoe"])
def test_with_centroids_the_training_starts_from_them_and_the_random_router_is_the_control(runs, method):
    run, random = runs(method, *CENTROIDS), runs(method)
    made = load_tensors(run / "router-init" / "routers.safetensors")
    assert reported(run) == pytest.approx(moved_from(run, made)), "what is called the start is what was trained"
    scores, before = (read_json(folder / "results.json")["retrieval"]["same"] for folder in (run, random))
    assert [*scores][-3:] == ["clip-moe (random router)", "clip-moe (untrained router)", "clip-moe"]
    assert scores["clip-moe (random router)"] == before["clip-moe (untrained router)"], "the same control for both"
    assert scores["clip-moe (untrained router)"] != scores["clip-moe (random router)"]
    assert "router-init" in (run / "metrics.jsonl").read_text(), "what it cost is counted"


def test_the_experts_of_fmoe_start_from_the_clusters_that_they_were_trained_on(runs):
    """Of the images of expert e's cluster, the base's tokens prefer e: the first block's router sees just these."""
    run = runs("fmoe", *CENTROIDS)
    with np.load(run / "clusters" / "iccl.npz") as archive:
        labels = archive["labels"]
    weight = load_tensors(run / "router-init" / "routers.safetensors")[
        "vision_model.encoder.layers.0.mlp.router.weight"
    ]
    base = load_bundle(run / "base")
    config = read_json(run / "config.json")
    from train_encoder.config import DataConfig
    from train_encoder.data.formats import open_source

    source = open_source(DataConfig(source=config["data"]["source"], caption_columns=("caption",)))
    rows = np.arange(len(labels))
    means = token_means(base, [("vision_model", 0)], source, rows, labels, 3, **CPU)["vision_model", 0]
    logits = means.float() @ weight.T
    assert logits.argmax(1).tolist() == [0, 1, 2]


def test_a_stopped_run_with_centroids_goes_on_to_the_same_bits(runs, data):
    run = runs("dmu", *CENTROIDS)
    files = [run / "clip-moe" / "model.safetensors", run / "router-init" / "routers.safetensors"]
    before = [file.read_bytes() for file in files]
    for name in ("clip-moe", "router-init"):
        for file in (run / name).iterdir():
            file.unlink()
        (run / name).rmdir()
    assert main([*flags("dmu", data, run), *CENTROIDS]) == 0
    assert [file.read_bytes() for file in files] == before


def test_two_processes_train_from_the_routers_of_one(runs, data, tmp_path):
    """The base is trained by both together and would differ in its last bits: it is taken from the other run."""
    alone, run = runs("fmoe", *CENTROIDS), tmp_path / "run"
    run_two([*flags("fmoe", data, run), *CENTROIDS, "--base.source", str(alone / "base"), "--evaluation.retrieval"])
    one, two = (load_tensors(folder / "router-init" / "routers.safetensors") for folder in (alone, run))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert (run / "clip-moe" / "model.safetensors").exists()


@pytest.mark.parametrize("method", ["sparse-upcycling", "vanilla-moe"])
def test_experts_without_clusters_of_their_own_are_refused_before_anything_trains(data, tmp_path, method):
    with pytest.raises(ValueError, match=r"router-init centroids.*dmu, dmu-lora or fmoe"):
        main([*flags(method, data, tmp_path / "run"), *CENTROIDS])
    assert not (tmp_path / "run" / "base").exists()
