"""What the model promises: equal to CLIP where it must be, a router in fp32, losses as in the paper."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import make_tiny_config, shake

from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig, active_parameters
from llava_clipmoe.experts_clipmoe import Router
from llava_clipmoe.losses_clipmoe import (
    RouterCounts,
    block_logits,
    end_of_text,
    router_counts,
    router_losses,
    text_token_mask,
    weighted,
)
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel, CLIPMoEVisionModel
from llava_clipmoe.transformer_clipmoe import CLIPMoEMLP, CLIPMoESparseMLP, only_expert
from llava_clipmoe.upcycling import (
    ffn_state,
    moe_config,
    sparse_upcycle,
    stretch_positions,
    upcycle,
    with_text_positions,
)


def features(model, batch) -> torch.Tensor:
    """Image and text features below each other [2B,P], not normalised."""
    with torch.no_grad():
        return torch.cat([model.get_image_features(batch["pixel_values"]), model.get_text_features(batch["input_ids"])])


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------------------------- equal to a dense CLIP


@pytest.mark.parametrize("k", [1, 2, 4])
def test_identical_experts_equal_the_dense_model(tiny_dense, batch, k):
    moe = sparse_upcycle(tiny_dense, moe_config(tiny_dense.config, num_experts=4, num_experts_per_tok=k))
    assert_close(features(moe, batch), features(tiny_dense, batch), 1e-5)


@pytest.mark.parametrize("expert", [0, 1, 2, 3])
def test_one_selected_expert_equals_that_stages_clip(tiny_dense, stages, tiny_moe, batch, expert):
    free = features(tiny_moe, batch)
    with only_expert(tiny_moe, expert):
        alone = features(tiny_moe, batch)
    if expert > 0:
        tiny_dense.load_state_dict(stages[expert - 1], strict=False)
    assert_close(alone, features(tiny_dense, batch), 1e-6)
    assert (alone - free).abs().max() > 1e-2, "the selection had no effect"
    assert torch.equal(features(tiny_moe, batch), free), "the selection outlived its `with`"


def test_selecting_an_expert_that_does_not_exist_is_an_error(tiny_moe, tiny_dense):
    for model, expert in ((tiny_moe, 4), (tiny_moe, -1), (tiny_dense, 0)):
        with pytest.raises(ValueError, match="does not exist"), only_expert(model, expert):
            pass


def transformers_twin(config: CLIPMoEConfig) -> transformers.CLIPModel:
    """transformers' own CLIP of the same sizes, with weights that all matter."""

    def plain(tower):
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
        return {name: getattr(tower, name) for name in (*names, "layer_norm_eps", "projection_dim")}

    text, vision = config.text_config, config.vision_config
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")}
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**plain(text), **ids, "max_position_embeddings": text.max_position_embeddings},
            vision_config={**plain(vision), "image_size": vision.image_size, "patch_size": vision.patch_size},
            projection_dim=config.projection_dim,
        )
    )
    return shake(theirs, seed=7).eval()


def load_twin(theirs: transformers.CLIPModel, config: CLIPMoEConfig) -> CLIPMoEModel:
    ours = CLIPMoEModel(config).eval()
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not name.endswith("position_ids")}
    ours.load_state_dict(state, strict=True)
    return ours


@pytest.mark.parametrize("eos_token_id", [98, 2], ids=["true-eos", "legacy-eos-2"])
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_dense_equals_transformers_clip_on_the_same_weights(tiny_config, batch, hidden_act, eos_token_id):
    config = tiny_config(hidden_act, eos_token_id)
    theirs = transformers_twin(config)
    ours = load_twin(theirs, config)
    with torch.no_grad():
        a = theirs(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], output_hidden_states=True)
        b = ours(**batch, output_hidden_states=True)
    assert_close(b.image_embeds, a.image_embeds, 1e-5)
    assert_close(b.text_embeds, a.text_embeds, 1e-5)
    assert_close(b.logits_per_image, a.logits_per_image, 1e-4)  # times exp(logit_scale) = 14
    for tower in ("vision_model_output", "text_model_output"):
        mine, yours = getattr(b, tower).hidden_states, getattr(a, tower).hidden_states
        assert len(mine) == len(yours)
        assert_close(mine[-2][:, :3], yours[-2][:, :3], 1e-5)  # 3 tokens: no caption has padding there


def test_the_wrong_activation_is_not_the_same_model(tiny_config, batch):
    """The gelu/quick_gelu mix-up raises no error anywhere; so at least it must be visible to a comparison."""
    theirs = transformers_twin(tiny_config("quick_gelu"))
    right = features(load_twin(theirs, tiny_config("quick_gelu")), batch)
    wrong = features(load_twin(theirs, tiny_config("gelu")), batch)
    assert (right - wrong).abs().max() > 1e-3


def test_an_unknown_activation_is_refused(tiny_config):
    with pytest.raises(ValueError, match="hidden_act 'relu'"):
        CLIPMoEModel(tiny_config("relu"))


# ------------------------------------------------------------------------------------------------------- the text side


def test_trimming_the_padding_does_not_change_the_features(tiny_moe, batch):
    rows = [0, 2, 3]  # at most 7 tokens
    ids = batch["input_ids"][rows]
    with torch.no_grad():
        assert_close(tiny_moe.get_text_features(ids[:, :7]), tiny_moe.get_text_features(ids), 1e-6)


def test_the_attention_mask_of_right_padding_changes_nothing(tiny_moe, batch):
    with torch.no_grad():
        without = tiny_moe.get_text_features(batch["input_ids"])
        given = tiny_moe.get_text_features(batch["input_ids"], batch["attention_mask"])
    assert_close(given, without, 1e-6)


def test_the_text_tower_is_causal(tiny_moe, batch):
    """What comes after a caption's end cannot reach its features."""
    ids = batch["input_ids"].clone()
    after = batch["attention_mask"] == 0
    ids[after] = 5
    with torch.no_grad():
        assert_close(tiny_moe.get_text_features(ids), tiny_moe.get_text_features(batch["input_ids"]), 1e-6)


def test_a_caption_longer_than_the_positions_is_refused(tiny_moe):
    with pytest.raises(ValueError, match="17 tokens, but this text tower has 16 positions"):
        tiny_moe.get_text_features(torch.full((1, 17), 98))


def test_a_picture_of_the_wrong_size_is_refused(tiny_moe):
    with pytest.raises(ValueError, match="reads 24x24 pixels, got"):
        tiny_moe.get_image_features(torch.zeros(1, 3, 32, 32))


def test_stretching_77_positions_gives_long_clips_248():
    old = torch.randn(77, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    new = stretch_positions(old)
    assert new.shape == (248, 8)
    for i in range(20):
        assert torch.equal(new[i], old[i]), f"kept position {i}"
    for i in range(20, 77):
        for f in range(4):
            step = old[i + 1] - old[i] if i < 76 else old[76] - old[75]  # the last three are extrapolated
            assert_close(new[20 + 4 * (i - 20) + f], old[i] + f / 4 * step, 1e-12)


def test_stretched_model_keeps_short_captions_and_reads_long_ones(tiny_config, batch):
    config = tiny_config()
    config.text_config.max_position_embeddings = 77
    model = CLIPMoEModel(config).eval()
    before = features(model, batch)
    assert with_text_positions(model, 248).config.text_config.max_position_embeddings == 248
    assert_close(features(model, batch), before, 1e-6)
    assert model.get_text_features(torch.full((1, 248), 98)).shape == (1, 24)
    with pytest.raises(ValueError, match="it can have 248"):
        with_text_positions(model, 100)


# ---------------------------------------------------------------------------------------------------------- the router


def make_router(**changes) -> Router:
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 32, "router_jitter_noise": 0.0, **changes}
    config = type("Config", (), {"router_initializer_range": 0.018, **fields})()
    router = Router(config).eval()
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(9))
    return router


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_router_weights_are_the_softmax_of_the_top_k_logits(k):
    """Eq. 3 and 5: softmax, top-K, renormalise equals Softmax(TopK(logits)); the weights sum to 1."""
    logits, weights, experts = make_router(num_experts_per_tok=k)(torch.randn(50, 32))
    top, index = logits.topk(k, dim=-1)
    assert torch.equal(experts, index)
    assert_close(weights, top.softmax(-1), 1e-6)
    assert_close(weights.sum(-1), torch.ones(50), 1e-6)


def test_router_is_fp32_under_bf16_autocast_and_for_a_bf16_model(tiny_moe, batch):
    router, x = make_router(), torch.randn(50, 32).bfloat16()
    expected = x.double() @ router.weight.detach().double().t()
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, _ = router(x)
        inside = tiny_moe(**batch, output_router_logits=True).router_logits
    assert logits.dtype == weights.dtype == torch.float32
    assert_close(logits.double(), expected, 1e-5)  # a product in bf16 is off by 1e-2
    assert {block.dtype for block in inside} == {torch.float32}
    assert router.bfloat16()(x)[0].dtype == torch.float32


def test_jitter_acts_in_training_only():
    plain, jittered, x = make_router(), make_router(router_jitter_noise=0.1), torch.randn(50, 32)
    assert torch.equal(jittered(x)[0], plain(x)[0])
    jittered.train()
    assert not torch.equal(jittered(x)[0], plain(x)[0])


@pytest.mark.parametrize("num_experts", [1, 4], ids=["dense", "moe"])
def test_expert_dropout_acts_in_training_only(tiny_config, batch, num_experts):
    kept, dropped = (
        shake(CLIPMoEModel(tiny_config(num_experts=num_experts, expert_dropout=p)), seed=1) for p in (0.0, 0.5)
    )
    assert torch.equal(features(dropped.eval(), batch), features(kept.eval(), batch))
    assert torch.equal(features(kept.train(), batch), features(kept.eval(), batch))
    assert not torch.equal(features(dropped.train(), batch), features(kept, batch))


def test_only_the_chosen_blocks_have_experts(tiny_dense, stages, batch):
    config = moe_config(tiny_dense.config, {"vision_model": [0, 2], "text_model": [1]}, num_experts=4)
    model = upcycle(tiny_dense, stages, config)
    kinds = [type(layer.mlp) for layer in (*model.vision_model.encoder.layers, *model.text_model.encoder.layers)]
    assert kinds == [CLIPMoESparseMLP, CLIPMoEMLP, CLIPMoESparseMLP, CLIPMoEMLP, CLIPMoESparseMLP]
    logits = model(**batch, output_router_logits=True).router_logits
    assert [tuple(block.shape) for block in logits] == [(5, 10, 4), (5, 10, 4), (5, 12, 4)]
    assert model(**batch).router_logits is None


# ------------------------------------------------------------------------------------------------------- router losses


def one_sided(expert: int, tokens: int = 40, num_experts: int = 4) -> torch.Tensor:
    """Logits that send every token to `expert` with certainty."""
    return 100.0 * F.one_hot(torch.full((tokens,), expert), num_experts).float()


def balance_and_z(*blocks: torch.Tensor) -> tuple[float, float]:
    return tuple(loss.item() for loss in router_losses(blocks, router_counts(blocks)))


def test_balance_loss_is_one_when_uniform_and_e_when_one_expert_takes_all():
    uniform = torch.cat([1e-3 * one_sided(e, 10) / 100 for e in range(4)])  # f and P both 1/4
    assert balance_and_z(uniform)[0] == pytest.approx(1.0, abs=1e-5)
    assert balance_and_z(one_sided(2))[0] == pytest.approx(4.0, abs=1e-5)


def test_balance_loss_is_the_papers_sum():
    logits = torch.randn(200, 4, generator=torch.Generator().manual_seed(10))
    f = [(logits.argmax(-1) == j).float().mean().item() for j in range(4)]
    p = [logits.softmax(-1)[:, j].mean().item() for j in range(4)]
    assert balance_and_z(logits)[0] == pytest.approx(4 * sum(a * b for a, b in zip(f, p, strict=True)))
    everywhere = RouterCounts(torch.tensor([[200.0, 0.0, 0.0, 0.0]]), torch.tensor([200.0]))
    assert router_losses([logits], everywhere)[0].item() == pytest.approx(4 * p[0])


def test_collapsed_blocks_do_not_balance_each_other():
    """Each block on another expert: pooled over the blocks, as in the official code, this is the minimum 1."""
    blocks = [one_sided(e) for e in range(4)]
    assert balance_and_z(torch.cat(blocks))[0] == pytest.approx(1.0, abs=1e-5)
    assert balance_and_z(*blocks)[0] == pytest.approx(4.0, abs=1e-5)


def test_router_losses_are_means_over_the_blocks_of_both_towers_weighted_by_the_config(tiny_config):
    config = tiny_config(num_experts=4, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    generator = torch.Generator().manual_seed(11)
    vision, text = torch.randn(2, 4, 10, 4, generator=generator), torch.randn(1, 4, 10, 4, generator=generator)
    blocks = block_logits(vision, [text], [torch.arange(40)])
    each = [balance_and_z(block.flatten(0, 1)) for block in (*vision, *text)]
    expected = [sum(parts) / 3 for parts in zip(*each, strict=True)]
    assert balance_and_z(*blocks) == pytest.approx(expected)
    assert weighted(*expected, config) == pytest.approx(0.5 * expected[0] + 0.25 * expected[1])


def test_z_loss_is_the_mean_squared_log_partition():
    logits = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    expected = (torch.log(torch.tensor(2.0)) ** 2 + torch.log(torch.e ** torch.tensor(3.0) + torch.e) ** 2) / 2
    assert balance_and_z(logits)[1] == pytest.approx(expected.item())


def test_text_mask_ends_with_the_pooled_token(batch):
    assert torch.equal(text_token_mask(batch["input_ids"], 98), batch["attention_mask"].bool())
    assert torch.equal(text_token_mask(batch["input_ids"], 2), batch["attention_mask"].bool())  # legacy id: the largest


def test_padding_counts_in_no_router_statistic(tiny_moe, batch):
    """The same captions with other padding, or with more of it, have the same loss."""
    other, longer = batch["input_ids"].clone(), F.pad(batch["input_ids"], (0, 4), value=98)
    other[batch["attention_mask"] == 0] = 5
    losses = []
    for ids in (batch["input_ids"], other, longer):
        with torch.no_grad():
            losses.append(tiny_moe(ids, batch["pixel_values"], return_loss=True).aux_loss)
    assert_close(losses[1], losses[0], 1e-6)
    assert_close(losses[2], losses[0], 1e-6)


def test_loss_is_the_contrastive_loss_plus_the_router_loss(tiny_moe, batch):
    with torch.no_grad():
        out = tiny_moe(**batch, return_loss=True, output_router_logits=True)
    logits, truth = out.logits_per_image, torch.arange(5)
    contrastive = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.t(), truth)) / 2
    mask = batch["attention_mask"].bool()
    blocks = [b.flatten(0, 1) for b in out.router_logits[:3]] + [b[mask] for b in out.router_logits[3:]]
    balance, _ = router_losses(blocks, router_counts(blocks))
    assert_close(out.aux_loss, 0.01 * balance, 1e-6)
    assert_close(out.loss, contrastive + 0.01 * balance, 1e-6)


def test_balance_gradient_reaches_every_router_and_no_expert(tiny_moe, batch):
    tiny_moe(**batch, return_loss=True).aux_loss.backward()
    last = [tower.encoder.layers[-1].mlp for tower in (tiny_moe.vision_model, tiny_moe.text_model)]
    assert all(block.router.weight.grad.abs().sum() > 0 for block in last)
    assert all(block.experts.fc1.weight.grad is None for block in last)  # after the last router, nothing routes


# ------------------------------------------------------------------------------------------- training and other habits


def test_gradient_checkpointing_gives_the_same_gradients(tiny_moe, batch):
    def gradients():
        tiny_moe.zero_grad()
        tiny_moe(**batch, return_loss=True).loss.backward()
        return {name: p.grad.clone() for name, p in tiny_moe.named_parameters() if p.grad is not None}

    tiny_moe.train()
    plain = gradients()
    tiny_moe.gradient_checkpointing_enable()
    assert all(tower.encoder.gradient_checkpointing for tower in (tiny_moe.vision_model, tiny_moe.text_model))
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() and len(plain) == len(tiny_moe.state_dict())
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient, 1e-6)


def test_two_forwards_are_equal_to_the_bit(tiny_moe, batch):
    assert torch.equal(features(tiny_moe, batch), features(tiny_moe, batch))


def test_hidden_state_minus_two_is_the_input_of_the_last_block(tiny_moe, batch):
    """LLaVA reads hidden_states[-2]; the list starts with the embeddings and has depth + 1 entries."""
    config = tiny_moe.config.vision_config
    tower = CLIPMoEVisionModel(config).eval()
    tower.load_state_dict({k: v for k, v in tiny_moe.state_dict().items() if k.startswith("vision_model.")})
    with torch.no_grad():
        out = tower(batch["pixel_values"], output_hidden_states=True, output_router_logits=True)
        first = tower.vision_model.pre_layrnorm(tower.vision_model.embeddings(batch["pixel_values"]))
        again, _ = tower.vision_model.encoder.layers[-1](out.hidden_states[-2])
    assert len(out.hidden_states) == config.num_hidden_layers + 1
    assert out.hidden_states[-2].shape == (5, config.num_patches + 1, 48)
    assert torch.equal(out.hidden_states[0], first)
    assert torch.equal(again, out.last_hidden_state)
    assert len(out.router_logits) == 3
    assert isinstance(tower(batch["pixel_values"], return_dict=False), tuple)


def test_a_fresh_model_has_clips_initialisation(tiny_config):
    """OpenAI's standard deviations, by width and depth, and a small router so that it starts undecided.

    transformers 5 skips the initialisation of a module of custom code that owns no tensor; then experts hold whatever
    the memory held.
    """
    state = CLIPMoEModel(tiny_config(num_experts=4)).state_dict()
    for tower, width, depth in (("vision_model", 48, 3), ("text_model", 32, 2)):
        block, small = f"{tower}.encoder.layers.0", width**-0.5 * (2 * depth) ** -0.5
        for name, std in (
            ("self_attn.q_proj", width**-0.5),
            ("self_attn.v_proj", width**-0.5),
            ("self_attn.out_proj", small),
            ("mlp.experts.fc1", (2 * width) ** -0.5),
            ("mlp.experts.fc2", small),
        ):
            assert state[f"{block}.{name}.weight"].std().item() == pytest.approx(std, rel=0.1), f"{block}.{name}"
            assert not state[f"{block}.{name}.bias"].any()
        assert state[f"{block}.mlp.router.weight"].std().item() == pytest.approx(0.018, rel=0.25)
    for name, std in (
        ("text_model.embeddings.token_embedding", 0.02),
        ("text_model.embeddings.position_embedding", 0.02),
        ("vision_model.embeddings.position_embedding", 48**-0.5),
        ("vision_model.embeddings.patch_embedding", (3 * 3 * 8 * 8) ** -0.5),
    ):
        assert state[f"{name}.weight"].std().item() == pytest.approx(std, rel=0.1), name
    assert state["visual_projection.weight"].std().item() == pytest.approx(48**-0.5, rel=0.1)
    assert state["text_projection.weight"].std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert state["logit_scale"].item() == pytest.approx(2.6592)


def test_two_models_from_one_seed_are_equal(tiny_config):
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(CLIPMoEModel(tiny_config(num_experts=4)).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize("experts", [{}, {"num_experts": 4}, {"num_experts": 3, "num_experts_per_tok": 1}])
def test_counted_parameters_are_the_models(tiny_config, experts):
    config = tiny_config(**experts)
    total = sum(p.numel() for p in CLIPMoEModel(config).parameters())
    assert active_parameters(config)["total"] == total
    assert (active_parameters(config)["active"] == total) == config.is_dense


def test_sizes_of_the_paper():
    """ViT-L/14@336, both towers: 428M dense; with 4 experts, 2 used, 686M active of 1.20B (the paper: 0.69B)."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    towers = {"vision_config": {**vision, "image_size": 336, "patch_size": 14}, "text_config": text}
    millions = lambda **experts: {  # noqa: E731
        name: count / 1e6
        for name, count in active_parameters(CLIPMoEConfig(**towers, projection_dim=768, **experts)).items()
    }
    assert millions(num_experts=1)["total"] == pytest.approx(428, abs=1)
    assert millions()["active"] == pytest.approx(686, abs=1)
    assert millions()["total"] == pytest.approx(1200, abs=5)


# --------------------------------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (
            {"num_experts": 2, "num_experts_per_tok": 3},
            r"num_experts_per_tok \(3\) must lie between 1 and num_experts \(2\)",
        ),
        ({"num_experts": 4, "num_experts_per_tok": 0}, "between 1 and num_experts"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"num_experts": 4, "experts_implementation": "fast"}, "must be auto, loop or grouped_mm"),
    ],
)
def test_impossible_expert_settings_are_refused(tiny_config, experts, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**experts)


def test_blocks_that_do_not_exist_are_refused(tiny_dense):
    with pytest.raises(ValueError, match=r"moe_layers \[3\] do not exist: the tower has blocks 0 to 2"):
        moe_config(tiny_dense.config, {"vision_model": [0, 3], "text_model": [0]}, num_experts=4)


def test_unknown_expert_fields_are_refused(tiny_dense):
    with pytest.raises(TypeError, match="num_expert"):
        moe_config(tiny_dense.config, num_expert=4)


def test_expert_fields_reach_both_towers_and_a_tower_s_own_win(tiny_config):
    config = tiny_config(num_experts=4, expert_dropout=0.3)
    assert [t.num_experts for t in (config, config.vision_config, config.text_config)] == [4, 4, 4]
    assert config.text_config.expert_dropout == 0.3
    own = CLIPMoEConfig(text_config={"num_experts": 2}, num_experts=4)
    assert (own.text_config.num_experts, own.vision_config.num_experts) == (2, 4)


def test_a_configuration_survives_its_json(tmp_path, tiny_moe):
    tiny_moe.config.save_pretrained(tmp_path)
    read = CLIPMoEConfig.from_pretrained(tmp_path)
    for tower in ("vision_config", "text_config"):
        before, after = getattr(tiny_moe.config, tower), getattr(read, tower)
        for name in ("num_experts", "num_experts_per_tok", "moe_layers", "hidden_size", "hidden_act", "layer_norm_eps"):
            assert getattr(after, name) == getattr(before, name), name


def test_ffn_state_is_exactly_the_ffns(tiny_dense):
    assert len(ffn_state(tiny_dense.state_dict())) == 4 * (3 + 2)
    assert all(".mlp.fc" in name for name in ffn_state(tiny_dense.state_dict()))


def test_a_fresh_model_leaves_no_tensor_uninitialised(tiny_config, monkeypatch):
    """transformers 5 calls `_init_weights` only for modules that own parameters: experts once stayed raw memory."""
    real = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: real(*a, **k).fill_(7.0) if not k.get("device") else real(*a, **k)
    )
    model = CLIPMoEModel(tiny_config(num_experts=4))
    raw = [name for name, tensor in model.state_dict().items() if (tensor == 7.0).all()]
    assert not raw
    width, depth = 48, 3
    fc2 = model.vision_model.encoder.layers[0].mlp.experts.fc2
    assert fc2.weight.std().item() == pytest.approx(width**-0.5 * (2 * depth) ** -0.5, rel=0.05)
    assert (fc2.bias == 0).all()


# --------------------------------------------------------------------------------------------- the pooled token alone


def towards(x: torch.Tensor) -> torch.Tensor:
    """A loss with gradients to compare: a norm has none here, as the last layer normalises."""
    return (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))).sum()


@pytest.mark.parametrize("num_experts", [1, 4], ids=["dense", "moe"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_last_block_for_the_pooled_token_alone_pools_the_same_with_the_same_gradients(num_experts, masked, batch):
    torch.manual_seed(0)
    model = CLIPMoEModel(make_tiny_config(num_experts=num_experts)).eval()
    ids = batch["input_ids"]
    mask = (torch.arange(ids.shape[1]) <= end_of_text(ids, model.config.text_config.eos_token_id)[:, None]).int()
    found = []
    for pooled_only in (False, True):
        model.zero_grad()
        vision = model.vision_model(batch["pixel_values"], pooled_only=pooled_only)
        text = model.text_model(ids, mask if masked else None, pooled_only=pooled_only)
        assert (vision.last_hidden_state.shape[1] == 1) == pooled_only == (text.last_hidden_state.shape[1] == 1)
        (towards(vision.pooler_output) + towards(text.pooler_output)).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"image": vision.pooler_output.detach(), "text": text.pooler_output.detach(), **gradients})
    assert set(found[0]) == set(found[1])
    for name, value in found[0].items():
        error = (found[1][name] - value).abs().max()
        scale = max(value.abs().max(), 1.0)  # keys' biases have no gradient but rounding
        assert error <= 1e-5 * scale, f"{name} is off by {error:.1e}"
