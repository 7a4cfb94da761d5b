import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trackrec.align.teachers import recorded


def test_recordings_from_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [{"context_id": "a", "text": " likes\u2028films "}, {"context_id": "b", "text": "x", "user_id": "7"}]
    jsonl, parquet = tmp_path / "r.jsonl", tmp_path / "r.parquet"
    jsonl.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    assert recorded.read(jsonl) == recorded.read(parquet) == {"a": "likes\u2028films", "b": "x"}
    assert recorded.locate(str(jsonl)) == jsonl
    assert recorded.locate("ml-100k").name == "ml-100k.jsonl"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"context_id": "a", "text": "x"}\nnonsense\n', r"r\.jsonl:2: no JSON: "),
        ("[]\n", r"r\.jsonl:1: no JSON object"),
        ('{"context_id": "a"}\n', r"r\.jsonl:1: must have"),
        ('{"context_id": "a", "text": "  "}\n', r"r\.jsonl:1: must have"),
        (
            '{"context_id": "a", "text": "x"}\n{"context_id": "a", "text": "y"}\n',
            r"r\.jsonl:2: context a is recorded before",
        ),
    ],
)
def test_faulty_recordings_are_refused_with_their_place(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(recorded.RecordingError, match=message) as caught:
        recorded.read(path)
    assert str(path) in str(caught.value)


def test_recordings_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(recorded.RecordingError, match="no such file"):
        recorded.locate(str(tmp_path / "none.jsonl"))
    (tmp_path / "r.jsonl").write_bytes(b'{"context_id": "a", "text": "x"}\n\xff\xfe\n')
    with pytest.raises(recorded.RecordingError, match=r"r\.jsonl:2: not UTF-8"):
        recorded.read(tmp_path / "r.jsonl")
    (tmp_path / "r.parquet").write_bytes(b"PAR0")
    with pytest.raises(recorded.RecordingError, match="no Parquet file"):
        recorded.read(tmp_path / "r.parquet")
    pq.write_table(pa.table({"context_id": ["a", "b"], "text": ["x", ""]}), tmp_path / "r.parquet")
    with pytest.raises(recorded.RecordingError, match=r"r\.parquet: row 2: must have"):
        recorded.read(tmp_path / "r.parquet")
    data = bytearray((tmp_path / "r.parquet").read_bytes())
    data[4:40] = b"\xff" * 36
    (tmp_path / "r.parquet").write_bytes(data)
    with pytest.raises(recorded.RecordingError, match=r"r\.parquet: no .*Parquet file"):
        recorded.read(tmp_path / "r.parquet")
