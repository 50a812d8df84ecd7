"""Checkpoints in OpenAI naming (open_clip, OpenAI, the official CLIP-MoE) become our model with the same features."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llava_clipmoe import conversion, open_clip_models
from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.conversion import load_checkpoint, to_openai_state
from llava_clipmoe.convert_command import convert, main
from llava_clipmoe.files import UnsafeFile, save_tensors
from llava_clipmoe.load import load_bundle
from llava_clipmoe.open_clip_models import load_open_clip
from llava_clipmoe.openai_names import from_openai_names
from llava_clipmoe.tokenizer import open_clip_tokenizer

open_clip = pytest.importorskip("open_clip")  # CLIP's vocabulary comes from it

PIXELS, PATCH, EMBED, EXPERTS = 32, 16, 24, 4
VISION, TEXT = (128, 3), (64, 2)  # width (2 heads, 1 head), blocks


# ------------------------------------------------------- the official layout: random weights, and the formulas in full


def official_state(moe_layers: int, positions: int = 248, res: bool = True, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict in the layout of the official code; `moe_layers` last blocks of each tower have experts."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def add(name, *shape, around=0.0, scale=0.12):
        state[name] = around + scale * torch.randn(shape, generator=generator)

    def norm(name, width):
        add(f"{name}.weight", width, around=1.0)
        add(f"{name}.bias", width)

    def linear(name, inside, outside):
        add(f"{name}.weight", outside, inside)
        add(f"{name}.bias", outside)

    for prefix, (width, depth) in (("visual.transformer", VISION), ("transformer", TEXT)):
        for i in range(depth):
            block = f"{prefix}.resblocks.{i}"
            norm(f"{block}.ln_1", width)
            norm(f"{block}.ln_2", width)
            add(f"{block}.attn.in_proj_weight", 3 * width, width)
            add(f"{block}.attn.in_proj_bias", 3 * width)
            linear(f"{block}.attn.out_proj", width, width)
            with_experts = i >= depth - min(moe_layers, depth)
            for ffn in [f"experts.{e}" for e in range(EXPERTS)] if with_experts else ["mlp"]:
                linear(f"{block}.{ffn}.c_fc", width, 4 * width)
                linear(f"{block}.{ffn}.c_proj", 4 * width, width)
            if with_experts:
                add(f"{block}.gate.weight", EXPERTS, width, scale=0.5)
    add("visual.conv1.weight", VISION[0], 3, PATCH, PATCH)
    add("visual.class_embedding", VISION[0])
    add("visual.positional_embedding", (PIXELS // PATCH) ** 2 + 1, VISION[0])
    add("visual.proj", VISION[0], EMBED)
    add("token_embedding.weight", 49408, TEXT[0])
    add("positional_embedding", positions, TEXT[0])
    if res:
        add("positional_embedding_res", positions, TEXT[0])
    add("text_projection", TEXT[0], EMBED)
    state["logit_scale"] = torch.tensor(math.log(100))
    for name, width in (("visual.ln_pre", VISION[0]), ("visual.ln_post", VISION[0]), ("ln_final", TEXT[0])):
        norm(name, width)
    return state


def ffn(x, state, prefix):
    h = F.linear(x, state[f"{prefix}.c_fc.weight"], state[f"{prefix}.c_fc.bias"])
    return F.linear(h * torch.sigmoid(1.702 * h), state[f"{prefix}.c_proj.weight"], state[f"{prefix}.c_proj.bias"])


def experts(x, state, prefix, k):
    """Equations 3 to 5 for every token by itself."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            logits = state[f"{prefix}.gate.weight"] @ x[b, t]
            best = logits.argsort(descending=True)[:k]
            for weight, e in zip(logits[best].softmax(0), best.tolist(), strict=True):
                out[b, t] += weight * ffn(x[b, t], state, f"{prefix}.experts.{e}")
    return out


def tower(x, state, prefix, depth, k, causal):
    """Pre-norm blocks with heads of 64."""
    length, width = x.shape[1:]
    mask = torch.full((length, length), -math.inf).triu(1) if causal else torch.zeros(length, length)
    for i in range(depth):
        block = f"{prefix}.resblocks.{i}"
        normed = F.layer_norm(x, (width,), state[f"{block}.ln_1.weight"], state[f"{block}.ln_1.bias"])
        q, k_, v = F.linear(normed, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"]).split(
            width, dim=-1
        )
        heads = []
        for h in range(width // 64):
            part = slice(64 * h, 64 * (h + 1))
            scores = q[..., part] @ k_[..., part].transpose(1, 2) / 8 + mask
            heads.append(scores.softmax(-1) @ v[..., part])
        attended = torch.cat(heads, -1)
        x = x + F.linear(attended, state[f"{block}.attn.out_proj.weight"], state[f"{block}.attn.out_proj.bias"])
        normed = F.layer_norm(x, (width,), state[f"{block}.ln_2.weight"], state[f"{block}.ln_2.bias"])
        has_experts = f"{block}.gate.weight" in state
        x = x + (experts(normed, state, block, k) if has_experts else ffn(normed, state, f"{block}.mlp"))
    return x


def official_features(state, pixels, ids, k=2):
    """Image and text embeddings by the formulas, straight from a state dict in the official layout."""
    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(pixels), 1, -1), patches], 1)
    x = x + state["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = tower(x, state, "visual.transformer", VISION[1], k, causal=False)[:, 0]
    image = F.layer_norm(x, x.shape[-1:], state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    positions = state["positional_embedding"].clone()
    if "positional_embedding_res" in state:
        positions[20:] = state["positional_embedding_res"][20:]
    x = state["token_embedding.weight"][ids] + positions[: ids.shape[1]]
    x = tower(x, state, "transformer", TEXT[1], k, causal=True)
    x = F.layer_norm(x, x.shape[-1:], state["ln_final.weight"], state["ln_final.bias"])
    x = x[torch.arange(len(ids)), ids.argmax(-1)]
    return image @ state["visual.proj"], x @ state["text_projection"]


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, PIXELS, PIXELS, generator=generator)
    captions = ["a red fox", "four clocks that show different times " * 5]  # one goes beyond position 20
    ids = torch.tensor(open_clip_tokenizer(77)(captions, padding=True)["input_ids"])
    assert ids.shape[1] > 25
    return pixels, ids


def features(bundle: ClipBundle, inputs):
    with torch.no_grad():
        return bundle.model.get_image_features(inputs[0]), bundle.model.get_text_features(inputs[1])


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert b.std() > 0.05  # otherwise anything would be equal
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max().clamp(min=1)), rtol=0)


def differ(ours, theirs) -> bool:
    return all((a - b).abs().max() > 1e-3 for a, b in zip(ours, theirs, strict=True))


def save_pt(state, path: Path) -> Path:
    torch.save(state, path)
    return path


# --------------------------------------------------------------------------------------------------- official CLIP-MoE


@pytest.mark.parametrize("moe_layers, k", [(3, 2), (1, 1), (2, 3)])
def test_an_official_clip_moe_gives_the_same_features(tmp_path, inputs, moe_layers, k):
    state = official_state(moe_layers)
    bundle = convert(save_pt(state, tmp_path / "moe.pt"), tmp_path / "moe", num_experts_per_tok=k)
    expected = official_features(state, *inputs, k=k)
    assert_same(features(bundle, inputs), expected)
    again = load_bundle(tmp_path / "moe")
    assert_same(features(again, inputs), expected)
    config = again.model.config
    assert (config.num_experts, config.num_experts_per_tok) == (EXPERTS, k)
    assert config.vision_config.moe_layers == list(range(3 - moe_layers, 3))
    assert config.text_config.moe_layers == list(range(2 - min(moe_layers, 2), 2))
    assert (again.context_length, again.image_size, again.tokenizer.model_max_length) == (248, PIXELS, 248)


def test_k_must_be_said_and_possible(tmp_path):
    path = save_pt(official_state(1), tmp_path / "moe.pt")
    with pytest.raises(ValueError, match=r"4 experts.*Say it with --num-experts-per-tok"):
        load_bundle(path)
    with pytest.raises(ValueError, match=r"num_experts_per_tok \(5\) must lie between 1 and num_experts \(4\)"):
        load_checkpoint(path, num_experts_per_tok=5)
    dense = save_pt(official_state(0), tmp_path / "dense.pt")
    with pytest.raises(ValueError, match="it has no experts"):
        load_checkpoint(dense, num_experts_per_tok=2)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_dense_stage_file_of_the_official_trainer(tmp_path, inputs, wrapped):
    state = official_state(0)
    stored = {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}} if wrapped else state
    bundle = convert(save_pt(stored, tmp_path / "clip-mcl-s1_weights.pt"), tmp_path / "stage1")
    assert bundle.model.config.is_dense
    assert_same(features(load_bundle(tmp_path / "stage1"), inputs), official_features(state, *inputs))


def test_half_precision_files_become_fp32(tmp_path, inputs):
    state = {name: tensor.half() for name, tensor in official_state(1).items()}
    bundle = load_checkpoint(save_pt(state, tmp_path / "moe.pt"), num_experts_per_tok=2)
    assert {p.dtype for p in bundle.model.parameters()} == {torch.float32}
    whole = {name: tensor.float() for name, tensor in state.items()}
    assert_same(features(bundle, inputs), official_features(whole, *inputs))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("moe_layers", [3, 1, 0])
def test_there_and_back_is_bit_exact(tmp_path, moe_layers, suffix):
    state = official_state(moe_layers)
    k = 2 if moe_layers else None
    bundle = convert(save_pt(state, tmp_path / "in.pt"), tmp_path / "ours", num_experts_per_tok=k)
    convert(tmp_path / "ours", tmp_path / f"out{suffix}", to="openai")
    back = conversion.read_state(tmp_path / f"out{suffix}")
    # The official code reads rows 0-19 of one table of positions and the others of the second: so both are whole now.
    whole = torch.cat([state["positional_embedding"][:20], state["positional_embedding_res"][20:]])
    state["positional_embedding"] = state["positional_embedding_res"] = whole
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    again = load_checkpoint(tmp_path / f"out{suffix}", num_experts_per_tok=k)
    ours, theirs = bundle.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_that_the_official_layout_cannot_hold_is_refused(tmp_path):
    path = save_pt(official_state(2), tmp_path / "moe.pt")
    bundle = load_checkpoint(path, num_experts_per_tok=2)
    to_openai_state(bundle)
    bundle.model.config.text_config.num_attention_heads = 2
    bundle.model.config.vision_config.hidden_act = "gelu"
    bundle.model.config.vision_config.moe_layers = [0, 1]
    with pytest.raises(ValueError, match=r"text_config: heads are not 64.*vision_config|vision_config.*text_config"):
        to_openai_state(bundle)
    with pytest.raises(ValueError, match=r"activation is gelu.*\[0, 1\] are not the tower's last"):
        to_openai_state(bundle)
    with pytest.raises(ValueError, match=r"ends in \.pt or \.safetensors"):
        convert(path, tmp_path / "out", num_experts_per_tok=2, to="openai")


# --------------------------------------------------------------------------------------------------------- dense OpenAI


def test_an_openai_file_is_known_by_its_numbers(tmp_path, inputs):
    state = official_state(0, positions=77, res=False)
    numbers = {name: torch.tensor(n) for name, n in (("input_resolution", 32), ("context_length", 77))}
    bundle = load_checkpoint(save_pt(state | numbers, tmp_path / "openai.pt"))
    assert_same(features(bundle, inputs), official_features(state, *inputs))
    assert to_openai_state(bundle).keys() == state.keys()  # 77 positions: no second table


def test_an_activation_that_nobody_says_is_asked_for(tmp_path, inputs):
    state = official_state(0, positions=77, res=False)
    path = save_pt(state, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"does not say its activation.*--open-clip-name.*--no-quick-gelu"):
        load_checkpoint(path)
    expected = official_features(state, *inputs)
    assert_same(features(load_checkpoint(path, quick_gelu=True), inputs), expected)
    assert differ(features(load_checkpoint(path, quick_gelu=False), inputs), expected)


# ------------------------------------------------------------------------------------------------------------ open_clip


def register(monkeypatch, name: str, **changes) -> dict:
    """Make `name` known to open_clip: a tiny CLIP whose heads are 32 and 16 wide."""
    vision = {"image_size": PIXELS, "layers": 2, "width": 64, "head_width": 32, "patch_size": PATCH, "mlp_ratio": 2.0}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, "mlp_ratio": 3.0}
    settings = {"embed_dim": EMBED, **changes}
    settings["vision_cfg"] = vision | changes.get("vision_cfg", {})
    settings["text_cfg"] = text | changes.get("text_cfg", {})
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, settings)
    return settings


def open_clip_model(name: str, **options):
    model = open_clip.create_model(name, **options).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


def open_clip_features(model, inputs):
    ids = F.pad(inputs[1], (0, 77 - inputs[1].shape[1]), value=0)  # open_clip wants all 77
    with torch.no_grad():
        return model.encode_image(inputs[0]), model.encode_text(ids)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("file", ["w.safetensors", "w.pt"])
def test_an_open_clip_model_gives_the_same_features(tmp_path, inputs, monkeypatch, quick_gelu, file):
    register(monkeypatch, "ViT-Tiny", quick_gelu=quick_gelu)
    model = open_clip_model("ViT-Tiny")
    state = dict(model.state_dict())
    if file == "w.pt":
        save_pt({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / file)
    else:
        save_tensors(tmp_path / file, state)
    expected = open_clip_features(model, inputs)
    bundle = load_bundle("ViT-Tiny", checkpoint=tmp_path / file)
    assert_same(features(bundle, inputs), expected)
    wrong = load_bundle("ViT-Tiny", checkpoint=tmp_path / file, quick_gelu=not quick_gelu)
    assert differ(features(wrong, inputs), expected)
    convert(tmp_path / file, tmp_path / "out", open_clip_name="ViT-Tiny")
    assert_same(features(load_bundle(tmp_path / "out"), inputs), expected)


def test_names_ending_in_quickgelu(tmp_path, inputs, monkeypatch):
    register(monkeypatch, "ViT-Tiny")
    model = open_clip_model("ViT-Tiny", force_quick_gelu=True)
    save_tensors(tmp_path / "w.safetensors", dict(model.state_dict()))
    bundle = load_open_clip("ViT-Tiny-quickgelu", tmp_path / "w.safetensors")
    assert_same(features(bundle, inputs), open_clip_features(model, inputs))


def test_openais_weights_under_a_gelu_name_are_warned_about(tmp_path, monkeypatch, recwarn):
    register(monkeypatch, "ViT-Tiny")
    register(monkeypatch, "ViT-Tiny-quickgelu", quick_gelu=True)
    save_tensors(tmp_path / "ViT-Tiny-openai.safetensors", dict(open_clip_model("ViT-Tiny").state_dict()))
    with pytest.warns(UserWarning, match="Use ViT-Tiny-quickgelu"):
        bundle = load_open_clip("ViT-Tiny", tmp_path / "ViT-Tiny-openai.safetensors")
    assert bundle.model.config.vision_config.hidden_act == "gelu"  # warned, not replaced
    recwarn.clear()
    load_open_clip("ViT-Tiny-quickgelu", tmp_path / "ViT-Tiny-openai.safetensors")
    load_open_clip("ViT-Tiny", tmp_path / "ViT-Tiny-openai.safetensors", quick_gelu=False)
    assert not [w for w in recwarn if "quickgelu" in str(w.message)]


def test_pixel_statistics_beside_the_checkpoint(tmp_path, monkeypatch):
    register(monkeypatch, "ViT-Tiny")
    save_tensors(tmp_path / "w.safetensors", dict(open_clip_model("ViT-Tiny").state_dict()))
    settings = {"preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    bundle = load_open_clip("ViT-Tiny", tmp_path / "w.safetensors")
    assert (bundle.image_mean, bundle.image_std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.parametrize(
    "name",
    ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "convnext_base", "roberta-ViT-B-32", "EVA02-B-16", "ViT-L-14-CLIPA"],
)
def test_open_clip_models_of_another_kind_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is not a CLIP with OpenAI's two transformers"):
        load_open_clip(name, tmp_path / "never-read.pt")


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14-336-quickgelu", "ViT-H-14", "ViT-bigG-14", "ViT-L-14-336"])
def test_open_clips_own_clips_are_accepted(name):
    settings = open_clip_models._open_clip_settings(name)
    assert settings["quick_gelu"] == name.endswith("quickgelu")
    assert settings["vision_cfg"]["head_width"] == {"ViT-H-14": 80, "ViT-bigG-14": 104}.get(name, 64)


def test_wrong_names_and_wrong_files(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"near it: .*ViT-L-14"):
        load_open_clip("ViT-L-41", tmp_path / "w.pt")
    register(monkeypatch, "ViT-Tiny")
    register(monkeypatch, "ViT-Other", vision_cfg={"layers": 3})
    save_tensors(tmp_path / "w.safetensors", dict(open_clip_model("ViT-Tiny").state_dict()))
    with pytest.raises(
        ValueError, match=r"16 missing: vision_model.encoder.layers.2.*Is this the checkpoint of ViT-Other"
    ):
        load_open_clip("ViT-Other", tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="leave --num-experts-per-tok out"):
        convert(tmp_path / "w.safetensors", tmp_path / "out", open_clip_name="ViT-Tiny", num_experts_per_tok=2)


# -------------------------------------------------------------------------------------------------------- foreign files


def test_a_file_that_would_run_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = save_pt({"visual.conv1.weight": Trap()}, tmp_path / "moe.pt")
    with pytest.raises(UnsafeFile, match=r"was not read.*Ask its author for a safetensors file"):
        load_bundle(path, num_experts_per_tok=2)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "names, said",
    [
        (["vision_model.embeddings.patch_embedding.weight"], "give the directory it lies in"),
        (["logit_bias"], "has a logit_bias, as SigLIP's loss trains one"),
        (["module.logit_bias", "module.visual.trunk.stem.0.weight"], "has a logit_bias"),
        (["clip.vision_model.embeddings.patch_embedding.weight"], "give the directory it lies in"),
        (["module.bert.embeddings.weight", "module.visual.conv1.weight"], "with another text tower"),
        (["model.visual.conv1.weight", "model.visual.layer1.0.conv1.weight"], "is a CLIP with a ResNet"),
        (["text_decoder.ln_final.weight"], "is CoCa"),
        (["visual.layer1.0.conv1.weight"], "is a CLIP with a ResNet"),
        (["visual.trunk.stem.0.weight"], "with a timm image tower"),
        (["text.transformer.embeddings.weight"], "with another text tower"),
        (["layer.weight"], "no CLIP in OpenAI naming: it lacks visual.conv1.weight"),
    ],
)
def test_other_checkpoints_are_named(tmp_path, names, said):
    path = save_pt({name: torch.zeros(2) for name in names}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=said):
        load_bundle(path)


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "clip.", "clip_model.",
            "model.module.", "module.model._orig_mod.", "_forward_module."]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_taken_off(tmp_path, inputs, prefix):
    state = official_state(1)
    path = save_pt({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "moe.pt")
    bundle = convert(path, tmp_path / "moe", num_experts_per_tok=2)
    assert_same(features(bundle, inputs), official_features(state, *inputs))


def test_the_names_that_torch_itself_gives_wrapped_models(tmp_path, inputs, monkeypatch):
    """Data-parallel, compiled, and only a tower or its blocks compiled, in and around each other."""
    register(monkeypatch, "ViT-Tiny")
    plain = open_clip_model("ViT-Tiny")
    expected = open_clip_features(plain, inputs)
    wraps = {
        "compiled": lambda model: torch.compile(model),
        "parallel": lambda model: torch.nn.DataParallel(model),
        "compiled in parallel": lambda model: torch.nn.DataParallel(torch.compile(model)),
        "parallel, then compiled": lambda model: torch.compile(torch.nn.DataParallel(model)),
    }
    parts = ("visual", "transformer.resblocks.0")
    for name, wrap in wraps.items():
        whole, model = wrap(plain).state_dict(), copy.deepcopy(plain)
        assert not plain.state_dict().keys() & whole.keys(), name
        for part in parts:
            parent, _, child = part.rpartition(".")
            setattr(model.get_submodule(parent), child, wrap(model.get_submodule(part)))
        for state in (whole, model.state_dict(), wrap(model).state_dict()):
            bundle = load_open_clip("ViT-Tiny", save_pt(dict(state), tmp_path / "w.pt"), quick_gelu=False)
            assert_same(features(bundle, inputs), expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"epoch": 3, "name": "x", "state_dict": state, "optimizer": {"state": {}}, "scaler": {}},
        lambda state: {"model": state, "step": 5, "best": 0.5},
        lambda state: {"model": {"state_dict": {f"module.{k}": v for k, v in state.items()}}},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {}},
        lambda state: {"module": {f"clip.{k}": v for k, v in state.items()}, "buffer_names": []},
        lambda state: {"model": {"name": "ViT", "layers": 3}, "state_dict": state},
        lambda state: {"state_dict": state, "state_dict_ema": {k: v + 1 for k, v in state.items()}},
    ],
)
def test_what_trainers_keep_beside_the_model_is_left_out(tmp_path, inputs, wrap):
    state = official_state(0)
    bundle = load_checkpoint(save_pt(wrap(state), tmp_path / "epoch_3.pt"))
    assert_same(features(bundle, inputs), official_features(state, *inputs))


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_logit_scale_with_dimensions(tmp_path, inputs, monkeypatch, shape):
    state = official_state(1)
    state["logit_scale"] = torch.full(shape, 3.5)
    bundle = load_checkpoint(save_pt(state, tmp_path / "moe.pt"), num_experts_per_tok=2)
    assert bundle.model.logit_scale.shape == () and bundle.model.logit_scale.item() == 3.5
    assert_same(features(bundle, inputs), official_features(state, *inputs))
    register(monkeypatch, "ViT-Tiny", nonscalar_logit_scale=True)
    model = open_clip.create_model("ViT-Tiny", nonscalar_logit_scale=True)
    assert model.logit_scale.shape == (1,)
    register(monkeypatch, "ViT-Tiny")
    save_tensors(tmp_path / "w.safetensors", dict(model.state_dict()))
    assert load_open_clip("ViT-Tiny", tmp_path / "w.safetensors").model.logit_scale.shape == ()
    state["logit_scale"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"logit_scale \[2\] instead of \[\].*built otherwise than OpenAI's"):
        load_checkpoint(save_pt(state, tmp_path / "two.pt"), num_experts_per_tok=2)


def test_a_mixture_of_prefixes_is_refused_with_two_names(tmp_path):
    def refused(names, said):
        with pytest.raises(ValueError, match=said) as error:
            load_checkpoint(save_pt(dict(names), tmp_path / "x.pt"), quick_gelu=True)
        assert str(error.value).endswith("Save the state_dict() of the CLIP alone.")

    state = list(official_state(0).items())
    for prefix in PREFIXES:
        half = [(f"{prefix}{name}" if i % 2 else name, tensor) for i, (name, tensor) in enumerate(state)]
        refused(half, r"x\.pt holds \S+ beside \S+: more than one model, or parts of several")
        both = [*state, *((f"{prefix}{name}", tensor) for name, tensor in state)]
        refused(both, r"x\.pt holds \S+ beside \S+: more than one model, or parts of several")
    copies = [(f"{where}{name}", tensor) for where in ("model.", "ema_model.") for name, tensor in state]
    refused(copies, r"holds model\.visual\.\S+ beside ema_model\.\S+")
    averaged = [("n_averaged", torch.tensor(3)), *((f"module.{name}", tensor) for name, tensor in state)]
    refused(averaged, r"holds n_averaged beside module\.")
    head = [("head.weight", torch.zeros(2, 2)), *((f"clip.{name}", tensor) for name, tensor in state)]
    refused(head, r"holds clip\.visual\.\S+ beside head\.weight")


def test_what_is_no_whole_state_dict_is_said(tmp_path):
    state = official_state(0)
    for stored, said in (
        (
            {"student": state, "teacher": state, "epoch": 3},
            r"student \(dict\), teacher \(dict\), epoch \(int\) is some",
        ),
        ({**state, "epoch": 3}, r"epoch \(int\) is something else"),
        ([1, 2], r"all of it \(list\) is something else"),
        ({**state, "visual.proj": torch.zeros(0)}, r"tensors without numbers \(visual\.proj\).*DeepSpeed"),
    ):
        with pytest.raises(ValueError, match=said):
            load_checkpoint(save_pt(stored, tmp_path / "x.pt"))


def test_incomplete_or_strange_checkpoints(tmp_path):
    def refused(change, match):
        state = official_state(1)
        change(state)
        with pytest.raises(ValueError, match=match):
            load_checkpoint(save_pt(state, tmp_path / "x.pt"), num_experts_per_tok=2)

    block = "visual.transformer.resblocks.2"
    refused(lambda s: s.pop(f"{block}.experts.1.c_fc.bias"), r"incomplete.*only the experts \[0, 2, 3\]")
    refused(lambda s: s.pop(f"{block}.ln_1.bias"), r"1 missing: vision_model.encoder.layers.2.layer_norm1.bias")
    refused(lambda s: s.update({f"{block}.gate.bias": torch.zeros(4)}), r"does not have: .*gate\.bias")
    refused(lambda s: s.update({f"{block}.gate.weight": torch.zeros(5, 128)}), "different numbers of experts")
    refused(lambda s: s.update({"token_embedding.weight": torch.zeros(9, 64)}), "vocabulary of 9")
    with pytest.raises(ValueError, match="plain state dict"):
        load_checkpoint(save_pt([1, 2], tmp_path / "list.pt"))


def test_unknown_names_are_reported_once():
    with pytest.raises(ValueError, match="a, b, c, d, e"):
        from_openai_names(dict.fromkeys("abcdefg", torch.zeros(1)))


# -------------------------------------------------------------------------------------------------------------- command


def test_the_command(tmp_path, capsys, inputs):
    state = official_state(1)
    source = str(save_pt(state, tmp_path / "CLIP-MoE.pt"))
    assert main([source, str(tmp_path / "moe"), "--num-experts-per-tok", "2"]) == 0
    assert "CLIP-MoE with 4 experts" in capsys.readouterr().out
    assert_same(features(load_bundle(tmp_path / "moe"), inputs), official_features(state, *inputs))
    assert main([str(tmp_path / "moe"), str(tmp_path / "back.pt"), "--to", "openai"]) == 0
    assert torch.load(tmp_path / "back.pt", weights_only=True).keys() == state.keys()
    dense = str(save_pt(official_state(0, positions=77, res=False), tmp_path / "dense.pt"))
    assert main([dense, str(tmp_path / "dense"), "--no-quick-gelu"]) == 0
    assert load_bundle(tmp_path / "dense").model.config.vision_config.hidden_act == "gelu"
    with pytest.raises(ValueError, match="is the input itself"):
        main([str(tmp_path / "moe"), str(tmp_path / "moe")])


def test_towers_of_open_clips_larger_models_are_not_given_openais_heads(tmp_path):
    """ViT-H-14 is 1280 wide: 16 heads of 80, though 20 of 64 would fit its tensors and give other features."""
    state = official_state(0)
    state["visual.conv1.weight"] = torch.zeros(1280, 3, PATCH, PATCH)
    with pytest.raises(ValueError, match=r"towers 1280 and 64 wide.*how many heads.*--open-clip-name.*ViT-H-14"):
        load_checkpoint(save_pt(state, tmp_path / "h.pt"), quick_gelu=False)
