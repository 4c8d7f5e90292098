"""docs/benchmarks.md is true: its table is suites.yaml's, its questions are those of the pictures.

`python tests/tasks/test_benchmark_docs.py` writes both anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.tasks import suites
from visionselector_eval.tasks.local import upstream
from visionselector_eval.tasks.tiny import MIRRORS, Document, gallery

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "benchmarks.md"
PICTURES = DOCS / "pictures" / "benchmarks"
PARTS = ("tasks", "gallery")


def task_table() -> str:
    """The real tasks of suites.yaml."""
    lines = ["| task | about | headline | largest | papers report | columns |", "|---|---|---|---|---|---|"]
    for name, entry in suites.load_suites().tasks.items():
        if entry.mirror_of is None:
            largest = "-" if entry.scale is None else f"{entry.scale:g}"
            columns = " ".join(f"`{c}`" for c in upstream.members(name)[0].columns) or "-"
            lines.append(f"| `{name}` | {entry.about} | `{entry.key}` | {largest} | {entry.published} | {columns} |")
    return "\n".join(lines) + "\n"


def mirror_gallery() -> str:
    """Each mirror with its picture, and what is asked about it."""
    parts = []
    for name in MIRRORS:
        entry = suites.entry(name)
        asked = [f"{_question(d)} `{d.answer}`" for d in gallery.shown(name)]
        numbered = "".join(f"{i + 1}. {text}\n" for i, text in enumerate(asked))
        parts.append(
            f"### {name}\n\n{_sentence(entry.about)}\n\n![{name}](pictures/benchmarks/{name}.png)\n\n{numbered}"
        )
    return "\n".join(parts)


def _question(document: Document) -> str:
    row: dict[str, Any] = document.row
    question = re.sub(r"<(image \d)>", r"\\<\1>", row["question"])
    choices = row.get("choices") or row.get("candidates") or row.get("options") or []
    if isinstance(choices, str):  # MMMU's are a list in text
        choices = json.loads(choices.replace("'", '"'))
    for keys in ("ABCD", ["choice_a", "choice_b", "choice_c", "choice_d"], ["a0", "a1", "a2", "a3", "a4"]):
        choices = choices or [row[k] for k in keys if k in row]
    listed = [c if re.match(r"[A-E]\. ", c) else f"{'ABCDE'[i]}. {c}" for i, c in enumerate(choices)]
    return f"{question} ({'; '.join(listed)})" if listed else question


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


WRITERS = {"tasks": task_table, "gallery": mirror_gallery}


def marks(part: str) -> tuple[str, str]:
    return f"<!-- {part}: written by tests/tasks/test_benchmark_docs.py -->\n", f"<!-- end of {part} -->"


@pytest.mark.parametrize("part", PARTS)
def test_the_page_is_up_to_date(part: str) -> None:
    start, end = marks(part)
    written = PAGE.read_text(encoding="utf-8").partition(start)[2].partition(end)[0]
    assert written == WRITERS[part](), "write it anew: python tests/tasks/test_benchmark_docs.py"


def test_the_page_names_all_suites() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, tasks in suites.load_suites().suites.items():
        (row,) = re.findall(rf"(?m)^\| `{name}` \|.*$", text)
        if name in ("visionselector9", "llava_stf9", "ocr", "video"):
            assert re.findall(r"`(\w+)`", row)[1:] == tasks


def test_every_mirror_has_its_picture(tmp_path: Path) -> None:
    made = gallery.write(tmp_path)
    assert {p.name for p in made} == {p.name for p in PICTURES.iterdir()}
    for fresh in made:
        shipped = PICTURES / fresh.name
        assert shipped.stat().st_size <= gallery.LARGEST
        # The same scene, whatever the Pillow that wrote it.
        small = [Image.open(p).convert("RGB").resize((64, 32), Image.Resampling.BOX) for p in (fresh, shipped)]
        difference = [abs(a - b) for a, b in zip(*(i.tobytes() for i in small), strict=True)]
        assert sum(difference) / len(difference) < 3, f"{shipped} is not what the generator draws now"


def test_the_gallery_says_what_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert gallery.main([]) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write pictures"):
        gallery.write(tmp_path / "file")
    assert gallery.main([str(tmp_path / "file")]) == 2


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for part in PARTS:
        start, end = marks(part)
        before, _, rest = text.partition(start)
        text = before + start + WRITERS[part]() + end + rest.partition(end)[2]
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
