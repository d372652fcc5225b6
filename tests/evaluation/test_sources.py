"""Rows of files, folders and the hub: each ends as an item or is refused with row, column and reason."""

import csv
import io
import json
import os
import re
import shutil
import socket
import types
from decimal import Decimal

import datasets
import httpx
import pyarrow as pa
import pytest
import yaml
from datasets import ClassLabel, Dataset
from datasets.exceptions import DatasetNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from evaluation import EvaluationError
from evaluation.sources import read_table
from evaluation.sources.columns import Column
from evaluation.sources.hub import open_data_set
from evaluation.sources.rows import RowSource, read_recipe, write_rejected
from evaluation.tasks import Field, Item, RowError, Source, aqi, chat

COLUMNS = {"pm25": "PM25", "o3_8h": "ozone", "co": "CO", "aqi": "AQI", "id": "site"}
HEADER = "site,PM25,ozone,CO,AQI\n"


class Where(RowSource):
    hub_split: str | None = None
    hub_test_split: str | None = None
    hub_subset: str | None = None
    delimiter: str = "auto"
    encoding: str = "auto"
    max_chars: int | None = None
    max_refused: float = 1.0
    trust_given_aqi: bool = False


def read(tmp_path, content, name="data.csv", columns=COLUMNS, **options):
    """The rows of a file of that content, by task aqi."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_recipe(aqi, Where(source=str(path), columns=columns, **options))


def reasons(result):
    return {r.row: r.reason for r in result.rejected}


def readings(item):
    return {key: float(value) for key, value in item.truth["readings"].items()}


def failure(call, *arguments, **options):
    with pytest.raises(EvaluationError) as caught:
        call(*arguments, **options)
    return caught.value


def problems(call, *arguments, **options):
    return failure(call, *arguments, **options).problems


# --- rows of readings, by task aqi ---


def test_csv_row_becomes_an_item_in_epa_units(tmp_path):
    result = read(tmp_path, HEADER + "A1,35.9,0.078,8.4,126\n,7,,,\n")
    item, other = result.train
    assert item.truth == {"aqi": 126, "category": "Unhealthy for Sensitive Groups",
                          "readings": {"pm25": "35.9", "o3_8h": "0.078", "co": "8.4"}}  # fmt: skip
    assert (item.id, item.completion) == ("A1", "Unhealthy for Sensitive Groups: 126")
    assert item.prompt.startswith("Predict AQI given:") and other.id == "aqi-train-2"
    assert result.rejected == [] and result.test is None


def test_units_convert_without_binary_fractions_or_not_at_all(tmp_path):
    def convert(key, unit, cell="1"):
        return read(tmp_path, f"v\n{cell}\n", columns={key: {"column": "v", "unit": unit}}).train[0]

    for key, unit, cell, expected in (
        ("o3_8h", "ppb", "70", 0.07), ("o3_8h", "ppm", "0.07", 0.07), ("co", "ppb", "4400", 4.4),
        ("no2", "ppm", "0.1", 100.0), ("pm10", "μg/m3", "54", 54.0), ("pm10", "ug/m^3", "54", 54.0),
        ("pm25", "mg/m³", "0.0049", 4.9),  # 4.8999… in binary, and EPA truncates
    ):  # fmt: skip
        assert readings(convert(key, unit, cell)) == {key: expected}
    assert "particles" in problems(convert, "pm25", "ppm")[0]
    assert "ppb or ppm, got 'furlong'" in problems(convert, "co", "furlong")[0]
    assert problems(convert, "aqi", "ppm")[0].startswith("aqi: expected no unit")


def test_bad_cells_name_file_row_line_column_and_value(tmp_path):
    for cell, message in (
        ("abc", "expected a number, got 'abc'"), ("-30", "expected a number ≥ 0, got -30"), ("٣", "expected a number"),
        ('"1,250"', "expected a number, got '1,250'; is it 1.250 or 1250? Write it without the comma"),
        ("1_0", "expected a number, got '1_0'"), ("1e999", "expected a finite number"),
        ("1e27", "far off EPA's scale, got 1e27"), ("325.5", "0.0 to 325.4 µg/m³, got 325.5"),
    ):  # fmt: skip
        result = read(tmp_path, HEADER + f"ok,9,,,\nbad,{cell},,,\n")
        (r,) = result.rejected
        assert (r.row, r.line, r.column) == (2, 3, "PM25") and r.file.endswith("data.csv")
        assert r.value == cell.strip('"') and r.raw["site"] == "bad"
        assert r.reason.startswith("PM25: ") and message in r.reason and len(result.train) == 1
    several = read(tmp_path, HEADER + "ok,9,,,\nx,abc,-1,4,700\n").rejected[0].reason
    assert all(part in several for part in ("PM25: ", "ozone: ", "AQI: expected an index in 0..500"))
    for hole in ("", "NA", "null", "NaN", " n/a ", "None"):
        result = read(tmp_path, HEADER + f"a,{hole},0.078,{hole},\nb,{hole},{hole},{hole},50\n")
        assert readings(result.train[0]) == {"o3_8h": 0.078}
        assert reasons(result) == {2: "no reading: all of pm25, o3_8h, co are missing"}


def test_index_and_category_must_agree_with_the_readings(tmp_path):
    rows = HEADER + "a,,0.078,,125.5\nb,,0.079,,128\nc,35.9,,,104\nd,35.9,0.01,,103\n"
    result = read(tmp_path, rows)  # EPA: 126, 129, 102, 102; fractions are rounded halves up
    assert [(i.id, i.truth["aqi"]) for i in result.train] == [("a", 126), ("b", 128), ("d", 103)]
    (r,) = result.rejected
    assert r.column == "AQI" and "104" in r.reason and "102" in r.reason
    trusted = read(tmp_path, rows, trust_given_aqi=True)
    assert [i.truth["aqi"] for i in trusted.train] == [126, 128, 104, 103] and not trusted.rejected
    result = read(tmp_path, "p,c\n9.0, good\n12,Good\n13,Moderat\n", columns={"pm25": "p", "category": "c"})
    assert [i.truth["category"] for i in result.train] == ["Good"]
    assert "an AQI of 56 is Moderate" in reasons(result)[2] and "did you mean 'Moderate'?" in reasons(result)[3]
    # Ozone values that EPA passes over are kept unless they are alone.
    result = read(tmp_path, "h8,h1\n0.05,0.06\n,0.06\n0.3,0.45\n0.3,\n", columns={"o3_8h": "h8", "o3_1h": "h1"})
    assert [i.id for i in result.train] == ["aqi-train-1", "aqi-train-3"]
    assert [(r.row, r.column) for r in result.rejected] == [(2, "h1"), (4, "h8")]


def test_readings_and_ids_of_their_own_are_unique_but_a_refused_row_has_no_duplicate(tmp_path):
    result = read(
        tmp_path, f"{HEADER}a,35.9,,,400\nb,35.9,,,102\nc,35.90,NA,,\nb,12,,,\nc,12,,,\naqi-train-7,1,,,\n,2,,,\n"
    )
    assert [i.id for i in result.train] == ["b", "c", "aqi-train-7"]
    assert 3 not in reasons(result) and result.facts["repeated_rows"] == 1
    assert reasons(result)[4].startswith("site: row 2 has the id 'b'")
    assert "ids must be unique" in reasons(result)[7]


def test_texts_of_the_user_are_used_verbatim(tmp_path):
    rows = [(" What is it?\n", "126 ", 126), ("And now?", "", 3), ("And then?", "4", None), (" What is it?\n", "1", 1)]
    content = "\n".join(json.dumps(dict(zip("qan", row, strict=True))) for row in rows)
    columns = {"prompt": "q", "completion": "a", "aqi": "n"}
    result = read(tmp_path, content, "d.jsonl", columns=columns)
    (item,) = result.train
    assert (item.prompt, item.completion) == (" What is it?\n", "126 ")
    assert item.truth == {"aqi": 126, "category": "Unhealthy for Sensitive Groups"}
    assert reasons(result)[2] == "a: expected a text, got nothing"
    assert reasons(result)[3].startswith("n: is missing") and "same prompt as row 1" in reasons(result)[4]
    (message,) = problems(read, tmp_path, content, "d.jsonl", columns={"prompt": "q", "aqi": "n"})
    assert "prompt and completion come together" in message


# --- files ---


def test_json_lines_that_are_not_objects(tmp_path):
    content = '{"PM25": 9, "site": 7, "ozone": 0.01, "CO": 1, "AQI": 50}\n\n[1]\n{"PM25": \nnull\n{"PM25": true}\n'
    content += '{"PM25": NaN, "CO": Infinity}\r\n{"PM25": "8.5"}\n{"PM25": 8, "site": "\\udc00"}'
    result = read(tmp_path, content, "d.jsonl")
    assert [i.id for i in result.train] == ["7", "aqi-train-7"]
    assert [(r.row, r.line) for r in result.rejected] == [(2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (8, 9)]
    message = reasons(result)
    assert "got list" in message[2] and "broken JSON" in message[3] and "got NoneType" in message[4]
    assert (
        message[5] == "PM25: expected a number, got bool True" and message[6] == "CO: expected a finite number, got inf"
    )
    assert message[8] == "site: expected UTF-8, got half a character (\\udc00)"


def test_a_json_array_is_read_and_rejections_are_written_as_plain_json(tmp_path):
    content = (
        b'[\n {"PM25": 9, "site": "Z\xc3\xbcrich", "ozone": null, "CO": null, "AQI": 50},\n [1],\n'
        b' {"PM25": 8, "site": "Z\xfcrich"}, {"PM25": 7, "site": "\\ud83d"}, {"PM25": 6, "site": "\\ud83d\\ude00"},'
        b' {"PM25": "\xc2\xb5", "CO": NaN}]'
    )
    for name in ("d.json", "d.jsonl"):
        result = read(tmp_path, content, name)
        assert [i.id for i in result.train] == ["Zürich", "😀"] and result.rejected[0].line is None
        assert reasons(result) == {
            2: "expected a JSON object, got list",
            3: "site: expected UTF-8, got byte 0xfc",
            4: "site: expected UTF-8, got half a character (\\ud83d)",
            6: "PM25: expected a number, got 'µ'",
        }
    write_rejected(tmp_path / "out.jsonl", result.rejected)
    *others, line = (tmp_path / "out.jsonl").read_text().splitlines()
    got = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (got["row"], got["line"], got["column"], got["value"]) == (6, None, "PM25", "µ") and len(others) == 3
    assert got["raw"] == {"PM25": "µ", "CO": "nan"} and got["reason"]
    write_rejected(tmp_path / "out.jsonl", [])
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_parquet_file_is_read_cell_by_cell(tmp_path):
    sites = pa.array([b"a", b"Z\xfc", b"c"], pa.binary()).view(pa.string())  # the second is no UTF-8
    table = pa.table({"PM25": [9.0, 8.0, None], "site": sites, "ozone": [None, None, 0.05], "CO": [None] * 3})
    parquet.write_table(table.append_column("AQI", [[50, None, None]]), tmp_path / "d.parquet")
    result = read_recipe(aqi, Where(source=str(tmp_path / "d.parquet"), columns=COLUMNS))
    assert [(i.id, readings(i)) for i in result.train] == [("a", {"pm25": 9.0}), ("c", {"o3_8h": 0.05})]
    assert list(reasons(result)) == [2] and "a cell cannot be read: 'utf-8' codec" in reasons(result)[2]


DOCUMENTS = {
    "a list under a key": ('{"status": "ok", "data": [{"p": 9}, {"p": 12}]}', [1, 2]),
    "over several lines": ('{\n  "meta": {"page": 1},\n  "results": [\n    {"p": 9},\n    {"p": 12}\n  ]\n}', [1, 2]),
    "objects over several lines": ('{\n "p": 9\n}\n{\n "p": 12\n}\n', [1, 2]),
    "an array over several lines": ('[\n {\n  "p": 9\n },\n {"p": 12}\n]', [1, 2]),
    "a list for each column": ('{"p": [9, 12], "q": ["a", "b"]}', [1, 2]),
    "columns under a key": ('{"hourly_units": {"p": "μg/m³"}, "hourly": {"t": ["0", "1"], "p": [9, 12]}}', [1, 2]),
    "pandas, orient split": ('{"columns": ["p", "q"], "index": [0, 1], "data": [[9, "a"], [12, "b"]]}', [1, 2]),
    "pandas, orient table": ('{"schema": {"fields": [{"name": "p"}]}, "data": [{"p": 9}, {"p": 12}]}', [1, 2]),
    "one object, a row": ('{\n "p": 9,\n "tags": [{"a": 1}]\n}', [1]),
}  # fmt: skip


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_json_document_is_read_as_the_rows_that_it_holds(tmp_path, kind):
    text, rows = DOCUMENTS[kind]
    for name in ("d.json", "d.jsonl"):
        result = read(tmp_path, text, name, columns={"pm25": "p"})
        assert [(i.id, readings(i)["pm25"]) for i in result.train] == [
            (f"aqi-train-{n}", {1: 9, 2: 12}[n]) for n in rows
        ]


def test_json_that_holds_no_rows_or_several_tables_is_refused_in_one_sentence(tmp_path):
    for text, message in (
        ('{"train": [{"p": 1}], "test": [{"p": 2}]}', "expected one list of rows, got 'train', 'test'"),
        ('{\n "data": [\n  {"p": 1},\n  {"p": 2}\n', "got broken JSON (Expecting"),
        ('[{"p": 1}, {"p": 2}', "got broken JSON (Expecting"),
        ('{"data": [1, 2]}', "there is no column 'p'"),
    ):
        (problem,) = problems(read, tmp_path, text, "d.json", columns={"pm25": "p"})
        assert message in problem
    result = read(tmp_path, '{"p": 1\n{"p": 2}\n', "d.jsonl", columns={"pm25": "p"})  # lines, the first one broken
    assert list(reasons(result)) == [1] and len(result.train) == 1


NUMBERS = [  # what a column holds, the field that is read from it, the reading in the prompt, EPA's index
    (pa.array([0.055], pa.float32()), "o3_8h", "0.055 ppm", 51),
    (pa.array([0.106], pa.float32()), "o3_8h", "0.106 ppm", 201),
    (pa.array([9.7], pa.float32()), "pm25", "9.7 µg/m³", 52),
    (pa.array([9.1], pa.float16()), "pm25", "9.1 µg/m³", 51),
    (pa.array([9.1]), "pm25", "9.1 µg/m³", 51),
    (pa.array(["0.0549999999999999999999999999999999"]), "o3_8h", "0.054 ppm", 50),
    (pa.array([Decimal("0.0550")], pa.decimal128(38, 18)), "o3_8h", "0.055 ppm", 51),
    (pa.array([Decimal("9.1")], pa.decimal256(50, 2)), "pm25", "9.1 µg/m³", 51),
    (pa.array([9], pa.uint64()), "pm25", "9.0 µg/m³", 50),
]


@pytest.mark.parametrize(("cells", "key", "reading", "index"), NUMBERS)
def test_a_number_is_the_shortest_decimal_of_its_columns_own_type(tmp_path, cells, key, reading, index):
    parquet.write_table(pa.table({"v": cells}), tmp_path / "d.parquet")
    (item,) = read_recipe(aqi, Where(source=str(tmp_path / "d.parquet"), columns={key: "v"})).train
    assert reading in item.prompt and item.truth["aqi"] == index


def test_a_folder_has_the_same_decimals_as_its_file(tmp_path):
    (tmp_path / "d").mkdir()
    cells = pa.array([0.055, None, 0.106], pa.float32())
    parquet.write_table(pa.table({"v": cells}), tmp_path / "d" / "train.parquet")
    result = read_recipe(aqi, Where(source=str(tmp_path / "d"), columns={"o3_8h": "v"}))
    assert [item.truth["aqi"] for item in result.train] == [51, 201]


def test_json_numbers_keep_their_digits_and_ids_are_whole(tmp_path):
    result = read(
        tmp_path, '{"o": 0.0549999999999999999999, "s": 360610135.0}\n', "d.jsonl", columns={"o3_8h": "o", "id": "s"}
    )
    assert [(item.truth["aqi"], item.id) for item in result.train] == [(50, "360610135")]


def test_maps_are_objects_and_a_key_twice_refuses_the_row(tmp_path):
    turn = pa.map_(pa.string(), pa.string())
    good = [[("role", "user"), ("content", "Hi")], [("role", "assistant"), ("content", "Hello")]]
    rows = pa.array([good, [[("role", "user"), ("role", "user")]]], pa.list_(turn))
    parquet.write_table(pa.table({"messages": rows}), tmp_path / "d.parquet")
    result = read_recipe(chat, Where(source=str(tmp_path / "d.parquet"), columns={}))
    assert [(i.prompt, i.completion) for i in result.train] == [("Hi", "Hello")] and list(reasons(result)) == [2]


def test_ragged_rows_and_broken_quotes(tmp_path):
    content = HEADER + 'a,9\nb,9,,,50,extra\n"c\nc",8,,,\nd,"7"x,,,\ne,6,,,\n'
    result = read(tmp_path, content)
    assert [i.id for i in result.train] == ["c\nc", "e"]
    assert [(r.row, r.line) for r in result.rejected] == [(1, 2), (2, 3), (4, 6)]
    message = reasons(result)
    assert message[1] == "expected 5 cells, as in the header, got 2" and "got 6" in message[2]
    assert result.rejected[1].raw["(beyond the header)"] == ["extra"]
    assert "broken quoting" in message[4]
    (problem,) = problems(read, tmp_path, content + 'f,"5,,,\ng,4,,,\n')
    assert "a quote opened on line 8 or later is never closed" in problem


def test_invalid_utf8_is_reported_with_its_offset(tmp_path):
    content = b"\xef\xbb\xbf" + HEADER.encode() + b"Z\xfcrich,9,,,\nBern,8,,,\n"  # a BOM is no part of the header
    result = read(tmp_path, content)
    assert [i.id for i in result.train] == ["Bern"]
    at = content.index(b"\xfc")
    assert reasons(result) == {1: f"expected UTF-8, got byte 0xfc at offset {at} of the file"}
    assert result.rejected[0].raw["site"] == "Z\\xfcrich"
    content = b'{"PM25": 1, "site": 1, "ozone": 0, "CO": 0, "AQI": 6}\n{"PM25": 2, "site": "\xe9"}\n'
    results = read(tmp_path, content, "d.jsonl", encoding="utf-8")
    assert f"offset {content.index(0xE9)} " in results.rejected[0].reason


def test_problems_of_a_whole_file_are_named_at_once(tmp_path):
    for content, name, message in (
        (b"", "d.csv", "is empty (0 bytes)"), (b"\xef\xbb\xbf\n \n", "d.jsonl", "is empty"),
        (HEADER, "d.csv", "no data row"), ("[]", "d.json", "no data row"),
        ('[\n{"PM25": 1},\n', "d.json", "expected a JSON array of objects, got broken JSON"),
        ("[1]\n[2]\n", "d.jsonl", "all 2 were rejected"),  # lines that are arrays are rows that are no objects
        ("a,b", "d.xlsx", "expected a name ending in .csv"), ("PAR1", "d.parquet", "expected a Parquet file"),
        (b"\xef\xbb\xbfsi\xffte,PM25\n1,2\n", "d.csv", "line 1, the header: expected UTF-8"),
        ("site,PM25,PM25,ozone,CO,AQI\n1,2,3,4,5,6\n", "d.csv", "'PM25' more than once"),
    ):  # fmt: skip
        assert message in str(failure(read, tmp_path, content, name))
    assert read(tmp_path, HEADER.replace(",", ";") + "A;9;;;\n", delimiter=";").train[0].id == "A"
    assert "set delimiter to it, or to auto" in str(failure(read, tmp_path, "site;PM25\n1;2\n", delimiter=","))
    results = problems(read_recipe, aqi, Where(source=str(tmp_path / "no.csv"), columns={"aqi": "AQI"}))
    assert len(results) == 2 and str(tmp_path / "no.csv") in results[1]
    error = failure(read, tmp_path, HEADER + "a,x,,,\n" * 7)
    assert "all 7 were rejected" in str(error) and "row 5 (line 6): PM25" in str(error) and "2 more" in str(error)


def test_a_european_excel_file_is_read_and_its_layout_reported(tmp_path):
    columns = {"pm25": "PM2,5 µg/m³", "co": "CO"}
    text = "Messstation: Zürich\n\nOrt;PM2,5 µg/m³;CO\nZürich;35,9;1,250\nBern;8;0,4\n"
    for encoding, message in (("utf-8", ""), ("utf-8-sig", ""), ("cp1252", "as cp1252, "), ("utf-16", "as UTF-16, ")):
        result = read(tmp_path, text.encode(encoding), columns=columns)
        assert [readings(i) for i in result.train] == [{"pm25": 35.9, "co": 1.25}, {"pm25": 8, "co": 0.4}]
        note = result.notes[0]
        assert note.startswith(f"data.csv is read {message}with cells separated by ';', from the header on line 3")
        assert "'Messstation: Zürich'" in note
        assert "Decimal commas are read as points in PM2,5 µg/m³, CO." in result.notes
    result = read(tmp_path, "sep=;\n" + HEADER.replace(",", ";") + "A;9;;x;\nB;9,5;;;\n")
    assert (result.train[0].id, result.rejected[0].line) == ("B", 3)
    assert read(tmp_path, (HEADER + "Genève,9,,,\nZürich,8,,,\n").encode("mac_roman")).train[1].id == "Zürich"
    long = "place,parameter,value\nX,pm25,12\nY,pm25,14\n"  # a row that names a column is no header
    assert "there is no column 'pm25'" in str(failure(read, tmp_path, long, columns={"pm25": "pm25"}))


def test_an_ambiguous_encoding_is_asked_for(tmp_path):
    text = HEADER + "Kovač,9,,,\n"
    (message,) = problems(read, tmp_path, text.encode("cp1250"))
    assert "cp1250 ('Kovač,9,,,') or" in message and "or cp1252 ('Kovaè,9,,,')" in message
    assert read(tmp_path, text.encode("cp1250"), encoding="cp1250").train[0].id == "Kovač"
    (message,) = problems(read, tmp_path, (HEADER + "東京はどこ,9,,,\n").encode("cp932"))
    assert "set prepare_data.encoding to" in message
    (message,) = problems(read, tmp_path, b"\x81" + text.encode("cp1250"), encoding="cp1252")
    assert message.startswith("expected cp1252, got byte 0x81 at offset 0 of the file.")


def test_too_many_refused_rows_stop_the_stage_with_the_commonest_reasons(tmp_path):
    rows = "".join(f"r{n},{n}.5,,,\n" for n in range(8))
    head, *reasons = problems(read, tmp_path, HEADER + rows + "x,abc,,,\n" * 2 + "y,-30,,,\n", max_refused=0.2)
    assert head.startswith("3 of 11 rows (27%) were refused, more than prepare_data.max_refused (20%) allows")
    assert reasons[0] == "2 times, first in row 9 (line 10): PM25: expected a number, got 'abc'" and len(reasons) == 2


def test_a_unit_that_seems_a_thousand_off_is_asked_about(tmp_path):
    content = "o,n\n41,0.02\n38,0.03\n"
    columns = {"o3_8h": "o", "no2": "n"}
    message = problems(read, tmp_path, content, columns=columns)
    for part in ("o3_8h: expected ppm", "median of 39.5", "too large", "o3_8h: {column: o, unit: ppb}", "unit: ppm"):
        assert part in message[0]
    assert "no2: expected ppb" in message[1] and "too small" in message[1] and "fit ppm" in message[1]
    units = {"o3_8h": {"column": "o", "unit": "ppb"}, "no2": {"column": "n", "unit": "ppb"}}
    assert readings(read(tmp_path, content, columns=units).train[0]) == {"o3_8h": 0.041, "no2": 0.02}


# --- every row ends in exactly one place ---

cell = st.one_of(
    st.floats(-5, 400).map(str), st.sampled_from(["", "NA", "9", "0.05", "12,5", '"', "a\nb"]), st.text(max_size=4)
)
value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.sampled_from([9, 0.05])),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
line = st.one_of(
    st.dictionaries(st.sampled_from([*COLUMNS.values()]), value).map(json.dumps),
    value.map(json.dumps),
    st.sampled_from(["{", "\x00", "\u2028", '{"PM25": 1' + "0" * 5000 + "}"]),
).map(str.encode) | st.binary(min_size=1, max_size=5).filter(lambda b: b"\n" not in b and b.strip() != b"")
fuzz = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_accounted(rows, *arguments):
    units = {name: {"column": own, "unit": aqi.FIELDS[name].unit} for name, own in COLUMNS.items()}  # none is doubted
    try:
        result = read(*arguments, columns=units, encoding="utf-8")
        made, rejected = len(result.train) + result.facts["repeated_rows"], [r.row for r in result.rejected]
    except EvaluationError as error:
        made, rejected = 0, [*range(int(re.search(r"all (\d+) were rejected", str(error))[1]))]
    assert made + len(rejected) == rows and rejected == sorted(set(rejected))


@fuzz
@given(rows=st.lists(st.lists(cell, min_size=2, max_size=7), min_size=1, max_size=8))
def test_every_csv_row_is_accounted_for(tmp_path, rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    assert_accounted(len(rows), tmp_path, HEADER + text.getvalue())


@fuzz
@given(rows=st.lists(line, min_size=1, max_size=8), elements=st.lists(value, max_size=8))
def test_every_line_and_every_element_of_json_is_accounted_for(tmp_path, rows, elements):
    head = dict.fromkeys(COLUMNS.values())  # every column is there, so that the mapping itself is never at fault
    assert_accounted(len(rows) + 1, tmp_path, b"\n".join([json.dumps(head).encode(), *rows]), "d.jsonl")
    assert_accounted(len(elements) + 1, tmp_path, json.dumps([head, *elements]), "d.json")


@fuzz
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_never_crash_the_reader(tmp_path, data):
    for name in ("d.csv", "d.jsonl", "d.parquet"):
        try:
            read(tmp_path, data, name, columns={"pm25": "a"})
        except EvaluationError as error:
            assert error.problems


# --- columns, splits and classes, by a small task ---


def make_item(item_id, row):
    if not isinstance(row.get("ask"), str):
        raise RowError("ask", f"expected text, got {row.get('ask')!r}")
    label = {"0": "yes", "1": "no"}.get(str(row["label"]), row["label"])
    if label not in ("yes", "no"):
        raise RowError("label", f"expected yes or no, got {row['label']!r}")
    return Item(item_id, "small", " ".join([row["ask"], row.get("hint") or ""]).strip(), label, {"answer": label})


SMALL = types.SimpleNamespace(
    NAME="small", SOURCE=Source("org/small", subset="main", test="test"), make_item=make_item,
    FIELDS={"ask": Field("question", True, "what is asked"), "label": Field("label", True, "yes or no"),
            "hint": Field("hint", False, "a hint")},
)  # fmt: skip


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(n, label="yes"):
    return [{"question": f"q{i}", "label": label, "hint": ""} for i in range(n)]


def folder(path, **splits):
    path.mkdir(exist_ok=True)
    for split, rows in splits.items():
        written(path / f"{split}.jsonl", *rows)
    return str(path)


def small(source, columns=None, **more):
    return read_recipe(SMALL, Where(source=source, columns=columns or {}, **more))


def test_every_row_is_an_item_or_refused_with_row_column_and_reason(tmp_path):
    file = tmp_path / "d.jsonl"
    rows = [("a", "yes"), (3, "no"), ("b", "maybe"), ("a", "yes"), ("a", "no"), ("b", "no"), ("x" * 30, "yes"),
            ("x" * 27, "yes")]  # fmt: skip
    written(file, *({"question": question, "label": label} for question, label in rows), {"label": "yes"})
    file.write_text(file.read_text() + '{"question":\n')
    made = small(str(file), max_chars=30)
    assert [(i.id, i.prompt, i.completion) for i in made.train] == [
        ("small-train-1", "a", "yes"), ("small-train-6", "b", "no"), ("small-train-8", "x" * 27, "yes")]  # fmt: skip
    counts = [made.facts[f"{what}_rows"] for what in ("repeated", "duplicate", "too_long")]
    assert made.test is None and counts == [1, 1, 1] and made.facts["rows"] == {"train": 10}
    assert [(r.row, r.line, r.column, r.reason.split(" (")[0]) for r in made.rejected] == [
        (2, 2, "question", "question: expected text, got 3"),
        (3, 3, "label", "label: expected yes or no, got 'maybe'"),
        (5, 5, None, "duplicate: same prompt as row 1, with another answer"),
        (7, 7, None, "too long: expected prompt and completion of at most 30 characters, got 33"),
        (9, 9, "question", "question: expected text, got None"),
        (10, 10, None, "expected a JSON object, got broken JSON"),
    ]
    assert {r.split for r in made.rejected} == {"train"} and made.rejected[0].value == 3


def test_columns_are_the_tasks_own_unless_mapped(tmp_path):
    file = written(tmp_path / "d.jsonl", {"q": "a", "label": "yes", "hint": "h", "question": "no"})
    made = small(file, {"ask": "q"})
    assert made.train[0].prompt == "a h"
    assert made.facts["columns"] == {"ask": "q", "label": "label", "hint": "hint"}
    # An optional field is left out if its column is missing or mapped to another field.
    assert small(file, {"ask": "hint"}).train[0].prompt == "h"
    bare = {"question": "a", "label": "yes", "text": "t"}
    file = written(tmp_path / "e.jsonl", bare)
    made = small(file, {"ask": Column(column="question")})
    note = "There is no column 'hint': items have none."
    assert made.facts["columns"] == {"ask": "question", "label": "label"} and note in made.notes
    for mapped in ("text", None):  # None: on purpose
        assert note not in small(file, {"hint": mapped}).notes
    assert small(folder(tmp_path / "both", train=[bare], test=[{**bare, "question": "b"}])).notes == [
        note, "Not read: text (100% of rows)."]  # fmt: skip
    # One with a similar name is asked about.
    file = written(tmp_path / "f.jsonl", {"question": "a", "label": "yes", "Hint": "h"})
    (problem,) = problems(small, file)
    assert problem.startswith("hint: there is no column 'hint'; did you mean 'Hint'?")
    for mapped, prompt in (("Hint", "a h"), (None, "a")):
        assert small(file, {"hint": mapped}).train[0].prompt == prompt


def test_all_problems_of_a_mapping_are_named_at_once(tmp_path):
    file = written(tmp_path / "d.jsonl", {"Question": "a", "answer": "yes", "text": "t"})
    columns = {"hnt": "text", "hint": "labell", "label": Column(column="answer", unit="ppm")}
    for problem, start in zip(problems(small, file, columns), (
        "unknown field 'hnt' in columns; did you mean 'hint'? Available: ask, label, hint.",
        "label: expected no unit, got 'ppm'",
        "ask: there is no column 'question'; did you mean 'Question'? Available: Question, answer, text.",
        "label: there is no column 'label'. Available: Question, answer, text.",
        "hint: there is no column 'labell'. Available: Question, answer, text.",
    ), strict=True):  # fmt: skip
        assert problem.startswith(start)
    for columns, message in (
        ({"ask": "text", "hint": "text"}, "column 'text' is mapped to both 'ask' and 'hint'; map it once."),
        ({"hint": "label"}, "column 'label' is mapped to 'hint', but 'label' is read from it too"),
        ({"label": None}, "label: expected a column, got null; items cannot do without it."),
    ):
        assert problems(small, file, columns)[0].startswith(message)
    results = problems(small, str(tmp_path / "none.csv"), {"hnt": "x"})
    assert len(results) == 2 and "unknown field" in results[0] and "got none at" in results[1]


def test_splits_are_the_tasks_if_the_data_set_has_them(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    both = folder(tmp_path / "both", train=rows_of(3), test=rows_of(2, "no"), dev=rows_of(1))
    for source in (both, f"hub:{both}"):
        made = small(source)
        assert [i.id for i in made.test] == ["small-test-1", "small-test-2"] and len(made.train) == 3
        assert (made.facts["train_split"], made.facts["test_split"], made.notes) == ("train", "test", [])
    assert [i.id for i in small(both, hub_test_split="validation").test] == ["small-validation-1"]
    alone = folder(tmp_path / "alone", train=rows_of(3))
    for source, more, message in (
        (alone, {}, "The data set has no split 'test' (it has train): test items are drawn from 'train'."),
        (both, {"hub_split": "test", "hub_test_split": "test"},
         "Split 'test' is used for training and tests: test items are drawn from 'test'."),
        (f"{alone}/train.jsonl", {}, "A file has no test split: test items are drawn from its rows."),
    ):  # fmt: skip
        made = small(source, **more)
        assert (made.test, made.notes) == (None, [message])


def test_splits_that_do_not_exist_or_have_no_usable_row_are_named(tmp_path):
    both = folder(tmp_path / "both", train=rows_of(3), test=rows_of(2, -1))
    missing = problems(small, both, hub_split="trian", hub_test_split="tset")
    assert ["'trian'; did you mean 'train'?" in missing[0], "'tset'; did you mean 'test'?" in missing[1]] == [True] * 2
    head, *rows = problems(small, both)
    assert head.startswith("split 'test': no row is left, all 2") and len(rows) == 2 and "row 1: label: " in rows[0]


def test_numbered_classes_are_read_by_name(tmp_path):
    """A number alone would turn every label round if the data set numbers its classes differently from the task."""
    rows = Dataset.from_dict({"question": ["a", "b", "c"], "label": [0, 1, -1]})
    file = tmp_path / "d" / "train-00000-of-00001.parquet"
    file.parent.mkdir()
    rows.cast_column("label", ClassLabel(names=["no", "yes"])).to_parquet(file)
    for source in (file, file.parent):
        results = small(str(source))
        assert [i.completion for i in results.train] == ["no", "yes"]
        assert "expected one of no, yes, got -1" in reasons(results)[3]


# --- the hub, and folders in its format ---


def read_split(source, split, subset):
    with open_data_set(source, subset, split=split) as data:
        return data.table(split)


SPLITS = ("train", "validation", "test")
WHOLE = ("cola/train", *(f"qnli/{split}" for split in SPLITS))


def glue(folder, *parts, readme=False):
    """A part of GLUE as it lies in a folder; `parts` are subset/split, and its README names all."""
    for part in parts:
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        written(folder / f"{part}.jsonl", {"question": f"{part}?"})
    named = {"cola": ("train",), "qnli": SPLITS}
    files = [{"config_name": subset, "data_files": [{"split": split, "path": f"{subset}/{split}*"} for split in splits]}
             for subset, splits in named.items()]  # fmt: skip
    if readme:
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': files})}---\n")
    return folder


@pytest.mark.parametrize(("parts", "readme"), [(WHOLE, True), (WHOLE, False), (WHOLE[1:], False)])
def test_a_subset_is_found_by_the_readme_or_by_its_folder(tmp_path, parts, readme):
    folder = glue(tmp_path / "glue", *parts, readme=readme)
    for asked in ({"subset": "qnli"}, {"usual": "qnli"}):
        with open_data_set(str(folder), **asked) as data:
            assert data.subset == "qnli"
            assert list(data.splits) == ["train", "validation", *(["test"] if "qnli/test" in parts else [])]
            table = data.table("validation")
    assert [(r.row, r.line, r.values) for r in table.rows] == [(1, None, {"question": "qnli/validation?"})]
    assert table.revision is None


def test_a_folder_is_read_again_after_its_files_change(tmp_path):
    file = tmp_path / "d" / "train.jsonl"
    file.parent.mkdir()
    for text in ("one", "two"):
        written(file, {"a": text})
        os.utime(file, (1, 1))
        assert read_split(str(file.parent), "train", None).rows[0].values == {"a": text}


def test_a_missing_subset_is_answered_with_the_existing_ones(tmp_path):
    folder, plain = str(glue(tmp_path / "glue", *WHOLE, readme=True)), str(glue(tmp_path / "plain", *WHOLE))
    (tmp_path / "plain" / "data").mkdir()  # as in data sets without subsets
    for source, subset, start in (
        (folder, "qnl", "there is no subset 'qnl'; did you mean 'qnli'?"),
        (plain, "mnli", "there is no subset 'mnli'; did you mean 'qnli'?"),
        (folder, None, "it has several subsets"),
    ):
        (problem,) = problems(read_split, source, "train", subset)
        assert problem.startswith(start) and problem.endswith("Available: cola, qnli.")
    assert "split 'dev'" in problems(read_split, folder, "dev", "qnli")[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "there is no data file"),
     ({"train.jsonl": '{"a": 1}\n{"a":\n'}, "JSON parse error.*the file itself as source"),
     ({"train.parquet": "PAR1"}, "could not be read .*Parquet"),
     ({"d.py": "raise SystemExit(3)", "train.jsonl": '{"a": 1}\n'}, "come from a script, which is not run"),
     ({"README.md": "---\na: [\n---\n", "train.jsonl": '{"a": 1}\n'}, "could not be read .*(YAML|pars)")],
)  # fmt: skip
def test_folders_that_cannot_be_read(tmp_path, files, message):
    folder = tmp_path / "d"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    (only,) = problems(read_split, str(folder), "train", None)
    assert re.search(message, only)


def test_offline_gives_one_sentence_and_no_network_request(monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or [])
    for source, revision in (("hub:openai/gsm8k", ""), ("hub:openai/gsm8k@main", " --revision main")):
        (message,) = problems(read_table, source, subset="main")
        assert message.startswith("the Hugging Face hub cannot be reached (ConnectionError: Couldn't reach")
        assert "HF_HUB_OFFLINE is set" in message and "and set source to that folder" in message
        assert f"`hf download openai/gsm8k --repo-type dataset{revision} --local-dir inputs/gsm8k`" in message
    assert asked == []


@pytest.mark.parametrize(
    ("local", "error", "problem"),
    [(0, httpx.ConnectTimeout("timed out"), "hub cannot be reached .ConnectTimeout: timed out"),
     (0, DatasetNotFoundError("Dataset 'o/n' is a gated dataset on the Hub."), "gated: .*`hf auth login`, or set HF_T"),
     (0, DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub or cannot be"), "has no data set o/n,"),
     (0, DatasetNotFoundError("Revision 'r' doesn't exist for dataset 'o/n'"), "has no revision 'r'"),
     (0, ValueError("Unknown split \"dev\". Should be one of ['train']"), "split 'dev'.*one of .'train'"),
     (0, OSError(28, "No space left on device"), "hub data set .*could not be read .OSError: .*No space left"),
     (1, PermissionError(13, "Permission denied", "x"), "the folder .*could not be read .PermissionError"),
     (1, DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "the folder .*could not be read .Dataset")],
)  # fmt: skip
def test_an_error_of_the_library_becomes_one_sentence(tmp_path, monkeypatch, local, error, problem):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(EvaluationError, match=problem) as caught:
        read_split(str(tmp_path) if local else "hub:o/n@r", "dev", None)
    assert caught.value.__cause__ is error and len(caught.value.problems) == 1
    assert not local or not re.search("hub (data set|cannot|has)|hf download", caught.value.problems[0])
    error = AttributeError("a bug")  # ours, so it keeps its traceback
    with pytest.raises(AttributeError, match="a bug"):
        read_split("hub:o/n", "train", None)


def test_the_commit_of_a_hub_data_set_is_known_from_its_cache(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "o___n" / "default" / "0.0.0" / commit
    folder.mkdir(parents=True)
    Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "saved")
    shutil.copy(next((tmp_path / "saved").glob("*.arrow")), folder / "n-train.arrow")
    made = Dataset.from_file(str(folder / "n-train.arrow"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    assert read_split("hub:o/n", "train", None).revision == commit


AGENCIES = {
    "EPA": (
        "Date,POC,Daily Mean PM2.5 Concentration,Units,Daily AQI Value,AQS Parameter Description\n"
        "1/2/2022,1,3,ug/m3 LC,17,PM2.5 - Local Conditions\n"
        "1/3/2022,1,-0.4,ug/m3 LC,0,PM2.5 - Local Conditions\n"
        "1/5/2022,1,35.5,ug/m3 LC,101,PM2.5 - Local Conditions\n"
        "1/6/2022,2,3,ug/m3 LC,17,PM2.5 - Local Conditions\n",
        [{"pm25": "3.0"}, {"pm25": "0.0"}, {"pm25": "35.5"}],
    ),
    "EPA with a misspelled column": (
        "Date,Coconcentration,UNITS,DAILY_AQI_VALUE,AQS_PARAMETER_DESC\n01-01-2023,0.3,ppm,3,Carbon monoxide\n"
        "01-02-2023,5.0,ppm,56,Carbon monoxide\n",
        [{"co": "0.3"}, {"co": "5.0"}],
    ),
    "OpenAQ": (
        "location_id,parameter,value,unit,datetimeUtc\n1,pm25,12.1,µg/m³,2024\n1,o3,71,ppb,2024\n1,temperature,3,c,2024\n",
        [{"pm25": "12.1"}, {"o3_8h": "0.071"}],
    ),
    "AirNow's API": (
        "Latitude,UTC,Parameter,Unit,RawConcentration,Value,AQI,Category\n37,2024,PM2.5,UG/M3,12.0,13.2,59,2\n"
        "37,2024,OZONE,PPB,33.0,33.0,31,1\n",
        [{"pm25": "13.2"}, {"o3_8h": "0.033"}],
    ),
    "AirNow's hourly files": (
        "AQSID,OZONE_AQI,PM25_AQI,PM25,PM25_Unit,OZONE,OZONE_Unit,SO2,SO2_Unit\n1,24,13,2.4,UG/M3,26.0,PPB,0.3,PPB\n"
        "2,,38,6.9,UG/M3,,PPB,,\n",
        [{"pm25": "2.4", "o3_8h": "0.026", "so2": "0.3"}, {"pm25": "6.9"}],
    ),
}


@pytest.mark.parametrize("agency", AGENCIES)
def test_files_of_agencies_need_no_mapping(tmp_path, agency):
    text, readings = AGENCIES[agency]
    (tmp_path / "air.csv").write_text(text, encoding="utf-8")
    rows = read_recipe(aqi, Where(source=str(tmp_path / "air.csv"), columns={}))
    expected = [{key: float(value) for key, value in reading.items()} for reading in readings]
    assert [{k: float(v) for k, v in item.truth["readings"].items()} for item in rows.train] == expected
    assert not rows.rejected and any("agency" in note for note in rows.notes)


def test_a_repeated_question_is_no_refused_row_but_another_answer_is(tmp_path):
    (tmp_path / "air.csv").write_text(AGENCIES["EPA"][0], encoding="utf-8")
    rows = read_recipe(aqi, Where(source=str(tmp_path / "air.csv"), columns={}))
    assert (rows.facts["repeated_rows"], rows.facts["rejected_rows"], len(rows.train)) == (1, 0, 3)
    (tmp_path / "q.csv").write_text("q,a,i\nHow is it?,Good: 3,3\nHow is it?,Good: 4,4\nHow is it?,Good: 3,3\n")
    columns = {"prompt": "q", "completion": "a", "aqi": "i"}
    rows = read_recipe(aqi, Where(source=str(tmp_path / "q.csv"), columns=columns))
    assert (rows.facts["repeated_rows"], rows.facts["duplicate_rows"]) == (1, 1)


@pytest.mark.parametrize("cell", ["-999", "-9.1"])
def test_far_below_zero_marks_a_missing_value(tmp_path, cell):
    (tmp_path / "air.csv").write_text(f"parameter,value,unit\npm25,{cell},µg/m³\npm25,1.0,µg/m³\n", encoding="utf-8")
    rows = read_recipe(aqi, Where(source=str(tmp_path / "air.csv"), columns={}, max_refused=0.5))
    assert len(rows.train) == len(rows.rejected) == 1


def test_an_unknown_header_is_asked_about(tmp_path):
    (tmp_path / "air.csv").write_text("station,fine dust\nA,3\n")
    with pytest.raises(EvaluationError, match=r"expected a mapping, e\.g\. .*station, fine dust"):
        read_recipe(aqi, Where(source=str(tmp_path / "air.csv"), columns={}))
