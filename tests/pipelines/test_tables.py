"""A manifest that is one JSON array, however it is laid out and wherever its pieces end."""

import json
from pathlib import Path

import pytest

from hbi.pipelines import tables
from hbi.pipelines.tables import Unreadable, read_table

ROWS = [
    {"video": f"{number}.mp4", "captions": ['] } , " é'], "qa": [{"question": "q", "answer": "a"}]}
    for number in range(50)
]


@pytest.mark.parametrize("piece", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2, "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_an_array_gives_the_rows_that_lines_give(
    piece: int, indent: int | str | None, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "PIECE_CHARACTERS", piece)
    path = tmp_path / "manifest.json"
    path.write_text("\n " + json.dumps(ROWS, indent=indent, ensure_ascii=False), encoding=encoding)
    assert [row for _, row in read_table(str(path))] == ROWS


def test_lines_are_counted_and_a_row_that_is_none_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text('[{"video": "a.mp4"},\n\n 12, {"video":\n "b.mp4"},\n{"video": "c.mp4"}\n]\n')
    found = list(read_table(str(path)))
    assert [where for where, _ in found] == ["line 1", "line 3", "line 3", "line 5"]
    assert isinstance(found[1][1], Unreadable) and found[3][1] == {"video": "c.mp4"}
    path.write_text("[ ]")
    assert list(read_table(str(path))) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"video": "a"}\n {"video": "b"}]', "line 2: .*, is missing before"),
        ('[{"video": "a"},\n {"video": "b"}', "line 2: .*it breaks off where , is missing"),
        ('[{"video": "a"},\n {"video": b}]', r"line 2: not JSON \(Expecting value\): mend it"),
        ('[{"video": "a"},\n {"vid', r"line 2: not JSON \(Unterminated string"),
        ('[{"video": "a"}]\n{"video": "b"}', "line 2: there is more after the end"),
    ],
)
def test_an_array_that_cannot_be_read_to_its_end_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        list(read_table(str(path)))


def test_lines_of_which_one_is_an_array_stay_lines(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text('[1, 2]\n{"video": "a.mp4"}\n')
    assert [isinstance(row, dict) for _, row in read_table(str(path))] == [False, True]
