"""The profile vision+smoke, at which every stage takes seconds, with changes."""

from __future__ import annotations

from typing import Any

from pipelines.profile import PROFILES, merged
from tests.project_clone import ROOT

ARMS = ("baseline_lora", "grit_vlm")
TEST_ITEMS, RETENTION_ITEMS, ASKED_AGAIN = 36, 7 * 3, 6


def small(**more: dict[str, Any]) -> dict[str, Any]:
    """The content of params.yaml; `more` goes on top, section by section."""
    raw, _ = merged("vision+smoke", ROOT / PROFILES)
    return {**raw, **{section: {**raw[section], **values} for section, values in more.items()}}
