"""What a file says about its readings: units, pollutants, indices and marks of missing values."""

import json
from decimal import Decimal

import pyarrow as pa
import pytest
from pyarrow import parquet

from evaluation import EvaluationError, epa
from evaluation.sources.rows import RowSource, read_recipe
from evaluation.sources.units import factor, is_index, units_in
from evaluation.tasks import aqi

SPELLINGS = {
    "µg/m³": (
        "NO2 (µg/m³)", "NO2 (μg/m3)", "O3 [ug/m^3]", "PM2.5_ugm3", "pm25ugm3", "NO2 µg·m⁻³", "ug m-3", "ug.m-3",
        "ugm-3 (TEOM FDMS)", "UG/M3", "ug/m3 LC", "Micrograms/cubic meter (25 C)", "micrograms_per_cubic_meter",
        "㎍/㎥", "Âµg/mÂ³", "\ufffdg/m\ufffd", "mcg/m3", "ug/cu m", "微克/立方米", "мкг/м3", "µg/m³ at 298 K",
        "Particulate matter < 10 µm (ug/m3)",
    ),
    "mg/m³": ("CO (mg/m³)", "co_mg_per_m3", "mg.m-3", "CO_mgm3"),
    "ppb": ("PPB", "NO2_ppb", "ppbv", "Parts per billion", "nmol/mol", "o3ppb"),
    "ppm": ("Daily Max 8-hour Ozone Concentration (ppm)", "ozonePpm", "COppm", "µmol/mol", "parts_per_million"),
    "pphm": ("NO2 1h average [pphm]",),
    None: ("PM10", "august", "avg m3", "Temp (°C)", "PM10 (daily mean)", "index", "time"),
}  # fmt: skip
UNKNOWN = (
    "NO2 (µg/Nm³)",
    "CO (mol/m²)",
    "ppbC",
    "µg/m³ (20 °C)",
    "micrograms/cubic_meter_(0_c)",
    "g/m³",
    "mg/l",
    "CO (kt)",
)


@pytest.mark.parametrize(("unit", "texts"), SPELLINGS.items())
def test_units_are_known_in_every_spelling(unit, texts):
    for text in texts:
        assert units_in(text) == ([unit] if unit else []), text
    for text in UNKNOWN:  # named as what they are not, so that they are refused
        (name,) = units_in(text)
        with pytest.raises(ValueError, match="expected the unit"):
            factor("ppb", name, Decimal(48))


def test_mass_becomes_volume_at_25_degrees_and_one_atmosphere():
    """The factors that EPA, NIOSH and the WHO publish: µg/m³ of one ppb."""
    published = {"o3_8h": 1.96, "no2": 1.88, "so2": 2.62, "co": 1.145}
    for key, micrograms in published.items():
        to_ppb = factor("ppb", "µg/m³", epa.POLLUTANTS[key].molar_mass)
        assert 1 / float(to_ppb) == pytest.approx(micrograms, rel=2e-3)


class Where(RowSource):
    hub_split: str | None = None
    hub_test_split: str | None = None
    hub_subset: str | None = None
    delimiter: str = "auto"
    encoding: str = "auto"
    max_chars: int | None = None
    max_refused: float = 1.0
    trust_given_aqi: bool = False


def read(tmp_path, content, columns, name="d.csv", **options):
    (tmp_path / name).write_text(content, encoding="utf-8")
    return read_recipe(aqi, Where(source=str(tmp_path / name), columns=columns, **options))


def readings(result):
    """Of each item, as the prompt has them."""
    return [
        {key: str(epa.POLLUTANTS[key].truncate(value)) for key, value in item.truth["readings"].items()}
        for item in result.train
    ]


OPEN_METEO = {"hourly_units": {"ozone": "μg/m³", "time": "iso8601"}, "hourly": {"time": ["0", "1"], "ozone": [60, 70]}}
STATED = {  # content, columns, the readings in EPA's units
    "header": (
        "t,NO2 (µg/m³),CO (mg/m³),O3 (µg/m³)\n0,100,5,60\n",
        {"no2": "NO2 (µg/m³)", "co": "CO (mg/m³)", "o3_8h": "O3 (µg/m³)"},
        [{"no2": "53", "co": "4.3", "o3_8h": "0.030"}],
    ),
    "header, no mapping": ("t,NO2 (µg/m³),CO_mgm3\n0,100,5\n", {}, [{"no2": "53", "co": "4.3"}]),
    "params.yaml": ("o\n60\n", {"o3_8h": {"column": "o", "unit": "ug/m3"}}, [{"o3_8h": "0.030"}]),
    "one of two in the header": ("O3 ppb/µg/m³\n60\n", {"o3_8h": {"column": "O3 ppb/µg/m³", "unit": "ppb"}},
                                 [{"o3_8h": "0.060"}]),
    "a column of units that vary": ("v,unit\n61,µg/m³\n32,ppb\n0.033,ppm\n", {"o3_8h": "v"},
                                    [{"o3_8h": "0.031"}, {"o3_8h": "0.032"}, {"o3_8h": "0.033"}]),
    "neighbours in any language": ("NO2,Einheit,CO,jednotka\n100,µg/m³,5,mg/m³\n", {"no2": "NO2", "co": "CO"},
                                   [{"no2": "53", "co": "4.3"}]),
    "neighbours of one name": ("Ozone,status,unit,NO2,status,unit\n60,V,ugm-3,40,V,ppb\n",
                               {"o3_8h": "Ozone", "no2": "NO2"}, [{"o3_8h": "0.030", "no2": "40"}]),
    "columns named after them": ("NO2 Units,NO2 Mean,CO Units,CO Mean\nParts per billion,19.9,Parts per million,1.1\n",
                                 {"co": "CO Mean", "no2": "NO2 Mean"}, [{"no2": "19", "co": "1.1"}]),
    "a row of units": ("t,O3,NO2\n,µg/m³,ppb\n0,60,40\n", {"o3_8h": "O3", "no2": "NO2"},
                       [{"o3_8h": "0.030", "no2": "40"}]),
    "Open-Meteo's JSON": (json.dumps(OPEN_METEO), {"o3_8h": "ozone"}, [{"o3_8h": "0.030"}, {"o3_8h": "0.035"}]),
    "a long table, one mapped": ("parameter,value,unit\npm25,12,µg/m³\no3,60,µg/m³\nco,5,mg/m³\n", {"o3_8h": "value"},
                                 [{"o3_8h": "0.030"}]),
    "a long table, none mapped": ("parameter,value,unit\npm25,12,µg/m³\no3,60,µg/m³\nno,9,ppb\n", {},
                                  [{"pm25": "12.0"}, {"o3_8h": "0.030"}]),
    "EPA's names, mapped": ("Parameter Name,Arithmetic Mean,Units of Measure\nOzone,0.031,Parts per million\n"
                            "PM2.5 - Local Conditions,12,Micrograms/cubic meter (LC)\n", {"pm25": "Arithmetic Mean"},
                            [{"pm25": "12.0"}]),
    "EEA": ("AirPollutant,Concentration,UnitOfMeasurement\nO3,60,ug.m-3\nNOX as NO2,60,ug.m-3\n", {},
            [{"o3_8h": "0.030"}]),
    "the worst pollutant beside": ("dust,dominant pollutant\n5,pm25\n6,o3\n", {"pm25": "dust"},
                                   [{"pm25": "5.0"}, {"pm25": "6.0"}]),
    "a state, no pollutant": ("State,dust\nCO,5\n", {"pm25": "dust"}, [{"pm25": "5.0"}]),
    "below zero": ("v,unit\n-2,ppb\n", {"o3_8h": "v"}, [{"o3_8h": "0.000"}]),
}  # fmt: skip


@pytest.mark.parametrize("kind", STATED)
def test_what_a_file_states_is_heeded(tmp_path, kind):
    content, columns, expected = STATED[kind]
    result = read(tmp_path, content, columns, "d.json" if content.startswith("{") else "d.csv")
    assert readings(result) == expected and not result.rejected


def test_a_parquet_column_may_have_its_unit_in_its_metadata(tmp_path):
    field = pa.field("o", pa.decimal128(10, 4), metadata={"unit": "µg/m³"})
    parquet.write_table(pa.table([[Decimal(60)]], schema=pa.schema([field])), tmp_path / "d.parquet")
    result = read_recipe(aqi, Where(source=str(tmp_path / "d.parquet"), columns={"o3_8h": "o"}))
    assert readings(result) == [{"o3_8h": "0.030"}]


CONTRADICTED = {  # content, columns, parts of the only problem
    "header and params.yaml": ("O3 (µg/m³)\n60\n", {"o3_8h": {"column": "O3 (µg/m³)", "unit": "ppb"}}, "ppb .* and µg"),
    "column and params.yaml": ("v,unit\n60,ppb\n31,ppm\n", {"o3_8h": {"column": "v", "unit": "ppb"}}, "ppm in column"),
    "header and neighbour": ("CO (ppm),unit\n4,mg/m³\n", {"co": "CO (ppm)"}, "ppm in the name .* and mg/m³ in column"),
    "two in the header": ("O3 (ppb or µg/m³)\n60\n", {"o3_8h": "O3 (ppb or µg/m³)"}, "got ppb and µg/m³"),
    "above the header": ("All gases in µg/m³\nt,O3\n0,60\n", {"o3_8h": "O3"}, "lines above the header name µg/m³"),
    "particles by volume": ("PM10 (ppm)\n5\n", {"pm10": "PM10 (ppm)"}, "particles have no molar mass"),
    "another temperature": ("NO2 (µg/Nm³)\n5\n", {"no2": "NO2 (µg/Nm³)"}, "expected the unit .*µg/Nm³"),
    "a column of a satellite": ("CO (mol/m²)\n0.03\n", {"co": "CO (mol/m²)"}, "expected the unit .*mol/m2"),
    "another pollutant": ("PM10,NO2\n5,6\n", {"pm25": "PM10"}, "named after another pollutant, pm10"),
    "another hour": ("O3 1h (ppm)\n0.13\n", {"o3_8h": "O3 1h (ppm)"}, "named after another pollutant, o3_1h"),
    "no such pollutant": ("parameter,value\npm25,5\no3,6\n", {"so2": "value"}, "no row is about it.*pm25 .1., o3 .1."),
    "pollutants by number": ("Pollutant,Value\n5,5\n7,6\n", {"pm10": "Value"}, "none of that is a pollutant"),
    "a long table, two mapped": ("parameter,a,b\npm25,5,6\n", {"pm25": "a", "pm10": "b"}, "pm25, pm10 are mapped"),
    "an index in the header": ("CO AQI Value\n3\n", {"co": "CO AQI Value"}, "index values .'CO AQI Value'"),
    "an index by camels": ("iaqi.pm25.v\n68\n", {"pm25": "iaqi.pm25.v"}, "index values"),
    "an index for one column's unit": ("pm25,pm25_unit\n60,index\n", {"pm25": "pm25"}, "index values .'index'"),
    "an index for a unit": ("parameter,value,unit\npm25,77,US AQI\n", {}, "index values .'US AQI'"),
    "aqicn's history": ("date, pm25, pm10, o3, co\n1, 77, 32, 26, 3\n2, 70, , 20, 2\n", {"pm25": "pm25"}, "aqicn.org"),
    "aqicn's bulk files": ("Specie,count,min,max,median,variance\npm25,24,1,80,34,5\n", {"pm25": "median"}, "aqicn"),
    "a long table of indices": ("pollutant_id,avg\nPM2.5,77\nOZONE,20\nCO,28\n", {"pm25": "avg"}, "aqicn.org"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTRADICTED)
def test_what_contradicts_itself_is_refused(tmp_path, kind):
    content, columns, message = CONTRADICTED[kind]
    with pytest.raises(EvaluationError, match=message) as caught:
        read(tmp_path, content, columns)
    assert len(caught.value.problems) == 1


def test_a_unit_that_one_row_lacks_or_has_alone_refuses_that_row(tmp_path):
    result = read(tmp_path, "v,unit\n60,µg/m³\n5,\n7,furlong\n,\n", {"o3_8h": "v"})
    assert readings(result) == [{"o3_8h": "0.030"}] and [r.row for r in result.rejected] == [2, 3, 4]
    assert "expected a unit in column 'unit', got 'furlong'" in result.rejected[1].reason


def test_units_that_are_converted_or_not_stated_are_named(tmp_path):
    notes = " ".join(read(tmp_path, "NO2 (ppm),CO,PM10\n0.1,4,9\n", {"no2": "NO2 (ppm)", "co": "CO"}).notes)
    assert "'NO2 (ppm)' from ppm to ppb" in notes and "'CO' is read in ppm" in notes
    with pytest.raises(
        EvaluationError, match="co: expected a unit, since the gas in 'NO2 .µg/m³.' is given by its mass"
    ):
        read(tmp_path, "NO2 (µg/m³),CO\n100,4\n", {"no2": "NO2 (µg/m³)", "co": "CO"})
    with pytest.raises(EvaluationError, match="would fit µg/m³ or ppb"):
        read(tmp_path, "O3\n60\n70\n", {"o3_8h": "O3"})


def test_marks_of_missing_values_are_named_where_they_come_again_and_can_be_declared(tmp_path):
    content = "p,n\n-999,4\n-999.0,5\n12,-999\n9,-1\n8,-1\n3,-\n4,-\n5,999\n6,999.0\n7,NA\n"
    columns = {"pm25": "p", "no2": "n"}
    result = read(tmp_path, content, columns)
    marks = [note for note in result.notes if "marks missing values" in note]
    assert [note.partition(" cells")[0] for note in marks] == [
        "'-999' stands in 3",
        "'-1' stands in 2",
        "'-' stands in 2",
    ]
    with pytest.raises(EvaluationError, match=r"'-999' stands in 3 cells of p, n.*missing: \[-999\]"):
        read(tmp_path, content, columns, max_refused=0.1)
    result = read(tmp_path, "p;n\n−999,0;4\n9,5;−0,4\n", columns, missing=[-999])
    assert readings(result) == [{"no2": "4"}, {"pm25": "9.5", "no2": "0"}]
    result = read(tmp_path, content, columns, missing=[-999, -1, "-", "999"], max_refused=0.0)
    assert len(result.train) == 10 and not any("marks missing" in note for note in result.notes)
    assert readings(result)[:3] == [{"no2": "4"}, {"no2": "5"}, {"pm25": "12.0"}]


def test_an_index_is_no_concentration():
    for text in ("PM2.5 AQI Value", "us_aqi_pm2_5", "european_aqi", "pm25Aqi", "sub-index", "iaqi.pm25.v", "AQI"):
        assert is_index(text)
    for text in ("PM2.5", "iraqi_pm25", "Ozone (ppm)", "aqs_site"):
        assert not is_index(text)
