from pathlib import Path

import pytest

from trackrec.journal import Journal


def test_journal_keeps_records_and_cuts_an_unfinished_line(tmp_path: Path) -> None:
    path = tmp_path / "a" / "j.jsonl"
    with Journal(path) as journal:
        journal.append({"text": "line one\nline two \u2028 \x85 é"})
    with path.open("ab") as file:
        file.write(b'{"text": "ha')
    with Journal(path) as journal:
        assert journal.records == [{"text": "line one\nline two \u2028 \x85 é"}]
        journal.append({"text": "next"})
    with Journal(path) as journal:
        assert [record["text"][:4] for record in journal.records] == ["line", "next"]


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "j.jsonl").write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"j\.jsonl:2: no record.*delete the file"):
        Journal(tmp_path / "j.jsonl")
