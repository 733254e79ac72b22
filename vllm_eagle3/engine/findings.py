"""The lines of the doctor's report."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "absent", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section: its heading.
        name: what was looked at.
        status: ``problem`` keeps trees from being served, ``absent`` does not.
        detail: what was found.
        remedy: what to do about it; empty if nothing.
    """

    section: str
    name: str
    status: Status
    detail: str
    remedy: str = ""


def render(findings: Iterable[Finding]) -> str:
    """The report for a person: sections, then the verdict and what to do."""
    findings = list(findings)
    width = max(len(finding.name) for finding in findings)
    marks = {"ok": "ok", "absent": "--", "problem": "!!"}
    lines = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section]
        line = f"  {marks[finding.status]}  {finding.name:<{width}}  {finding.detail}"
        lines.append(line.rstrip())
    problems = [finding for finding in findings if finding.status == "problem"]
    if problems:
        lines += ["", "Draft trees cannot be served here. What to do:"]
    else:
        lines += ["", "Draft trees can be served here."]
    remedies = dict.fromkeys(f.remedy for f in problems or findings if f.remedy)
    lines += [f"  - {remedy}" for remedy in remedies]
    return "\n".join(lines[1:])
