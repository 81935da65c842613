"""Tables of examples: CSV, TSV and JSON Lines. Every complaint names the file, the line and the column.

CSV is that of RFC 4180 (fields in double quotes may hold commas, quotes and line ends), with commas or semicolons. TSV
has no quoting: a field ends at a tab. JSON Lines has one object in each line. All are UTF-8.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .corpus import DataError

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson")
CSV_FIELD_LIMIT = 1 << 30  # characters; the csv module's own limit of 131,072 is too little for a document


@dataclass(frozen=True)
class Field:
    """A column that a task reads: its name, other names it goes by, and whether it must be there."""

    name: str
    aliases: tuple[str, ...] = ()
    required: bool = True


@dataclass(frozen=True)
class Example:
    """One row: the place it comes from, and its values by field."""

    where: str  # file:line
    columns: Mapping[str, str]  # the column in the file that each field was found in
    values: Mapping[str, Any]

    def has(self, field: str) -> bool:
        return self.values.get(field) not in (None, "")

    def error(self, field: str, problem: str) -> DataError:
        return DataError(f"{self.where}: column {self.columns.get(field, field)}: {problem}")

    def text(self, field: str) -> str:
        """A text that is not blank."""
        value = self.values[field]
        if not isinstance(value, str):
            raise self.error(field, f"expected a text, got {_short(value)}")
        if not value.strip():
            raise self.error(field, "it is empty")
        return value

    def label(self, field: str) -> str:
        """The name of a class; of whole numbers and booleans, their text."""
        value = self.values[field]
        if isinstance(value, bool):
            return str(value).lower()
        if not isinstance(value, str | int) or not str(value).strip():
            raise self.error(field, f"expected a label, got {_short(value) if value != '' else 'nothing'}")
        return str(value).strip()

    def words(self, field: str) -> list[str]:
        """Words: a list of texts, or one text that is cut at its blanks."""
        value = self.values[field]
        words = value.split() if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(w, str) and w.strip() for w in words):
            raise self.error(field, f"expected words, as a list or separated by blanks, got {_short(value)}")
        if not words:
            raise self.error(field, "it is empty")
        return words

    def whole(self, field: str) -> int:
        """A whole number, 0 or more."""
        value = self.values[field]
        text = value.strip() if isinstance(value, str) else value
        if isinstance(text, str) and text.isdecimal():
            return int(text)
        if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
            return text
        raise self.error(field, f"expected a whole number, got {_short(value)}")


def read_examples(
    path: str | Path, fields: Sequence[Field], chosen: Mapping[str, str | None], header: str = "auto"
) -> list[Example]:
    """The rows of a file, with the columns that `fields` ask for.

    Args:
        chosen: the column of each field, by name (or by number from 1, where there is no header); None: found by the
            field's name and aliases.
        header: whether the first line of a CSV or TSV names the columns: "true", "false", or "auto": it does unless
            none of its names is known and the fields are a text and a label, whose values tell which is which.

    Raises:
        DataError: no such file, another format, a malformed line, a column that is not there, or no rows.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path}: expected a file ending in {', '.join(ENDINGS)}")
    for field, column in chosen.items():
        if column is not None and field not in {f.name for f in fields}:
            names = ", ".join(f.name for f in fields)
            raise DataError(f"columns.{field}: the task has no such column; it has {names}")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _from_json(path, fields, chosen)
    return _from_rows(path, fields, chosen, header)


def find_tables(folder: Path) -> tuple[Path, Path | None]:
    """Of a folder, the table named train and the one named validation, valid, val or dev, if there is one.

    Raises:
        DataError: no train table, or several.
    """
    found = {f.name: f for f in sorted(folder.iterdir()) if f.suffix.lower() in ENDINGS}
    train = [f for f in found.values() if f.stem.lower() == "train"]
    if len(train) != 1:
        raise DataError(f"{folder}: expected one of train{', train'.join(ENDINGS)} in it, found {len(train)}")
    held_out = [f for f in found.values() if f.stem.lower() in ("validation", "valid", "val", "dev")]
    if len(held_out) > 1:
        raise DataError(f"{folder}: {held_out[0].name} and {held_out[1].name} are both there; choose by --validation")
    return train[0], held_out[0] if held_out else None


# ---- JSON Lines ----


def _from_json(path: Path, fields: Sequence[Field], chosen: Mapping[str, str | None]) -> list[Example]:
    examples, columns = [], None
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise DataError(f"{where}: expected a JSON object, got {_short(values)}")
        if columns is None:
            columns = _match(where, list(values), fields, chosen)
        examples.append(_example(where, columns, values, fields))
    return _not_empty(path, examples)


def _example(where: str, columns: Mapping[str, str], values: Mapping[str, Any], fields: Sequence[Field]) -> Example:
    for field in fields:
        column = columns.get(field.name, field.name)
        if field.required and values.get(column) is None:
            raise DataError(f"{where}: column {column}: it is missing; this line has {', '.join(values) or 'nothing'}")
    return Example(where, columns, {name: values.get(column) for name, column in columns.items()})


# ---- CSV and TSV ----


def _from_rows(path: Path, fields: Sequence[Field], chosen: Mapping[str, str | None], header: str) -> list[Example]:
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path}: it is empty")
    width = len(rows[0][1])
    for number, row in rows:
        if len(row) != width:
            raise DataError(
                f"{path}:{number}: column {min(len(row), width) + 1}: the line has {len(row)} columns, "
                f"the first one {width}"
            )
    first = [cell.strip() for cell in rows[0][1]]
    if header == "true" or (header == "auto" and _names_columns(first, fields, chosen)):
        columns, rows = _match(f"{path}:{rows[0][0]}", first, fields, chosen), rows[1:]
        names = first
    else:
        names = [str(i + 1) for i in range(width)]
        columns = _numbered(path, names, rows, fields, chosen, sure=header == "false")
    examples = [_example(f"{path}:{n}", columns, dict(zip(names, row, strict=True)), fields) for n, row in rows]
    return _not_empty(path, examples)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number of the first line, and cells, of each row that is not blank."""
    if path.suffix.lower() == ".tsv":
        yield from ((n, line.rstrip("\r\n").split("\t")) for n, line in _lines(path) if line.strip())
        return
    csv.field_size_limit(CSV_FIELD_LIMIT)
    first = next((line for _, line in _lines(path)), "")
    delimiter = ";" if first.count(";") > first.count(",") else ","
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    number = 1
    try:
        for row in reader:
            if row:
                yield number, row
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{number}: not CSV ({error})") from None


def _names_columns(first: list[str], fields: Sequence[Field], chosen: Mapping[str, str | None]) -> bool:
    given = {column for column in chosen.values() if column is not None}
    if given:
        return not all(column.isdecimal() and column not in first for column in given)
    known = {_plain(name) for field in fields for name in (field.name, *field.aliases)}
    if any(_plain(cell) in known for cell in first):
        return True
    return [f.name for f in fields if f.required] != ["text", "label"] or len(first) != 2


def _numbered(
    path: Path, names: list[str], rows: list[Any], fields: Sequence[Field], chosen: Mapping[str, str | None], sure: bool
) -> dict[str, str]:
    """The columns of a file without a header."""
    if any(chosen.values()):
        return _match(f"{path}:1", names, fields, chosen)
    required = [f.name for f in fields if f.required]
    if len(names) != len(required):
        raise DataError(
            f"{path}: {len(names)} columns without names; tell them by --columns.{required[0]} 1 and so on "
            f"(needed: {', '.join(required)})"
        )
    if required != ["text", "label"]:
        return dict(zip(required, names, strict=True))
    values = [[row[i] for _, row in rows] for i in range(2)]
    label = 0 if len(set(values[0])) < len(set(values[1])) else 1
    if not sure and len(rows) > 1 and values[label].count(values[label][0]) == 1:
        cells = ", ".join(rows[0][1])
        raise DataError(
            f"{path}:{rows[0][0]}: no column of a known name ({_short(cells)}); tell them by --columns.text NAME "
            "--columns.label NAME, or give --header false if this line is an example"
        )
    return {"text": names[1 - label], "label": names[label]}


# ---- both ----


def _match(where: str, names: list[str], fields: Sequence[Field], chosen: Mapping[str, str | None]) -> dict[str, str]:
    """The column of each field; DataError for one that is not there."""
    columns: dict[str, str] = {}
    for field in fields:
        wanted = chosen.get(field.name)
        if wanted is not None:
            if wanted not in names:
                raise DataError(f"{where}: columns.{field.name}: no column {wanted}; there are {', '.join(names)}")
            columns[field.name] = wanted
            continue
        for name in (field.name, *field.aliases):
            match = [column for column in names if _plain(column) == name and column not in columns.values()]
            if match:
                columns[field.name] = match[0]
                break
        else:
            if field.required:
                raise DataError(
                    f"{where}: no column for {field.name} among {_short(', '.join(names))}; "
                    f"tell it by --columns.{field.name} NAME"
                )
    return columns


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with path.open("rb") as f:
            for number, line in enumerate(f, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if "\0" in text:
                    raise DataError(f"{path}:{number}: column {text.index(chr(0)) + 1}: a zero byte; is this text?")
                yield number, text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _not_empty(path: Path, examples: list[Example]) -> list[Example]:
    if not examples:
        raise DataError(f"{path}: no examples in it")
    return examples


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
