"""EPA's index against EPA's own table and examples."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import epa

# Published table (EPA-454/B-24-002, table 6), typed here a second time, as EPA prints it: for each pollutant the
# concentrations at which each category begins and ends.
PUBLISHED = {
    "o3_8h": "0.000-0.054 0.055-0.070 0.071-0.085 0.086-0.105 0.106-0.200 -",
    "o3_1h": "- - 0.125-0.164 0.165-0.204 0.205-0.404 0.405-0.604",
    "pm25": "0.0-9.0 9.1-35.4 35.5-55.4 55.5-125.4 125.5-225.4 225.5-325.4",
    "pm10": "0-54 55-154 155-254 255-354 355-424 425-604",
    "co": "0.0-4.4 4.5-9.4 9.5-12.4 12.5-15.4 15.5-30.4 30.5-50.4",
    "so2": "0-35 36-75 76-185 186-304 305-604 605-1004",
    "no2": "0-53 54-100 101-360 361-649 650-1249 1250-2049",
}
INDEX = [(0, 50), (51, 100), (101, 150), (151, 200), (201, 300), (301, 500)]
EDGES = [
    (key, value, index, category)
    for key, bands in PUBLISHED.items()
    for band, category, limits in zip(bands.split(), epa.CATEGORIES, INDEX, strict=True)
    if band != "-"
    for value, index in zip(band.split("-"), limits, strict=True)
]


def test_every_breakpoint_edge():
    for key, value, index, category in EDGES:
        assert epa.sub_index(key, value) == epa.sub_index(key, float(value)) == index
        assert epa.category(index) == category
    assert epa.category(501) == "Hazardous"
    assert len(EDGES) == 2 * (5 + 4 + 6 * 5)


def test_epas_worked_example():
    # (150-101)/(0.085-0.071)·(0.078-0.071)+101 = 125.5, which binary floats put a hair below; halves go up
    examples = [("o3_8h", 0.078, 126), ("pm25", 35.9, 102), ("co", 8.4, 90), ("o3_8h", 0.07853333, 126)]
    for key, value, index in [*examples, ("o3_8h", Decimal("0.078"), 126)]:
        assert epa.sub_index(key, value) == index
    assert epa.aqi({"o3_8h": 0.078, "pm25": 35.9, "co": 8.4}) == 126, "the largest"


def test_truncates_and_does_not_round():
    same = "pm25 9.09 9.0, pm25 35.49 35.4, pm10 54.99 54, o3_8h 0.0709 0.070, co 4.49 4.4"
    for key, value, same_as in map(str.split, same.split(", ")):
        assert epa.sub_index(key, value) == epa.sub_index(key, same_as)


def test_values_without_an_index_or_category_are_refused():
    for key, value in (("pm25", 325.5), ("no2", 2050), ("o3_8h", 0.201), ("o3_1h", 0.124), ("so2", 1005)):
        with pytest.raises(ValueError, match="EPA defines an index for"):
            epa.sub_index(key, value)
    for value in (-1, -0.04, float("nan"), float("inf"), "abc", "", 1e30):
        with pytest.raises(ValueError, match="PM2.5"):
            epa.sub_index("pm25", value)
    with pytest.raises(ValueError, match="at least one"):
        epa.aqi({})
    with pytest.raises(ValueError, match="≥ 0"):
        epa.category(-1)


def test_one_hour_ozone_takes_over_where_eight_hours_end():
    assert epa.aqi({"o3_8h": 0.3, "o3_1h": 0.45}) == epa.sub_index("o3_1h", 0.45)
    assert epa.aqi({"o3_8h": 0.05, "o3_1h": 0.06}) == epa.sub_index("o3_8h", 0.05)
    with pytest.raises(ValueError):
        epa.aqi({"o3_8h": 0.3})
    with pytest.raises(ValueError):
        epa.aqi({"o3_1h": 0.1})


@given(st.sampled_from(sorted(epa.POLLUTANTS)), st.floats(0, 700), st.floats(0, 700))
def test_more_pollution_is_never_a_lower_index(key, a, b):
    low, high = sorted((a, b))
    try:
        assert epa.sub_index(key, low) <= epa.sub_index(key, high)
    except ValueError:
        pass
