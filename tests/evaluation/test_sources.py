"""A user's data ends in items or rejections, row by row, and every problem is named where it stands: with task aqi."""

import csv
import io
import json
import math
from pathlib import Path

import datasets
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evaluation.sources.rows import RecipeRows, RowSource, read_recipe, write_rejected
from evaluation.sources.tables import SourceError
from evaluation.tasks import aqi

COLUMNS = {"pm25": "PM25", "o3_8h": "ozone", "co": "CO", "aqi": "AQI", "id": "site"}
HEADER = "site,PM25,ozone,CO,AQI\n"


class Where(RowSource):
    hub_split: str | None = None
    hub_test_split: str | None = None
    hub_subset: str | None = None
    delimiter: str = ","
    max_chars: int | None = None
    trust_given_aqi: bool = False


def read(tmp_path: Path, content: str | bytes, name: str = "data.csv", **options: object) -> RecipeRows:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_recipe(aqi, Where(source=str(path), **{"columns": COLUMNS, **options}))


def reasons(result: RecipeRows) -> dict[int, str]:
    return {r.row: r.reason for r in result.rejected}


def readings(item):
    return {key: float(value) for key, value in item.truth["readings"].items()}


def failure(tmp_path: Path, content: str | bytes, name: str = "data.csv", **options: object) -> SourceError:
    with pytest.raises(SourceError) as caught:
        read(tmp_path, content, name, **options)
    return caught.value


def test_csv_row_becomes_an_item_in_epa_units(tmp_path):
    result = read(tmp_path, HEADER + "A1,35.9,0.078,8.4,126\n,7,,,\n")
    item, other = result.train
    assert item.truth == {"aqi": 126, "category": "Unhealthy for Sensitive Groups",
                          "readings": {"pm25": "35.9", "o3_8h": "0.078", "co": "8.4"}}  # fmt: skip
    assert (item.id, item.completion) == ("A1", "Unhealthy for Sensitive Groups: 126")
    assert item.prompt.startswith("Predict AQI given:") and other.id == "aqi-train-2"
    assert result.rejected == [] and result.test is None


@pytest.mark.parametrize(
    ("key", "unit", "cell", "expected"),
    [
        # 0.0049 · 1000 is 4.8999… in binary
        ("o3_8h", "ppb", "70", 0.07), ("o3_8h", "ppm", "0.07", 0.07), ("co", "ppb", "4400", 4.4),
        ("no2", "ppm", "0.1", 100.0), ("pm25", "mg/m³", "0.0049", 4.9), ("pm10", "μg/m3", "54", 54.0),
        ("pm10", "ug/m^3", "54", 54.0),
    ],
)  # fmt: skip
def test_units_convert_without_binary_fractions(tmp_path, key, unit, cell, expected):
    result = read(tmp_path, f"v\n{cell}\n", columns={key: {"column": "v", "unit": unit}})
    assert readings(result.train[0]) == {key: expected}  # exactly: EPA truncates


def test_units_that_cannot_be_converted(tmp_path):
    for key, unit in (("o3_8h", "µg/m³"), ("no2", "mg/m3"), ("pm25", "ppm")):
        said = str(failure(tmp_path, "v\n1\n", columns={key: {"column": "v", "unit": unit}}))
        assert key in said and unit in said and "temperature" in said
    columns = {"co": {"column": "v", "unit": "furlong"}, "aqi": {"column": "w", "unit": "ppm"}}
    error = failure(tmp_path, "v,w\n1,2\n", columns=columns)
    assert any("ppb or ppm" in p and "'furlong'" in p for p in error.problems)
    assert any(p.startswith("aqi: expected no unit") for p in error.problems)


@pytest.mark.parametrize("hole", ["", "NA", "null", "NaN", " n/a ", "None"])
def test_one_missing_pollutant_is_fine_all_missing_is_not(tmp_path, hole):
    result = read(tmp_path, HEADER + f"a,{hole},0.078,{hole},\nb,{hole},{hole},{hole},50\n")
    assert readings(result.train[0]) == {"o3_8h": 0.078}
    assert reasons(result) == {2: "no reading: all of pm25, o3_8h, co are missing"}


@pytest.mark.parametrize(
    ("cell", "said"),
    [("abc", "expected a number, got 'abc'"),
     ('"12,5"', "expected a number, got '12,5'; write the decimal comma as a point"),
     ("-3", "expected a number ≥ 0, got -3"), ("1_0", "expected a number, got '1_0'"), ("٣", "expected a number"),
     ("1e999", "expected a finite number"), ("inf", "expected a number, got 'inf'"),
     ("1e27", "far off EPA's scale, got 1e27"), ("325.5", "0.0 to 325.4 µg/m³, got 325.5")],
)  # fmt: skip
def test_bad_cells_name_file_row_line_column_and_value(tmp_path, cell, said):
    result = read(tmp_path, HEADER + f"ok,9,,,\nbad,{cell},,,\n")
    (r,) = result.rejected
    assert (r.row, r.line, r.column) == (2, 3, "PM25") and r.file.endswith("data.csv")
    assert r.value == cell.strip('"') and r.raw["site"] == "bad"
    assert r.reason.startswith("PM25: ") and said in r.reason
    assert len(result.train) == 1
    several = read(tmp_path, HEADER + "ok,9,,,\nx,abc,-1,4,700\n").rejected[0].reason
    assert all(part in several for part in ("PM25: ", "ozone: ", "AQI: expected an index in 0..500"))


def test_ozone_values_that_epa_passes_over_are_kept_unless_alone(tmp_path):
    result = read(tmp_path, "h8,h1\n0.05,0.06\n,0.06\n0.3,0.45\n0.3,\n", columns={"o3_8h": "h8", "o3_1h": "h1"})
    assert [i.id for i in result.train] == ["aqi-train-1", "aqi-train-3"]
    assert [(r.row, r.column) for r in result.rejected] == [(2, "h1"), (4, "h8")]


def test_the_given_index_must_agree_within_one_point(tmp_path):
    rows = HEADER + "a,,0.078,,125.5\nb,,0.079,,128\nc,35.9,,,104\nd,35.9,0.01,,103\n"
    result = read(tmp_path, rows)  # EPA: 126, 129, 102, 102; fractions are rounded halves up
    assert [(i.id, i.truth["aqi"]) for i in result.train] == [("a", 126), ("b", 128), ("d", 103)]
    (r,) = result.rejected
    assert r.column == "AQI" and "104" in r.reason and "102" in r.reason
    trusted = read(tmp_path, rows, trust_given_aqi=True)
    assert [i.truth["aqi"] for i in trusted.train] == [126, 128, 104, 103] and not trusted.rejected


def test_category_is_checked(tmp_path):
    result = read(tmp_path, "p,c\n9.0, good\n12,Good\n13,Moderat\n", columns={"pm25": "p", "category": "c"})
    assert [i.truth["category"] for i in result.train] == ["Good"]
    assert "an AQI of 56 is Moderate" in reasons(result)[2] and "did you mean 'Moderate'?" in reasons(result)[3]


def test_duplicates_name_the_first_row_and_a_refused_row_has_no_duplicate(tmp_path):
    rows = HEADER + "a,35.9,,,400\nb,35.9,,,102\nc,35.90,NA,,\nb,12,,,\nc,12,,,\n"
    result = read(tmp_path, rows)
    assert [i.id for i in result.train] == ["b", "c"]
    assert reasons(result)[3] == "duplicate: same prompt as row 2"
    assert reasons(result)[4] == "site: 'b' is that of row 2 too; ids must be unique"
    shadow = read(tmp_path, HEADER + "aqi-train-2,1,,,\n,2,,,\n")
    assert [i.id for i in shadow.train] == ["aqi-train-2"] and "ids must be unique" in reasons(shadow)[2]


def test_own_texts_are_taken_as_they_are(tmp_path):
    lines = [
        {"q": " What is it?\n", "a": "126 ", "n": 126},
        {"q": "And now?", "a": "", "n": 3},
        {"q": "And then?", "a": "4", "n": None},
        {"q": " What is it?\n", "a": "127", "n": 127},
    ]
    columns = {"prompt": "q", "completion": "a", "aqi": "n"}
    result = read(tmp_path, "\n".join(map(json.dumps, lines)), "d.jsonl", columns=columns)
    (item,) = result.train
    assert (item.prompt, item.completion) == (" What is it?\n", "126 ")
    assert item.truth == {"aqi": 126, "category": "Unhealthy for Sensitive Groups"}
    assert reasons(result)[2] == "a: expected a text, got nothing"
    assert reasons(result)[3].startswith("n: is missing") and "same prompt as row 1" in reasons(result)[4]


# --- files ---


def test_json_lines_that_are_no_objects(tmp_path):
    content = '{"PM25": 9, "site": 7, "ozone": 0.01, "CO": 1, "AQI": 50}\n\n[1]\n{"PM25": \nnull\n{"PM25": true}\n'
    content += '{"PM25": NaN, "CO": Infinity}\r\n{"PM25": "8.5"}\n{"PM25": 8, "site": "\\udc00"}'
    result = read(tmp_path, content, "d.jsonl")
    assert [i.id for i in result.train] == ["7", "aqi-train-7"]
    assert [(r.row, r.line) for r in result.rejected] == [(2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (8, 9)]
    said = reasons(result)
    assert "got list" in said[2] and "broken JSON" in said[3] and "got NoneType" in said[4]
    assert said[5] == "PM25: expected a number, got bool True" and said[6] == "CO: expected a finite number, got inf"
    assert said[8] == "site: expected UTF-8, got half a character (\\udc00)"


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_json_array_file_is_read(tmp_path, name):
    content = (
        b'[\n {"PM25": 9, "site": "Z\xc3\xbcrich", "ozone": null, "CO": null, "AQI": 50},\n [1],\n'
        b' {"PM25": 8, "site": "Z\xfcrich"}, {"PM25": 7, "site": "\\ud83d"}, {"PM25": 6, "site": "\\ud83d\\ude00"}]'
    )
    result = read(tmp_path, content, name)
    assert [i.id for i in result.train] == ["Zürich", "😀"] and result.rejected[0].line is None
    assert reasons(result) == {
        2: "expected a JSON object, got list",
        3: "site: expected UTF-8, got byte 0xfc",
        4: "site: expected UTF-8, got half a character (\\ud83d)",
    }
    write_rejected(tmp_path / "out.jsonl", result.rejected)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3


def test_parquet_file_is_read_cell_by_cell(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    sites = pa.array([b"a", b"Z\xfc", b"c"], pa.binary()).view(pa.string())  # the second is no UTF-8
    table = pa.table({"PM25": [9.0, 8.0, None], "site": sites, "ozone": [None, None, 0.05], "CO": [None] * 3})
    parquet.write_table(table.append_column("AQI", [[50, None, None]]), tmp_path / "d.parquet")
    result = read_recipe(aqi, Where(source=str(tmp_path / "d.parquet"), columns=COLUMNS))
    assert [(i.id, readings(i)) for i in result.train] == [("a", {"pm25": 9.0}), ("c", {"o3_8h": 0.05})]
    assert list(reasons(result)) == [2] and "a cell cannot be read: 'utf-8' codec" in reasons(result)[2]


def test_ragged_rows_and_broken_quotes(tmp_path):
    content = HEADER + 'a,9\nb,9,,,50,extra\n"c\nc",8,,,\nd,"7"x,,,\ne,6,,,\nf,"5,,,\ng,4,,,\n'
    result = read(tmp_path, content)
    assert [i.id for i in result.train] == ["c\nc", "e"]
    assert [(r.row, r.line) for r in result.rejected] == [(1, 2), (2, 3), (4, 6), (6, 8)]
    said = reasons(result)
    assert said[1] == "expected 5 cells, as in the header, got 2" and "got 6" in said[2]
    assert result.rejected[1].raw["(beyond the header)"] == ["extra"]
    assert "broken quoting" in said[4] and "line 8" in said[6] and "up to 9" in said[6]


def test_bytes_that_are_not_utf8_give_their_offset(tmp_path):
    content = b"\xef\xbb\xbf" + HEADER.encode() + b"Z\xfcrich,9,,,\nBern,8,,,\n"  # a BOM is no part of the header
    result = read(tmp_path, content)
    assert [i.id for i in result.train] == ["Bern"]
    at = content.index(b"\xfc")
    assert reasons(result) == {1: f"expected UTF-8, got byte 0xfc at offset {at} of the file"}
    assert result.rejected[0].raw["site"] == "Z\\xfcrich"
    lines = b'{"PM25": 1, "site": 1, "ozone": 0, "CO": 0, "AQI": 6}\n{"PM25": 2, "site": "\xe9"}\n'
    assert f"offset {lines.index(0xE9)} " in read(tmp_path, lines, "d.jsonl").rejected[0].reason


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (b"", "d.csv", "is empty (0 bytes)"), (b"\xef\xbb\xbf\n \n", "d.jsonl", "is empty"),
        (HEADER, "d.csv", "no data row"), ("[]", "d.json", "no data row"),
        ('[\n{"PM25": 1},\n', "d.json", "expected a JSON array of objects, got broken JSON"),
        ("[1]\n[2]\n", "d.jsonl", "all 2 were rejected"),  # lines that are arrays are rows that are no objects
        ("a,b", "d.xlsx", "expected a name ending in .csv"), ("PAR1", "d.parquet", "expected a Parquet file"),
        ("site,PM25".encode("utf-16"), "d.csv", "got UTF-16"),
        (b"si\xffte,PM25\n1,2\n", "d.csv", "line 1, the header: expected UTF-8"),
        ("site,PM25,PM25,ozone,CO,AQI\n1,2,3,4,5,6\n", "d.csv", "'PM25' more than once"),
        ("site;PM25;ozone;CO;AQI\n1;2;3;4;5\n", "d.csv", "set delimiter"),
    ],
)  # fmt: skip
def test_whole_file_problems(tmp_path, content, name, said):
    assert said in str(failure(tmp_path, content, name))


def test_file_problems_are_listed_at_once(tmp_path):
    columns = {"pm25": "pm_25", "ozone": "ozone", "co": "CO", "no2": "CO", "prompt": "site"}
    error = failure(tmp_path, HEADER + "a,1,2,3,4\n", columns=columns)
    text = str(error)
    assert "'pm_25'" in text and "did you mean 'PM25'?" in text and "Available: site, PM25, ozone, CO, AQI" in text
    assert "unknown field 'ozone'" in text and "mapped to both 'co' and 'no2'" in text
    assert "prompt and completion come together" in text and len(error.problems) == 4
    with pytest.raises(SourceError) as caught:
        read_recipe(aqi, Where(source=str(tmp_path / "no.csv"), columns={"aqi": "AQI"}))
    assert len(caught.value.problems) == 2 and str(tmp_path / "no.csv") in str(caught.value)
    assert read(tmp_path, HEADER.replace(",", ";") + "A;9;;;\n", delimiter=";").train[0].id == "A"
    error = failure(tmp_path, HEADER + "a,x,,,\n" * 7)
    assert "all 7 were rejected" in str(error) and "row 5 (line 6): PM25" in str(error) and "2 more" in str(error)
    assert [r.row for r in error.rejected] == list(range(1, 8))


def test_rejected_file_is_plain_json(tmp_path):
    result = read(tmp_path, '{"PM25":1,"site":1,"ozone":0,"CO":0,"AQI":6}\n{"PM25":"µ","CO":NaN}\n', "d.jsonl")
    out = tmp_path / "rejected.jsonl"
    write_rejected(out, result.rejected)
    (line,) = out.read_text().splitlines()
    got = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert got["row"] == 2 and got["line"] == 2 and got["column"] == "PM25" and got["value"] == "µ"
    assert got["raw"] == {"PM25": "µ", "CO": "nan"} and got["reason"]
    write_rejected(out, [])
    assert out.read_text() == ""


@pytest.mark.parametrize("prefix", ["hub:", ""])
def test_a_data_set_in_the_hubs_format_reads_and_rejects_like_a_file(tmp_path, monkeypatch, prefix):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "org" / "air"
    (folder / "data").mkdir(parents=True)
    train = pd.DataFrame({"site": ["a", "b", "c"], "pm": [9.0, math.nan, 12.0], "o3": [0.05, None, -1.0]})
    train.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    train.head(1).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    where = Where(source=f"{prefix}{folder}", columns={"pm25": "pm", "o3_8h": "o3", "id": "site"})
    result = read_recipe(aqi, where)
    assert [(i.id, readings(i)) for i in result.train] == [("a", {"pm25": 9.0, "o3_8h": 0.05})]
    assert reasons(result)[2].startswith("no reading") and reasons(result)[3].startswith("o3: expected a number ≥ 0")
    assert len(read_recipe(aqi, where.model_copy(update={"hub_split": "test"})).train) == 1
    with pytest.raises(SourceError, match="split 'valid'"):
        read_recipe(aqi, where.model_copy(update={"hub_split": "valid"}))


# --- every row ends in exactly one place ---

cell = st.one_of(
    st.floats(-5, 400).map(str), st.sampled_from(["", "NA", "9", "0.05", "12,5", '"', "a\nb"]), st.text(max_size=4)
)


def accounted(read_it, rows: int) -> None:
    try:
        result = read_it()
        made, rejected = len(result.train), [r.row for r in result.rejected]
    except SourceError as error:
        made, rejected = 0, [r.row for r in error.rejected]
    assert made + len(rejected) == rows and rejected == sorted(set(rejected))


fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(rows=st.lists(st.lists(cell, min_size=2, max_size=7), min_size=1, max_size=8))
def test_every_csv_row_is_accounted_for(tmp_path, rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    accounted(lambda: read(tmp_path, HEADER + text.getvalue()), len(rows))


value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.sampled_from([9, 0.05])),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)


@fuzz
@given(
    rows=st.lists(
        st.one_of(
            st.dictionaries(st.sampled_from([*COLUMNS.values()]), value).map(json.dumps),
            value.map(json.dumps),
            st.sampled_from(["{", "\x00", "\u2028", '{"PM25": 1' + "0" * 5000 + "}"]),
        ).map(str.encode)
        | st.binary(min_size=1, max_size=5).filter(lambda b: b"\n" not in b and b.strip() != b""),
        min_size=1,
        max_size=8,
    )
)
def test_every_json_line_is_accounted_for(tmp_path, rows):
    # Line 0 holds every column, so that the mapping itself is never at fault.
    head = json.dumps(dict.fromkeys(COLUMNS.values())).encode()
    accounted(lambda: read(tmp_path, b"\n".join([head, *rows]), "d.jsonl"), len(rows) + 1)


@fuzz
@given(rows=st.lists(value, max_size=8))
def test_every_element_of_a_json_array_is_accounted_for(tmp_path, rows):
    head = dict.fromkeys(COLUMNS.values())
    accounted(lambda: read(tmp_path, json.dumps([head, *rows]), "d.json"), len(rows) + 1)


@fuzz
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_never_crash_the_reader(tmp_path, data):
    for name in ("d.csv", "d.jsonl", "d.parquet"):
        try:
            read(tmp_path, data, name, columns={"pm25": "a"})
        except SourceError as error:
            assert error.problems
