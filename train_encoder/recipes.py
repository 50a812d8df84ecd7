"""Named recipes: each reads like a row of the paper's settings, and is a default set of flags of `train-encoder`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .config import (
    BaseConfig,
    ClusterConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    FinetuneConfig,
    FMoEConfig,
    LoraConfig,
    MCLConfig,
    MoEConfig,
    OptimConfig,
    ScratchConfig,
    TrainConfig,
)

# CLIP-MoE, section 4.1 and appendix: AdamW, 1 epoch, global batch 800, temperature 0.01 frozen.
_PAPER = TrainConfig(
    base=BaseConfig(source="openai/clip-vit-large-patch14-336", text_positions=248),
    clusters=ClusterConfig(image_clusters=3, text_clusters=3),
    mcl=MCLConfig(optim=OptimConfig(learning_rate=1e-5, weight_decay=0.2)),
    moe=MoEConfig(num_experts=4, num_experts_per_tok=2, optim=OptimConfig(learning_rate=1e-6, weight_decay=0.01)),
    engine=EngineConfig(precision="bf16", workers=8),
)

_SHAREGPT4V = "data/sharegpt4v"
DMU_SHAREGPT4V = replace(
    _PAPER,
    data=DataConfig(source=f"{_SHAREGPT4V}/share-captioner_coco_lcs_sam_1246k_1107.json", image_root=Path(_SHAREGPT4V)),
)
DMU_RECAP1M = replace(_PAPER, data=DataConfig(source="data/recap-datacomp-1m", caption_columns=("re_caption",)))

# Everything is scaled to 6,000 scenes: a base whose attention learns from captions that say everything, and whose
# features then forget what the web's captions do not say (at half the rate they keep half of it); learning rates for a
# CLIP of width 128, the temperature that the small base finds by itself (the paper's 0.01 is OpenAI's), and fp32, which
# is faster than bf16 on most CPUs.
_BASE = ScratchConfig()
_STAGE = OptimConfig(
    learning_rate=1e-3, weight_decay=0.1, warmup_steps=20, epochs=3, global_batch_size=64, temperature=0.07
)
DMU_OPENMOJI = TrainConfig(
    data=DataConfig(source="openmoji", split="train", cache_images=True),
    base=BaseConfig(
        source="scratch",
        text_positions=None,
        scratch=replace(
            _BASE,
            early_caption_columns=("long",),
            locked_text_epochs=4,
            early_optim=replace(_BASE.optim, epochs=6),
            optim=replace(_BASE.optim, epochs=8),
        ),
    ),
    mcl=MCLConfig(optim=_STAGE),
    moe=MoEConfig(
        # Two thirds of them the web's: with half the routers forget nouns (96.6% instead of 99.8, seed 0).
        caption_columns=("long", "short", "short"),
        optim=replace(_STAGE, learning_rate=1e-2, weight_decay=0.01, epochs=4),
    ),
    evaluation=EvaluationConfig(
        retrieval=("held-out, long captions=openmoji:heldout",),
        attributes="openmoji",
        zero_shot=("openmoji-nouns", "openmoji-colours"),
    ),
    engine=EngineConfig(device="cpu", precision="fp32", workers=0, checkpoint_every=100),
)

# Every other method of the papers, with as many epochs in all as DMU has beside it (3 stages and the routers). Learning
# rates that a paper gives are the paper's; the others are DMU's, so that a comparison is one of methods.


def other_methods(dmu: TrainConfig) -> dict[str, tuple[str, TrainConfig]]:
    """The baselines and CLIP-FMoE on the data, base and scale of a DMU recipe: name -> (what it is, settings)."""
    stage, router, scratch = dmu.mcl.optim, dmu.moe.optim, dmu.base.source == "scratch"
    stages = dmu.moe.num_experts - 1
    experts = replace(stage, epochs=stages * stage.epochs)
    whole = replace(stage, epochs=stages * stage.epochs + router.epochs)
    everything = replace(whole, learning_rate=stage.learning_rate / 10, weight_decay=0.01)  # Long-CLIP: 1e-6, 1e-2
    # Four times the stages' rate: low-rank changes usually want more than full ones. Not measured.
    low_rank = replace(stage, learning_rate=4 * stage.learning_rate)
    # The small base is eight times narrower than ViT-L; at a sixteenth of its width 15% of a full stage would be lost.
    lora = LoraConfig(rank=dmu.base.scratch.vision_width // 8) if scratch else LoraConfig()
    # The paper's 64 sub-clusters of each cluster are for a million images; of 2,000, most would not fill a batch.
    fmoe = FMoEConfig(sub_clusters=4 if scratch else 64, optim=replace(experts, loss="multi-positive"))
    return {
        "base": (
            "the dense base alone, trained from nothing where there is none",
            replace(dmu, method="base"),
        ),
        "dmu-lora": (
            "DMU whose stages train low-rank changes of the FFNs (LoRA), at a fraction of the memory",
            replace(dmu, method="dmu-lora", mcl=replace(dmu.mcl, optim=low_rank), lora=lora),
        ),
        # The last training is DMU's router training, of the gates too.
        "fmoe": (
            "CLIP-FMoE: independent experts on clusters, a fusion gate to the base",
            replace(dmu, method="fmoe", fmoe=fmoe, moe=replace(dmu.moe, optim=replace(router, loss="multi-positive"))),
        ),
        "direct-ft": (
            "baseline: the base's FFNs fine-tuned",
            replace(dmu, method="finetune", finetune=FinetuneConfig("ffn", whole)),
        ),
        "direct-ft-all": (
            "baseline: the whole base fine-tuned",
            replace(dmu, method="finetune", finetune=FinetuneConfig("all", everything)),
        ),
        "sparse-upcycling": (
            "baseline: copies of the base's FFN as experts, trained together",
            replace(dmu, method="sparse-upcycling", moe=replace(dmu.moe, caption_columns=(), optim=whole)),
        ),
        # Everything is trained, at a tenth of the FFNs' rate (official code).
        "long-clip": (
            "baseline: Long-CLIP's objective, the whole base",
            replace(dmu, method="finetune", finetune=FinetuneConfig("all", replace(everything, loss="long-short"))),
        ),
        # Table 4 of CLIP-MoE: the base and one FFN that was fine-tuned without clusters.
        "vanilla-moe": (
            "ablation: the base and one directly fine-tuned FFN as two experts",
            replace(
                dmu,
                method="vanilla-moe",
                mcl=replace(dmu.mcl, optim=experts),
                moe=replace(dmu.moe, num_experts=2, num_experts_per_tok=2),
            ),
        ),
    }


RECIPES: dict[str, tuple[str, TrainConfig]] = {
    "dmu-openmoji": (
        "a small CLIP-MoE from nothing, on scenes of emoji drawn on this machine; minutes on 2 cores",
        DMU_OPENMOJI,
    ),
    "dmu-vitl14-336-sharegpt4v": ("the paper's: OpenAI ViT-L/14@336 on ShareGPT4V's 1.2M captions", DMU_SHAREGPT4V),
    "dmu-vitl14-336-recap1m": ("the paper's: OpenAI ViT-L/14@336 on Recap-DataComp-1M", DMU_RECAP1M),
}
for _scale, _where, _dmu in (
    ("openmoji", "on emoji", DMU_OPENMOJI),
    ("vitl14-336-sharegpt4v", "ViT-L/14@336 on ShareGPT4V", DMU_SHAREGPT4V),
):
    for _method, (_what, _config) in other_methods(_dmu).items():
        RECIPES[f"{_method}-{_scale}"] = f"{_what}; {_where}", _config
