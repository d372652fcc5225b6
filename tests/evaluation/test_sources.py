"""A user's data ends in records or rejections, row by row, and every problem is named where it stands."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from evaluation.sources import ColumnSpec, SourceError, SourceResult, SourceSpec, read_source, write_rejected

COLUMNS: dict[str, str | ColumnSpec] = {
    "pm25": "PM25",
    "o3_8h": "ozone",
    "co": "CO",
    "aqi": "AQI",
    "id": "site",
}
HEADER = "site,PM25,ozone,CO,AQI\n"


def read(tmp_path: Path, content: str | bytes, name: str = "data.csv", **options: object) -> SourceResult:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_source(SourceSpec(source=str(path), **{"columns": COLUMNS, **options}))


def reasons(result: SourceResult) -> dict[int, str]:
    return {r.row: r.reason for r in result.rejected}


def failure(tmp_path: Path, content: str | bytes, name: str = "data.csv", **options: object) -> SourceError:
    with pytest.raises(SourceError) as caught:
        read(tmp_path, content, name, **options)
    return caught.value


def test_csv_row_becomes_a_record_in_epa_units(tmp_path):
    result = read(tmp_path, HEADER + "A1,35.9,0.078,8.4,126\n")
    (record,) = result.records
    assert record.readings == {"pm25": 35.9, "o3_8h": 0.078, "co": 8.4}
    assert (record.id, record.given_aqi, record.row, record.line) == ("A1", 126, 1, 2)
    assert result.rejected == []


@pytest.mark.parametrize(
    ("key", "unit", "cell", "expected"),
    [
        ("o3_8h", "ppb", "70", 0.07),
        ("o3_8h", "ppm", "0.07", 0.07),
        ("co", "ppb", "4400", 4.4),
        ("no2", "ppm", "0.1", 100.0),
        ("so2", "ppb", "75", 75.0),
        ("pm25", "mg/m³", "0.0049", 4.9),  # 0.0049 · 1000 is 4.8999… in binary
        ("pm10", "μg/m3", "54", 54.0),
        ("pm10", "ug/m^3", "54", 54.0),
    ],
)
def test_units_convert_without_binary_fractions(tmp_path, key, unit, cell, expected):
    result = read(tmp_path, f"v\n{cell}\n", columns={key: ColumnSpec(column="v", unit=unit)})
    assert result.records[0].readings == {key: expected}  # exactly: EPA truncates


@pytest.mark.parametrize(("key", "unit"), [("o3_8h", "µg/m³"), ("no2", "mg/m3"), ("pm25", "ppm")])
def test_mass_to_volume_is_refused_by_name(tmp_path, key, unit):
    error = failure(tmp_path, "v\n1\n", columns={key: {"column": "v", "unit": unit}})
    assert key in str(error) and unit in str(error) and "temperature" in str(error)


def test_unknown_unit_and_unit_on_a_plain_field(tmp_path):
    error = failure(
        tmp_path,
        "v,w\n1,2\n",
        columns={"co": {"column": "v", "unit": "furlong"}, "aqi": {"column": "w", "unit": "ppm"}},
    )
    assert any("ppb or ppm" in p and "'furlong'" in p for p in error.problems)
    assert any(p.startswith("aqi: expected no unit") for p in error.problems)


@pytest.mark.parametrize("hole", ["", "NA", "null", "NaN", " n/a ", "None"])
def test_one_missing_pollutant_is_fine_all_missing_is_not(tmp_path, hole):
    result = read(tmp_path, HEADER + f"a,{hole},0.078,{hole},\nb,{hole},{hole},{hole},50\n")
    assert result.records[0].readings == {"o3_8h": 0.078} and result.records[0].given_aqi is None
    assert reasons(result) == {2: "no reading: all of PM25, ozone, CO are missing"}


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("abc", "expected a number, got 'abc'"),
        ('"12,5"', "expected a number, got '12,5'; write the decimal comma as a point"),
        ("-3", "expected a number ≥ 0, got -3"),
        ("1_0", "expected a number, got '1_0'"),
        ("٣", "expected a number"),
        ("1e999", "expected a finite number"),
        ("inf", "expected a number, got 'inf'"),
        ("1e27", "far off EPA's scale, got 1e27"),
        ("325.5", "0.0 to 325.4 µg/m³, got 325.5"),
    ],
)
def test_bad_cells_name_file_row_line_column_and_value(tmp_path, cell, said):
    result = read(tmp_path, HEADER + f"ok,9,,,\nbad,{cell},,,\n")
    (r,) = result.rejected
    assert (r.row, r.line, r.column) == (2, 3, "PM25") and r.file.endswith("data.csv")
    assert r.value == cell.strip('"') and r.raw["site"] == "bad"
    assert r.reason.startswith("PM25: ") and said in r.reason
    assert len(result.records) == 1


def test_all_problems_of_one_row_are_named(tmp_path):
    result = read(tmp_path, HEADER + "ok,9,,,\nx,abc,-1,4,700\n")
    assert all(part in result.rejected[0].reason for part in ("PM25: ", "ozone: ", "AQI: expected an index in 0..500"))


def test_ozone_values_that_epa_passes_over_are_kept_unless_alone(tmp_path):
    columns = {"o3_8h": "h8", "o3_1h": "h1"}
    result = read(tmp_path, "h8,h1\n0.05,0.06\n,0.06\n0.3,0.45\n0.3,\n", columns=columns)
    assert [r.row for r in result.records] == [1, 3]
    assert [(r.row, r.column) for r in result.rejected] == [(2, "h1"), (4, "h8")]


def test_given_aqi_must_agree_within_one_point(tmp_path):
    rows = HEADER + "a,,0.078,,126\nb,,0.079,,128\nc,35.9,,,104\nd,35.9,0.01,,103\n"
    result = read(tmp_path, rows)  # EPA: 126, 129, 102, 102
    assert [r.id for r in result.records] == ["a", "b", "d"]
    (r,) = result.rejected
    assert r.column == "AQI" and "104" in r.reason and "102" in r.reason
    trusted = read(tmp_path, rows, trust_given_aqi=True)
    assert [r.given_aqi for r in trusted.records] == [126, 128, 104, 103] and not trusted.rejected


def test_fractional_given_aqi_is_rounded_halves_up(tmp_path):
    assert read(tmp_path, HEADER + "a,,0.078,,125.5\n").records[0].given_aqi == 126


def test_category_is_checked_and_spelled_as_epa_does(tmp_path):
    columns = {"pm25": "p", "category": "c"}
    result = read(tmp_path, "p,c\n9.0, good\n12,Good\n13,Moderat\n", columns=columns)
    assert [r.category for r in result.records] == ["Good"]
    assert "an AQI of 56 is Moderate" in reasons(result)[2]
    assert "Did you mean 'Moderate'?" in reasons(result)[3]


def test_duplicates_name_the_first_row_and_a_refused_row_has_no_duplicate(tmp_path):
    rows = HEADER + "a,35.9,,,400\nb,35.9,,,102\nc,35.90,NA,,\nb,12,,,\n"
    result = read(tmp_path, rows)
    assert [r.id for r in result.records] == ["b"]
    assert reasons(result)[3] == "duplicate: same readings as row 2"
    assert "the id 'b' is that of row 2" in reasons(result)[4]


def test_a_generated_id_never_shadows_a_given_one(tmp_path):
    result = read(tmp_path, HEADER + "row-2,1,,,\n,2,,,\n")
    assert [r.id for r in result.records] == ["row-2"] and "ids must be unique" in reasons(result)[2]


def test_own_texts_are_taken_as_they_are(tmp_path):
    columns = {"prompt": "q", "completion": "a", "aqi": "n"}
    lines = [
        {"q": " What is it?\n", "a": "126 ", "n": 126},
        {"q": "And now?", "a": "", "n": 3},
        {"q": "And then?", "a": "4", "n": None},
        {"q": " What is it?\n", "a": "127", "n": 127},
    ]
    result = read(tmp_path, "\n".join(map(json.dumps, lines)), "d.jsonl", columns=columns)
    (record,) = result.records
    assert (record.prompt, record.completion, record.given_aqi) == (" What is it?\n", "126 ", 126)
    assert reasons(result)[2] == "a: expected a text, got nothing"
    assert reasons(result)[3].startswith("n: is missing") and "same prompt as row 1" in reasons(result)[4]


def test_jsonl_lines_that_are_no_objects(tmp_path):
    content = '{"PM25": 9, "site": 7, "ozone": 0.01, "CO": 1, "AQI": 50}\n\n[1]\n{"PM25": \nnull\n{"PM25": true}\n'
    content += '{"PM25": NaN, "CO": Infinity}\r\n{"PM25": "8.5"}'
    result = read(tmp_path, content, "d.jsonl")
    assert [(r.row, r.line, r.id) for r in result.records] == [(1, 1, "7"), (7, 8, "row-7")]
    assert [(r.row, r.line) for r in result.rejected] == [(2, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
    said = reasons(result)
    assert "got list" in said[2] and "broken JSON" in said[3] and "got NoneType" in said[4]
    assert said[5] == "PM25: expected a number, got bool True" and said[6] == "CO: expected a finite number, got inf"


def test_json_array_file_is_read(tmp_path):
    """As Alpaca's own file; a .jsonl file may hold one too."""
    content = b'[\n {"PM25": 9, "site": "Z\xc3\xbcrich", "ozone": null, "CO": null, "AQI": 50},\n [1],\n'
    content += (
        b' {"PM25": 8, "site": "Z\xfcrich"}, {"PM25": 7, "site": "\\ud83d"}, {"PM25": 6, "site": "\\ud83d\\ude00"}]'
    )
    for name in ("d.json", "d.jsonl"):
        result = read(tmp_path, content, name)
        assert [(r.row, r.line, r.id) for r in result.records] == [(1, None, "Zürich"), (5, None, "😀")]
        assert reasons(result) == {
            2: "expected a JSON object, got list",
            3: "site: expected UTF-8, got byte 0xfc",
            4: "site: expected UTF-8, got half a character (\\ud83d)",
        }
        write_rejected(tmp_path / "out.jsonl", result.rejected)
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3


def test_broken_and_empty_json_arrays_are_explained(tmp_path):
    assert "expected a JSON array of objects, got broken JSON" in str(failure(tmp_path, '[\n{"PM25": 1},\n', "d.json"))
    assert "no data row" in str(failure(tmp_path, "[]", "d.json"))
    # Lines that are arrays are rows that are no objects.
    assert "all 2 were rejected" in str(failure(tmp_path, "[1]\n[2]\n", "d.jsonl", columns={"pm25": "a"}))


def test_half_a_character_in_a_json_line_is_a_rejection(tmp_path):
    lines = '{"PM25": 9, "site": "a", "ozone": 0, "CO": 0, "AQI": 50}\n{"PM25": 8, "site": "\\udc00"}\n'
    assert reasons(read(tmp_path, lines, "d.jsonl")) == {2: "site: expected UTF-8, got half a character (\\udc00)"}


def test_parquet_file_is_read_cell_by_cell(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    sites = pa.array([b"a", b"Z\xfc", b"c"], pa.binary()).view(pa.string())  # the second is no UTF-8
    table = pa.table({"PM25": [9.0, 8.0, None], "site": sites, "ozone": [None, None, 0.05], "CO": [None] * 3})
    parquet.write_table(table.append_column("AQI", [[50, None, None]]), tmp_path / "d.parquet")
    result = read_source(SourceSpec(source=str(tmp_path / "d.parquet"), columns=COLUMNS))
    assert [(r.row, r.line, r.id, r.readings) for r in result.records] == [
        (1, None, "a", {"pm25": 9.0}), (3, None, "c", {"o3_8h": 0.05})]  # fmt: skip
    assert list(reasons(result)) == [2] and "a cell cannot be read: 'utf-8' codec" in reasons(result)[2]


def test_ragged_rows_and_broken_quotes(tmp_path):
    content = HEADER + 'a,9\nb,9,,,50,extra\n"c\nc",8,,,\nd,"7"x,,,\ne,6,,,\nf,"5,,,\ng,4,,,\n'
    result = read(tmp_path, content)
    assert [(r.row, r.line, r.id) for r in result.records] == [(3, 4, "c\nc"), (5, 7, "e")]
    said = reasons(result)
    assert said[1] == "expected 5 cells, as in the header, got 2" and "got 6" in said[2]
    assert result.rejected[1].raw["(beyond the header)"] == ["extra"]
    assert "broken quoting" in said[4] and "line 8" in said[6] and "up to 9" in said[6]


def test_bytes_that_are_not_utf8_give_their_offset(tmp_path):
    content = b"\xef\xbb\xbf" + HEADER.encode() + b"Z\xfcrich,9,,,\nBern,8,,,\n"
    result = read(tmp_path, content)
    assert [r.id for r in result.records] == ["Bern"]
    at = content.index(b"\xfc")
    assert reasons(result) == {1: f"expected UTF-8, got byte 0xfc at offset {at} of the file"}
    assert result.rejected[0].raw["site"] == "Z\\xfcrich"

    lines = b'{"PM25": 1, "site": 1, "ozone": 0, "CO": 0, "AQI": 6}\n{"PM25": 2, "site": "\xe9"}\n'
    assert f"offset {lines.index(0xE9)} " in read(tmp_path, lines, "d.jsonl").rejected[0].reason


def test_bom_is_no_part_of_the_first_column(tmp_path):
    assert read(tmp_path, "\ufeff" + HEADER + "A,9,,,\n").records[0].id == "A"


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (b"", "d.csv", "is empty (0 bytes)"),
        (b"\xef\xbb\xbf\n \n", "d.jsonl", "is empty"),
        (HEADER, "d.csv", "no data row"),
        ("a,b", "d.xlsx", "expected a name ending in .csv"),
        ("PAR1", "d.parquet", "expected a Parquet file"),
        ("", "d.parquet", "expected a Parquet file"),
        ("site,PM25".encode("utf-16"), "d.csv", "got UTF-16"),
        (b"si\xffte,PM25\n1,2\n", "d.csv", "line 1, the header: expected UTF-8"),
        ("site,PM25,PM25,ozone,CO,AQI\n1,2,3,4,5,6\n", "d.csv", "'PM25' more than once"),
        ("site;PM25;ozone;CO;AQI\n1;2;3;4;5\n", "d.csv", "set delimiter"),
    ],
)
def test_whole_file_problems(tmp_path, content, name, said):
    assert said in str(failure(tmp_path, content, name))


def test_file_problems_are_listed_at_once(tmp_path):
    columns = {"pm25": "pm_25", "ozone": "ozone", "co": "CO", "no2": "CO", "prompt": "site"}
    error = failure(tmp_path, HEADER + "a,1,2,3,4\n", columns=columns)
    text = str(error)
    assert "'pm_25'" in text and "Did you mean 'PM25'?" in text and "Available: site, PM25, ozone, CO, AQI" in text
    assert "unknown field 'ozone'" in text and "mapped to both 'co' and 'no2'" in text
    assert "prompt and completion come together" in text
    assert len(error.problems) == 4


def test_missing_file_and_bad_mapping_come_together(tmp_path):
    with pytest.raises(SourceError) as caught:
        read_source(SourceSpec(source=str(tmp_path / "no.csv"), columns={"aqi": "AQI"}))
    assert len(caught.value.problems) == 2 and str(tmp_path / "no.csv") in str(caught.value)
    with pytest.raises(ValidationError, match="delimeter"):
        SourceSpec(source="x.csv", columns={}, delimeter=";")


def test_other_delimiter(tmp_path):
    assert read(tmp_path, HEADER.replace(",", ";") + "A;9;;;\n", delimiter=";").records[0].readings == {"pm25": 9.0}


def test_no_row_left_lists_reasons_and_keeps_the_rejections(tmp_path):
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


# --- hub ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    pd = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "org" / "air"
    (folder / "data").mkdir(parents=True)
    train = pd.DataFrame({"site": ["a", "b", "c"], "pm": [9.0, math.nan, 12.0], "o3": [0.05, None, -1.0]})
    train.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    train.head(1).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


def test_hub_layout_reads_and_rejects_like_a_file(hub_folder):
    spec = SourceSpec(source=f"hub:{hub_folder}", columns={"pm25": "pm", "o3_8h": "o3", "id": "site"})
    result = read_source(spec)
    assert [(r.id, r.readings, r.line) for r in result.records] == [("a", {"pm25": 9.0, "o3_8h": 0.05}, None)]
    assert reasons(result)[2].startswith("no reading") and reasons(result)[3].startswith("o3: expected a number ≥ 0")
    assert len(read_source(spec.model_copy(update={"split": "test"})).records) == 1
    with pytest.raises(SourceError, match="split 'valid'"):
        read_source(spec.model_copy(update={"split": "valid"}))


def test_folder_in_the_hub_s_format_reads_like_the_hub(hub_folder):
    spec = SourceSpec(source=str(hub_folder), columns={"pm25": "pm", "o3_8h": "o3", "id": "site"})
    assert [r.id for r in read_source(spec).records] == ["a"] and len(read_source(spec).rejected) == 2
    assert len(read_source(spec.model_copy(update={"split": "test"})).records) == 1
    with pytest.raises(SourceError, match="split 'valid'"):
        read_source(spec.model_copy(update={"split": "valid"}))


def test_hub_revision_is_passed_on_and_failure_names_the_local_way(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def unreachable(name, subset, *, split, revision):
        asked.update(name=name, split=split, revision=revision)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(SourceError) as caught:
        read_source(SourceSpec(source="hub:org/air@v2", columns={"pm25": "pm"}))
    assert asked == {"name": "org/air", "split": "train", "revision": "v2"}
    (problem,) = caught.value.problems
    assert "no route to host" in problem and "save the data set as CSV or JSONL and set source to that path" in problem


# --- every row ends in exactly one place ------------------------------------------------------------------

cell = st.one_of(
    st.floats(-5, 400).map(str),
    st.sampled_from(["", "NA", "9", "0.05", "12,5", '"', "a\nb"]),
    st.text(max_size=4),
)


def accounted(read_it, rows: int) -> None:
    try:
        result = read_it()
        records, rejected = [r.row for r in result.records], [r.row for r in result.rejected]
    except SourceError as error:
        records, rejected = [], [r.row for r in error.rejected]
    assert sorted(records + rejected) == list(range(1, rows + 1))
    assert records == sorted(records) and rejected == sorted(rejected)


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
            st.dictionaries(st.sampled_from([c for c in COLUMNS.values() if isinstance(c, str)]), value).map(
                json.dumps
            ),
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
    head = json.dumps(dict.fromkeys([c for c in COLUMNS.values()], None)).encode()
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
