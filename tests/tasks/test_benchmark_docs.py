"""docs/benchmarks.md is true: its suites are suites.yaml's, its images are what the generators draw."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.tasks import suites
from visionselector_eval.tasks.tiny import gallery

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "benchmarks.md"
PICTURES = DOCS / "images" / "benchmarks"


def test_the_page_names_all_suites() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, tasks in suites.load_suites().suites.items():
        (row,) = re.findall(rf"(?m)^\| `{name}` \|.*$", text)
        if name in ("visionselector9", "llava_stf9", "ocr", "video"):
            assert re.findall(r"`(\w+)`", row)[1:] == tasks


def test_every_mirror_has_its_image(tmp_path: Path) -> None:
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
    with pytest.raises(InputError, match="cannot write images"):
        gallery.write(tmp_path / "file")
    assert gallery.main([str(tmp_path / "file")]) == 2
