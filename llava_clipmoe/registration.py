"""Teaches transformers' Auto classes (config, model, image processor, tokenizer, processor) about CLIP-MoE.

`llava_clipmoe` calls this when one of its classes is first used; a program that only has a directory calls
`register_auto_classes()` itself before `AutoModel.from_pretrained(directory)`.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, CLIPConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from .configuration_clipmoe import CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig
from .modeling_clipmoe import CLIPMoEModel, CLIPMoETextModel, CLIPMoEVisionModel


def register_auto_classes() -> None:
    """Register the configurations, the model and its towers, and CLIP's own image processor, tokenizer and processor.

    May be called any number of times.
    """
    for config in (CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(CLIPMoEConfig, CLIPMoEModel, exist_ok=True)
    AutoModelForZeroShotImageClassification.register(CLIPMoEConfig, CLIPMoEModel, exist_ok=True)
    AutoModel.register(CLIPMoETextConfig, CLIPMoETextModel, exist_ok=True)
    AutoModel.register(CLIPMoEVisionConfig, CLIPMoEVisionModel, exist_ok=True)
    # What stands for CLIP in each table differs: one class in transformers 4.37, a slow-fast pair later, a dictionary
    # of backends in 5. `AutoX.register` takes other arguments in each; the installed version's own entry always fits.
    for table, configs in (
        (IMAGE_PROCESSOR_MAPPING, (CLIPMoEConfig, CLIPMoEVisionConfig)),
        (TOKENIZER_MAPPING, (CLIPMoEConfig, CLIPMoETextConfig)),
        (PROCESSOR_MAPPING, (CLIPMoEConfig,)),
    ):
        for config in configs:
            table.register(config, table[CLIPConfig], exist_ok=True)
