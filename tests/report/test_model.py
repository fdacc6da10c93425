"""The report as data, and its page in the documentation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from privrec.report import render
from privrec.report.model import (
    Accounting,
    Accuracy,
    Adversary,
    AuditPart,
    Charged,
    Checked,
    Cost,
    Definition,
    Deployment,
    Fallback,
    Mechanism,
    Metric,
    NoiseBand,
    Outputs,
    OutsideTheLedger,
    Privacy,
    Reading,
    Report,
    Sampling,
    Scope,
    Segment,
    TrustModel,
    flat,
    json_schema,
    schema_text,
)

DOCS = Path(__file__).parents[2] / "docs" / "report.md"


def test_nested_facts_become_flat() -> None:
    nested = {"model": {"dim": 32, "hidden": [64, 32]}, "name": "a", "none": None}
    assert flat(nested) == {"model.dim": 32, "model.hidden": "64, 32", "name": "a", "none": None}


def test_the_schema_forbids_unknown_fields_everywhere() -> None:
    schema = json_schema()
    objects = [schema, *schema["$defs"].values()]
    assert all(part["additionalProperties"] is False for part in objects)
    assert json.loads(schema_text()) == schema


def test_no_name_in_the_schema_could_hold_a_realised_cohort() -> None:
    names = set(re.findall(r'"(\w*cohort\w*)":', schema_text()))
    assert names == {"expected_cohort", "small_cohort_delta"}


@pytest.mark.parametrize(
    "part",
    [
        Report, Privacy, Charged, Adversary, Scope, TrustModel, Fallback, Definition, Outputs,
        Mechanism, NoiseBand, Sampling, Accounting, OutsideTheLedger, Deployment, Reading,
        AuditPart, Checked, Segment, Accuracy, Metric, Cost,
    ],
)  # fmt: skip
def test_every_field_is_documented(part: type[Report]) -> None:
    text = DOCS.read_text(encoding="utf-8")
    told_by_the_table_of_names = {"sees", "assumes"} if part is Adversary else set()
    named = set(re.findall(r"`(?:metrics\[\])?\.?(\w+)`", text)) | {"metrics", "privacy"}
    assert set(part.model_fields) - told_by_the_table_of_names - named == set()


def test_every_warning_is_documented() -> None:
    template = Path(render.__file__).parent / "templates" / "sentences.toml.j2"
    notice = r'^\[\[warnings\]\]\n(?:\w+ = "\w+"\n)*title = "(.+)"$'
    titles = re.findall(notice, template.read_text("utf-8"), flags=re.MULTILINE)
    assert len(titles) == 16
    for title in titles:
        assert f"| {title} |" in DOCS.read_text(encoding="utf-8")
