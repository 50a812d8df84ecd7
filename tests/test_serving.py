"""What export-hf writes is served: `transformers serve` answers about a picture over the OpenAI protocol, on a CPU."""

from __future__ import annotations

import base64
import importlib.metadata
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_llava_upstream import free_port
from tiny.exported import NEW_TOKENS, QUESTION, TILES, answers_of_transformers, make_exported_llava, make_pictures
from tiny.llavas import upstream_is_installed

openai = pytest.importorskip("openai", reason='`transformers serve` needs it: pip install "transformers[serving]"')
pytestmark = pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed")

SERVE = """
import sys
sys.modules["llava_clipmoe"] = None  # a machine without this package
from transformers.cli.transformers import main
sys.argv = ["transformers", "serve", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module", params=["square", "tiles"])
def exported(request, tmp_path_factory) -> Path:
    settings = TILES if request.param == "tiles" else {}
    return make_exported_llava(tmp_path_factory.mktemp("llava"), **settings)[1]


@contextmanager
def served(directory: Path, folder: Path) -> Iterator[str]:
    """`transformers serve DIRECTORY --trust-remote-code` in a process of its own; -> its address."""
    port = free_port()
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "LLAVA_CLIPMOE_HOOK": "0"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", SERVE, str(directory), "--trust-remote-code", "--device", "cpu"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_for(f"http://localhost:{port}/health", server, folder / "server.log")
            yield f"http://localhost:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    """Until the server answers; fails with its log when it ends before that."""
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"no answer in two minutes: {log.read_text()[-3000:]}")


def ask(client, model: str, content: list[dict], **settings):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=model, messages=messages, max_tokens=NEW_TOKENS, **settings)


def about(picture: Path) -> list[dict]:
    address = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    return [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": QUESTION}]


def test_transformers_serve_answers_about_pictures_as_transformers_does(exported, tmp_path):
    pictures = make_pictures(tmp_path / "pictures")
    expected = answers_of_transformers(exported, pictures)
    assert len(set(expected)) > 1  # the picture counts
    with served(exported, tmp_path) as address:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        (model,) = [model.id for model in client.models.list()]
        whole = [ask(client, model, about(picture)) for picture in pictures]
        streamed = [
            chunk.choices[0].delta.content or "" for chunk in ask(client, model, about(pictures[0]), stream=True)
        ]
        text_alone = ask(client, model, [{"type": "text", "text": QUESTION}])
    assert [answer.choices[0].message.content.strip() for answer in whole] == expected
    assert "".join(streamed).strip() == expected[0]
    assert text_alone.usage.prompt_tokens < whole[0].usage.prompt_tokens


_AS_VLLM_DOES = """
import sys
from importlib.metadata import entry_points
for plugin in entry_points(group="vllm.general_plugins"):
    if plugin.name == "llava_clipmoe":
        plugin.load()()
from transformers import AutoConfig
assert "vllm" not in sys.modules
print(type(AutoConfig.from_pretrained(sys.argv[1]).vision_config).__name__)
"""


def test_the_entry_point_for_vllm_teaches_transformers_our_classes(exported):
    """In a process that has imported nothing of ours. vLLM itself is not here: it pins a torch of its own."""
    installed = [entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")]
    if "llava_clipmoe" not in installed:
        pytest.skip("llava-clipmoe is installed here without its entry points: pip install -e .")
    command = [sys.executable, "-c", _AS_VLLM_DOES, str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "CLIPMoEVisionConfig", done.stderr[-2000:]
