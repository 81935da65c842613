"""Tables of examples: what is read, what is detected, and what is refused, with file, line and column."""

from pathlib import Path

import pytest

from bigmodel_fast.data import Buckets, DataError, Field, find_tables, labelled_snippets, read_examples
from bigmodel_fast.data.buckets import by_length

CLASSIFY = (Field("text", ("sentence",)), Field("label", ("class",)), Field("pair", required=False))
TRANSLATE = (Field("source"), Field("target"))


def read(folder: Path, name: str, content: str | bytes, fields=CLASSIFY, header: str = "auto", **chosen: str):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_examples(path, fields, chosen, header)


def pairs(examples) -> list[tuple[str, str]]:
    return [(e.text("text"), e.label("label")) for e in examples]


WHOLE = [("good, they said", "yes"), ('so "so"\nlala', "no"), ("bad", "yes")]


@pytest.mark.parametrize(
    ("name", "text", "chosen"),
    [
        ("a.csv", 'sentence,class\n"good, they said",yes\n"so ""so""\nlala",no\n\nbad,yes\n', {}),
        ("a.csv", '\ufeffSentence,Class\r\n"good, they said",yes\r\n"so ""so""\nlala",no\r\nbad,yes\r\n', {}),
        ("a.csv", 'class;id;sentence\nyes;1;good, they said\nno;2;"so ""so""\nlala"\nyes;3;bad\n', {}),
        ("a.csv", 'yes,"good, they said"\nno,"so ""so""\nlala"\nyes,bad\n', {}),
        ("a.csv", 'what,how\n"good, they said",yes\n"so ""so""\nlala",no\nbad,yes\n', {"text": "what", "label": "how"}),
        ("a.csv", '1,"good, they said",yes\n2,"so ""so""\nlala",no\n3,bad,yes\n', {"text": "2", "label": "3"}),
        ("a.jsonl", '{"text": "good, they said", "label": "yes"}\n\n{"label": "no", "text": "so \\"so\\"\\nlala"}\n'
         '{"text": "bad", "label": "yes", "more": [1]}', {}),
    ],
    ids=["quoted", "BOM and CRLF", "semicolons", "no header", "names", "numbers", "JSON Lines"],
)  # fmt: skip
def test_what_is_read(name: str, text: str, chosen: dict[str, str], tmp_path: Path) -> None:
    assert pairs(read(tmp_path, name, text, **chosen)) == WHOLE


def test_tsv_has_no_quotes(tmp_path: Path) -> None:
    found = read(tmp_path, "a.tsv", 'a "b\t1\nthat\'s "it"\t0\nx\t1\n')
    assert pairs(found) == [('a "b', "1"), ('that\'s "it"', "0"), ("x", "1")]
    assert found[1].where.endswith("a.tsv:2")


def test_labels_are_numbers_and_booleans_too(tmp_path: Path) -> None:
    lines = '{"text": "a", "label": 3}\n{"text": "b", "label": true}\n'
    assert [e.label("label") for e in read(tmp_path, "a.jsonl", lines)] == ["3", "true"]


BAD = {
    "empty": ("a.csv", "", {}, "a.csv: it is empty"),
    "header only": ("a.csv", "text,label\n", {}, "a.csv: no examples in it"),
    "too few cells": ("a.csv", "text,label\na,b\nc\n", {}, ":3: column 2: the line has 1 columns, the first one 2"),
    "too many cells": ("a.tsv", "text\tlabel\na\tb\tc\n", {}, ":2: column 3: the line has 3 columns, the first one 2"),
    "open quote": ("a.csv", 'text,label\na,b\n"c,d\ne', {}, "a.csv:3: not CSV (unexpected end of data)"),
    "not UTF-8": ("a.csv", b"text,label\na,b\n\xff\xfe,b\n", {}, "a.csv:3: not UTF-8 text"),
    "binary": ("a.tsv", b"text\tlabel\nab\0\tb\n", {}, "a.tsv:2: column 3: a zero byte"),
    "unknown names": ("a.csv", "what,how\na,b\nc,b\n", {}, "a.csv:1: no column of a known name (what, how)"),
    "wrong name": ("a.csv", "text,label\na,b\n", {"label": "x"}, ":1: columns.label: no column x; there are text"),
    "no such field": ("a.csv", "text,label\na,b\n", {"source": "text"}, "columns.source: the task has no such column"),
    "three columns": ("a.csv", "a,b,c\n1,2,3\n", {}, "no column for text among a, b, c; tell it by --colu"),
    "not JSON": ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": ', {}, "a.jsonl:2: not JSON"),
    "no object": ("a.jsonl", "[1, 2]\n", {}, "a.jsonl:1: expected a JSON object, got [1, 2]"),
    "missing key": ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": "a"}\n', {}, ":2: column label: it is missing"),
    "ending": ("a.parquet", "text", {}, "expected a file ending in .csv, .tsv, .jsonl, .ndjson"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_what_is_refused(case, tmp_path: Path) -> None:
    name, text, chosen, message = case
    with pytest.raises(DataError) as error:
        read(tmp_path, name, text, **chosen)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3, "label": "b"}', "a.jsonl:1: column text: expected a text, got 3"),
        ('{"text": " ", "label": "b"}', "a.jsonl:1: column text: it is empty"),
        ('{"text": "a", "label": 0.5}', "a.jsonl:1: column label: expected a label, got 0.5"),
        ('{"text": "a", "label": ""}', "a.jsonl:1: column label: expected a label, got nothing"),
    ],
)
def test_what_a_cell_must_hold(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        pairs(read(tmp_path, "a.jsonl", line))
    assert message in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_examples(tmp_path / "none.csv", CLASSIFY, {})


def test_header_can_be_told(tmp_path: Path) -> None:
    lines = "text,label\nmore text,label\n"
    assert pairs(read(tmp_path, "a.csv", lines, header="false", text="1", label="2"))[0] == ("text", "label")
    found = read(tmp_path, "a.csv", "a,b\nc,d\n", TRANSLATE, header="false")
    assert [(e.text("source"), e.text("target")) for e in found] == [("a", "b"), ("c", "d")]


def test_files_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found 0"):
        find_tables(tmp_path)
    for name in ("train.tsv", "dev.tsv", "test.tsv", "notes.txt"):
        (tmp_path / name).touch()
    assert [f.name for f in find_tables(tmp_path) if f] == ["train.tsv", "dev.tsv"]
    (tmp_path / "val.csv").touch()
    with pytest.raises(DataError, match=r"dev\.tsv and val\.csv are both there"):
        find_tables(tmp_path)


def test_snippets_of_the_standard_library() -> None:
    train, validation = labelled_snippets()
    labels = {e.label("label") for e in train}
    assert len(labels) >= 5
    assert {e.label("label") for e in validation} <= labels
    assert not {e.where.rpartition(":")[0] for e in train} & {e.where.rpartition(":")[0] for e in validation}
    assert min(len(e.text("text")) for e in train) >= 100


# ---- batches ----


def test_buckets_hold_each_example_once_and_little_padding() -> None:
    lengths = [1 + (i * 37) % 100 for i in range(1000)]
    buckets = Buckets(lengths, 16, seed=3)
    epochs = [[buckets.next() for _ in range(len(buckets))] for _ in range(2)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(1000))
    assert epochs[0] != epochs[1]

    def padded(batches: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in b) * len(b) for b in batches)

    plain = Buckets(lengths, 16, seed=3, bucketed=False)
    shuffled = [plain.next() for _ in range(len(plain))]
    assert padded(epochs[0]) < 1.05 * sum(lengths) < 1.5 * sum(lengths) < padded(shuffled)
    longest = by_length(lengths, 16)
    assert lengths[longest[0][0]] == 100
    assert padded(longest) <= padded(epochs[0])


def test_buckets_go_on_from_a_position() -> None:
    buckets = Buckets(list(range(1, 51)), 8, seed=1)
    for _ in range(9):
        buckets.next()
    other = Buckets(list(range(1, 51)), 8, seed=1)
    other.load_state_dict(buckets.state_dict())
    assert [buckets.next() for _ in range(20)] == [other.next() for _ in range(20)]
