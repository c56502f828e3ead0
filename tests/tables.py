"""The page of tables of nbs/02_store.ipynb, and what files hold that it doesn't say."""
import csv
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pyarrow.types as kinds

NOTEBOOK = Path(__file__).parent.parent/"nbs/02_store.ipynb"
HUB = re.compile(r"round_\d+/(generator|judge)/(?!DONE|generator\.json|judge\.json)")   # the hub's own layouts
JSON_KINDS = {bool: "yes/no", int: "whole", float: "number", str: "text", dict: "object"}
ANYTHING = None   # where a file holds nothing but missing values


def page() -> dict[str, dict[str, tuple[str, str, str]]]:
    "{pattern of paths: {column: (type, unit, meaning)}}"
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    text = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "markdown")
    tables, columns = {}, {}
    for line in text.splitlines():
        if line.startswith("#"): columns = {}
        if line.startswith("### `"): tables |= dict.fromkeys(re.findall("`([^`]+)`", line), columns)
        row = re.fullmatch(r"\| `([^`]+)` \| (.*?) \| ?(.*?) \| ?(.*?) ?\|", line)
        if row: columns[row[1]] = row.groups()[1:]
    return tables


def matches(pattern: str, path: str) -> bool:
    "Whether a path is of a pattern: ** for folders, * within a name."
    parts = {"**/": "(.*/)?", "*": "[^/]*"}
    return re.fullmatch("".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*)", pattern)), path)


def json_kind(value):
    if value is None: return ANYTHING
    if not isinstance(value, list): return JSON_KINDS[type(value)]
    return {str: "list of text", dict: "list of objects"}.get(type(value[0]), "list of numbers") if value else ANYTHING


def arrow_kind(kind):
    if kinds.is_null(kind): return ANYTHING
    if kinds.is_list(kind):
        if kinds.is_struct(kind.value_type): return "list of objects"
        return "list of text" if kinds.is_string(kind.value_type) else "list of numbers"
    known = (("text", kinds.is_string), ("whole", kinds.is_integer), ("number", kinds.is_floating),
             ("yes/no", kinds.is_boolean))
    return next(name for name, is_it in known if is_it(kind))


def json_columns(path: Path, described) -> dict[str, str]:
    "Types of a JSON file's keys; those of an object too whose own keys the page names."
    data = json.loads(path.read_text("utf-8"))
    if isinstance(data, list): return {"(list)": json_kind(data)}
    columns = {}
    for key, value in data.items():
        columns[key] = json_kind(value)
        if isinstance(value, dict) and any(name.startswith(f"{key}.") for name in described):
            columns |= {f"{key}.{name}": json_kind(own) for name, own in value.items()}
    return columns


def columns_of(path: Path, described) -> dict[str, str]:
    "{column: its type, or None}"
    if path.suffix == ".csv":
        with open(path, encoding="utf-8") as file: return dict.fromkeys(next(csv.reader(file)), "text")
    if path.suffix != ".parquet": return json_columns(path, described)
    columns = {}
    for column in pq.read_schema(path):
        columns[column.name] = arrow_kind(column.type)
        if columns[column.name] != "list of objects": continue
        columns |= {f"{column.name}.{own.name}": arrow_kind(own.type) for own in column.type.value_type}
    return columns


def row_of(name: str, described):
    "What the page says of a column; {…} in its name stands for anything."
    if name in described: return described[name]
    for pattern, row in described.items():
        if "{" in pattern and re.fullmatch(re.sub(r"\\{.*?\\}", r"\\w+", re.escape(pattern)), name): return row


def faults(path: Path, name: str, tables, whole: bool = True):
    "What a file holds that the page doesn't say, or says otherwise; `whole`: and what it lacks."
    described = next((columns for pattern, columns in tables.items() if matches(pattern, name)), None)
    if described is None: return [f"{name}: no such table"]
    found, lines = columns_of(path, described), []
    for column, kind in found.items():
        row = row_of(column, described)
        if row is None: lines.append(f"{name}: {column} ({kind})")
        elif kind not in (row[0], ANYTHING) and (kind, row[0]) != ("whole", "number"):
            lines.append(f"{name}: {column} is {kind}, not {row[0]}")
    optional = [column for column, row in described.items() if "{" in column or row[2].startswith("only ")]
    missing = described.keys() - found.keys() - {*optional} if whole and found else []
    return lines + [f"{name}: no {column}" for column in sorted(missing)]


def undescribed(folder: Path, whole: bool = True) -> list[str]:
    "What the page of tables doesn't say about a run's folder."
    lines, tables = [], page()
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_ours = path.suffix in (".parquet", ".json") or path.name == "DONE"
        if is_ours and path.stat().st_size and not HUB.match(name): lines += faults(path, name, tables, whole)
    return lines
