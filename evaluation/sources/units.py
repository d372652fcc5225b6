"""Units of concentrations: how files spell them, and what turns one into another.

A gas of molar mass M (g/mol) is converted between mass and volume as an ideal gas at EPA's reference conditions, 25 °C
and 1 atm (40 CFR 50.3), where a mole has 24.45 litres:

    ppb = µg/m³ · 24.45 / M

Particles have no molar mass, and a unit that names another temperature is none of these.
"""

import re
import unicodedata
from decimal import Decimal
from functools import lru_cache

MASS = {"ng/m³": Decimal("0.001"), "µg/m³": Decimal(1), "mg/m³": Decimal(1000)}  # in µg/m³
VOLUME = {"ppt": Decimal("0.001"), "ppb": Decimal(1), "pphm": Decimal(10), "ppm": Decimal(1000)}  # in ppb
MOLAR_VOLUME = Decimal("24.45")  # l/mol
_PREFIXES = {"μ": "µ", "u": "µ", "mc": "µ", "\ufffd": "µ", "?": "µ", "m": "m", "n": "n"}

# Words and mangled bytes, replaced one after the other in lower-case text in Unicode's form NFKC.
_WORDS = [
    (re.compile(pattern), symbol)
    for pattern, symbol in (
        ("â", ""), ("î1⁄4", "μ"),  # UTF-8 read as Latin-1: Âµg/mÂ³, Î¼g/m³
        (r"micro[\s_-]*grams?|microg(?=\W)|微克|мкг", "μg"), (r"milli[\s_-]*grams?|毫克|мг", "mg"),
        (r"nano[\s_-]*grams?|纳克|нг", "ng"),
        (r"cubic[\s_-]*met(?:er|re)s?|cu\.?[\s_]*m(?:et(?:er|re)s?)?(?![a-z])|cbm|m\*\*3|立方米|(?<=/)м3", "m3"),
        (r"parts[\s_-]*(?:per|/)[\s_-]*hundred[\s_-]*million", "pphm"), (r"parts[\s_-]*(?:per|/)[\s_-]*million", "ppm"),
        (r"parts[\s_-]*(?:per|/)[\s_-]*billion", "ppb"), (r"parts[\s_-]*(?:per|/)[\s_-]*trillion", "ppt"),
        (r"[μu]mol[\s_]*/[\s_]*mol", "ppm"), (r"nmol[\s_]*/[\s_]*mol", "ppb"),
        ("[−‐‑–]", "-"),
    )
]  # fmt: skip
_START = r"(?<![^\W\d_])"  # no letter before it
_UNIT = re.compile(
    rf"{_START}(?P<prefix>mc|[μu\ufffd?mnk])?g[\s_.·⋅*]*(?:/|per(?![a-z]))?[\s_]*(?P<normal>n)?m[\s_^]*\(?"
    r"(?:-?3(?!\d)|(?<=/m)[\ufffd?]?(?![a-z\d]))"
    rf"|(?:{_START}|(?<=co))(?P<ratio>pp(?:hm|[bmt]))[\s_]*(?P<of>[vc])?(?![a-z])"
    # What is a unit too, but not of these: mol/m², molecules/cm², µg/kg, mg/l, a column in Dobson units, tonnes
    rf"|(?P<other>{_START}(?:[μumnpk]?(?:g|mol)|molec(?:ules)?|particles|counts?|\#)[\s_]*/[\s_]*[a-z]+[\s^]*-?\d?"
    r"|[(\[][\s]*(?:%|du|kt|k?tons?|tonnes?)[\s]*[)\]])"
)
_TEMPERATURE = re.compile(r"(?<![\d.])(-?\d+(?:\.\d+)?)[\s_]*(?:°|deg(?:rees)?)?[\s_]*(c|k)(?![a-z\d])")
_INDEX = re.compile(r"(?<![a-z])(?:us|i|ca|e|d|n)?[\s_]*aqi(?![a-z])|(?<![a-z])(?:sub[\s_-]*)?ind(?:ex|ices)(?![a-z])")
_HUMP = re.compile(r"(?<=[a-z\d])(?=[A-Z])")  # in camelCase


def _spelled(text: str) -> str:
    text = unicodedata.normalize("NFKC", _HUMP.sub(" ", text)).casefold()
    for pattern, symbol in _WORDS:
        text = pattern.sub(symbol, text)
    return text


def plain(name: object) -> str:
    """A name in lower-case letters and digits alone, as names of columns are compared."""
    return re.sub("[^a-z0-9]", "", unicodedata.normalize("NFKC", str(name)).casefold())


def units_in(text: str) -> list[str]:
    """The units that a text names, each once; those that nothing here converts as they stand there."""
    spelled, names = _spelled(text), dict[str, None]()
    for match in _UNIT.finditer(spelled):
        if match["ratio"]:
            name = match["ratio"] + ("C" if match["of"] == "c" else "")
        elif match["other"]:
            name = match["other"].strip("()[] ")
        else:
            prefix = match["prefix"] or ""
            name = f"{_PREFIXES.get(prefix, prefix)}g/{'N' if match['normal'] else ''}m³"
            for number, scale in _TEMPERATURE.findall(spelled[match.end() :]):
                celsius = float(number) - (273.15 if scale == "k" else 0)
                name += f" at {celsius:g} °C" if abs(celsius - 25) > 0.5 else ""
        names[name] = None
    return list(names)


def is_index(text: str) -> bool:
    """Whether a column or a unit of that name holds index values, not concentrations."""
    return _INDEX.search(_spelled(text)) is not None


def without_units(text: str) -> str:
    """The text in lower case without the units in it, as "no2 ( )" of "NO2 (µg/m³)"."""
    return _UNIT.sub(" ", _spelled(text))


@lru_cache(maxsize=10_000)
def stated(text: str) -> str | None:
    """The unit that a text names, None if it names none; ValueError if it names several, or an index."""
    if is_index(text):
        raise ValueError(f"expected a concentration, got index values ({text!r}), which nothing turns into one")
    names = units_in(text)
    if len(names) > 1:
        raise ValueError(f"expected one unit, got {' and '.join(names)} in {text!r}")
    return names[0] if names else None


def factor(to: str | None, unit: str, molar_mass: Decimal | None) -> Decimal:
    """What a value in `unit` is multiplied by to be in unit `to`; ValueError if that is impossible.

    `molar_mass`: of a gas, in g/mol; None for particles.
    """
    if to is None:
        raise ValueError(f"expected no unit, got {unit!r}; this field has none")
    family, other = (VOLUME, MASS) if to in VOLUME else (MASS, VOLUME)
    if unit in family:
        return family[unit] / family[to]
    if unit in other and molar_mass is not None:
        return other[unit] * MOLAR_VOLUME / molar_mass / family[to]
    if unit in other:
        raise ValueError(f"cannot turn {unit} into {to}: particles have no molar mass")
    gas = molar_mass is not None or to in VOLUME
    known = "µg/m³, mg/m³, ppb or ppm" if gas else "µg/m³ or mg/m³"
    raise ValueError(f"expected the unit {known}, got {unit!r}")
