"""junit.xml: a test case for each row of the gate, as CI systems show them.

A row that failed is a failure, an undecided one an error: neither lets a pipeline go on, and they read differently.
Benchmark tasks follow, a case each that passes: they inform, the gate judges.
The format is what Jenkins, GitLab and GitHub's reporters agree on: https://github.com/testmoapp/junitxml.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from gemma_pack.reports import task_table, wording

if TYPE_CHECKING:
    from gemma_pack.report import Report


def render_junit(report: Report, name: str) -> str:
    """Return junit.xml for the variant called `name`."""
    judged = [metric for metric in report.metrics if metric.verdict != "not judged"]
    tasks = report.tasks.results if report.tasks else ()
    counts = {
        "tests": len(judged) + len(tasks),
        "failures": sum(metric.verdict == "fail" for metric in judged),
        "errors": sum(metric.verdict == "undecided" for metric in judged),
    }
    attributes = {key: str(value) for key, value in counts.items()}
    root = ET.Element("testsuites", {"name": "gemma-pack validate", **attributes})
    suite = ET.SubElement(root, "testsuite", {"name": name, **attributes})
    for metric in judged:
        case = ET.SubElement(suite, "testcase", {"classname": name, "name": wording.label(metric)})
        cells = (
            f"value {wording.value(metric)}, bound {wording.bound(metric) or 'none'}, margin {wording.margin(metric)}"
        )
        if metric.verdict == "pass":
            ET.SubElement(case, "system-out").text = cells
        else:
            kind = "failure" if metric.verdict == "fail" else "error"
            ET.SubElement(case, kind, {"message": cells, "type": metric.verdict}).text = "\n".join(
                wording.reasons(report)
            )
    for result, row in zip(tasks, task_table.rows(report.tasks) if report.tasks else [], strict=True):
        case = ET.SubElement(suite, "testcase", {"classname": name, "name": f"{result.label} {row[1]}"})
        ET.SubElement(case, "system-out").text = ", ".join(
            f"{title} {cell}" for title, cell in zip(task_table.HEADER[3:], row[3:], strict=True) if cell
        )
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
