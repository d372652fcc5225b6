"""Parameters for tests of the plan."""

from pathlib import Path

from pipelines.config import parse_params
from pipelines.profile import compose, load_text

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ROOT / "profiles"
GB = 10**9


def params_of(name, **sections):
    """Of a profile, with keys of some sections changed; params.yaml is not read."""
    raw = load_text(compose(name, PROFILES))
    for section, values in sections.items():
        raw[section] |= values
    return parse_params(raw)
