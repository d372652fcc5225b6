"""What is said where Unsloth cannot load a base. A double stands for Unsloth, which patches the whole process."""

import sys
import types

import httpx
import pytest
from huggingface_hub import errors

from trainers import hybrid_grit
from trainers.models import ModelError
from trainers.settings import BaseReference


def failing(error, cause):
    """An Unsloth whose loading fails as the real one does: with a long text, from what the hub raised."""

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(*_, **__):
            raise error from cause

    return types.SimpleNamespace(FastLanguageModel=FastLanguageModel)


@pytest.fixture
def said(make_job, monkeypatch):
    def load(location, cause):
        text = "Unsloth: No config file found\n\nAutoConfig error: long\n"
        monkeypatch.setitem(sys.modules, "unsloth", failing(RuntimeError(text), cause))
        with pytest.raises(ModelError) as caught:
            hybrid_grit._load_model(BaseReference(location), make_job().settings)
        return str(caught.value)

    return load


def test_errors_of_the_hub_are_one_sentence(said):
    refused = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid/x"))
    for cause, wanted in (
        (errors.GatedRepoError("refused", response=refused), "org/name is gated: ask for access"),
        (httpx.ConnectTimeout("timed out"), "the hub cannot be reached"),
    ):
        found = said("org/name", cause)
        assert found.startswith(f"Unsloth could not load a model from 'org/name': {wanted}")
        assert "\n" not in found and "AutoConfig" not in found


def test_errors_of_a_folder_are_unsloths_own(said, tmp_path):
    assert "AutoConfig error: long" in said(str(tmp_path), OSError("a broken file"))
    assert "AutoConfig error: long" in said("org/name", OSError("a broken file"))
