"""Write docs/config.md: a table of every key of a config, made from config.py.

    python docs/make_config.py

A test fails while the page differs from what this writes. The one-line comments in `Config` become
the section headings.
"""

import inspect
import json
import re
import sys
import typing
from pathlib import Path

from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import FIELDS, TYPES, Config  # noqa: E402
from models import BACKBONES  # noqa: E402
from support.system.settings import choices_of, may_change, range_of, wanted  # noqa: E402

HEAD = """\
# The keys of a config

*`python docs/make_config.py` makes this page from `config.py`. Change it there.*

A config must set `working_dir`. Every other key has a default. `--set KEY=VALUE` replaces a value.
*May change* says whether a run may continue with another value. Any other change makes it another
experiment, which `--allow-changed KEY` has to confirm ([training](training.md#continue)).
"""
COLUMNS = """
| key | default | values | meaning | may change |
| --- | --- | --- | --- | --- |
"""


def page() -> str:
    """The text of docs/config.md."""
    return HEAD + "".join(section_or_row(line) for line in inspect.getsource(Config).splitlines())


def section_or_row(line: str) -> str:
    """The Markdown of one line of `Config`: the head of a table, a row, or nothing."""
    if key := re.match(r"    (\w+): ", line):
        row_of_key = row(key[1], FIELDS[key[1]])
        return head_of("Run", None) + row_of_key if key[1] == "working_dir" else row_of_key
    if section := re.fullmatch(r"    # ([A-Z]\w+)(?:[:;] (.+))?", line):
        return head_of(section[1], section[2])
    return ""


def head_of(name: str, remark: str | None) -> str:
    """A section's heading, a remark on it, and the head of its table."""
    said = f"\n{remark[0].upper()}{remark[1:]}.\n" if remark else ""
    return f"\n## {name}\n{said}{COLUMNS}"


def row(name: str, field: FieldInfo) -> str:
    """One key's row."""
    changes = "yes" if may_change(field) else ""
    return (
        f"| `{name}` | {shown(field.default)} | {values_of(name, field)} | {field.description} "
        f"| {changes} |\n"
    )


def shown(default: object) -> str:
    """A default as a config spells it."""
    if default == "":
        return "none: must be given"
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def values_of(name: str, field: FieldInfo) -> str:
    """The values that a key may have, in words."""
    if name == "model_type":
        return "; ".join(backbone.written for backbone in BACKBONES.values())
    if name == "method":
        return f"`{field.default}`, or FILE.py:NAME with --set"
    parts = typing.get_args(TYPES[name])
    is_optional = type(None) in parts
    if choices := choices_of(field):
        words = ", ".join(f"`{choice}`" for choice in choices)
    else:
        limits = range_of(field)
        words = wanted(parts[0] if is_optional else TYPES[name]).removeprefix("a ")
        words += f", {limits}" if limits else ""
    return f"{words}, or null" if is_optional and not words.endswith("or null") else words


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(page())
