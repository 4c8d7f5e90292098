"""A smoke run's outcome in JUnit's format, which CI servers show."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from visionselector_eval.harness.smoke.compare import Comparison, Outcome

# What XML 1.0 can't hold, escaped or not.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(outcome: Outcome, comparison: Comparison | None) -> str:
    """A JUnit report with a test case for each cell: a failure where it moved, an error where it failed.

    Args:
        comparison: None where nothing was compared (`--update`).
    """
    moved = dict(comparison.moved) if comparison else {title: [reason] for title, reason in outcome.failed.items()}
    titles = [*dict.fromkeys([*outcome.tasks, *moved])]
    counts = {
        "tests": str(len(titles)),
        "failures": str(len(set(moved) - set(outcome.failed))),
        "errors": str(len(outcome.failed)),
    }
    suites = ET.Element("testsuites", counts)
    attributes = {**counts, "name": "visionselector-eval smoke", "time": f"{outcome.wall_seconds:.3f}"}
    suite = ET.SubElement(suites, "testsuite", attributes)
    properties = ET.SubElement(suite, "properties")
    for name, value in outcome.observed.made_with.items():
        ET.SubElement(properties, "property", {"name": name, "value": _xml(value)})
    for title in titles:
        name = f"smoke.{outcome.tasks[title]}" if title in outcome.tasks else "smoke"
        seconds = f"{outcome.seconds.get(title, 0.0):.3f}"
        case = ET.SubElement(suite, "testcase", {"classname": _xml(name), "name": _xml(title), "time": seconds})
        if lines := moved.get(title):
            kind = "error" if title in outcome.failed else "failure"
            problem = ET.SubElement(case, kind, {"message": _xml("; ".join(line.strip() for line in lines))})
            problem.text = _xml("\n".join(lines))
    ET.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
