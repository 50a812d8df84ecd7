"""Names of vision towers: what is registered where, what a name means, and what a reader is told when it means nothing.

Nothing here needs LLaVA, and the look-up needs no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava_clipmoe import cli, tower_registry
from llava_clipmoe.tower_registry import CONFIG_DIRECTORY, OVERRIDE, Tower, UnknownTower, register, registered, resolve

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """An empty working directory and an empty config directory: no test sees the user's own."""
    monkeypatch.setenv(CONFIG_DIRECTORY, str(tmp_path / "config"))
    monkeypatch.delenv(OVERRIDE, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def directory(path: Path, model_type: str | None = "clip_moe") -> Path:
    """A model directory as far as a name's look-up reads it."""
    path.mkdir(parents=True)
    if model_type is not None:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def written() -> dict:
    return json.loads(tower_registry.registry_file().read_text())


# ------------------------------------------------------------------------------------------------- where names are kept


def test_the_registrations_are_in_the_users_config_directory(place, monkeypatch):
    assert tower_registry.registry_file() == place / "config" / "towers.json"
    monkeypatch.delenv(CONFIG_DIRECTORY)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place / "xdg"))
    assert tower_registry.registry_file() == place / "xdg" / "llava-clipmoe" / "towers.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(place / "home"))
    assert tower_registry.registry_file() == place / "home" / ".config" / "llava-clipmoe" / "towers.json"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("APPDATA", str(place / "appdata"))
    assert tower_registry.registry_file() == place / "appdata" / "llava-clipmoe" / "towers.json"


def test_a_registered_name_means_its_directory_from_anywhere(place, monkeypatch):
    directory(place / "work" / "runs" / "moe")
    assert register(Tower("clipmoe-336", "runs/moe")).source == str(place / "work" / "runs" / "moe")
    monkeypatch.chdir(place)  # a relative path was made absolute
    assert resolve("clipmoe-336") == Tower("clipmoe-336", str(place / "work" / "runs" / "moe"))
    assert written() == {"clipmoe-336": {"source": str(place / "work" / "runs" / "moe")}}


def test_a_second_registration_keeps_the_first_and_a_repeated_one_replaces_it(place):
    one, two = directory(place / "one"), directory(place / "two")
    register(Tower("a", str(one)))
    register(Tower("b", str(one), s2=True, s2_scales=[336, 672]))
    register(Tower("a", str(two)))
    assert registered() == {"a": Tower("a", str(two)), "b": Tower("b", str(one), True, [336, 672])}


def test_a_hub_id_can_be_registered_without_asking_the_hub():
    register(Tower("mine", "someone/clip-moe"))
    assert resolve("mine").source == "someone/clip-moe"


def test_the_environment_wins_over_the_registrations(place, monkeypatch):
    one, two = directory(place / "one"), directory(place / "two")
    register(Tower("clipmoe-336", str(one)))
    monkeypatch.setenv(OVERRIDE, f" clipmoe-336={two} , other = someone/clip-moe,")
    assert resolve("clipmoe-336").source == str(two)
    assert resolve("other").source == "someone/clip-moe"
    monkeypatch.delenv(OVERRIDE)
    assert resolve("clipmoe-336").source == str(one)


@pytest.mark.parametrize("value", ["clipmoe-336", "=/somewhere", "clipmoe-336="])
def test_a_variable_that_names_nothing_says_its_form(monkeypatch, value):
    monkeypatch.setenv(OVERRIDE, value)
    with pytest.raises(ValueError, match="expected NAME=DIR_OR_HUB_ID"):
        resolve("clipmoe-336")


@pytest.mark.parametrize("content", ['{"a": ', "[1]", '{"a": "somewhere"}', '{"a": {}}'])
def test_a_damaged_file_of_registrations_is_named(content):
    path = tower_registry.registry_file()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=str(path)):
        resolve("a")
    with pytest.raises(ValueError, match=str(path)):
        register(Tower("b", "someone/clip-moe"))
    assert path.read_text() == content


# ------------------------------------------------------------------------------------------------------- what a name is


def test_a_directory_of_ours_is_its_own_name(place):
    path = directory(place / "moe")
    assert resolve(str(path)) == Tower(str(path), str(path))


@pytest.mark.parametrize(
    "name", ["openai/clip-vit-large-patch14-336", "laion/CLIP-ViT-H-14", "Lin-Chen/ShareGPT4V-13B_Pretrained_vit"]
)
def test_upstreams_names_are_upstreams(name):
    assert resolve(name) is None


@pytest.mark.parametrize("model_type", ["clip", "clip_vision_model"])
def test_a_dense_clip_directory_is_upstreams(place, model_type):
    assert resolve(str(directory(place / "dense", model_type))) is None


def test_a_hub_id_of_ours_is_recognised_by_its_config(place, monkeypatch):
    def hf_hub_download(hub_id, file):
        return directory(place / hub_id, {"me/moe": "clip_moe", "me/bert": "bert"}[hub_id]) / file

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    assert resolve("me/moe") == Tower("me/moe", "me/moe")
    with pytest.raises(UnknownTower, match="llava-clipmoe register me-bert DIR_OR_HUB_ID"):
        resolve("me/bert")


def test_an_unknown_name_says_what_is_known_and_the_command_that_registers_it():
    register(Tower("clipmoe-224", "someone/clip-moe"))
    with pytest.raises(UnknownTower) as caught:
        resolve("clipmoe-336")
    message = str(caught.value)
    assert "unknown vision tower 'clipmoe-336'" in message and "Registered: clipmoe-224." in message
    assert "llava-clipmoe register clipmoe-336 DIR_OR_HUB_ID" in message
    assert f"export {OVERRIDE}=clipmoe-336=DIR_OR_HUB_ID" in message


@pytest.mark.parametrize("model_type", [None, "clip", "bert"])
def test_a_stray_folder_of_the_towers_name_is_no_tower(place, model_type):
    """Upstream takes any existing path and loads it as a dense CLIP with whatever weights fit: none."""
    directory(place / "work" / "clipmoe-336", model_type)
    with pytest.raises(UnknownTower, match="llava-clipmoe register clipmoe-336 DIR_OR_HUB_ID"):
        resolve("clipmoe-336")


def test_a_registered_name_wins_over_a_stray_folder(place):
    directory(place / "work" / "clipmoe-336", None)
    path = directory(place / "moe")
    register(Tower("clipmoe-336", str(path)))
    assert resolve("clipmoe-336").source == str(path)


def test_a_vision_tower_saved_alone_is_never_handed_to_upstream(place):
    """Upstream would load it as a dense CLIP with random FFNs."""
    path = directory(place / "alone", "clip_moe_vision_model")
    with pytest.raises(UnknownTower, match="clip_moe_vision_model"):
        resolve(str(path))


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("clip", "is a dense CLIP"), ("clip_vision_model", "is a dense CLIP"), (None, "no config.json"), ("bert", "bert")],
)
def test_what_is_no_clip_moe_is_not_registered_and_nothing_is_written(place, model_type, why):
    path = directory(place / "other", model_type)
    with pytest.raises(ValueError, match=why):
        register(Tower("clipmoe-336", str(path)))
    assert not (place / "config").exists()


def test_a_refused_registration_leaves_the_old_one(place):
    path = directory(place / "moe")
    register(Tower("clipmoe-336", str(path)))
    before = tower_registry.registry_file().read_bytes()
    for source in (str(directory(place / "dense", "clip")), "/no/such/directory"):
        with pytest.raises(ValueError):
            register(Tower("clipmoe-336", source))
    assert tower_registry.registry_file().read_bytes() == before


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a,b", "a=b", "-a", "../a", "openai-mine", "laion", "ShareGPT4V-x"])
def test_names_that_cannot_be_asked_for_cannot_be_registered(place, name):
    with pytest.raises(ValueError, match="cannot be a tower's name"):
        register(Tower(name, str(directory(place / "moe"))))
    assert not (place / "config").exists()


def test_a_moved_directory_is_said_to_be_moved_with_the_command_that_mends_it(place):
    path = directory(place / "moe")
    register(Tower("clipmoe-336", str(path)))
    path.rename(place / "elsewhere")
    with pytest.raises(UnknownTower, match="does not exist") as caught:
        resolve("clipmoe-336")
    assert "llava-clipmoe register clipmoe-336 DIR_OR_HUB_ID" in str(caught.value)
    assert resolve(str(place / "elsewhere")) is not None  # other names are not hindered


def test_a_dense_directory_behind_the_environments_name_is_refused(place, monkeypatch):
    monkeypatch.setenv(OVERRIDE, f"clipmoe-336={directory(place / 'dense', 'clip')}")
    with pytest.raises(UnknownTower, match="is a dense CLIP"):
        resolve("clipmoe-336")


# ------------------------------------------------------------------------------------------------------------- commands


def test_the_commands_register_list_check_and_forget(place, capsys):
    path = directory(place / "moe")
    assert cli.main(["towers"]) == 0
    assert "llava-clipmoe register clipmoe-336 DIR_OR_HUB_ID" in capsys.readouterr().out
    assert cli.main(["register", "clipmoe-336", str(path)]) == 0
    assert "--vision_tower clipmoe-336" in capsys.readouterr().out
    assert cli.main(["register", "clipmoe-s2", str(path), "--s2-scales", "24", "48"]) == 0
    assert written()["clipmoe-s2"] == {"source": str(path), "s2": True, "s2_scales": [24, 48]}
    capsys.readouterr()
    assert cli.main(["towers"]) == 0
    listed = capsys.readouterr().out
    assert "clipmoe-336" in listed and "ready, S2" in listed
    assert cli.main(["towers", "clipmoe-336"]) == 0
    assert str(path) in capsys.readouterr().out.replace("\n", "")
    assert cli.main(["register", "clipmoe-336", "--remove"]) == 0
    assert list(written()) == ["clipmoe-s2"] and path.is_dir()


def test_checking_a_name_answers_with_the_exit_status(place, capsys):
    assert cli.main(["towers", "openai/clip-vit-large-patch14-336"]) == 0
    assert cli.main(["towers", "clipmoe-336"]) == 2
    assert "llava-clipmoe register clipmoe-336 DIR_OR_HUB_ID" in capsys.readouterr().err


def test_the_list_shows_a_tower_that_is_gone(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    path = directory(place / "moe")
    register(Tower("clipmoe-336", str(path)))
    path.rename(place / "elsewhere")
    assert cli.main(["towers"]) == 0
    assert "does not exist" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["register", "clipmoe-336"], "llava-clipmoe register clipmoe-336 DIR_OR_HUB_ID"),
        (["register", "clipmoe-336", "no/such/directory"], "neither a directory"),
        (["register", "clipmoe-336", "DENSE"], "is a dense CLIP"),
        (["register", "clipmoe-336", "--remove"], "not registered"),
    ],
)
def test_a_command_that_cannot_be_done_says_why_and_writes_nothing(place, capsys, arguments, words):
    dense = str(directory(place / "dense", "clip"))
    assert cli.main([dense if word == "DENSE" else word for word in arguments]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and words in text and "Traceback" not in text
    assert not (place / "config").exists()


def test_the_look_up_imports_neither_torch_nor_transformers(place):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from llava_clipmoe.tower_registry import resolve;"
        "resolve(sys.argv[2]);"
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(REPOSITORY), str(directory(place / "moe"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
