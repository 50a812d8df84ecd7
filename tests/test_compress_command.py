"""`llava-clipmoe compress`: a directory that everybody reads, a report that is true, and the smallest good rank."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import test_vision_tower as tower_tests
import torch
import torch.nn.functional as F
from test_model_directory import _WITHOUT_US, other_python, write_tiny_tokenizer  # noqa: F401 (a fixture)
from tiny_run import draw_data

from llava_clipmoe import cli
from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.compression import compress as compress_model
from llava_clipmoe.configuration_clipmoe import active_parameters
from llava_clipmoe.experts_delta_clipmoe import DeltaExperts
from llava_clipmoe.files import read_json, write_json
from llava_clipmoe.load import load_bundle
from llava_clipmoe.model_directory import save_bundle
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.tokenizer import load_tokenizer
from llava_clipmoe.vision_tower import CLIPMoEVisionTower
from train_encoder.compare.cost import vision_macs
from train_encoder.compress import command as compress
from train_encoder.compress.report import Trial, best, make_page, verdict

if find_spec("sentencepiece"):  # without it test_export skips itself, and would take this file with it
    import test_export as export_tests
    from test_export import llava, picture, tokenizer_model  # noqa: F401 (fixtures)


def spread(model: CLIPMoEModel, rank: int | None, size: float = 0.1) -> CLIPMoEModel:
    """Experts 1.. as expert 0 plus a difference of exactly this rank (None: of full rank)."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if ".experts." in name and name.endswith("weight"):
                _, o, i = weight.shape
                for expert in range(1, len(weight)):
                    r = min(o, i) if rank is None else rank
                    noise = torch.randn(o, r, generator=generator) @ torch.randn(r, i, generator=generator) / r**0.5
                    weight[expert] = weight[0] + size * noise
    return model


@pytest.fixture
def make(tiny_moe, tmp_path):
    """make(rank of the differences) -> the directory of a CLIP-MoE."""
    write_tiny_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer", 16)

    def write(rank: int | None, folder: str = "clip-moe"):
        model = spread(copy.deepcopy(tiny_moe), rank)
        save_bundle(ClipBundle(model, tokenizer, name="tiny"), tmp_path / folder)
        return tmp_path / folder

    return write


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return draw_data(tmp_path_factory.mktemp("pictures"), count=24)


def run(*arguments) -> int:
    return compress.main([*map(str, arguments), "--device", "cpu"])


def features(model: torch.nn.Module, batch: dict) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model.get_image_features(batch["pixel_values"]), model.get_text_features(batch["input_ids"])]


def assert_same(ours, theirs, tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert b.std() > 0.01  # otherwise anything would be equal
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# ------------------------------------------------------------------------------------------------- what is written


def test_at_a_sufficient_rank_the_written_model_is_the_full_one(make, tmp_path, batch):
    full, out = make(8), tmp_path / "out"
    assert run(full, out, "--rank", 8) == 0
    found = load_bundle(out)
    assert found.model.config.vision_config.delta_ranks == [[8, 8]] * 3
    assert any(isinstance(module, DeltaExperts) for module in found.model.modules())
    assert_same(features(found.model, batch), features(load_bundle(full).model, batch), 1e-4)
    text = "a cat"
    assert found.tokenizer(text)["input_ids"] == load_bundle(full).tokenizer(text)["input_ids"]


def test_a_low_rank_is_what_compression_gives_and_not_the_full_model(make, tmp_path, batch):
    full, out = make(None), tmp_path / "out"
    run(full, out, "--rank", 8)
    bundle = load_bundle(full)
    assert_same(features(load_bundle(out).model, batch), features(compress_model(bundle.model, rank=8)[0], batch), 1e-6)
    ours, theirs = features(load_bundle(out).model, batch)[0], features(bundle.model, batch)[0]
    assert (ours - theirs).abs().max() > 1e-3 * theirs.abs().max()


def test_an_energy_chooses_ranks_that_keep_it(make, tmp_path):
    out = tmp_path / "out"
    run(make(None), out, "--energy", 0.97)
    trial = Trial(**read_json(out / "compress.json")["compressed"])
    assert 0.97 <= trial.energy_min < 1 and trial.energy_mean >= trial.energy_min
    assert len({one["rank"] for one in trial.kept}) > 1  # the towers' widths differ, so do their ranks


def test_the_model_card_says_what_it_is(make, tmp_path):
    out = tmp_path / "small-moe"
    run(make(8), out, "--rank", 8)
    card = (out / "README.md").read_text()
    for words in ("# small-moe", "made from: clip-moe", "rank 8", "energy kept", "100.00% on average"):
        assert words in card, words
    assert str(tmp_path) not in card + (out / "compress.json").read_text() + (out / "compress.html").read_text()


def test_calibration_changes_the_cut_and_is_named(make, pictures, tmp_path):
    full = make(None)
    run(full, tmp_path / "plain", "--rank", 8, "--check", pictures)
    run(full, tmp_path / "calibrated", "--rank", 8, "--calibration", pictures)
    plain, calibrated = (read_json(tmp_path / name / "compress.json") for name in ("plain", "calibrated"))
    assert not plain["compressed"]["calibrated"] and calibrated["compressed"]["calibrated"]
    assert calibrated["calibration"] == {"source": "data.jsonl, train", "images": 24, "captions": 48}
    # On the inputs that it was cut for, the input-weighted cut stays nearer to the full model.
    patches = [one["compressed"]["cosine"]["patches"]["mean"] for one in (plain, calibrated)]
    assert patches[0] < patches[1] < 1
    assert "calibration: data.jsonl, train (24 images, 48 captions)" in (tmp_path / "calibrated/README.md").read_text()


# -------------------------------------------------------------------------------------------------- who reads it


@pytest.fixture
def delta(make, tmp_path):
    run(make(None), tmp_path / "delta", "--rank", 8)
    return tmp_path / "delta"


def test_llavas_tower_reads_it(delta):
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    tower = CLIPMoEVisionTower(str(delta), tower_tests.settings())
    with torch.no_grad():
        expected = load_bundle(delta).model.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(tower(pixels), expected, atol=1e-5, rtol=1e-5)
    experts = tower.vision_tower.vision_model.encoder.layers[0].mlp.experts
    assert isinstance(experts, DeltaExperts) and len(tower.vision_tower.vision_model.encoder.layers) == 2


@pytest.mark.skipif(find_spec("sentencepiece") is None, reason="the LLM's tokenizer needs sentencepiece")
def test_a_llava_answers_with_it_and_its_export_alike(delta, tmp_path, request):
    llava, tokenizer, picture = map(request.getfixturevalue, ("llava", "tokenizer_model", "picture"))
    source = export_tests.make_llava(llava, delta, tokenizer, tmp_path / "llava-delta")
    config = export_tests.export_hf(source, tmp_path / "out")
    assert config["vision_config"]["delta_ranks"]
    export_tests.assert_same(export_tests.Upstream(llava, source), export_tests.Exported(tmp_path / "out"), picture)


def stranger(python: str, delta, tmp_path, batch, flags: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """What AutoModel(trust_remote_code=True) makes of the directory, in an interpreter that does not import us."""
    torch.save(batch, tmp_path / "batch.pt")
    (tmp_path / "stranger.py").write_text(_WITHOUT_US)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "LLAVA_CLIPMOE_HOOK": "0"}
    command = [python, "-I", "stranger.py", str(delta), "batch.pt", "out.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(tmp_path / "out.pt", weights_only=True)


def test_a_stranger_reads_it_with_trust_remote_code(delta, tmp_path, batch):
    out = stranger(sys.executable, delta, tmp_path, batch)
    assert_same([out["image"], out["text"]], features(load_bundle(delta).model, batch), 1e-5)


def test_a_stranger_with_the_other_transformers_reads_it(delta, tmp_path, batch, other_python):  # noqa: F811
    out = stranger(other_python, delta, tmp_path, batch)
    assert_same([out["image"], out["text"]], features(load_bundle(delta).model, batch), 1e-5)


def test_evaluate_reads_it(delta, pictures, tmp_path, capsys):
    assert cli.main(["evaluate", "retrieval", str(delta), "--data", str(pictures), "--workers", "0",
                     "--device", "cpu"]) == 0  # fmt: skip
    assert "delta" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- the report


def test_the_report_counts_and_measures_what_is_there(make, pictures, tmp_path):
    full, out = make(None), tmp_path / "out"
    run(full, out, "--rank", 8, "--check", pictures, "--images", 10, "--retrieval", f"dev={pictures}")
    report, before, after = read_json(out / "compress.json"), load_bundle(full), load_bundle(out)
    assert report["full"]["parameters"] == active_parameters(before.model.config)
    assert report["compressed"]["parameters"]["total"] == sum(p.numel() for p in after.model.parameters())
    assert report["dense"]["parameters"]["total"] < report["compressed"]["parameters"]["total"]
    assert report["check"] == {"source": "data.jsonl, train", "images": 10, "captions": 20}
    settings = compress.Settings(str(full), images=10, device="cpu")
    sample = compress.load_sample(settings, str(pictures), before)
    pixels = compress.normalise(sample.pixels, before.image_mean, before.image_std)
    with torch.no_grad():
        states = [
            b.model.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:] for b in (before, after)
        ]
        patches = F.cosine_similarity(*states, dim=-1).mean(-1)
        images = F.cosine_similarity(*(b.model.get_image_features(pixels) for b in (before, after)))
        texts = torch.cat([F.cosine_similarity(*(b.model.get_text_features(ids) for b in (before, after)))
                           for ids in sample.ids])  # fmt: skip
    for kind, expected in (("patches", patches), ("image", images), ("text", texts)):
        found = report["compressed"]["cosine"][kind]
        assert found["mean"] == pytest.approx(expected.mean().item(), abs=1e-6) and found["mean"] < 0.99999
        assert found["min"] == pytest.approx(expected.min().item(), abs=1e-6)
    for model, recalls in ((before, report["full"]), (after, report["compressed"])):
        _, source = settings.open(f"dev={pictures}")
        expected = compress.evaluate_retrieval(model, source, device="cpu")
        assert recalls["retrieval"]["dev"] == expected


def test_captions_come_in_batches_of_one_length_and_all_of_them(make, pictures, tmp_path):
    """Padding would count in the second moments."""
    texts = [["cat", "the cat"], ["42"], ["a cat 7", "cats"]]
    rows = [{"image": str(pictures.parent / f"{i:03d}.png"), "caption": own} for i, own in enumerate(texts)]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bundle = load_bundle(make(8))
    sample = compress.load_sample(compress.Settings("", batch_size=2), str(tmp_path / "short.jsonl"), bundle)
    expected = sorted(bundle.tokenizer(text)["input_ids"] for own in texts for text in own)
    assert sorted(ids for part in sample.ids for ids in part.tolist()) == expected
    assert len({part.shape[1] for part in sample.ids}) > 1 and max(map(len, sample.ids)) <= 2


def test_macs_of_differences_are_counted_by_hand(tiny_moe):
    config = compress_model(tiny_moe, rank=8)[0].config
    t = config.vision_config
    tokens, d, h = t.num_patches + 1, t.hidden_size, t.intermediate_size
    whole = 2 * (2 * d * h)  # two experts a token
    delta = 2 * d * h + 4 * 8 * d + 2 * (8 * h + 8 * h + 8 * d)
    saved = vision_macs(tiny_moe.config.vision_config) - vision_macs(t)
    assert saved == 3 * tokens * (whole - delta)


def test_the_page_stands_alone_and_shows_every_table(make, pictures, tmp_path):
    out = tmp_path / "out"
    run(make(None), out, "--find", "--calibration", pictures, "--retrieval", f"dev={pictures}", "--cosine", 0.9,
        "--points", 100)  # fmt: skip
    page, report = (out / "compress.html").read_text(), read_json(out / "compress.json")
    assert page == make_page(report).html()
    assert page.count("<table") == 4
    assert page.count("<svg") == 3 + 4  # a figure a feature, a map a tower and layer
    assert "<script" not in page and 'src="' not in page and verdict(report).partition(":")[2] in page


# ------------------------------------------------------------------------------------------------------- --find


def test_find_prints_all_ranks_and_the_smallest_good_one(make, pictures, capsys, tmp_path):
    before = sorted(tmp_path.iterdir())
    full = make(12)  # so that 16 keeps everything and 8 does not
    assert run(full, "--find", "--calibration", pictures, "--cosine", 0.999999) == 0
    text = capsys.readouterr().out
    for rank in ("8", "16", "32", "full"):
        for kind in ("plain", "calibrated"):
            assert f"| {rank} | {kind} |" in text
    assert "feature cosine >= 0.999999 (retrieval was not measured): 16, " in text
    assert sorted(tmp_path.iterdir()) == sorted([*before, full])


def test_find_writes_the_rank_that_it_found(make, pictures, tmp_path):
    out = tmp_path / "out"
    assert run(make(12), out, "--find", "--check", pictures, "--cosine", 0.999999) == 0
    assert load_bundle(out).model.config.vision_config.delta_ranks == [[16, 16]] * 3
    assert read_json(out / "compress.json")["compressed"]["rank"] == 16


def test_find_writes_nothing_when_no_rank_is_good_enough(make, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(make(12), out, "--find", "--check", pictures, "--cosine", 1.1) == 1
    assert not out.exists() and "No rank keeps feature cosine >= 1.1" in capsys.readouterr().out


def test_the_smallest_rank_must_keep_features_and_retrieval():
    trial = Trial(8, None, False, [], {}, 0, {kind: {"mean": 1.0, "min": 1.0} for kind in ("image", "text", "patches")},
                  {"dev": dict.fromkeys(("i2t_r1", "t2i_r1", "i2t_r5", "t2i_r5"), 0.5)})  # fmt: skip
    before = trial.retrieval
    one_blind = {**trial.cosine, "patches": {"mean": 0.99, "min": 0.99}}
    worse = {"dev": {**before["dev"], "t2i_r5": 0.49}}  # 0.25 points of the mean
    trials = [
        dataclasses.replace(trial, rank=8, cosine=one_blind), dataclasses.replace(trial, rank=16, retrieval=worse),
        dataclasses.replace(trial, rank=64), dataclasses.replace(trial, rank=32),
    ]  # fmt: skip
    assert best(trials, before, 0.999, 0.2).rank == 32
    assert best(trials, before, 0.999, 0.3).rank == 16
    assert best(trials, {}, 0.98, 0.2).rank == 8
    assert best(trials[:2], before, 0.999, 0.2) is None


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["OUT"], "give one of --rank N, --energy SHARE and --find"),
        (["OUT", "--rank", "8", "--energy", "0.9"], "give one of"),
        (["OUT", "--rank", "8", "--find"], "give one of"),
        (["OUT", "--rank", "0"], "at least 1"),
        (["OUT", "--energy", "1.5"], "between 0 and 1"),
        (["OUT", "--energy", "0"], "between 0 and 1"),
        (["OUT", "--rank", "8", "--images", "0"], "--images"),
        (["--rank", "8"], "where should"),
        (["--find"], "--check SOURCE"),
        (["DIR", "--rank", "8"], "is the model itself"),
        (["OTHER", "--rank", "8"], "not a CLIP model directory"),
        (["OUT", "--rank", "8", "--check", "nowhere/data.csv"], "do not exist"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_work(make, tmp_path, monkeypatch, flags, words):
    full = make(8)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    places = {"OUT": tmp_path / "out", "DIR": full, "OTHER": tmp_path / "other"}
    monkeypatch.setattr(compress, "compress", lambda *_, **__: pytest.fail("it began to compress"))
    with pytest.raises(ValueError, match=words):
        run(full, *(places.get(flag, flag) for flag in flags))
    assert (tmp_path / "other" / "thesis.txt").exists() and not (tmp_path / "out").exists()


def test_models_without_whole_experts_are_refused(tiny_dense, make, tmp_path):
    bundle = load_bundle(make(8))
    save_bundle(dataclasses.replace(bundle, model=tiny_dense), tmp_path / "dense")
    with pytest.raises(ValueError, match="is dense"):
        run(tmp_path / "dense", tmp_path / "out", "--rank", 8)
    run(tmp_path / "clip-moe", tmp_path / "out", "--rank", 8)
    with pytest.raises(ValueError, match="compressed already"):
        run(tmp_path / "out", tmp_path / "again", "--rank", 8)


def test_a_source_without_a_readable_picture_is_refused(make, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "data.jsonl").write_text('{"image": "no.png", "caption": "nothing"}\n')
    with pytest.raises(ValueError, match="none of the 1 pictures"):
        run(make(8), tmp_path / "out", "--rank", 8, "--calibration", tmp_path / "empty" / "data.jsonl")


def test_an_older_model_directory_is_replaced_as_a_whole(make, tmp_path):
    old = make(8, "old")
    write_json(old / "stale.json", {})
    run(make(8), old, "--rank", 8)
    assert not (old / "stale.json").exists() and load_bundle(old).model.config.vision_config.delta_ranks
