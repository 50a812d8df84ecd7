"""A LLaVA answers in the environment as it is. `make test` runs this file first: a new version of a library that breaks
generation is then seen in half a minute, by its name, and not as a hundred failing tests."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from tiny.llavas import make_language_model, make_towers, upstream_in_this_process, upstream_is_installed

from llava_clipmoe import run
from llava_clipmoe.compat import versions
from llava_clipmoe.tower_registry import CONFIG_DIRECTORY, OVERRIDE

pytestmark = pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed")

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A tiny LLaVA with a CLIP-MoE tower, on the CPU, whose answers depend on the picture."""
    folder = tmp_path_factory.mktemp("generation")
    make_language_model(folder / "llama")
    make_towers(folder)
    with upstream_in_this_process(), pytest.MonkeyPatch.context() as patch:
        patch.setenv(CONFIG_DIRECTORY, str(folder / "config"))
        patch.setenv(OVERRIDE, f"clipmoe-336={folder / 'clip-moe'}")
        module = importlib.import_module("llava.model.language_model.llava_llama")
        arguments = importlib.import_module("test_llava_traps").model_args()
        torch.manual_seed(0)
        model = module.LlavaLlamaForCausalLM.from_pretrained(folder / "llama")
        model.get_model().initialize_vision_modules(arguments)
        yield model.eval()


def ask(model, pixels: torch.Tensor | None = None, **changed) -> torch.Tensor:
    """The ids [1,T] of a greedy answer about a picture (or text alone); 4.37 puts the start token before it."""
    from llava.constants import IMAGE_TOKEN_INDEX

    ids = torch.tensor([[1, 40, 50, *([] if pixels is None else [IMAGE_TOKEN_INDEX]), 60, 70]])
    given = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, **changed}
    return model.generate(ids, images=pixels, image_sizes=None if pixels is None else [(24, 24)], **given)


def picture(seed: int) -> torch.Tensor:
    return 3 * torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def step_by_step(model, pixels: torch.Tensor | None) -> list[int]:
    """The answer without `generate` and its cache: the whole prompt again for every token."""
    from llava.constants import IMAGE_TOKEN_INDEX

    start, said = [1, 40, 50, *([] if pixels is None else [IMAGE_TOKEN_INDEX]), 60, 70], []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(input_ids=torch.tensor([start + said]), images=pixels, use_cache=False).logits[0, -1]
            logits[model.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens has it
            said.append(int(logits.argmax()))
    return said


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_llava_generates_what_its_forward_says(llava, seed):
    pixels = None if seed is None else picture(seed)
    assert ask(llava, pixels)[0, -NEW_TOKENS:].tolist() == step_by_step(llava, pixels)


def test_without_a_warning_for_every_token(llava, recwarn):
    ask(llava, picture(1))
    assert not [str(each.message) for each in recwarn if "past_key_values" in str(each.message)]


def test_keywords_that_upstream_has_never_heard_of_reach_the_class_below(llava, monkeypatch):
    """A future transformers: its preparation hands one more keyword to its own forward."""
    base = type(llava).__mro__[1]
    prepare, forward, seen = base.prepare_inputs_for_generation, base.forward, []

    def newer_prepare(self, *args, **kwargs):
        return {**prepare(self, *args, **kwargs), "from_the_future": 7}

    def newer_forward(self, *args, from_the_future, **kwargs):
        seen.append(from_the_future)
        return forward(self, *args, **kwargs)

    expected = ask(llava, picture(1)).tolist()
    monkeypatch.setattr(base, "prepare_inputs_for_generation", newer_prepare)
    monkeypatch.setattr(base, "forward", newer_forward)
    assert ask(llava, picture(1)).tolist() == expected and seen == [7] * NEW_TOKENS


def break_generation(llava, monkeypatch) -> None:
    def changed(self, *args, **kwargs):
        raise TypeError("forward() missing 1 required keyword-only argument: 'novelty'")

    monkeypatch.setattr(type(llava).__mro__[1], "forward", changed)


def test_a_failure_under_an_untested_version_names_the_version(llava, monkeypatch):
    break_generation(llava, monkeypatch)
    monkeypatch.setattr(versions.transformers, "__version__", "5.99.0")
    with pytest.raises(versions.NewerTransformers, match=r"'novelty'.*transformers 5\.99\.0 is newer.*pip install"):
        ask(llava, picture(1))


def test_under_a_tested_version_it_stays_as_it_is(llava, monkeypatch):
    break_generation(llava, monkeypatch)
    monkeypatch.setattr(versions.transformers, "__version__", str(versions.TESTED))
    with pytest.raises(TypeError, match="novelty"):
        ask(llava, picture(1))


def test_the_launcher_names_the_version_before_the_trace_of_an_unforeseen_error(tmp_path, monkeypatch, capsys):
    script = tmp_path / "fails.py"
    script.write_text("raise AttributeError('no attribute that once was there')")
    monkeypatch.setattr(versions.transformers, "__version__", "6.0.0")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(AttributeError, match="once was there"):
        run.main([str(script)])
    assert "transformers 6.0.0 is newer" in capsys.readouterr().err
