"""Manifests in both formats, from folder and storage, row by row; and one line for each thing that is wrong."""

import csv
import gzip
import io
import json
import os
import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from hbi.pipelines import manifest
from hbi.pipelines.datasets.folder import folder_manifest
from hbi.pipelines.manifest import Row, read_manifest, write_manifest

CONTENT: list[dict[str, Any]] = [
    {"video": "a.mp4"},
    {
        "video": "sub/b.c.webm",
        "id": "x/y",
        "captions": ["one", "two"],
        "split": "test",
        "start": 1,
        "end": 2.5,
    },
    {"video": "/abs/c", "qa": [{"question": "who?", "answer": "me"}], "licence": "MIT", "score": 3},
    {"video": "s3://bucket/d.mp4", "id": 7, "start": None, "captions": None},
]


def write(folder: Path, *lines: str) -> str:
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path, *map(json.dumps, CONTENT), "")
    assert list(read_manifest(path)) == [
        Row(f"{tmp_path}/a.mp4", "a"),
        Row(f"{tmp_path}/sub/b.c.webm", "x/y", ["one", "two"], "test", 1.0, 2.5),
        Row("/abs/c", "c", qa=[{"question": "who?", "answer": "me"}], extra={"licence": "MIT", "score": 3}),
        Row("s3://bucket/d.mp4", "7"),
    ]


def test_parquet_says_the_same(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{**row, "id": str(row.get("id") or "") or None} for row in CONTENT])
    columns = {name: [row.get(name) for row in CONTENT] for name in ("licence", "score")}
    for name, values in columns.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.array(values))
    qa = pa.array([row.get("qa") for row in CONTENT])
    table = table.drop_columns([n for n in ("qa",) if n in table.column_names]).append_column("qa", qa)
    for name in ("captions", "split", "start", "end"):
        values = pa.array([row.get(name) for row in CONTENT])
        table = table.drop_columns([n for n in (name,) if n in table.column_names]).append_column(
            name, values
        )
    parquet.write_table(table, tmp_path / "manifest.parquet", row_group_size=2)
    lines = list(read_manifest(write(tmp_path, *map(json.dumps, CONTENT))))
    rows = list(read_manifest(str(tmp_path / "manifest.parquet")))
    assert [row.extra.get("licence") for row in rows] == [None, None, "MIT", None]
    strip = [(row.video, row.id, row.captions, row.split, row.start, row.end, row.qa) for row in rows]
    assert strip == [
        (row.video, row.id, row.captions, row.split, row.start, row.end, row.qa) for row in lines
    ]


def test_a_manifest_is_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten million rows cost what ten do: the first come before the rest is read."""

    def endless(path: str) -> Iterator[tuple[str, Any]]:
        while True:
            yield "line 1", {"video": "a.mp4"}

    monkeypatch.setattr(manifest, "read_table", endless)
    assert len(list(islice(read_manifest(str(tmp_path / "m.jsonl")), 1000))) == 1000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", 'a row is an object such as {"video": "a.mp4"}, not [1]'),
        ('{"path": "a.mp4", "caption": 1}', "the column 'path' is not read: call it video"),
        ('{"film": "a.mp4"}', "no `video` (its columns: film)"),
        ("{}", "no `video` (its columns: none)"),
        ('{"video": 3}', "`video` is 3, must be a path or URI"),
        ('{"video": ""}', '`video` is "", must be a path or URI'),
        ('{"video": NaN}', "`video` is NaN, must be a path or URI"),
        ('{"video": "a", "captions": 4}', "`captions` is 4, must be a sentence or a list of sentences"),
        ('{"video": "a", "captions": [1]}', "`captions` is [1]"),
        ('{"video": "a", "Captions": ["x"]}', "the column 'Captions' is not read: call it captions"),
        ('{"video": "a", "captoins": ["x"]}', "the column 'captoins' is not read"),
        ('{"video": "a", "sentence": "x"}', "the column 'sentence' is not read: call it captions"),
        ('{"video": "a", "Text": "x"}', "the column 'Text' is not read: call it captions"),
        ('{"video": "a", "captionEn": "x"}', "the column 'captionEn' is not read: call it captions"),
        ('{"video": "a", "clip_start": 3}', "the column 'clip_start' is not read: call it start"),
        ('{"video": "a", "endFrame": 3}', "the column 'endFrame' is not read: call it end"),
        ('{"video": "a", "text": "[\'a\' \'b\']"}', "a list that cannot be read: write it as JSON"),
        ('{"video": "a", "start_time": 3}', "the column 'start_time' is not read: call it start"),
        ('{"video": "a", "caption": "x", "text": "y"}', "captions stand in two columns, caption and text"),
        ('{"video": "a", "split": 1}', "`split` is 1"),
        ('{"video": "a", "split": "a/b"}', "cannot name a file"),
        ('{"video": "a", "id": [1]}', "`id` is [1], must be text"),
        ('{"video": "a", "id": true}', "`id` is true, must be text"),
        ('{"video": "a", "start": "soon"}', '`start` is "soon", must be seconds'),
        ('{"video": "a", "start": -1}', "`start` is -1"),
        ('{"video": "a", "end": Infinity}', "`end` is Infinity"),
        ('{"video": "a", "start": 4, "end": 2}', "`end` is 2 s, must be after `start` (4 s)"),
        ('{"video": "a", "qa": [{"q": 1}]}', '`qa` is [{"q": 1}], must be a list of {"question", "answer"}'),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_row_that_cannot_be_meant_has_a_fault_and_its_neighbours_have_none(
    tmp_path: Path, line: str, message: str
) -> None:
    path = write(tmp_path, '{"video": "good.mp4"}', line, '{"video": "fine.mp4"}')
    good, bad, fine = read_manifest(path)
    assert (good.fault, fine.fault, fine.id) == ("", "", "fine")
    assert bad.fault.startswith("line 2: ") and message in bad.fault
    assert "\n" not in bad.fault and len(bad.fault) < 400 and bad.split == "train"
    # Alone, it is the manifest that is wrong.
    with pytest.raises(ValueError, match=r"manifest\.jsonl: its only row: line 1: "):
        list(read_manifest(write(tmp_path, line)))


def test_what_people_write_is_understood() -> None:
    def row(**columns: Any) -> Row:
        return Row.parse({"video": "a.mp4", **columns})

    assert (
        row(caption="one").captions == row(text=["one"]).captions == row(captions="one").captions == ["one"]
    )
    assert row(captions=None).captions == row(captions=float("nan")).captions == []
    assert row(captions=["one", None, float("nan"), " "]).captions == ["one"]
    assert row(captions='["one", "two"]').captions == ["one", "two"]
    assert row(captions="['one', \"it's\"]").captions == ["one", "it's"]  # as Python prints a list
    assert row(captions="[music]").captions == ["[music]"]
    assert [
        row(start=value).start for value in (1, 1.5, "2", " 2.5 ", "0:10", "00:01:02.5", "1:00:00,5")
    ] == [*(1.0, 1.5, 2.0, 2.5, 10.0, 62.5, 3600.5)]
    assert row(start=float("nan"), end="").start is row(start=None, end="").end is None
    assert [row(id=value).id for value in (7, 7.0, "7.0", float("nan"))] == ["7", "7", "7.0", "a"]
    assert row(split=float("nan")).split == "train"
    assert row(title="t", begin=3, start=1).extra == {"title": "t", "begin": 3}


ROWS = [
    Row("/v/a.mp4", "1", ["a dog, running"], "train", 1.5, 62.0),
    Row("/v/é.mp4", "é", ["one", "two"], "test"),
    Row("/v/c.mp4", "c"),
]


def text_of(delimiter: str) -> str:
    """ROWS as a spreadsheet would write them."""
    table = io.StringIO()
    writer = csv.writer(table, delimiter=delimiter)
    writer.writerow(["video", "id", "caption", "split", "start", "end"])
    writer.writerow(["/v/a.mp4", "1", "a dog, running", "", "1.5", "00:01:02"])
    writer.writerow(["/v/é.mp4", "é", '["one", "two"]', "test", "", ""])
    writer.writerow(["/v/c.mp4", "", "", "", "", ""])
    return table.getvalue()


JSONL = "".join(json.dumps(json.loads(row.line()), ensure_ascii=False) + "\r\n" for row in ROWS)


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "m.tsv", "m.jsonl.gz", "m.csv.gz", "M.TSV.GZ", "m"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_every_format_in_every_encoding_says_the_same(tmp_path: Path, name: str, encoding: str) -> None:
    kind = name.lower().removesuffix(".gz")
    text = text_of("," if kind.endswith("csv") else "\t") if kind.endswith(("csv", "tsv")) else JSONL
    content = text.encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert list(read_manifest(str(path))) == ROWS


def test_a_header_that_is_wrong_is_wrong_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("video,sentence\na.mp4,hello\n")
    with pytest.raises(ValueError, match=r"m\.csv: the column 'sentence' is not read: call it captions"):
        list(read_manifest(str(tmp_path / "m.csv")))
    parquet.write_table(pa.table({"film": ["a.mp4"]}), tmp_path / "m.parquet")
    with pytest.raises(ValueError, match=r"m\.parquet: no `video` \(its columns: film\)"):
        list(read_manifest(str(tmp_path / "m.parquet")))
    path = write(tmp_path, *['{"film": "a.mp4"}'] * 200)
    with pytest.raises(ValueError, match="none of its first 100 rows is a clip: line 1: no `video`"):
        list(read_manifest(path))


def test_tables_as_data_frames_and_spreadsheets_write_them(tmp_path: Path) -> None:
    """An index without a name in front, a word for no value, semicolons or tabs in a .csv."""
    path = tmp_path / "m.csv"
    for text in (
        ",video,caption,start\n0,/a.mp4,one,\n1,/b.mp4,NaN,2.5\n",
        "video;caption;start\n/a.mp4;one;None\n/b.mp4;null;2.5\n",
        "video\tcaption\tstart\n/a.mp4\tone\n\n/b.mp4\t<NA>\t2.5\n",
    ):
        path.write_text(text)
        assert list(read_manifest(str(path))) == [Row("/a.mp4", "a", ["one"]), Row("/b.mp4", "b", start=2.5)]
    path.write_text("video,caption,caption\n/a.mp4,one,two\n")
    with pytest.raises(ValueError, match="two of its columns are called 'caption': keep one"):
        list(read_manifest(str(path)))


def test_cells_beyond_the_header_are_a_fault(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("video,caption\na.mp4,one\nb.mp4,two, three\n")
    good, bad = read_manifest(str(tmp_path / "m.csv"))
    assert good.captions == ["one"] and "more cells than the header has columns (2)" in bad.fault


def test_a_manifest_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.jsonl: no such manifest"):
        list(read_manifest(str(tmp_path / "gone.jsonl")))
    with pytest.raises(ValueError, match="is a folder"):
        list(read_manifest(str(tmp_path)))
    (tmp_path / "m.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a Parquet file"):
        list(read_manifest(str(tmp_path / "m.parquet")))
    (tmp_path / "v.jsonl").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"v\.jsonl: .*line 1: not JSON"):
        list(read_manifest(str(tmp_path / "v.jsonl")))
    (tmp_path / "m.csv.gz").write_bytes(gzip.compress(b"video\n" + b"a.mp4\n" * 10)[:-12])
    with pytest.raises(ValueError, match="gzip is damaged or incomplete"):
        list(read_manifest(str(tmp_path / "m.csv.gz")))


def test_ids_default_to_the_name_without_its_last_extension() -> None:
    names = {"a.b.mp4": "a.b", "x/-c.mp4": "-c", ".hidden": ".hidden", "noext": "noext", "f/": "f"}
    names |= {"s3://b/k/é.webm": "é", "https://e.com/v.mp4?x=1": "v", "a b%20.mp4": "a b%20"}
    assert {video: Row.parse({"video": video}).id for video in names} == names


def test_written_rows_are_read_as_they_were(tmp_path: Path) -> None:
    rows = [
        Row(
            "/v/a.mp4", "a", ["é 🎬 \u2028"], "val", 0.0, 4.25, [{"question": "q", "answer": "a"}], {"k": [1]}
        ),
        Row("s3://b/k.mp4", "x" * 300),
        Row("/v/" + os.fsdecode(b"\xff\xfe.mp4"), "odd"),
        Row("/v/new\nline.mp4", 'quote" and \\'),
    ]
    out = str(tmp_path / "sub" / "out.jsonl")
    assert write_manifest(rows, out) == 4
    assert list(read_manifest(out)) == rows
    with pytest.raises(ValueError, match="there is no clip to write"):
        write_manifest([], str(tmp_path / "none.jsonl"))
    assert not (tmp_path / "none.jsonl").exists()


def test_a_folder_becomes_a_manifest(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    names = [
        "b.mp4",
        "a.MKV",
        "sub/b.webm",
        "same.mp4",
        "same.webm",
        "noext",
        "-x.mp4",
        "ü 🎬.mp4",
        "no\nline.avi",
    ]
    names.append(os.fsdecode(b"\xff.mov"))
    for name in [*names, "notes.txt", "pic.jpg", ".hidden", "sub/b.json"]:
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        (videos / name).write_bytes(b"\x1aE\xdf\xa3")
    (videos / "folder.mp4").mkdir()
    (videos / "dangling.mp4").symlink_to("gone")
    count = folder_manifest(str(videos), str(tmp_path / "m.jsonl"))
    rows = list(read_manifest(str(tmp_path / "m.jsonl")))
    assert count == len(rows)
    assert {row.video for row in rows} >= {str(videos / name) for name in names}
    assert not {row.video for row in rows} & {
        str(videos / name) for name in ("notes.txt", "pic.jpg", ".hidden")
    }
    assert len({row.id for row in rows}) == len(rows)
    assert {"a", "sub/b", "same.mp4", "same.webm", "noext"} <= {row.id for row in rows}
    with pytest.raises(ValueError, match="no videos in it"):
        folder_manifest(str(tmp_path / "empty"), str(tmp_path / "n.jsonl"))


def test_what_lies_beside_videos_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    for name in (".plan/lock", "shards/.plan/lock", ".git/x.mp4", "LICENSE", "Makefile", "empty"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name.endswith("empty") else b"words, and no video\n")
    assert folder_manifest(str(tmp_path), str(tmp_path / "m.jsonl")) == 1


def test_ids_stay_apart_whatever_becomes_of_them(tmp_path: Path) -> None:
    """Of case, of composed letters, of an extension that is another's name."""
    names = [
        "x/clip.mp4",
        "y/clip.mp4",
        "v.mp4",
        "v.webm",
        "v.mp4.mkv",
        "é.mp4",
        "e\u0301.avi",
        "A.mp4",
        "a.avi",
    ]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    folder_manifest(str(tmp_path / "in"), str(tmp_path / "m.jsonl"))
    ids = [row.id for row in read_manifest(str(tmp_path / "m.jsonl"))]
    folded = {unicodedata.normalize("NFC", id).casefold() for id in ids}
    assert len(folded) == len(ids) == len(names) and {"x/clip", "y/clip"} <= set(ids)
