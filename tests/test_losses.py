"""The loss of a step is the same however its batch is cut."""

import subprocess
import sys

import pytest
import tiny_run
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from llava_clipmoe.losses_clipmoe import block_logits, kept_tokens, router_counts, router_losses
from llava_clipmoe.upcycling import moe_config, upcycle
from train_encoder.config import OptimConfig
from train_encoder.data.dataset import Batch
from train_encoder.training.losses import (
    Contrastive,
    LongShort,
    MultiPositive,
    SmoothedClipLoss,
    make_objective,
    principal_components,
)
from train_encoder.training.optimizer import learning_rate
from train_encoder.training.step import TwoTowers, forward_backward


@pytest.fixture
def moe(tiny_dense, stages):
    config = moe_config(
        tiny_dense.config,
        num_experts=len(stages) + 1,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.5,
        router_z_loss_coef=0.1,
        router_initializer_range=0.5,
    )
    return upcycle(tiny_dense, stages, config)


def batch_for(model, size: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(1)
    vision, text = model.config.vision_config, model.config.text_config
    shape = (size, 3, vision.image_size, vision.image_size)
    ids = torch.randint(1, text.eos_token_id, (size, 9), generator=generator)
    ends = torch.randint(3, 9, (size,), generator=generator)
    ids[torch.arange(9) >= ends[:, None]] = (
        text.eos_token_id
    )  # captions of different lengths, padded with the end token
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Batch(pixels, ids, torch.arange(size), [], 0)


def gradients(
    model, chunk_size: int | None, trainable=lambda name: True, objective: Contrastive | None = None
) -> tuple[dict, dict]:
    class Bundle:
        image_mean, image_std = (0.5,) * 3, (0.5,) * 3

    Bundle.model = model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable(name))
        parameter.grad = None
    accelerator, batch = Accelerator(cpu=True), batch_for(model)
    if objective is not None and objective.captions == 2:
        batch.short_ids = batch.input_ids[:, [0, 1, 8]]  # three tokens, the last one the end's
    parts = forward_backward(
        TwoTowers(Bundle).train(), batch, objective or Contrastive(0.1), accelerator, chunk_size, (0, 0)
    )
    return parts, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a: tuple[dict, dict], b: tuple[dict, dict], tolerance: float = 1e-6) -> None:
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys() and left
        for name in left:
            torch.testing.assert_close(
                left[name], right[name], rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("chunk", [1, 5, 6])
def test_gradient_caching_equals_the_plain_step_on_a_dense_clip(tiny_dense, chunk):
    assert_same(gradients(tiny_dense, None), gradients(tiny_dense, chunk))


@pytest.mark.parametrize("chunk", [1, 5, 6])
def test_gradient_caching_equals_the_plain_step_on_a_mixture_with_router_losses(moe, chunk):
    plain = gradients(moe, None)
    assert any(".mlp.router." in name and g.abs().max() > 0 for name, g in plain[1].items())
    assert plain[0].keys() == {"loss", "contrastive", "balance", "router_z"}
    assert_same(plain, gradients(moe, chunk))


def test_gradient_caching_equals_the_plain_step_when_only_routers_learn(moe):
    def routers(name):
        return ".mlp.router." in name

    plain = gradients(moe, None, routers)
    assert all(routers(name) for name in plain[1])
    assert_same(plain, gradients(moe, 4, routers))


TWO_CAPTIONS = {"multi-positive": MultiPositive(0.3, 0.1), "long-short": LongShort(3, 0.1)}


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("kind", TWO_CAPTIONS)
def test_gradient_caching_equals_the_plain_step_with_two_captions_an_image(moe, kind, chunk):
    plain = gradients(moe, None, objective=TWO_CAPTIONS[kind])
    # Principal components enlarge what a CPU rounds otherwise in batches of another size: gradients reach 0.5 here.
    assert_same(plain, gradients(moe, chunk, objective=TWO_CAPTIONS[kind]), 1e-5 if kind == "long-short" else 1e-6)
    assert not torch.allclose(plain[0]["contrastive"], gradients(moe, None)[0]["contrastive"], atol=1e-3)


def test_activation_checkpointing_changes_no_gradient(moe):
    plain = gradients(moe, None)
    moe._set_gradient_checkpointing(True)
    assert_same(plain, gradients(moe, 5))


def test_dropout_is_the_same_in_both_passes_of_gradient_caching(tiny_dense, stages):
    config = moe_config(tiny_dense.config, num_experts=len(stages) + 1, num_experts_per_tok=2, expert_dropout=0.5)
    model = upcycle(tiny_dense, stages, config)
    first, second = gradients(model, 4), gradients(model, 4)
    assert_same(first, second, 0.0)  # seeded by the step, so it can be repeated
    no_dropout = upcycle(tiny_dense, stages, moe_config(tiny_dense.config, num_experts=len(stages) + 1))
    assert not torch.allclose(first[0]["contrastive"], gradients(no_dropout, 4)[0]["contrastive"], atol=1e-6)


def test_router_losses_of_chunks_add_up_to_those_of_the_whole(moe):
    batch = batch_for(moe)
    pixels = torch.randn(12, 3, *[moe.config.vision_config.image_size] * 2)
    with torch.no_grad():
        vision, text = moe.vision_model(pixels), moe.text_model(batch.input_ids)
        whole = moe(batch.input_ids, pixels, return_loss=True).aux_loss
        chunks = [
            block_logits(
                [x[part] for x in vision.router_logits],
                [[x[part] for x in text.router_logits]],
                [kept_tokens(batch.input_ids[part], moe.config.text_config.eos_token_id)],
            )
            for part in (slice(0, 5), slice(5, 12))
        ]
        counts = router_counts(chunks[0]) + router_counts(chunks[1])
        balance, z = (sum(parts) for parts in zip(*(router_losses(c, counts) for c in chunks), strict=True))
    torch.testing.assert_close(whole, 0.5 * balance + 0.1 * z)


def test_the_loss_is_clips_symmetric_cross_entropy_with_smoothing():
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(2, 7, 16), dim=-1)
    scale, truth = torch.tensor(100.0), torch.arange(7)
    logits = scale * image @ text.T
    by_hand = (
        F.cross_entropy(logits, truth, label_smoothing=0.1) + F.cross_entropy(logits.T, truth, label_smoothing=0.1)
    ) / 2
    torch.testing.assert_close(SmoothedClipLoss(0.1)(image, text, scale), by_hand)
    assert SmoothedClipLoss(0.0)(image, text, scale) != by_hand


def test_the_loss_is_computed_in_fp32_under_autocast():
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(2, 7, 16), dim=-1)
    scale = torch.tensor(100.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert SmoothedClipLoss(0.1)(image, text, scale) == SmoothedClipLoss(0.1)(image.float(), text.float(), scale)
        assert SmoothedClipLoss(0.1)(image, text, scale).dtype == torch.float32


def test_the_schedule_warms_up_then_falls_as_a_cosine():
    optim = OptimConfig(learning_rate=1.0, warmup_steps=200)
    rates = [learning_rate(optim, step, 4000) for step in range(4000)]
    assert rates[0] == pytest.approx(1 / 200) and rates[199] == pytest.approx(1.0)
    assert rates[2100] == pytest.approx(0.5, abs=1e-3) and rates[-1] < 1e-6
    assert learning_rate(optim, 9, 100) == 1.0  # a short training warms up for a tenth of it


# ------------------------------------------------------------------------------------------- two captions an image


def features(rows: int = 9, width: int = 16) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(2)
    return tuple(F.normalize(torch.randn(3, rows, width), dim=-1))


def test_multi_positive_weighs_the_loss_of_each_caption():
    image, long, short = features()
    scale, one = torch.tensor(20.0), SmoothedClipLoss(0.1)
    by_hand = 0.7 * one(image, long, scale) + 0.3 * one(image, short, scale)
    torch.testing.assert_close(MultiPositive(0.3, 0.1)(image, [long, short], scale), by_hand)


def test_long_short_sees_the_short_caption_through_the_principal_components_only():
    image, long, short = features()
    scale, one = torch.tensor(20.0), SmoothedClipLoss(0.0)
    loss = LongShort(4, 0.0)
    coarse = loss.coarse(image)
    by_hand = one(image, long, scale) + one(coarse, short, scale)
    torch.testing.assert_close(loss(image, [long, short], scale), by_hand)
    assert torch.linalg.matrix_rank(coarse - coarse.mean(0)) == 4
    torch.testing.assert_close(LongShort(16, 0.0).coarse(image), image)  # all components: nothing is lost


def test_principal_components_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    x = features(rows=40)[0]
    mean, basis = principal_components(x, 5)
    found = PCA(5).fit(x.numpy())
    torch.testing.assert_close(
        mean + (x - mean) @ basis @ basis.T,
        torch.from_numpy(found.inverse_transform(found.transform(x.numpy()))),
        atol=1e-5,
        rtol=0,
    )


ALONE = """
import torch, torch.distributed as dist
from train_encoder.training.losses import LongShort

dist.init_process_group("gloo")
if dist.get_rank() == 0:
    x = torch.eye(4)
    LongShort(2, 0.1)(x, [x, x], torch.tensor(1.0))
dist.barrier()
"""


def test_an_objective_of_one_process_waits_for_no_other(tmp_path):
    """As in the trials of a chunk, and where an expert is trained by one process of several."""
    (tmp_path / "alone.py").write_text(ALONE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, tmp_path / "alone.py"], env=tiny_run.environment(), check=True, timeout=120)


def test_the_settings_name_the_objective():
    kinds = {
        kind: make_objective(OptimConfig(loss=kind, short_weight=0.2, principal_components=7))
        for kind in ("clip", "multi-positive", "long-short")
    }
    assert {kind: (type(made), made.captions) for kind, made in kinds.items()} == {
        "clip": (Contrastive, 1),
        "multi-positive": (MultiPositive, 2),
        "long-short": (LongShort, 2),
    }
    assert kinds["multi-positive"].gamma == (0.8, 0.2) and kinds["long-short"].components == 7
