"""Write the key tables of scenarios.md, and the JSON Schema for editors, from the classes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from privrec.scenario.keys import json_schema, reference
from privrec.scenario.load import Scenario

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


def _section(page: str, heading: str) -> tuple[str, str, str]:
    before, _, rest = page.partition(heading)
    section, mark, after = rest.partition("\n## ")
    return before + heading, section + "\n", mark[1:] + after


if __name__ == "__main__":
    main()
