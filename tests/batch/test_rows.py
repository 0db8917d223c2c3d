"""Rows of a batch: three formats, settings, templates, ids, seeds, and what is refused."""

import csv
import gzip
import json
import os
import threading
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from safelight.batch.check import Row, Rules, name_of, seed_of
from safelight.batch.rows import Columns, kind_of, read_rows
from safelight.batch.worklist import WorkList
from safelight.errors import SafelightError, StorageError

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "a cat", "steps": 3, "guidance_scale": 2.5},
    {"id": "b", "prompt": "two, owls\nat night", "width": 64, "loras": ["x:0.5", "y"]},
    {"id": "c", "prompt": "", "unconditional": True},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows in the format of the file's ending, as other programs do."""
    if path.suffix == ".parquet":
        columns = {name for row in rows for name in row}
        pq.write_table(pa.table({n: [row.get(n) for row in rows] for n in columns}), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            names = list({name: None for row in rows for name in row})
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ";")
            writer.writerow(names)
            for row in rows:
                cells = [row.get(name, "") for name in names]
                writer.writerow(",".join(c) if isinstance(c, list) else c for c in cells)
    else:
        text = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def settings(file: str, **rules: Any) -> dict[str, dict[str, Any]]:
    made = [Rules(**rules).row(i, columns) for i, columns in enumerate(read_rows(file), 1)]
    return {row.id: row.settings for row in made}


def row(values: dict[str, Any], number: int = 1, **rules: Any) -> Row:
    given = {"prompt": "a cat", **values}
    return Rules(**rules).row(number, Columns(number, given))


@pytest.mark.parametrize("end", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet"])
def test_three_formats_say_the_same(tmp_path: Path, end: str):
    found = settings(write(tmp_path / f"rows.{end}", ROWS))
    assert [*found] == ["a", "b", "c"]
    expected = {"prompt": "a cat", "steps": 3, "guidance_scale": 2.5, "seed": seed_of("a")}
    assert found["a"] == expected
    assert found["b"]["prompt"] == "two, owls\nat night"
    assert (found["b"]["width"], list(found["b"]["loras"])) == (64, ["x:0.5", "y"])
    assert found["c"]["unconditional"] is True


def test_integers_that_pandas_made_floats_are_integers_again(tmp_path: Path):
    table = pa.table({"id": [1.0, 2.0], "steps": [4.0, float("nan")], "prompt": ["", ""]})
    pq.write_table(table, tmp_path / "rows.parquet")
    found = settings(str(tmp_path / "rows.parquet"))
    assert [one.pop("prompt") for one in found.values()] == ["", ""]
    assert found == {"1": {"steps": 4, "seed": seed_of("1")}, "2": {"seed": seed_of("2")}}


def test_an_empty_cell_and_null_leave_a_setting_out(tmp_path: Path):
    (tmp_path / "rows.csv").write_text("prompt,steps\na cat,\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a cat", "steps": null, "seed": null}\n')
    for name in ("rows.csv", "rows.jsonl"):
        found = settings(str(tmp_path / name), defaults={"steps": 7})
        assert found == {"1": {"prompt": "a cat", "steps": 7, "seed": seed_of("1")}}


def test_a_row_comes_before_the_command_line_and_a_template_before_the_row():
    made = row(
        {"animal": "owl", "prompt": "seen", "steps": 2, "note": 1, "n": 4},
        defaults={"steps": 9, "sampler": "euler"},
        templates={"prompt": "an {animal} {{at|by}} night, {prompt}", "count": "{n}"},
        ignored=frozenset({"note"}),
    )
    assert made.settings["prompt"] == "an owl {at|by} night, seen"
    assert (made.settings["steps"], made.settings["sampler"]) == (2, "euler")
    assert made.settings["count"] == 4


@pytest.mark.parametrize(
    ("values", "rules", "said"),
    [
        ({"promt": "x"}, {}, "column 'promt' is no setting: did you mean prompt?"),
        ({"steps": 0}, {}, "steps must be a whole number from 1 to 1000"),
        ({"steps": "4"}, {}, "steps must be"),
        ({"id": [1]}, {}, "id must be a text or a whole number"),
        ({"id": "a\nb"}, {}, "id must be printable"),
        ({"id": "x" * 300}, {}, "id must be printable and short"),
        ({"prompt": "x"}, {"id_column": "key"}, "column 'key', the row's id, is missing"),
        ({"a": 1}, {"templates": {"prompt": "{b}"}}, "column 'b' of the template is missing"),
        ({"image": "none.png"}, {}, "image: there is no file 'none.png'"),
        ({"image": 3}, {}, "image must be the path of a picture"),
        ({"mask": "none.png"}, {}, "mask: there is no file"),
        ({"model": 3}, {}, "model must be a name"),
        ({"model": 0}, {}, "model must be a name, not 0"),
        ({"model": []}, {}, "model must be a name"),
        ({"model": "\ud800"}, {}, "model must be a name, not '\\ud800'"),
        ({"id": ""}, {"id_column": "id"}, "column 'id', the row's id, is missing or empty"),
        ({"unconditional": True, "prompt": "x"}, {}, "prompt cannot be used with unconditional"),
    ],
)
def test_a_row_that_is_not_valid_says_what_would_be(values, rules, said):
    with pytest.raises(SafelightError, match=r"^[^\n]*$") as caught:
        row(values, **rules)
    assert said in str(caught.value)


def test_a_template_for_no_setting_is_refused():
    with pytest.raises(SafelightError, match="did you mean prompt"):
        Rules(templates={"promt": "x"})


def test_pictures_are_named_by_paths_beside_the_file(tmp_path: Path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    made = row({"image": "a.png", "mask": "a.png"}, folder=tmp_path)
    request = made.request()
    assert request.image is not None
    assert request.mask is not None
    assert request.image.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(SafelightError, match="give image as well"):
        row({"mask": "a.png"}, folder=tmp_path)


def test_a_row_without_a_prompt_is_refused_and_an_empty_one_skipped(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,steps,negative_prompt\na cat,2,\n,,\n,3,ugly\n")
    with WorkList() as work:
        (problem,) = work.fill(read_rows(str(path)), Rules())
        assert work.count() == 1
    assert (problem.line, problem.message.partition(":")[0]) == (4, "prompt is missing")
    for values in ({"unconditional": True}, {"prompt": ""}):
        assert Rules().row(1, Columns(1, values))


def test_an_empty_id_is_none():
    assert row({"id": ""}, number=4).name == "4"


def test_a_row_that_no_encoding_has_is_a_problem_that_one_has():
    values = {"id": "\ud800", "prompt": "a cat"}
    with WorkList() as work:
        (problem,) = work.fill([Columns(1, values)], Rules())
    assert problem.row_id.encode() == b"?"


def test_ignored_columns_are_left_out_even_those_of_settings():
    values = {"id": "a", "seed": 5, "model": "none", "steps": 3, "note": 1}
    ignored = frozenset({"id", "seed", "model", "note"})
    made = row(values, number=7, ignored=ignored, templates={"prompt": "{note}"})
    assert (made.id, made.model) == ("7", "embedded")
    assert made.settings == {"prompt": "1", "steps": 3, "seed": seed_of("7")}
    made = row({"prompt": "x"}, id_column="prompt", ignored=frozenset({"prompt"}),
        templates={"prompt": "a {prompt}"})  # fmt: skip
    assert (made.id, made.settings["prompt"]) == ("x", "a x")


def test_a_template_of_the_model_comes_before_its_column():
    values = {"kind": "embedded", "model": "none"}
    assert row(values, templates={"model": "{kind}"}).model == "embedded"


def test_a_digest_tells_what_a_picture_shows_and_not_where_it_is(tmp_path: Path):
    for name, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64), colour).save(tmp_path / name / "x.png")

    def digest(folder: str) -> str:
        return row({"image": "x.png"}, folder=tmp_path / folder).digest

    before = digest("a")
    assert digest("b") == before != digest("c")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "a" / "x.png")
    os.utime(tmp_path / "a" / "x.png", (1, 1))
    assert digest("a") == digest("c")


def test_a_digest_is_the_same_in_every_format(tmp_path: Path):
    rows = [{"id": "a", "prompt": "a cat", "guidance_scale": 7, "loras": ["x:0.5"]}]
    files = [write(tmp_path / f"rows.{end}", rows) for end in ("jsonl", "csv", "parquet")]
    made = [Rules().row(1, columns) for file in files for columns in read_rows(file)]
    assert len({one.digest for one in made}) == 1


def test_a_seed_depends_on_the_id_alone():
    first, second = row({"id": "a"}, number=1), row({"id": "a", "prompt": "x"}, number=9)
    assert first.settings["seed"] == second.settings["seed"] == seed_of("a")
    assert seed_of("a") != seed_of("b")
    assert row({"id": "a", "seed": 5}).settings["seed"] == 5
    assert row({"id": "a", "seed": -1}).settings["seed"] == seed_of("a")
    assert row({"id": "a"}, defaults={"seed": 8}).settings["seed"] == 8


def test_names_of_files_are_one_to_one_and_harmless():
    ids = ["a", "A.b", "A%2Eb", "../x", "a@1", "ä~", ".hidden", "a b", "con"]
    names = [name_of(one) for one in ids]
    assert len({*names}) == len(ids)
    assert all(c.isascii() and (c.isalnum() or c in "-_%") for name in names for c in name)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("rows.txt", "x", "must be a file of rows that ends in .jsonl"),
        ("rows.jsonl", None, "cannot be read: No such file"),
        ("rows.csv", "a,a\n1,2\n", "each of them once"),
        ("rows.csv", 'prompt\na\n"x\ny', "a quote that begins at line 3 ends wrongly at line 4"),
        ("rows.csv", 'pro"mpt,"a"b\nx,y', "cannot be read as CSV: line 1"),
        ("rows.parquet", "no", "is not Parquet"),
        ("rows.jsonl", b"\xff\xfe{", "not text in UTF-8"),
        ("rows.jsonl.gz", "no", "cannot be read"),
        ("rows.jsonl.xz", "no", "cannot be read"),
        # mtime: else the test's id is another in each second, and the suite's processes differ.
        ("rows.jsonl.gz", gzip.compress(b"{}", mtime=0)[:10] + b"damaged", "cannot be read"),
        ("rows.csv.zip", "no", "cannot be read"),
        ("none://x/rows.jsonl", None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, name: str, text, said: str):
    path = tmp_path / name if "://" not in name else name
    if text is not None:
        Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SafelightError, match=r"^[^\n]*$") as caught:
        list(read_rows(str(path)))
    assert said in str(caught.value)


def test_every_problem_has_its_line(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    lines = ['{"id": "a"}', "", "{no", "[1]", '{"id": "a"}', '{"id": "A"}', '{"steps": 0}']
    rules = Rules(defaults={"prompt": "a cat"})
    path.write_text("\n".join(lines))
    with WorkList() as work:
        problems = list(work.fill(read_rows(str(path)), rules))
        assert work.count() == 1
    assert [p.line for p in problems] == [3, 4, 5, 6, 7]
    assert [p.code for p in problems] == [
        "unreadable",
        "unreadable",
        "same_id",
        "same_id",
        "invalid",
    ]
    assert "is that of line 1" in problems[2].message
    assert "upper and lower case" in problems[3].message
    path = tmp_path / "rows.csv"
    path.write_text('prompt,steps\n"two\nlines",3\nx\ny,0\n')
    with WorkList() as work:
        assert [p.line for p in work.fill(read_rows(str(path)), Rules())] == [4, 5]


def test_rows_come_by_model_and_size():
    values = [{"id": str(i), "model": m, "width": w} for i, (m, w) in enumerate(
        [("b", 64), ("a", 128), ("b", 72), ("a", 64), ("a", 128)]
    )]  # fmt: skip
    with WorkList() as work:
        rules = Rules(defaults={"prompt": "a cat"})
        assert not list(work.fill([Columns(i, v) for i, v in enumerate(values, 1)], rules))
        assert work.models() == [("a", 3), ("b", 2)]
        assert [r.id for m, _ in work.models() for r in work.rows(m)] == ["3", "1", "4", "0", "2"]
        assert [r.id for r in work.sample("a", 3)] == ["3", "1", "4"]
        assert [r.id for r in work.sample("b", 3)] == ["0", "2"]
        shapes = work.shapes("a", ("width", "steps"))
        assert sorted((s["width"], n) for s, n in shapes) == [(64, 1), (128, 2)]


def test_csv_as_pandas_and_spreadsheets_write_it(tmp_path: Path):
    """An index without a name, separators at the ends of lines, and numbers with a point."""
    path = tmp_path / "rows.csv"
    expected = {"prompt": "a cat", "steps": 20, "seed": 7}
    for text in (
        ",prompt,steps,seed\n0,a cat,20.0,7.\n",
        "prompt;steps;seed;;\na cat;20;7;;\n",
        "prompt,steps,seed\na cat,20.0,7,,\n",
    ):
        path.write_text(text)
        assert settings(str(path)) == {"1": expected}
    for text in ("prompt,,steps\na cat,,2\n", "prompt,prompt\na,b\n", ",,\n1,2,3\n"):
        path.write_text(text)
        with pytest.raises(SafelightError, match="a line of column names, each of them once"):
            settings(str(path))
    path.write_text("prompt,steps,\na cat,20.5,\nb,2,x\n")
    with WorkList() as work:
        problems = list(work.fill(read_rows(str(path)), Rules()))
    assert [one.line for one in problems] == [2, 3]
    assert "steps must be a whole number" in problems[0].message
    assert problems[1].message == "this row has 3 cells, and 2 columns have names"


def test_a_wrong_quote_has_its_line_and_spares_the_other_rows(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,steps\na,2\n"red" apple,3\n"two\nlines",4\n')
    first, wrong, last = read_rows(str(path))
    assert (first.line, last.line) == (2, 4)
    assert last.values == {"prompt": "two\nlines", "steps": "4"}
    assert (wrong.line, (wrong.problem or "").partition(":")[0]) == (3, "this is not CSV")


def test_a_long_cell_may_be_in_a_csv_file(tmp_path: Path):
    (tmp_path / "rows.csv").write_text(f"prompt,blob\na cat,{'x' * 200_000}\n")
    found = settings(str(tmp_path / "rows.csv"), ignored=frozenset({"blob"}))
    assert found["1"]["prompt"] == "a cat"


def test_decimal_numbers_of_parquet_are_numbers(tmp_path: Path):
    columns = {"id": "7", "steps": "20.00", "guidance_scale": "7.50", "prompt": None}
    table = {n: [None if v is None else Decimal(v)] for n, v in columns.items()}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    with WorkList() as work:
        rules = Rules(defaults={"prompt": "a cat"})
        assert not list(work.fill(read_rows(str(tmp_path / "rows.parquet")), rules))
        (made,) = work.rows("embedded")
    assert (made.id, made.settings["steps"], made.settings["guidance_scale"]) == ("7", 20, 7.5)
    values = {"price": Decimal("7.50")}  # in a text it stays as it was
    assert row(values, templates={"prompt": "{price} €"}).settings["prompt"] == "7.50 €"


class Web(ThreadingHTTPServer):
    """Serves one file in chunks: without its length, and without ranges."""

    def __init__(self, data: bytes) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if "gone" in self.path:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for part in (data[:9], data[9:], b""):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))

            def log_message(self, format: str, *args: Any) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


@pytest.mark.parametrize("end", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet"])
def test_rows_at_an_address_with_a_query(tmp_path: Path, end: str):
    pytest.importorskip("aiohttp")
    data = Path(write(tmp_path / f"rows.{end}", ROWS)).read_bytes()
    with Web(data) as web:
        found = settings(f"http://127.0.0.1:{web.server_port}/rows.{end}?token=abc.def")
        with pytest.raises(SafelightError, match=r"\?…' cannot be read: No such file$") as caught:
            settings(f"http://127.0.0.1:{web.server_port}/gone.{end}?token=abc")
        web.shutdown()
    assert [*found] == ["a", "b", "c"]
    assert "abc" not in str(caught.value)


def test_a_secret_in_an_address_is_not_told(tmp_path: Path):
    for file in ("https://anna:abc@example.com/x.txt", "https://example.com/rows?token=abc.csv"):
        with pytest.raises(SafelightError, match=r"must be a file of rows that ends in") as caught:
            kind_of(file)
        assert "abc" not in str(caught.value)


def test_a_full_folder_for_temporary_files_is_one_line(monkeypatch: pytest.MonkeyPatch):
    with WorkList() as work:
        work._database.execute("PRAGMA max_page_count = 12")
        columns = (Columns(i, {"prompt": "x" * 1000}) for i in range(1, 500))
        with pytest.raises(StorageError, match=r"^the folder for temporary files[^\n]*full[^\n]*$"):
            list(work.fill(columns, Rules()))
    monkeypatch.setattr("tempfile.tempdir", "/none")
    with pytest.raises(StorageError, match=r"^the folder for temporary files, /none, cannot be"):
        WorkList()


def test_the_end_of_a_name_says_its_format():
    assert [kind_of(n) for n in ("a.b.jsonl", "X.CSV", "s3://b/x.parquet", "x.tsv.bz2")] == [
        "jsonl",
        "csv",
        "parquet",
        "csv",
    ]
