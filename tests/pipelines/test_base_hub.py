"""What is said where the model hub does not give a base."""

import re

import pytest

from pipelines import base_model
from pipelines.config import ConfigError


def test_a_base_that_the_hub_does_not_give_names_the_local_way():
    from trainers.models import ModelError, load_tokenizer
    from trainers.settings import BaseReference

    way = "`hf download org/name --local-dir FOLDER` and set prepare_base.source to FOLDER"
    with pytest.raises(ConfigError) as caught:
        base_model.hub_model("org/name", None)
    assert "the hub cannot be reached" in str(caught.value) and way in str(caught.value)
    with pytest.raises(ConfigError, match=r"set prepare_base\.merge_source to FOLDER"):
        base_model.hub_model("org/name", None, "merge_source")
    with pytest.raises(ModelError) as missing:
        load_tokenizer(BaseReference("org/name"))
    assert way in str(missing.value) and "\n" not in str(missing.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "is gated: ask for access on its page.*`hf auth login` or set HF_TOKEN"),
        ("RepositoryNotFoundError", "the hub has no model org/name, or a private one"),
        ("RevisionNotFoundError", r"has no such revision; set prepare_base\.revision"),
    ],
)
def test_what_the_hub_says_of_a_base_is_explained(kind, said):
    """As transformers hands it on: inside an OSError."""
    import httpx
    from huggingface_hub import errors

    from trainers.models import hub_reason

    answer = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid/x"))
    try:
        try:
            raise getattr(errors, kind)("refused", response=answer)
        except errors.HfHubHTTPError as error:
            raise OSError("a long text\nof many lines") from error
    except OSError as error:
        assert re.search(said, hub_reason(error, "org/name") or "")
    assert hub_reason(OSError("a broken file"), "org/name") is None
