"""Writes the table of environment variables in docs/operations.md from shared/config.py.

    python scripts/settings_table.py [--check]

`--check` changes nothing and fails when the table is not what it would write.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG, DOCUMENT = ROOT / "shared/config.py", ROOT / "docs/operations.md"
BEGIN, END = "<!-- settings: written by `make settings-table` -->\n", "<!-- end of settings -->\n"


def rows(source: str) -> Iterator[str]:
    """One table row for each field of `Settings`, a headline row for each group comment."""
    lines = source.splitlines()
    settings = next(
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Settings"
    )
    for field in settings.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.value:
            above = lines[field.lineno - 2].strip()
            if above.startswith("# "):
                yield f"| **{above[2:]}** | | |"
            comment = lines[(field.end_lineno or field.lineno) - 1].partition("  # ")[2]
            yield f"| `FLEXLLM_{field.target.id.upper()}` | {default(field.value)} | {comment} |"


def default(value: ast.expr) -> str:
    """The default as one types it into the environment."""
    if isinstance(value, ast.Call):
        named = [keyword.value for keyword in value.keywords if keyword.arg == "default"]
        return default((named or value.args)[0])
    if isinstance(value, ast.Constant):
        return f"`{value.value}`" if value.value not in (None, "") else ""
    number = eval_arithmetic(value)
    return f"`{int(number) if number == int(number) else number}`"


def eval_arithmetic(value: ast.expr) -> float:
    """Products of numbers, such as `512 * 1024 * 1024`."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult):
        return eval_arithmetic(value.left) * eval_arithmetic(value.right)
    if isinstance(value, ast.Constant) and isinstance(value.value, int | float):
        return value.value
    raise ValueError(f"{CONFIG}:{value.lineno}: a default that this table cannot show")


def main() -> None:
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    table = ["| variable | default | |", "| --- | --- | --- |", *rows(CONFIG.read_text())]
    written = before + BEGIN + "\n" + "\n".join(table) + "\n\n" + END + after
    if "--check" in sys.argv:
        sys.exit(None if written == text else f"{DOCUMENT} is out of date: run `make settings-table`")
    DOCUMENT.write_text(written)


if __name__ == "__main__":
    main()
