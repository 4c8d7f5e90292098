"""Published numbers: copied right, checked when read, and shown apart from what a run measured."""

from __future__ import annotations

import csv
import math
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from visionselector_eval.baselines import InputError, available, parse_budget
from visionselector_eval.harness import cli
from visionselector_eval.harness.report.published import (
    COLUMNS,
    FOLDER,
    LABEL,
    aliases,
    backbone_named,
    beside,
    chosen,
    load_published,
    render,
    write,
)
from visionselector_eval.harness.store.files import digest_of
from visionselector_eval.harness.store.record import CellRecord
from visionselector_eval.harness.store.run import Run
from visionselector_eval.tasks.suites import load_suites

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = load_published()


def one(**wanted: str) -> str:
    """The single printed value with these columns."""
    rows = NUMBERS
    for name, value in wanted.items():
        rows = rows[rows[name].str.contains(value, regex=False) if name in ("source", "place") else rows[name] == value]
    assert len(rows) == 1, wanted
    return rows["value"].iloc[0]


# the data ------------------------------------------------------------------------------------------------------------


def test_the_folder_is_that_of_the_checkout():
    assert FOLDER == ROOT / "results" / "published"
    assert set(NUMBERS.columns) == {*COLUMNS, "number"}


@pytest.mark.parametrize(
    ("wanted", "value"),
    [
        ({"backbone": "LLaVA-STF-7B", "kept": "144tok", "task": "vqav2_test"}, "78.1"),
        ({"backbone": "LLaVA-STF-7B", "kept": "144tok", "task": "mme"}, "1482.8"),
        ({"source": "2506.07138", "backbone": "LLaVA-1.5-7B", "method": "full", "task": "vizwiz_vqa_test"}, "50.0"),
        ({"source": "2506.07138", "method": "average pooling", "kept": "0.25", "task": "vizwiz_vqa_test"}, "44.0"),
        ({"source": "2605.29657", "method": "full", "task": "mme"}, "1862"),
        ({"source": "2605.29657", "method": "sparsevlm", "kept": "64tok", "task": "gqa"}, "52.7"),
        ({"source": "2412.04467", "kept": "192tok", "task": "mme"}, "1782"),
        ({"source": "2602.13315", "method": "fastv", "kept": "0.1", "task": "docvqa_val"}, "51.90"),
        ({"source": "2602.13315", "method": "visionselector", "task": "Vinoground"}, "10.80"),
        ({"source": "2510.16598", "method": "dart", "kept": "0.2"}, "78.16"),
        ({"source": "2510.16598", "method": "visionselector", "metric": "prefill, ms"}, "761"),
        ({"source": "2503.02175", "method": "divprune", "task": "COCO"}, "0.96"),
    ],
)
def test_numbers_are_those_of_the_source(wanted, value):
    assert one(**wanted) == value


@pytest.mark.parametrize(
    ("source", "mean", "missing", "within"),
    [
        ("IDPruner (arXiv 2602.13315)", "mean over the table's 11 tasks", {}, 0.006),
        # The full model's MMBench-CN is known as 58.1 to 58.3, and the source rounds down now and then.
        ("OccamToken (arXiv 2605.29657)", "mean over the table's tasks", {"MMB-CN": 58.2}, 0.1),
    ],
)
def test_the_tables_give_the_means_that_they_print(source, mean, missing, within):
    """A digit copied wrongly moves the mean of its row away from the printed one."""
    table = NUMBERS[(NUMBERS["source"] == source) & ~NUMBERS["place"].str.contains("video")]
    full = table[table["method"] == "full"].set_index("task")["number"].to_dict() | missing
    rows = table[table["method"] != "full"].groupby(["method", "kept"])
    assert len(rows) == 14
    for _, row in rows:
        values = row.set_index("task")["number"]
        printed = values.pop(mean)
        assert sum(100 * values[task] / full[task] for task in values.index) / len(values) == pytest.approx(
            printed, abs=within
        )


def test_names_are_ours_where_they_are_meant_to_be():
    assert set(NUMBERS["method"]) - set(available()) == {"average pooling"}
    tasks = load_suites().tasks
    papers = {"AI2D", "COCO", "MMB", "MMB-CN", "MMStar", "MVBench", "SEED", "SQA", "VQAv2", "VideoMME", "Vinoground"}
    own = {task for task in NUMBERS["task"] if task in tasks}
    assert {task for task in set(NUMBERS["task"]) - own if "mean over" not in task} == papers | {"not stated"}
    assert not any(tasks[task].mirror_of for task in own), "nobody has published a mirror"
    for kept in NUMBERS["kept"]:
        assert kept == "" or str(parse_budget(kept)) == kept
    unknown = NUMBERS[NUMBERS["kept"] == ""]
    assert (unknown["note"] != "").all(), "a number without a budget says why"


def test_what_can_not_be_compared_says_so():
    llava = NUMBERS[NUMBERS["backbone"].str.startswith("LLaVA")]
    assert llava[llava["task"] == "textvqa_val"]["differs"].str.contains("OCR tokens").all()
    assert llava[llava["task"].str.endswith("_test")]["differs"].str.contains("server").all()
    sums = NUMBERS[(NUMBERS["task"] == "mme") & NUMBERS["metric"].str.contains("cognition")]
    assert (sums["number"] < 2000).all()
    assert sums["differs"].str.contains("perception alone").all()
    trained = NUMBERS[NUMBERS["backbone"] == "LLaVA-STF-7B"]
    assert trained["note"].str.contains("never among training-free").all()
    assert set(trained["method"]) == {"full"}, "its fusion is the backbone, not a compressor of ours"


def test_every_file_is_explained_and_only_public_things_are_cited():
    readme = (FOLDER / "README.md").read_text()
    for file in FOLDER.iterdir():
        assert file.name == "README.md" or f"`{file.name}`" in readme
        assert not re.search(r"METHODS|DESIGN", file.read_text())
    for name in COLUMNS:
        assert f"| `{name}` |" in readme
    for source in set(NUMBERS["source"]):
        assert re.search(r"arXiv \d{4}\.\d{5}", source)


# reading -------------------------------------------------------------------------------------------------------------

GOOD = {
    "source": "A paper (arXiv 2601.00001)",
    "place": "table 1",
    "backbone": "LLaVA-1.5-7B",
    "method": "divprune",
    "kept": "25%",
    "task": "gqa",
    "metric": "accuracy, %",
    "value": "55.50",
    "certainty": "P",
    "differs": "",
    "note": "",
}


def folder_of(tmp_path: Path, *rows: dict[str, str], columns: list[str] | None = None) -> Path:
    """A folder with one file of these rows."""
    shutil.copy(FOLDER / "backbones.yaml", tmp_path)
    with (tmp_path / "paper.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns or list(GOOD), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def test_a_file_is_read_as_it_stands(tmp_path):
    found = load_published(folder_of(tmp_path, GOOD))
    assert found.iloc[0].to_dict() == {**GOOD, "kept": "0.25", "number": 55.5}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"value": "-"}, "paper.csv, line 3: value '-' is not a number"),
        ({"value": ""}, "value '' is not a number"),
        ({"value": "nan"}, "value 'nan' is not a number"),
        ({"source": " "}, "line 3: source is empty"),
        ({"task": ""}, "task is empty"),
        ({"certainty": "X"}, "invalid certainty 'X': expected P or S"),
        ({"kept": "0"}, "line 3: invalid budget"),
        ({"backbone": "LLaVA-1.6-7B"}, "unknown backbone 'LLaVA-1.6-7B': did you mean 'LLaVA-1.5-7B'"),
        ({"method": "divprune"}, "line 3: the same number as in line 2"),
    ],
)
def test_a_wrong_row_is_one_line(change, said, tmp_path):
    other = {**GOOD, "method": "dart"}
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        load_published(folder_of(tmp_path, GOOD, {**other, **change}))
    assert "\n" not in str(caught.value)


def test_a_wrong_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no published numbers"):
        load_published(tmp_path)
    with pytest.raises(InputError, match=r"paper\.csv: unknown column 'metrics': did you mean 'metric'"):
        load_published(folder_of(tmp_path, GOOD, columns=[*GOOD, "metrics"]))
    with pytest.raises(InputError, match="no column source, note"):
        load_published(folder_of(tmp_path, GOOD, columns=[n for n in GOOD if n not in ("source", "note")]))
    folder_of(tmp_path, GOOD)
    with (tmp_path / "paper.csv").open("a") as stream:
        stream.write("one,two\n")
    with pytest.raises(InputError, match=r"line 3: not 11 values"):
        load_published(tmp_path)
    (tmp_path / "paper.csv").write_bytes(b"source\xff\n")
    with pytest.raises(InputError, match=r"paper\.csv can't be read"):
        load_published(tmp_path)
    folder_of(tmp_path, GOOD)
    for text in ("[]", "LLaVA-1.5-7B: llava", "{"):
        (tmp_path / "backbones.yaml").write_text(text)
        with pytest.raises(InputError, match=r"backbones\.yaml"):
            load_published(tmp_path)


@pytest.mark.parametrize(
    ("identity", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "LLaVA-1.5-7B"),
        ("llava-hf/llava-1.5-7b-hf", "LLaVA-1.5-7B"),
        ("/models/LLaVA-1.5-7B-hf/", "LLaVA-1.5-7B"),
        ("Qwen/Qwen2.5-VL-7B-Instruct @ 0123456789ab", "Qwen2.5-VL-7B"),
        ("JulietChoo/VisionSelector-Qwen2.5-VL-7B", "Qwen2.5-VL-7B"),
        ("llava-stf-7b", "LLaVA-STF-7B"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", None),
        ("liuhaotian/llava-v1.5-13b", None),
        ("llava-v1.5-7b/finetuned", None),
        ("tiny", None),
    ],
)
def test_a_backbone_is_known_by_the_last_part_of_its_id(identity, name):
    assert backbone_named(identity, aliases()) == name


# beside a run --------------------------------------------------------------------------------------------------------


def cells(*rows: tuple[str, str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["backbone", "method", "task"])


def test_only_what_a_run_has_stands_beside_it():
    llava, qwen = "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct"
    run = cells((llava, "divprune", "gqa"), (llava, "full", "gqa"), (qwen, "visionzip", "docvqa_val"))
    found = beside(NUMBERS, run, aliases())
    assert set(zip(found["backbone"], found["method"], found["task"], strict=True)) == {
        ("LLaVA-1.5-7B", "full", "gqa"),
        ("LLaVA-1.5-7B", "divprune", "gqa"),
        ("Qwen2.5-VL-7B", "full", "docvqa_val"),
        ("Qwen2.5-VL-7B", "visionzip", "docvqa_val"),
    }
    assert beside(NUMBERS, cells((llava, "divprune", "tiny_pope"), ("tiny", "divprune", "gqa")), aliases()).empty


def a_run(folder: Path, backbone: str, task: str = "gqa") -> Path:
    """A run folder with `full` and `divprune` on one task."""
    run = Run.open(folder, create=True)
    for method, budget, score in (("full", "1", 0.6), ("divprune", "64tok", 0.5)):
        digest = digest_of({"method": method})
        record = CellRecord(
            digest=digest, backbone=backbone, method=method, budget=budget, task=task, metric="exact_match",
            score=score, n_documents=2,
        )  # fmt: skip
        table = pd.DataFrame({"doc_id": [0, 1], "score": [1.0, 2 * score - 1]})
        run.finish(digest, record, table.assign(answer="a", target="b", kept_tokens=4, total_tokens=20))
    return folder


def test_a_report_shows_them_below_and_never_within(tmp_path, capsys):
    folder = a_run(tmp_path / "run", "/models/llava-1.5-7b-hf")
    assert cli.main(["report", str(folder)]) == 0
    plain = capsys.readouterr().out
    files = {p.name: p.read_bytes() for p in folder.glob("leaderboard.*")}
    assert cli.main(["report", str(folder), "--published"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(plain.rstrip("\n"))
    below = text[len(plain.rstrip("\n")) :]
    assert "57.8" in below
    assert "57.8" not in plain
    assert "49.6" not in text, "no row for a method that the run does not have"
    assert "2605.29657" in below
    titles = [line for line in below.splitlines() if line.startswith("LLaVA-1.5-7B")]
    assert len(titles) == 3
    assert all(LABEL in title for title in titles)
    assert {p.name: p.read_bytes() for p in folder.glob("leaderboard.*")} == files, "the leaderboard is the same"
    page = (folder / "published.md").read_text()
    assert page.startswith("# Published numbers\n")
    assert page.count(f"### LLaVA-1.5-7B ({LABEL})") == 3
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables) == sum(2 + rows for rows in (2, 3, 1))
    assert write(folder) == below.lstrip("\n")


def test_a_report_says_where_there_is_nothing_published(tmp_path, capsys):
    folder = a_run(tmp_path / "run", "liuhaotian/llava-v1.5-7b")
    write(folder)
    assert (folder / "published.md").exists()
    shutil.rmtree(folder / "cells")
    a_run(folder, "tiny")
    assert cli.main(["report", str(folder), "--published"]) == 0
    assert f"{LABEL}: nothing for the backbones, tasks and methods of this run" in capsys.readouterr().out
    assert not (folder / "published.md").exists(), "what is out of date does not stay"
    assert cli.main(["report", str(tmp_path / "absent"), "--published"]) == 2


# listed --------------------------------------------------------------------------------------------------------------


def test_every_number_is_listed(capsys):
    assert cli.main(["list", "published"]) == 0
    text = capsys.readouterr().out
    shown = re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w.%-])", text)
    assert not set(NUMBERS["value"]) - set(shown)
    titles = [line for line in text.splitlines() if LABEL in line]
    assert len(titles) == len(NUMBERS.groupby(["source", "place", "certainty", "backbone"]))
    assert all("arXiv" in title for title in titles)
    assert cli.main(["list"]) == 0
    assert LABEL not in capsys.readouterr().out, "they are no part of what a sweep takes"


def test_a_table_has_one_row_for_each_method_and_budget():
    table = render(chosen(NUMBERS, backbone="LLaVA-STF-7B")).splitlines()
    assert [line.split()[:2] for line in table if line.startswith("full ")] == [["full", "144tok"]]
    assert [line for line in table if line.startswith("[")] == [
        "[1] differs from ours: from the benchmark's server: here a submission is written",
        "[2] differs from ours: LLaVA's own prompts and scripts",
        "[3] differs from ours: OCR tokens in the prompt (LLaVA's scripts)",
        "[4] differs from ours: F1; ours is accuracy over all splits",
        "[5] differs from ours: letters read by the benchmark's server",
    ]
    unknown = render(chosen(NUMBERS, method="divprune", task="COCO")).splitlines()
    assert [line.split() for line in unknown if line.startswith("divprune ")] == [["divprune", "?", "0.96"]]


def test_the_list_can_be_narrowed(capsys):
    def listed(*flags: str) -> tuple[int, str, str]:
        code = cli.main(["list", "published", *flags])
        said = capsys.readouterr()
        return code, said.out, said.err

    code, text, _ = listed("--backbone", "llava-hf/llava-1.5-7b-hf", "--method", "pyramiddrop")
    assert code == 0
    assert text.count(LABEL) == 1
    assert "69.2" in text
    assert listed("--task", "MMStar")[1].count(LABEL) == 1
    for flags, said in (
        (["--method", "divprun"], "unknown published method 'divprun': did you mean 'divprune'"),
        (["--backbone", "tiny"], "unknown published backbone 'tiny'"),
        (["--backbone", "LLaVA-STF-7B", "--method", "divprune"], "unknown published method 'divprune'"),
    ):
        code, _, error = listed(*flags)
        assert code == 2
        assert said in error
        assert error.count("\n") == 1
    assert cli.main(["list", "tasks", "--method", "divprune"]) == 2
    assert "--method goes with list published" in capsys.readouterr().err


def test_values_are_numbers():
    assert NUMBERS["number"].map(math.isfinite).all()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("fastv", "dropped after layer 0, by a softmax over visual keys alone"),
        ("dart", "dropped after layer 0"),
        ("visionzip", "10/64 of K contextual"),
        ("vispruner", "raster order in each round"),
        ("visionselector", "AngelSlim/Qwen2.5-VL-7B-Instruct-Selector"),
        ("idpruner", "pixels up to 12845056, no JPEG"),
    ],
)
def test_idpruners_rows_say_how_its_variants_differ(method, said):
    rows = NUMBERS[NUMBERS["source"].str.contains("2602.13315") & (NUMBERS["method"] == method)]
    assert len(rows) > 3
    assert rows["differs"].str.contains(said, regex=False).all()


def test_counts_that_are_means_over_layers_say_so():
    table = NUMBERS[NUMBERS["method"] == "sparsevlm"]
    for kept, end, mean in (("128tok", 39, 145), ("64tok", 18, 82)):
        texts = table[table["kept"] == kept]["differs"]
        assert texts.str.contains(f"{end} tokens are left at the end, {mean} in the mean over layers").all()
    assert NUMBERS[NUMBERS["method"] == "pyramiddrop"]["differs"].str.contains("mean over layers").all()


def test_a_row_that_differs_stands_apart_from_the_equal_ones(tmp_path):
    rows = [
        {**GOOD, "method": "full", "kept": "1", "value": "61"},
        {**GOOD, "value": "55"},
        {**GOOD, "method": "fastv", "value": "49", "differs": "another layer", "note": "small / odd"},
        {**GOOD, "task": "pope", "value": "85", "differs": "F1"},
        {**GOOD, "method": "fastv", "task": "pope", "value": "77", "differs": "F1 / another layer", "note": "odd"},
    ]
    equal, other = render(load_published(folder_of(tmp_path, *rows))).split("Not to be compared with ours:")
    assert [line.split() for line in equal.splitlines() if line.startswith(("full", "divprune", "fastv"))] == [
        ["full", "100%", "61"],
        ["divprune", "25%", "55"],
    ]
    lines = other.splitlines()
    assert [line.split() for line in lines if line.startswith(("divprune", "fastv "))] == [
        ["fastv", "[1]", "25%", "49", "77"],
        ["divprune", "25%", "-", "85"],
    ]
    assert next(line for line in lines if line.startswith("method")).split() == ["method", "kept", "gqa", "pope", "[2]"]
    assert [line for line in lines if "differs from ours" in line] == [
        "[1] differs from ours: another layer",
        "[2] differs from ours: F1",
    ]
    assert lines[-2:] == ["gqa: small", "fastv: odd"]
