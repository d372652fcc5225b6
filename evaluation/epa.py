"""The US EPA Air Quality Index, breakpoints in force since May 2024.

Source: EPA, "Technical Assistance Document for the Reporting of Daily Air Quality", EPA-454/B-24-002 (May
2024), tables 5 and 6, and 40 CFR 58 appendix G:

    I = (I_hi − I_lo) / (C_hi − C_lo) · (C − C_lo) + I_lo

C is truncated (not rounded) to the pollutant's precision first, I is rounded to the nearest integer, halves up; the
overall index is the largest sub-index. All arithmetic is decimal, so no binary fraction moves a value across a
breakpoint. Readings that have no index raise ValueError, whose text names the pollutant and what was expected.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal, InvalidOperation

CATEGORIES = ("Good", "Moderate", "Unhealthy for Sensitive Groups", "Unhealthy", "Very Unhealthy", "Hazardous")
# Lowest and highest index of each category, in the order of CATEGORIES.
INDEX_RANGES = ((0, 50), (51, 100), (101, 150), (151, 200), (201, 300), (301, 500))
AQI_MAX = INDEX_RANGES[-1][1]

Band = tuple[Decimal, Decimal]
Value = float | str | Decimal


@dataclass(frozen=True)
class Pollutant:
    key: str  # in data files and code
    label: str  # in prompts
    unit: str  # of the concentrations
    decimals: int  # precision to which a concentration is truncated
    bands: tuple[Band | None, ...]  # (C_lo, C_hi) per category; None where EPA defines none
    molar_mass: Decimal | None  # of a gas, g/mol

    @property
    def typical(self) -> tuple[float, float]:
        """Range of plausible medians: from a hundredth of the first band's top to the end of the scale."""
        tops = [float(band[1]) for band in self.bands if band]
        return tops[0] / 100, tops[-1]

    def truncate(self, value: Value) -> Decimal:
        """`value` cut to this pollutant's precision; ValueError if it is not a finite number below about 1e27."""
        try:
            number = value if isinstance(value, Decimal) else Decimal(str(value))
            if number.is_finite():
                return number.quantize(Decimal(1).scaleb(-self.decimals), rounding=ROUND_DOWN)
        except InvalidOperation:  # no number, or more digits than decimal arithmetic keeps
            pass
        raise ValueError(f"{self.label}: expected a finite number in {self.unit}, below 1e27, got {value!r}")


_TABLE = (  # bands: lowest–highest concentration of each category
    ("pm25", "PM2.5", "µg/m³", 1, "0.0–9.0 9.1–35.4 35.5–55.4 55.5–125.4 125.5–225.4 225.5–325.4"),
    ("pm10", "PM10", "µg/m³", 0, "0–54 55–154 155–254 255–354 355–424 425–604"),
    ("o3_8h", "O3 8h", "ppm", 3, "0.000–0.054 0.055–0.070 0.071–0.085 0.086–0.105 0.106–0.200 none"),
    ("o3_1h", "O3 1h", "ppm", 3, "none none 0.125–0.164 0.165–0.204 0.205–0.404 0.405–0.604"),
    ("co", "CO", "ppm", 1, "0.0–4.4 4.5–9.4 9.5–12.4 12.5–15.4 15.5–30.4 30.5–50.4"),
    ("so2", "SO2", "ppb", 0, "0–35 36–75 76–185 186–304 305–604 605–1004"),
    ("no2", "NO2", "ppb", 0, "0–53 54–100 101–360 361–649 650–1249 1250–2049"),
)
_MOLAR_MASSES = {"o3": "47.998", "co": "28.010", "so2": "64.064", "no2": "46.006"}  # g/mol, NIST Chemistry WebBook


def _bands(text: str) -> tuple[Band | None, ...]:
    edges = (band.split("–") for band in text.split())
    return tuple(None if len(band) == 1 else (Decimal(band[0]), Decimal(band[1])) for band in edges)


def _molar_mass(key: str) -> Decimal | None:
    mass = _MOLAR_MASSES.get(key.partition("_")[0])
    return None if mass is None else Decimal(mass)


POLLUTANTS: dict[str, Pollutant] = {row[0]: Pollutant(*row[:4], _bands(row[4]), _molar_mass(row[0])) for row in _TABLE}


def sub_index(key: str, value: Value) -> int:
    """The index, 0 to 500, of one pollutant (a key of POLLUTANTS) at a concentration ≥ 0 in its unit."""
    index = _index_on_scale(key, value)
    if index is None:
        raise ValueError(_off_scale(key, value))
    return index


def _index_on_scale(key: str, value: Value) -> int | None:
    """None where EPA defines no index: beyond the scale, and below 0.125 ppm of 1 h ozone."""
    pollutant = POLLUTANTS[key]
    c = pollutant.truncate(value)
    # The sign is read before truncation, which would turn -0.04 ppm into a harmless -0.0.
    if Decimal(str(value)) < 0:
        raise ValueError(f"{pollutant.label}: expected a concentration ≥ 0 {pollutant.unit}, got {value}")
    for edges, (i_lo, i_hi) in zip(pollutant.bands, INDEX_RANGES, strict=True):
        if edges is not None and edges[0] <= c <= edges[1]:
            index = Decimal(i_hi - i_lo) * (c - edges[0]) / (edges[1] - edges[0]) + i_lo
            return int(index.quantize(Decimal(1), rounding=ROUND_HALF_UP))
    return None


def _off_scale(key: str, value: Value) -> str:
    pollutant = POLLUTANTS[key]
    bands = [band for band in pollutant.bands if band is not None]
    scale = f"{bands[0][0]} to {bands[-1][1]} {pollutant.unit}"
    return f"{pollutant.label}: EPA defines an index for {scale}, got {value}"


def aqi(readings: Mapping[str, Value]) -> int:
    """The overall index: the largest sub-index.

    Ozone may come as 8 h and 1 h averages. As EPA prescribes, a 1 h value below 0.125 ppm has no index, and for an 8 h
    value above 0.200 ppm the 1 h one is used; either is skipped if another reading has an index.
    """
    if not readings:
        raise ValueError("expected at least one reading, got none")
    indices: list[int] = []
    skipped: list[str] = []
    for key, value in readings.items():
        index = _index_on_scale(key, value)
        below_1h = key == "o3_1h" and POLLUTANTS[key].truncate(value) < Decimal("0.125")
        above_8h = key == "o3_8h" and "o3_1h" in readings
        if index is not None:
            indices.append(index)
        elif below_1h or above_8h:
            skipped.append(_off_scale(key, value))
        else:
            raise ValueError(_off_scale(key, value))
    if not indices:
        raise ValueError(skipped[0])
    return max(indices)


def category_number(index: float) -> int:
    """Position in CATEGORIES of an index ≥ 0; above 500 counts as Hazardous ("beyond the AQI")."""
    if not index >= 0:
        raise ValueError(f"expected an index ≥ 0, got {index}")
    return next((i for i, (_, hi) in enumerate(INDEX_RANGES) if index <= hi), len(CATEGORIES) - 1)


def category(index: float) -> str:
    return CATEGORIES[category_number(index)]
