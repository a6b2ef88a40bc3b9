"""Models of the hub, against one on this machine: what is fetched, and each way in which it fails."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hub_server import MAIN, OTHER, Hub, files_of, hub_here
from huggingface_hub import constants
from meta_folder import write_tokenizer

from llamaweft.errors import RunError, UserError
from llamaweft.model.folder import read_config
from llamaweft.model.init import random_tensors
from llamaweft.model.load import load_causal_lm
from llamaweft.model.locate import find_folder
from llamaweft.model.presets import PRESETS
from llamaweft.model.save import write_model
from llamaweft.model.tokenizer import load_tokenizer

NAME = "acme/small-llama"
TOKEN = "hf_" + "Secret" * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, bytes]:
    """The files of a small model, 0.3 MB."""
    from dataclasses import replace

    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer"))
    config = replace(PRESETS["tiny"], vocab_size=96)
    tensors = random_tensors(config, seed=3)
    write_model(folder, config, tensors, tokenizer.save_pretrained, dtype=torch.float32)
    return files_of(folder)


@pytest.fixture
def hub(monkeypatch, tmp_path, model):
    with hub_here(monkeypatch, tmp_path / "hub") as hub:
        hub.add(NAME, dict(model))
        yield hub


def snapshot(tmp_path: Path, commit: str = MAIN) -> Path:
    return tmp_path / "hub" / "models--acme--small-llama" / "snapshots" / commit


def test_what_is_needed_is_fetched_once_and_nothing_else(hub: Hub, model, tmp_path):
    hub.commits[NAME][MAIN] |= {
        "modeling_evil.py": b"raise SystemExit",
        "README.md": b"read me",
        "pytorch_model.bin": b"pickled",
        "consolidated.safetensors": b"the same again",
        "original/params.json": b"{}",
        "tokenizer.model": b"pieces",
    }
    folder = find_folder(NAME)
    assert folder == snapshot(tmp_path)
    assert {path.name for path in folder.iterdir()} == {*model, "tokenizer.model"}
    assert load_causal_lm(folder, base_weights=None).config == read_config(folder)
    hub.asked.clear()
    assert find_folder(NAME) == folder
    assert hub.fetched() == []


def test_a_tokenizer_is_fetched_without_the_weights(hub: Hub, tmp_path):
    assert len(load_tokenizer(NAME)) == 90
    assert "model.safetensors" not in hub.fetched()
    find_folder(NAME)
    assert "model.safetensors" in hub.fetched()


def test_a_revision_is_taken_by_its_name_or_commit(hub: Hub, model, tmp_path):
    hub.add(NAME, dict(model), OTHER, branch="v2")
    assert find_folder(NAME, "v2") == snapshot(tmp_path, OTHER)
    assert find_folder(NAME, OTHER) == snapshot(tmp_path, OTHER)
    assert find_folder(NAME) == snapshot(tmp_path, MAIN)
    with pytest.raises(
        UserError, match=f"model_revision: v9 is no commit, tag or branch of {NAME}"
    ):
        find_folder(NAME, "v9")
    with pytest.raises(UserError, match="is for models of the hub"):
        find_folder(str(tmp_path), "v2")


def test_a_gated_model_says_where_its_licence_is_and_how_to_log_in(hub: Hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.gated = True
    with pytest.raises(UserError) as refused:
        find_folder(NAME)
    said = str(refused.value)
    assert f"accept its licence at https://huggingface.co/{NAME}" in said
    assert "`hf auth login` or set HF_TOKEN" in said
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in said
    assert len(said.splitlines()) == 1


def test_an_unknown_model_and_a_bad_name_are_told_apart(hub: Hub):
    with pytest.raises(UserError, match="the hub has none of that name that this account may see"):
        find_folder("acme/unknown")
    with pytest.raises(UserError, match="no hub id"):
        find_folder("acme/--bad--")


def test_a_hub_that_fails_gives_a_reason_without_the_token(hub: Hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.broken = True
    with pytest.raises(UserError, match="the server answers 500") as refused:
        find_folder(NAME)
    assert TOKEN not in str(refused.value)


def test_a_download_that_was_cut_goes_on_where_it_was(hub: Hub, model, tmp_path):
    size = len(model["model.safetensors"])
    hub.cut_after = size // 2
    with pytest.raises(RunError, match="the same command goes on from there"):
        find_folder(NAME)
    (part,) = (tmp_path / "hub").rglob("*.incomplete")
    kept = part.stat().st_size
    assert size // 4 < kept <= size // 2
    assert part.read_bytes() == model["model.safetensors"][:kept]

    hub.cut_after, hub.broken = None, False
    hub.asked.clear()
    folder = find_folder(NAME)
    ranges = [r for method, path, r in hub.asked if method == "GET" and "safetensors" in path]
    assert ranges == [f"bytes={kept}-"]
    assert (folder / "model.safetensors").read_bytes() == model["model.safetensors"]
    assert not list((tmp_path / "hub").rglob("*.incomplete"))


def test_a_connection_that_is_cut_once_is_taken_up_at_once(hub: Hub, model, monkeypatch):
    hub.cut_after = 100_000
    from huggingface_hub import file_download

    def mended(seconds: float) -> None:
        hub.cut_after, hub.broken = None, False

    monkeypatch.setattr(file_download.time, "sleep", mended)
    folder = find_folder(NAME)
    assert (folder / "model.safetensors").read_bytes() == model["model.safetensors"]


def test_a_damaged_file_is_found_and_removed(hub: Hub, tmp_path):
    hub.spoilt.add("model.safetensors")
    with pytest.raises(RunError, match="arrived damaged"):
        find_folder(NAME)
    assert not list((tmp_path / "hub").rglob("*.incomplete"))
    assert not (snapshot(tmp_path) / "model.safetensors").exists()


def test_room_is_asked_for_before_weights_are_fetched(hub: Hub, model, monkeypatch, tmp_path):
    free = len(model["model.safetensors"]) + 10_000
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(UserError, match=rf"the model {NAME} and its fp32 store needs"):
        find_folder(NAME, store_codec="fp32")
    assert "model.safetensors" not in hub.fetched()
    free = 1000
    with pytest.raises(UserError, match=rf"the model {NAME} needs"):
        find_folder(NAME)
    free = len(model["model.safetensors"]) + 10_000
    find_folder(NAME)


def test_what_is_there_of_a_cut_download_needs_no_room_again(
    hub: Hub, model, monkeypatch, tmp_path
):
    hub.cut_after = len(model["model.safetensors"]) - 5000
    with pytest.raises(RunError):
        find_folder(NAME)
    hub.cut_after, hub.broken = None, False
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    assert (find_folder(NAME) / "model.safetensors").exists()


@pytest.mark.parametrize(
    "name",
    ["../../evil.json", "/etc/evil.json", "a/../../evil.json", "C:\\evil.json", "..\\e.json"],
)
def test_a_file_that_would_leave_its_folder_stops_everything(hub: Hub, tmp_path, name):
    hub.commits[NAME][MAIN][name] = b"{}"
    with pytest.raises(UserError, match="outside its folder"):
        find_folder(NAME)
    assert hub.fetched() == []
    assert not list(tmp_path.rglob("*e.json"))
    assert not list(tmp_path.rglob("evil*"))


def test_what_is_no_model_is_said_before_anything_is_fetched(hub: Hub):
    hub.add("acme/gguf", {"model.gguf": b"GGUF", "README.md": b""})
    with pytest.raises(UserError, match=r"no config\.json.*fetch one of its \.gguf files"):
        find_folder("acme/gguf")
    hub.add("acme/empty", {"config.json": b"{}"})
    with pytest.raises(UserError, match=r"no model\*\.safetensors and no pytorch_model"):
        find_folder("acme/empty")
    assert hub.fetched() == []


def test_without_a_connection_the_cache_is_taken(hub: Hub, monkeypatch, tmp_path):
    folder = find_folder(NAME)
    hub.broken = True
    assert find_folder(NAME) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_folder(NAME) == folder
    assert find_folder(NAME, MAIN) == folder
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids to fetch it"):
        find_folder("acme/other")
    hub.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert find_folder(NAME) == folder
    with pytest.raises(UserError, match="check the connection"):
        find_folder("acme/other")


def test_half_a_model_in_the_cache_is_not_taken(hub: Hub):
    hub.cut_after = 1000
    with pytest.raises(RunError):
        find_folder(NAME)
    with pytest.raises(UserError, match="cannot be fetched"):
        find_folder(NAME)


def test_pickled_weights_are_fetched_where_there_are_no_others(
    hub: Hub, model, tmp_path, monkeypatch
):
    import io

    from safetensors.torch import load

    monkeypatch.setenv("LLAMAWEFT_CACHE", str(tmp_path / "ours"))
    weights = load(model["model.safetensors"])
    packed = io.BytesIO()
    torch.save(weights, packed)
    files = {name: data for name, data in model.items() if name != "model.safetensors"}
    hub.add("acme/pickled", files | {"pytorch_model.bin": packed.getvalue()})
    folder = find_folder("acme/pickled")
    assert folder.is_relative_to(tmp_path / "ours")
    loaded = dict(load_causal_lm(folder, base_weights=None).named_parameters())
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
