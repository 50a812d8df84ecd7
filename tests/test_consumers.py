"""A model directory where its users are: transformers' pipeline and Auto classes, sentence-transformers, diffusers.

Where the claim is that the directory alone is enough, it is opened by a process that cannot import this package.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_tiny_config, shake
from PIL import Image
from test_model_directory import dense, moe, other_python, tiny_tokenizer, write_tiny_tokenizer  # noqa: F401

from llava_clipmoe import CLIPMoETextModel, load_bundle
from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.model_directory import save_bundle
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.tokenizer import load_tokenizer

TEXTS = ["the cat", "cat 9", "42"]


def needs(package: str):
    reason = f'{package} is not installed (pip install "llava-clipmoe[dev]")'
    return pytest.mark.skipif(find_spec(package) is None, reason=reason)


@pytest.fixture
def directory(tmp_path, moe) -> Path:  # noqa: F811
    """A CLIP-MoE's directory `model`, two pictures `0.png` and `1.png` beside it."""
    save_bundle(moe, tmp_path / "model")
    for number, colours in enumerate([("red", "blue"), ("green", "white")]):
        picture = Image.new("RGB", (40, 30), colours[0])
        picture.paste(colours[1], (5, 5, 18, 25))
        picture.save(tmp_path / f"{number}.png")
    return tmp_path / "model"


def stranger(folder: Path, code: str, python: str = sys.executable, remote: bool = True) -> dict:
    """What `code` leaves in `result`, run in `folder` by an interpreter that cannot import this package.

    remote: whether the code beside the weights is to have run.
    """
    before = "import json, sys\nsys.modules['llava_clipmoe'] = None\n"
    after = "\nresult['remote'] = any('modeling_clipmoe' in name for name in sys.modules)"
    after += f"\nprint({MARK!r} + json.dumps(result))\n"
    (folder / "stranger.py").write_text(before + code + after)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "LLAVA_CLIPMOE_HOOK": "0"}
    # -I: no PYTHONPATH and no current folder, so that only what is installed can be imported
    command = [python, "-I", "stranger.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.rpartition(MARK)[2])
    assert result.pop("remote") == remote
    return result


MARK = "the result: "
PICTURES = "pictures = [Image.open(f'{n}.png') for n in range(2)]\n"


def expected(directory: Path) -> dict[str, torch.Tensor]:
    """Logits and embeddings of TEXTS and the two pictures, by this package and CLIP's own image processor."""
    bundle = load_bundle(directory)
    processor = transformers.CLIPImageProcessor.from_pretrained(directory)
    pictures = [Image.open(directory.parent / f"{number}.png") for number in range(2)]
    pixels = processor(images=pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        image = bundle.model.get_image_features(pixels)
        text = torch.cat(
            [bundle.model.get_text_features(torch.tensor([bundle.tokenizer(one).input_ids])) for one in TEXTS]
        )
    normal = torch.nn.functional.normalize
    logits = bundle.model.logit_scale.exp().detach() * normal(image) @ normal(text).T
    return {"image": image, "text": text, "logits": logits}


def assert_near(found: list, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert wanted.std() > 0.01
    torch.testing.assert_close(torch.tensor(found), wanted, atol=tolerance, rtol=tolerance)


# --------------------------------------------------------------------------------------------------------- transformers

_AUTO = f"""
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor
{PICTURES}
processor = AutoProcessor.from_pretrained("model", trust_remote_code=True)
inputs = processor(text={TEXTS}, images=pictures, padding=True, return_tensors="pt")
result = {{"processor": type(processor).__name__}}
for auto in (AutoModel, AutoModelForZeroShotImageClassification):
    model = auto.from_pretrained("model", trust_remote_code=True).eval()
    with torch.no_grad():
        result[auto.__name__] = model(**inputs).logits_per_image.tolist()
"""
_PIPELINE = """
from transformers import pipeline
classify = pipeline("zero-shot-image-classification", model="model", trust_remote_code=True{more})
scores = classify(pictures, candidate_labels={texts}, hypothesis_template="{{}}")
by_label = [{{one["label"]: one["score"] for one in picture}} for picture in scores]
result["pipeline"] = [[picture[text] for text in {texts}] for picture in by_label]
"""
# transformers 4.37 looks for a tokenizer and an image processor by the configuration's class, which it does not know.
_OLD = ', tokenizer=processor.tokenizer, image_processor="model"'


def check_auto_and_pipeline(directory: Path, python: str, more: str = "") -> None:
    code = _AUTO + _PIPELINE.format(texts=TEXTS, more=more)
    result, logits = stranger(directory.parent, code, python), expected(directory)["logits"]
    assert result["processor"] == "CLIPProcessor"
    assert_near(result["AutoModel"], logits, 2e-3)  # resized by another version's image processor
    assert_near(result["AutoModelForZeroShotImageClassification"], logits, 2e-3)
    assert_near(result["pipeline"], logits.softmax(-1), 2e-3)


def test_auto_classes_and_the_pipeline_need_the_directory_alone(directory):
    check_auto_and_pipeline(directory, sys.executable, _OLD if transformers.__version__ < "5" else "")


def test_so_they_do_under_the_other_transformers(directory, other_python):  # noqa: F811
    check_auto_and_pipeline(directory, other_python, _OLD)


def test_our_registration_is_enough_without_remote_code(directory):
    from transformers import AutoModel, AutoModelForZeroShotImageClassification

    assert isinstance(AutoModelForZeroShotImageClassification.from_pretrained(directory), CLIPMoEModel)
    text = CLIPMoETextModel.from_pretrained(directory)
    text.save_pretrained(directory.parent / "text")
    assert isinstance(AutoModel.from_pretrained(directory.parent / "text"), CLIPMoETextModel)


# ------------------------------------------------------------------------------------------------ sentence-transformers

_SENTENCES = f"""
from PIL import Image
from sentence_transformers import SentenceTransformer
{PICTURES}
model = SentenceTransformer("model", trust_remote_code=True)
result = {{"text": model.encode({TEXTS}).tolist(), "image": model.encode(pictures).tolist()}}
result["size"] = model.get_embedding_dimension()
model.save("again")
again = SentenceTransformer("again", trust_remote_code=True)
result["again"] = again.encode({TEXTS}).tolist()
"""


@needs("sentence_transformers")
def test_sentence_transformers_embeds_texts_and_pictures(directory):
    result, wanted = stranger(directory.parent, _SENTENCES), expected(directory)
    assert_near(result["text"], wanted["text"])
    assert_near(result["image"], wanted["image"])
    assert_near(result["again"], wanted["text"])
    assert result["size"] == wanted["text"].shape[1]


# ------------------------------------------------------------------------------------------------------------ diffusers


def test_the_text_model_is_what_transformers_own_is(tmp_path, dense, batch):  # noqa: F811
    """By position and by name: what diffusers' pipelines read of a text encoder."""
    save_bundle(dense, tmp_path / "clip")
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / "clip").eval()
    ours = CLIPMoETextModel(dense.model.config.text_config).eval()
    ours.text_model.load_state_dict(dense.model.text_model.state_dict())
    for mask in (None, batch["attention_mask"]):
        with torch.no_grad():
            expected = theirs(batch["input_ids"], attention_mask=mask, output_hidden_states=True)
            found = ours(batch["input_ids"], attention_mask=mask, output_hidden_states=True)
        kept = slice(None) if mask is None else batch["attention_mask"].bool()
        torch.testing.assert_close(found[0][kept], expected[0][kept], atol=1e-5, rtol=0)
        torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=0)
        for a, b in zip(found[-1], expected[-1], strict=True):
            torch.testing.assert_close(a[kept], b[kept], atol=1e-5, rtol=0)
    assert ours.dtype == torch.float32 and ours.text_model.final_layer_norm.weight.shape == (32,)
    torch.testing.assert_close(ours.text_model.final_layer_norm(found[-1][-1]), found[0])


def test_the_text_model_returns_what_was_asked_for(tiny_moe, batch):
    text = CLIPMoETextModel(tiny_moe.config.text_config).eval()
    ids = batch["input_ids"]
    assert [len(text(ids, return_dict=False)), len(text(ids)), len(text(ids, output_hidden_states=True))] == [2, 2, 3]
    routed = text(ids, output_router_logits=True)
    assert len(routed.router_logits) == 2 and len(routed) == 3


def make_long(tmp_path: Path, **experts: int) -> Path:
    """The directory `model` of a tiny model of 248 text positions."""
    config = make_tiny_config(**experts)
    config.text_config.max_position_embeddings = 248
    write_tiny_tokenizer(tmp_path / "tokenizer")
    model = shake(CLIPMoEModel(config), seed=1).eval()
    save_bundle(ClipBundle(model, load_tokenizer(tmp_path / "tokenizer", 248)), tmp_path / "model")
    return tmp_path / "model"


_DIFFUSERS = """
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

CLIPMoETextModel = get_class_from_dynamic_module("modeling_clipmoe.CLIPMoETextModel", "model")
text_encoder = CLIPMoETextModel.from_pretrained("model", dtype=torch.float32).eval()
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=text_encoder.config.hidden_size,
)
pipe = StableDiffusionPipeline(
    vae=AutoencoderKL(block_out_channels=(16,), norm_num_groups=8), text_encoder=text_encoder, unet=unet,
    tokenizer=CLIPTokenizer.from_pretrained("model"), scheduler=DDIMScheduler(), safety_checker=None,
    feature_extractor=None, requires_safety_checker=False,
)
pipe.set_progress_bar_config(disable=True)

def draw(prompt, **more):
    more = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np", **more}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **more).images

long = "the cat " * 50
first = draw(long + "a")
result = {
    "shape": first.shape,
    "spread": float(first.std()),
    "again": float(abs(draw(long + "a") - first).max()),
    "beyond 77 tokens": float(abs(draw(long + "9 9 9 9") - first).max()),
    "clip skip": float(abs(draw(long + "a", clip_skip=1) - first).max()),
    "tokens": pipe.tokenizer.model_max_length,
    "dtype": str(pipe.text_encoder.dtype),
}
pipe.save_pretrained("saved")
"""


@needs("diffusers")
def test_stable_diffusion_draws_with_it_as_text_encoder(tmp_path):
    make_long(tmp_path, num_experts=4, num_experts_per_tok=2)
    result = stranger(tmp_path, _DIFFUSERS)
    assert result["shape"] == [1, 16, 16, 3] and result["spread"] > 0.01 and result["again"] == 0
    assert result["beyond 77 tokens"] > 1e-4 and result["clip skip"] > 1e-4
    assert (result["tokens"], result["dtype"]) == (248, "torch.float32")


# --------------------------------------------------------------------------------------------------------- the card


@needs("sentence_transformers")
@pytest.mark.parametrize("experts", [4, 1], ids=["clip-moe", "dense"])
def test_the_cards_own_examples_run(tmp_path, experts):
    """All of them, in one process that cannot import this package; the last, which needs it, in this one."""
    directory = make_long(tmp_path, num_experts=experts)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.jpg")
    card = (directory / "README.md").read_text().replace("path/to/this/directory", "model")
    *foreign, ours = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(foreign) == 3 and "load_bundle" in ours
    code = "\n".join(foreign) + "\nresult = {'width': text_encoder.config.hidden_size}"
    assert stranger(tmp_path, code, remote=experts > 1) == {"width": 32}
    names = {"path": str(directory)}
    exec(ours, names)
    assert names["bundle"].model.config.is_dense == (experts == 1)
