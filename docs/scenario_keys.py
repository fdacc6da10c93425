"""Write the key tables of scenarios.md, and the JSON Schema for editors, from the classes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from privrec.scenario.keys import Key, json_schema, keys
from privrec.scenario.load import Scenario
from privrec.scenario.schema import TABLES

HERE = Path(__file__).parent


def main() -> None:
    """Replace each section's tables, which follow one another after its text."""
    page = (HERE / "scenarios.md").read_text("utf-8")
    for table, rows in reference().items():
        heading = f"## [{table}]\n" if table else "## Above the tables\n"
        before, section, after = _section(page, heading)
        text = re.sub(r"(^\|.*\n\n?)+", lambda _, rows=rows: f"{rows}\n\n", section, flags=re.M)
        page = before + text + after
    (HERE / "scenarios.md").write_text(page, "utf-8")
    schema = json.dumps(json_schema(Scenario), indent=1, ensure_ascii=False)
    (HERE / "schemas" / "scenario.json").write_text(schema + "\n", "utf-8")


def reference() -> dict[str, str]:
    """The tables of keys in Markdown, by the table of a scenario that they describe."""
    everything, found = keys(), {}
    for table, section in TABLES.items():
        here = [key for key in everything if key.table == table]
        lines = ["| key | takes | unit | default | meaning |", "|---|---|---|---|---|"]
        lines += [_row(key) for key in here if key.registry is None]
        for registry in section.registries:
            name = registry.key
            lines += ["", f"| `{name}` | is | has the keys |", "|---|---|---|"]
            for kind in registry:
                own = ", ".join(f"`{key}`" for key in registry[kind].config.model_fields)
                lines.append(f"| `{kind}` | {registry[kind].meaning} | {own} |")
            of_kinds = [key for key in here if key.registry is registry]
            if of_kinds:
                lines += ["", f"| key of a `{name}` | takes | unit | default | meaning |"]
                lines += ["|---|---|---|---|---|", *map(_row, of_kinds)]
        found[table] = "\n".join(lines)
    return found


def _row(key: Key) -> str:
    default = key.default if key.default in ("required", "unset") else f"`{key.default}`"
    return f"| `{key.name}` | {key.rule} | {key.unit} | {default} | {key.meaning} |"


def _section(page: str, heading: str) -> tuple[str, str, str]:
    before, _, rest = page.partition(heading)
    section, mark, after = rest.partition("\n## ")
    return before + heading, section + "\n", mark[1:] + after


if __name__ == "__main__":
    main()
