"""Sweeps on the embedded checkpoint: what they write, what they share, what they do again and what they do not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from local_data import write_task
from PIL import Image
from safetensors.torch import load_file, save_file
from sweeps import SMALL, Answering, contents, records, small, sweep
from tqdm import tqdm

from visionselector_eval.baselines import InputError, parse_budget
from visionselector_eval.baselines.contract import registry
from visionselector_eval.harness import cli
from visionselector_eval.harness.cli.arguments import EXIT_FAILED_CELLS
from visionselector_eval.harness.report.leaderboard import build_leaderboard
from visionselector_eval.harness.report.render import markdown
from visionselector_eval.harness.store.record import IDENTITY, SAMPLE_COLUMNS
from visionselector_eval.harness.store.run import Run, load_run
from visionselector_eval.harness.sweep import worker
from visionselector_eval.harness.sweep.plan import plan
from visionselector_eval.harness.sweep.screen import render_plan
from visionselector_eval.harness.sweep.spec import SweepSpec, cells_of
from visionselector_eval.harness.sweep.worker import Answered, answer_unit
from visionselector_eval.models.backbones.qwen2_5_vl import Qwen2_5_VL
from visionselector_eval.models.generation import cut, generation_arguments
from visionselector_eval.models.tiny import checkpoint
from visionselector_eval.tasks import binding, scoring

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished small sweep; tests read it or copy it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    _, result = sweep(folder)
    assert (len(result.done), result.failed, result.before) == (6, {}, [])
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished sweep that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def stock_checkpoint(folder: Path) -> Path:
    """The embedded checkpoint without its scorer."""
    shutil.copytree(checkpoint(), folder)
    tensors = load_file(folder / "model.safetensors")
    stock = {k: v for k, v in tensors.items() if "importance_scorer" not in k}
    save_file(stock, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# what is written -----------------------------------------------------------------------------------------------------


def test_a_run_has_the_promised_files_and_columns(finished):
    """Files of a run, columns of both frames."""
    assert {p.name for p in finished.iterdir() if not p.name.startswith(".")} == {
        "spec.yaml",
        "environment.json",
        "cells",
    }
    assert SweepSpec.load(finished / "spec.yaml") == small(finished)
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert (environment["device"], environment["dtype"], environment["attn_implementation"]) == (
        "cpu",
        "float32",
        "sdpa",
    )
    for cell in (finished / "cells").iterdir():
        assert sorted(p.name for p in cell.iterdir()) == ["cell.json", "samples.parquet"]

    cells, samples = load_run(finished)
    wanted = "backbone method options budget task seed metric score n_documents kept_tokens total_tokens status"
    assert set(wanted.split()) <= set(cells.columns)
    assert {"cell", "method", "budget", *SAMPLE_COLUMNS, *IDENTITY} <= set(samples.columns)
    assert list(zip(cells.task, cells.method, cells.budget, strict=True)) == [
        (task, method, budget)
        for task in ("tiny_chartqa", "tiny_pope")
        for method, budget in (("divprune", "0.2"), ("downsample", "0.2"), ("full", "1"))
    ]
    assert set(cells.status) == {"done"}
    assert (cells.n_documents == 4).all()
    assert (cells.backbone == "tiny").all()
    assert cells.context.nunique() == 2, "a cell shares everything with the full row of its task but its method"
    for _, cell in cells.iterrows():
        rows = samples[samples.cell == cell.digest]
        assert sorted(rows.doc_id) == [0, 1, 2, 3]
        assert rows.kept_tokens.mean() == cell.kept_tokens
        assert rows.total_tokens.mean() == cell.total_tokens
        assert cell.score == pytest.approx(rows.score.mean())
        assert json.loads(cell.settings)["limit"] == 4


def test_kept_tokens_are_what_entered_the_model(finished, tiny):
    """Measured, one number a document: those of the budget where images are ranked, whole grids when shrunk."""
    _, samples = load_run(finished)
    budget = parse_budget(0.2)
    for method, rows in samples.groupby("method"):
        for _, row in rows.iterrows():
            if method == "full":
                assert row.kept_tokens == row.total_tokens
            elif method == "divprune":
                assert row.kept_tokens == budget.count(row.total_tokens)
            else:
                assert 0 < row.kept_tokens <= budget.count(row.total_tokens)
            assert row.prompt_tokens > row.kept_tokens
            assert row.new_tokens > 0
    text = samples.assign(text=samples.prompt_tokens - samples.kept_tokens)
    assert (text.groupby(["task", "doc_id"]).text.nunique() == 1).all(), "only visual tokens are dropped"


def test_kept_tokens_of_a_video_count_all_frames(tmp_path):
    task = "tiny_mvbench_moving_direction"
    sweep(tmp_path, tasks=[task], methods=["divprune", "downsample"], budgets=[0.25, "7tok"], limit=2)
    _, samples = load_run(tmp_path)
    for (method, budget), rows in samples.groupby(["method", "budget"]):
        assert (rows.total_tokens > 100).all()
        wanted = [parse_budget(budget).count(n) for n in rows.total_tokens]
        if method == "downsample":
            assert (rows.kept_tokens < rows.total_tokens).all()
        else:
            assert list(rows.kept_tokens) == wanted


# what the answers are ------------------------------------------------------------------------------------------------


def test_the_full_row_is_the_stock_model(finished, tiny, tmp_path):
    """Alone and in batches: `model.generate` of transformers on the processor's own inputs, decoded."""
    sweep(tmp_path / "alone", batch_size=1, methods=["full"])
    for folder, size in ((tmp_path / "alone", 1), (finished, 2)):
        _, samples = load_run(folder)
        full = samples[samples.method == "full"]
        for task in SMALL["tasks"]:
            asked = binding.requests(binding.bind(task, limit=4))
            given = full[full.task == task].sort_values("doc_id").answer.tolist()
            for start in range(0, len(asked), size):
                batch = asked[start : start + size]
                chats = [request.messages() for request in batch]
                images = [part["image"] for chat in chats for m in chat for part in m["content"] if "image" in part]
                texts = [
                    tiny.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                    for chat in chats
                ]
                inputs = tiny.processor(
                    text=texts,
                    images=[p.convert("RGB") for p in images],
                    padding=True,
                    padding_side="left",
                    return_tensors="pt",
                )
                tokens = tiny.model.generate(**inputs, **generation_arguments(batch[0].generation))
                texts = tiny.processor.batch_decode(
                    tokens[:, inputs["input_ids"].shape[1] :],
                    skip_special_tokens=True,
                    clean_up_tokenization_spaces=False,
                )
                assert [cut(t, r.until) for t, r in zip(texts, batch, strict=True)] == given[start : start + size]


def test_a_sweep_answers_what_the_lmms_eval_model_answers(finished, tiny):
    """The shared path of a sweep and lmms-eval's own evaluator with our model: answers, tokens and scores."""
    from visionselector_eval.models.lmms_eval_models import VisionSelectorQwen2_5_VL
    from visionselector_eval.tasks import lmms

    cells, samples = load_run(finished)
    for method, budget in (("divprune", "0.2"), ("downsample", "0.2"), ("full", "1")):
        model = VisionSelectorQwen2_5_VL(
            backbone=tiny, method=method, budget=budget, batch_size=2, protocol="checkpoint"
        )
        for task in SMALL["tasks"]:
            results = lmms.lmms_eval().simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=binding.bind(task, limit=4).task_manager,
                limit=4,
                bootstrap_iters=0,
                cli_args=SimpleNamespace(output_path=None, process_with_media=False),
            )
            theirs = results["samples"][task]
            ours = samples[(samples.method == method) & (samples.task == task)].sort_values("doc_id")
            assert [s["resps"][0][0] for s in theirs] == ours.answer.tolist()
            counts = [s["token_counts"][0] for s in theirs]
            assert [c["visual_tokens_kept"] for c in counts] == ours.kept_tokens.tolist()
            assert [c["input_tokens"] for c in counts] == ours.prompt_tokens.tolist()
            cell = cells[(cells.method == method) & (cells.task == task)].iloc[0]
            assert results["results"][task][cell.metric] == cell.score


def test_sampled_answers_follow_their_seed(tmp_path):
    """Seeds give other samples of every method, and the same seed the same ones."""
    fields = {
        "methods": ["divprune"],
        "tasks": ["tiny_chartqa"],
        "generation": {"temperature": 8.0},
    }  # the embedded model is sure of its answers
    for name in ("one", "two"):
        sweep(tmp_path / name, seeds=[0, 1], **fields)
    one, two = (load_run(tmp_path / name).samples for name in ("one", "two"))
    assert one.answer.tolist() == two.answer.tolist()
    for method in ("full", "divprune"):
        rows = one[one.method == method]
        assert rows[rows.seed == 0].answer.tolist() != rows[rows.seed == 1].answer.tolist()


# what is shared ------------------------------------------------------------------------------------------------------


def test_one_vision_pass_serves_every_method_and_budget(tmp_path, monkeypatch):
    """Documents / batch size passes, whatever the number of cells; only the down-sampling control encodes again."""
    passes, images, loads = [], [], []
    encode = Qwen2_5_VL.encode

    def counting(self, inputs, *args, **kwargs):
        passes.append(len(inputs["input_ids"]))
        return encode(self, inputs, *args, **kwargs)

    monkeypatch.setattr(Qwen2_5_VL, "encode", counting)
    read = worker.Answerer.prepare
    monkeypatch.setattr(worker.Answerer, "prepare", lambda *a: images.append(len(a[1])) or read(*a))
    load = worker.load_backbone
    monkeypatch.setattr(worker, "load_backbone", lambda *a, **k: loads.append(a) or load(*a, **k))
    worker._loaded.clear()
    methods = ["divprune", "visionzip", "visionselector", "random", "uniform"]
    _, result = sweep(tmp_path / "a", methods=methods, budgets=[0.3, 0.2, 0.1], limit=6, batch_size=4)
    assert len(result.done) == 2 * (5 * 3 + 1)
    assert passes == [4, 2, 4, 2]
    assert images == [4, 2, 4, 2]
    assert len(loads) == 1
    passes.clear()
    sweep(tmp_path / "b", methods=["divprune", "downsample"], budgets=[0.3, 0.1], tasks=["tiny_pope"])
    assert passes == [2] * 2 * (1 + 2), "downsample: once more for each budget"


def test_two_backbones_in_one_sweep(tmp_path):
    """Each is loaded once; the same weights give the same answers under the same protocol."""
    folder = tmp_path / "again"
    shutil.copytree(checkpoint(), folder)
    _, result = sweep(tmp_path / "run", backbones=["tiny", str(folder)], protocol="checkpoint", methods=["divprune"])
    assert len(result.done) == 8
    cells, samples = load_run(tmp_path / "run")
    assert Counter(cells.backbone) == {"tiny": 4, str(folder): 4}
    one, two = (samples[samples.backbone == b].sort_values(["task", "method", "doc_id"]) for b in ("tiny", str(folder)))
    assert one.answer.tolist() == two.answer.tolist()
    assert cells.revision.nunique() == 1


def two_checkpoints(folder: Path) -> list[str]:
    """Two copies of the embedded checkpoint, in folders of their own."""
    return [str(shutil.copytree(checkpoint(), folder / name)) for name in ("plain", "retrained")]


def headings(markdown: str) -> list[str]:
    return [line.removeprefix("## ") for line in markdown.splitlines() if line.startswith("## ")]


REMARK = "trained fusion, LLM retrained"


def remarked(monkeypatch, name: str = "retrained") -> None:
    """Backbones from a folder of this name carry a remark."""
    monkeypatch.setattr(Qwen2_5_VL, "remark", property(lambda self: REMARK if Path(self.id).name == name else ""))


TWO = ["--methods", "divprune", "downsample", "--budgets", "0.2", "--tasks", "tiny_docvqa_val", "--limit", "4"]
TWO += ["--batch-size", "4", "--device", "cpu", "--protocol", "checkpoint"]


def test_two_backbones_give_one_leaderboard_grouped_by_backbone(tmp_path, monkeypatch, capsys):
    """Each has a heading with its remark, a `full` row of its own and means relative to that one; so has the split."""
    remarked(monkeypatch)
    plain, retrained = names = two_checkpoints(tmp_path)
    given = worker._plain

    def worse(documents, answers, skipped, remark=""):
        """The retrained one has no answer to the first document, so that its `full` row is another number."""
        told = given(documents, answers, skipped, remark)
        return [a | {"answer": ""} if remark and a["doc_id"] == 0 else a for a in told]

    monkeypatch.setattr(worker, "_plain", worse)
    folder = tmp_path / "run"
    assert cli.main(["sweep", "--pretrained", retrained, plain, *TWO, "--output", str(folder)]) == 0
    shown = capsys.readouterr().out
    cells, _ = load_run(folder)
    assert cells.groupby("backbone")["remark"].unique().map(list).to_dict() == {plain: [""], retrained: [REMARK]}
    scores = cells[cells.method == "full"].set_index("backbone")["score"]
    assert scores[plain] > scores[retrained] > 0

    page = (folder / "leaderboard.md").read_text()
    assert headings(page) == [plain, f"{retrained} ({REMARK})"]
    parts = page.split("## ")[1:]
    for part in parts:
        rows = [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("| ")]
        assert rows == ["method", "full", "divprune", "downsample", "task", "tiny_docvqa_val"]
    board = build_leaderboard(*load_run(folder))
    summary = pd.DataFrame([vars(row) for row in board.summary]).set_index(["backbone", "label"])
    for name in names:
        assert summary.loc[(name, "full"), "mean_relative"] == 100
        own = cells[(cells.backbone == name) & (cells.method == "divprune")]["score"].iloc[0]
        assert summary.loc[(name, "divprune"), "mean_relative"] == pytest.approx(100 * own / scores[name])
        assert summary.loc[name]["best_of_budget"].sum() == 1
    assert [line for line in shown.splitlines() if line.startswith(str(tmp_path))] == [plain, f"{retrained} ({REMARK})"]
    for ending in ("tex", "html", "csv"):
        assert REMARK in (folder / f"leaderboard.{ending}").read_text()

    assert cli.main(["report", str(folder), "--difficulty"]) == 0
    split = capsys.readouterr().out
    assert f"difficulty split of {plain}\n" in split
    assert f"difficulty split of {retrained} ({REMARK})\n" in split
    assert headings((folder / "difficulty.md").read_text()) == [plain, f"{retrained} ({REMARK})"]


def test_a_remark_is_kept_where_the_backbone_is_not_loaded_again(tmp_path, monkeypatch):
    """Answered, not scored: the record of the failure has it, and so has that of a run that only scores."""
    remarked(monkeypatch)
    name = two_checkpoints(tmp_path)[1]
    fields = {"backbones": [name], "tasks": ["tiny_pope"], "methods": ["divprune"], "protocol": "checkpoint"}
    with monkeypatch.context() as broken:
        broken.setattr(scoring, "score", lambda *a: 1 / 0)
        _, result = sweep(tmp_path / "run", **fields)
    assert len(result.failed) == 2
    assert set(load_run(tmp_path / "run").cells.remark) == {REMARK}
    monkeypatch.undo()
    answering = Answering()
    _, result = sweep(tmp_path / "run", answer=answering, **fields)
    assert (len(result.done), answering.answers) == (2, [])
    assert set(load_run(tmp_path / "run").cells.remark) == {REMARK}


def test_a_run_without_remarks_still_loads(copy):
    """Records of an older version have no such field."""
    for file in copy.glob("cells/*/cell.json"):
        record = json.loads(file.read_text())
        assert record.pop("remark") == ""
        file.write_text(json.dumps(record))
    cells, _ = load_run(copy)
    assert (list(cells.status), list(cells.remark)) == (["done"] * 6, [""] * 6)
    assert headings(markdown(build_leaderboard(*load_run(copy)))) == ["tiny"]


# what is done again --------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing(finished):
    before, answering = {p: p.stat().st_mtime_ns for p in (finished / "cells").rglob("*")}, Answering()
    worker._loaded.clear()
    _, result = sweep(finished, answer=answering)
    assert (len(result.before), result.done, result.failed) == (6, [], {})
    assert answering.units == []
    assert worker._loaded == {}, "not even a backbone is loaded"
    assert {p: p.stat().st_mtime_ns for p in (finished / "cells").rglob("*")} == before


def test_an_amended_spec_runs_only_what_is_new(copy):
    """More budgets, methods and tasks in the same folder."""
    old, answering = records(copy), Answering()
    _, result = sweep(
        copy,
        answer=answering,
        methods=["divprune", "downsample", "uniform"],
        budgets=[0.2, 0.5],
        tasks=["tiny_chartqa", "tiny_pope", "tiny_docvqa_val"],
    )
    assert len(result.before) == 6
    assert len(result.done) == 3 * (1 + 3 * 2) - 6
    assert {digest for digest, _, _ in answering.answers} == set(result.done)
    new = records(copy)
    assert {d: r for d, r in new.items() if d in old} == old


def test_overwrite_runs_the_cells_of_this_spec_again_and_no_other(copy):
    old, answering = contents(copy), Answering()
    _, result = sweep(copy, existing="overwrite", answer=answering, tasks=["tiny_pope"])
    assert (result.before, len(result.done)) == ([], 3)
    assert Counter(task for _, task, _ in answering.answers) == {"tiny_pope": 12}
    assert contents(copy) == old


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"limit": 2}, r"\(limit, prompts\)"),
        ({"generation": {"max_new_tokens": 3}}, r"\(generation\)"),
        ({"max_pixels": 20000, "attn_implementation": "eager"}, r"\(attention, media\)"),
        ({"methods": [{"name": "divprune", "upstream_exact": True, "label": "divprune"}]}, r"\(options\)"),
    ],
)
def test_cells_made_with_other_settings_are_not_mixed(change, named, copy):
    """The refusal names the settings and changes nothing; `overwrite` replaces the cells."""
    old = contents(copy)
    with pytest.raises(InputError, match=named) as caught:
        sweep(copy, **change)
    assert "--existing overwrite" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(copy) == old
    _, result = sweep(copy, existing="overwrite", **{"tasks": ["tiny_pope"], **change})
    assert result.done
    assert not result.failed


def test_stale_cells_are_replaced_where_that_is_asked_for(copy, monkeypatch):
    """Cells of an older version go, wherever in the grid they stand; current ones stay as they are."""
    sweep(copy, tasks=["tiny_docvqa_val"])  # current, and not asked for below
    old = set(records(copy))
    monkeypatch.setattr("visionselector_eval.harness.sweep.plan.version", lambda package: "99")
    with pytest.raises(InputError, match=r"\(lmms_eval, version\).*--existing replace-stale"):
        sweep(copy, tasks=["tiny_pope"])
    assert set(records(copy)) == old
    _, result = sweep(copy, existing="replace-stale", tasks=["tiny_pope"])
    found = records(copy)
    assert (result.before, set(result.done), result.failed) == ([], set(found), {})
    assert (len(found), {record["version"] for record in found.values()}) == (3, {"99"})
    assert "left out" not in " ".join(build_leaderboard(*load_run(copy)).notes)
    before = {p: p.stat().st_mtime_ns for p in (copy / "cells").rglob("*")}
    # Nothing is stale now. A method that is not asked for any more stays.
    _, again = sweep(copy, existing="replace-stale", tasks=["tiny_pope"], methods=["divprune"])
    assert (len(again.before), again.done) == (2, [])
    assert {p: p.stat().st_mtime_ns for p in (copy / "cells").rglob("*")} == before


def test_results_whose_data_are_out_of_reach_are_not_stale(tmp_path):
    """A data root that isn't mounted today costs no finished cell."""
    for task in ("chartqa", "pope"):
        write_task(tmp_path / "root", task)
    real = {"data_root": str(tmp_path / "root"), "tasks": ["chartqa", "pope"]}
    sweep(tmp_path / "run", **real)
    old = contents(tmp_path / "run")
    shutil.rmtree(tmp_path / "root" / "chartqa")
    worker._bound.clear()  # as in another process
    with pytest.raises(InputError, match="made with other settings"):
        sweep(tmp_path / "run", existing="replace-stale", **real)
    assert contents(tmp_path / "run") == old


@pytest.mark.parametrize("pretrained", ["tiny", "other"])
def test_the_embedded_checkpoint_is_run_in_one_thread(pretrained, tmp_path, monkeypatch):
    seen = []
    prepare = worker._prepare
    monkeypatch.setattr(worker, "_prepare", lambda *a: seen.append(torch.get_num_threads()) or prepare(*a))
    if pretrained == "other":
        pretrained = str(shutil.copytree(checkpoint(), tmp_path / "other"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        sweep(tmp_path / "run", backbones=[pretrained], tasks=["tiny_pope"], methods=["uniform"], limit=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1 if pretrained == "tiny" else 2]


def test_a_folder_has_one_writer(copy):
    with Run(copy).lock(), pytest.raises(InputError, match="another process is writing"):
        sweep(copy)


def test_another_batch_size_on_resume_loses_nothing(tmp_path):
    """Answers of batches of three stay; what is left is answered in batches of two, once."""

    def stops(unit):
        for count, event in enumerate(answer_unit(unit)):
            if count == 4:
                raise KeyboardInterrupt
            yield event

    fields = {"tasks": ["tiny_chartqa"], "limit": 8}
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, answer=stops, batch_size=3, **fields)
    begun = {
        (digest, answer["task"], answer["doc_id"]): answer
        for digest in Run(tmp_path).digests()
        for line in Run(tmp_path).journal(digest).read()
        for answer in line["answers"]
    }
    assert Counter(Counter(digest for digest, _, _ in begun).values()) == {6: 1, 3: 2}
    rest = Answering()
    _, result = sweep(tmp_path, answer=rest, batch_size=2, **fields)
    assert len(result.done) == 3
    assert not set(rest.answers) & set(begun)
    assert len(rest.answers) + len(begun) == 3 * 8
    _, samples = load_run(tmp_path)
    assert len(samples) == 24
    for (digest, _, doc_id), answer in begun.items():
        row = samples[(samples.cell == digest) & (samples.doc_id == doc_id)].iloc[0]
        assert row.answer == answer["answer"]


# what fails ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """A package beside ours with a compressor that fails at its fifth image while a file says so."""
    site, switch = tmp_path / "site", tmp_path / "broken"
    (site / "fragile_plugin-1.0.dist-info").mkdir(parents=True)
    (site / "fragile_plugin-1.0.dist-info" / "METADATA").write_text("Name: fragile-plugin\nVersion: 1.0\n")
    (site / "fragile_plugin-1.0.dist-info" / "entry_points.txt").write_text(
        "[visionselector_eval.compressors]\nfragile = fragile_plugin:Fragile\n"
    )
    (site / "fragile_plugin.py").write_text(
        "import pathlib\n"
        "from dataclasses import dataclass\n"
        "from visionselector_eval.baselines import ScoreCompressor\n"
        f"SWITCH = pathlib.Path({str(switch)!r})\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Fragile(ScoreCompressor):\n"
        "    '''Keeps the longest.'''\n"
        "    name = 'fragile'\n"
        "    def score(self, tokens):\n"
        "        if SWITCH.exists() and tokens.key.endswith('/2/0'):\n"
        "            raise RuntimeError('it broke\\non two lines')\n"
        "        return tokens.features.norm(dim=-1)\n"
    )
    monkeypatch.syspath_prepend(str(site))
    registry.compressor_class.cache_clear()
    yield switch
    registry.compressor_class.cache_clear()
    sys.modules.pop("fragile_plugin", None)


def test_a_failed_cell_is_recorded_and_only_it_is_tried_again(third_party, tmp_path, capfd):
    """Exit code 3, the reason in one line, the other cells done; the next run answers only what failed."""
    third_party.touch()
    folder = tmp_path / "run"
    flags = ["--methods", "divprune", "fragile", "--budgets", "0.2", "--tasks", "tiny_pope", "--limit", "4"]
    command = ["sweep", *flags, "--device", "cpu", "--batch-size", "2", "--output", str(folder)]
    assert cli.main(command) == EXIT_FAILED_CELLS == 3
    said = capfd.readouterr()
    assert "failed: tiny fragile @ 0.2 on tiny_pope: RuntimeError: it broke on two lines\n" in said.err
    assert "Traceback" not in said.err
    assert "divprune" in said.out
    cells, samples = load_run(folder)
    assert dict(zip(cells.method, cells.status, strict=True)) == {
        "full": "done",
        "divprune": "done",
        "fragile": "failed",
    }
    failed = cells[cells.status == "failed"].iloc[0]
    assert failed.error == "RuntimeError: it broke on two lines"
    assert set(samples.method) == {"full", "divprune"}
    assert cli.main(command) == 3, "still broken"

    third_party.unlink()
    answering = Answering()
    _, result = sweep(folder, answer=answering, methods=["divprune", "fragile"], tasks=["tiny_pope"])
    assert (len(result.before), result.done) == (2, [failed.digest])
    assert answering.answers == [(failed.digest, "tiny_pope", i) for i in (2, 3)], "documents 0 and 1 were answered"
    cells, samples = load_run(folder)
    assert set(cells.status) == {"done"}
    assert len(samples) == 12
    assert cli.main(command) == 0


def test_a_method_that_does_not_fit_the_second_backbone_fails_alone(tmp_path):
    """The first backbone has a scorer, the second none: its other cells are done all the same."""
    stock = stock_checkpoint(tmp_path / "stock")
    fields = {"methods": ["visionselector", "divprune"], "tasks": ["tiny_pope"], "protocol": "checkpoint"}
    _, result = sweep(tmp_path / "run", backbones=["tiny", str(stock)], **fields)
    assert len(result.done) == 5
    assert len(result.failed) == 1
    assert "scorer" in next(iter(result.failed.values()))
    with pytest.raises(InputError, match="scorer"):
        sweep(tmp_path / "other", backbones=[str(stock)], **fields)


def test_which_backbone_is_named_first_does_not_matter(tmp_path):
    stock = stock_checkpoint(tmp_path / "stock")
    fields = {"methods": ["visionselector", "divprune"], "tasks": ["tiny_pope"], "protocol": "checkpoint"}
    _, result = sweep(tmp_path / "run", backbones=[str(stock), "tiny"], **fields)
    assert (len(result.done), len(result.failed)) == (5, 1)
    assert "scorer" in next(iter(result.failed.values()))


@pytest.mark.parametrize("first", ["broken", "sound"])
def test_a_backbone_that_cannot_be_loaded_fails_alone(first, tmp_path, capfd):
    """Exit code 3 and one line for each of its cells; the other backbone's are done, and only the rest is run again."""
    sound, broken = two_checkpoints(tmp_path)
    file = Path(broken) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    names = [broken, sound] if first == "broken" else [sound, broken]
    command = ["sweep", "--pretrained", *names, *TWO, "--output", str(tmp_path / "run")]
    assert cli.main(command) == 3
    said = capfd.readouterr()
    failures = [line for line in said.err.splitlines() if line.startswith("failed: ")]
    assert len(failures) == 3
    assert all(line.startswith(f"failed: {broken} ") and "can't be read" in line for line in failures)
    assert "Traceback" not in said.err
    cells, samples = load_run(tmp_path / "run")
    assert cells.groupby("backbone")["status"].unique().map(list).to_dict() == {sound: ["done"], broken: ["failed"]}
    assert set(samples.backbone) == {sound}
    notes = [line for line in (tmp_path / "run" / "leaderboard.md").read_text().splitlines() if "- failed" in line]
    assert len(notes) == 1
    assert notes[0].startswith(f"- failed: {broken}, all 3 cells: ")
    assert cli.main(command) == 3, "nothing but the broken one is left: still no reason to refuse the sweep"
    assert sound in capfd.readouterr().out

    file.write_bytes(whole)
    assert cli.main(command) == 0
    assert f"done: {sound} " not in capfd.readouterr().err, "mended, it alone is run"
    assert Counter(load_run(tmp_path / "run").cells.status) == {"done": 6}


def test_no_backbone_that_can_be_loaded_is_bad_input(tmp_path, capfd):
    names = two_checkpoints(tmp_path)
    for name in names:
        (Path(name) / "model.safetensors").write_bytes(b"")
    assert cli.main(["sweep", "--pretrained", *names, *TWO, "--output", str(tmp_path / "run")]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert names[0] in said
    assert cli.main(["sweep", "--pretrained", "tiny", str(tmp_path / "absent"), *TWO, "--output", str(tmp_path)]) == 2
    assert "absent" in capfd.readouterr().err


def test_a_cell_that_cannot_be_scored_fails_alone(tmp_path, monkeypatch):
    """Upstream's scoring code meets answers that it cannot read: the answers stay, the other cells continue."""
    score = scoring.score

    def breaks(bound, responses, *args):
        if bound.name == "tiny_pope":
            raise KeyError("yes")
        return score(bound, responses, *args)

    monkeypatch.setattr(scoring, "score", breaks)
    _, result = sweep(tmp_path)
    assert (len(result.done), len(result.failed)) == (3, 3)
    assert set(result.failed.values()) == {"KeyError: 'yes'"}
    monkeypatch.undo()
    answering = Answering()
    _, result = sweep(tmp_path, answer=answering)
    assert (len(result.done), result.failed, answering.answers) == (3, {}, [])


def test_a_task_without_its_data_fails_alone_and_a_misspelt_one_is_refused(tmp_path):
    _, result = sweep(tmp_path, tasks=["tiny_pope", "docvqa_val"])
    assert len(result.done) == 3
    assert len(result.failed) == 3
    assert all("docvqa_val" in reason and "\n" not in reason for reason in result.failed.values())
    cells, _ = load_run(tmp_path)
    assert Counter(cells.status) == {"done": 3, "failed": 3}
    with pytest.raises(InputError, match="docvqa_val"):
        sweep(tmp_path / "none", tasks=["docvqa_val"])
    with pytest.raises(InputError, match="unknown task 'tiny_pop': did you mean 'tiny_pope'"):
        sweep(tmp_path / "misspelt", tasks=["tiny_chartqa", "tiny_pop"])


def chartqa_root(folder: Path, **wrong: object) -> str:
    """A data root whose third document of chartqa has other fields."""
    fine = {"type": "human_test", "question": "What is it?", "answer": "1", "image": Image.new("RGB", (56, 56))}
    write_task(folder, "chartqa", [fine, fine, {**fine, **wrong}, fine])
    return str(folder)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"image": Image.new("RGB", (9000, 12))}, "processor refused the input"),
        ({"question": "Is <|image_pad|> here?"}, "invalid prompt text"),
    ],
)
def test_a_document_that_the_processor_refuses_has_its_reason(wrong, reason, tmp_path):
    fields = {"tasks": ["chartqa"], "methods": ["divprune"], "data_root": chartqa_root(tmp_path / "root", **wrong)}
    _, result = sweep(tmp_path / "fail", **fields)
    assert len(result.failed) == 2
    assert all(r.startswith("document 2 of chartqa: ") and reason in r for r in result.failed.values())
    _, result = sweep(tmp_path / "skip", on_bad_document="skip", **fields)
    assert (len(result.done), result.failed) == (2, {})
    samples = load_run(tmp_path / "skip").samples
    assert samples[samples.skipped != ""].doc_id.tolist() == [2, 2]
    assert samples[samples.skipped != ""].skipped.str.contains(reason).all()
    # Documents beside it answer what they answer without it.
    sweep(tmp_path / "fine", **{**fields, "data_root": chartqa_root(tmp_path / "other")})
    fine = load_run(tmp_path / "fine").samples
    assert fine[fine.doc_id != 2].answer.tolist() == samples[samples.doc_id != 2].answer.tolist()


def test_a_checkpoint_whose_logits_are_not_finite_fails_its_cells(tmp_path):
    shutil.copytree(checkpoint(), tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    (name,) = (k for k in tensors if k in ("model.norm.weight", "model.language_model.norm.weight"))
    tensors[name][0] = float("nan")
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    fields = {"backbones": [str(tmp_path / "broken"), "tiny"], "protocol": "checkpoint"}
    _, result = sweep(tmp_path / "run", methods=["divprune"], tasks=["tiny_pope"], **fields)
    assert (len(result.done), len(result.failed)) == (2, 2)
    assert all("logits are not finite" in reason for reason in result.failed.values())


def test_bounds_that_contradict_each_other_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(InputError, match=r"pixel bounds 3000000\.\.1605632"):
        sweep(tmp_path, protocol="visionselector", min_pixels=3_000_000)


# what people see -----------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_is_shared_and_what_is_done(copy, tmp_path, capsys):
    spec = small(copy, budgets=[0.2, 0.5])
    flags = ["--methods", "divprune", "downsample", "--budgets", "0.2", "0.5", "--tasks", *SMALL["tasks"]]
    flags += ["--limit", "4", "--batch-size", "2", "--device", "cpu"]
    before = contents(copy)
    assert cli.main(["sweep", *flags, "--output", str(copy), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text == render_plan(plan(spec, Run(copy), "cpu")) + "\n"
    lines = text.splitlines()
    for cell in plan(spec, Run(copy), "cpu").cells:
        line = next(line for line in lines if cell.digest in line)
        assert line.split()[:4] == ["tiny", cell.spec.task, cell.spec.label, str(cell.spec.budget)]
        assert line.endswith("done" if str(cell.spec.budget) != "0.5" else "to do")
    assert ["tiny", "tiny_pope", "4", "5", "2"] in [line.split() for line in lines]
    assert lines[-1] == "10 cells, 6 done; 16 answers to give, from 8 vision passes"
    assert contents(copy) == before

    missing = tmp_path / "not" / "there"
    assert cli.main(["sweep", *flags, "--output", str(missing), "--dry-run"]) == 0
    assert "10 cells, 0 done; 40 answers to give, from 8 vision passes" in capsys.readouterr().out
    assert not missing.exists()


def test_a_dry_run_says_what_is_begun(tmp_path):
    def stops(unit):
        for count, event in enumerate(answer_unit(unit)):
            if count == 4:
                raise KeyboardInterrupt
            yield event

    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, answer=stops)
    text = render_plan(plan(small(tmp_path), Run(tmp_path), "cpu"))
    assert text.count("begun: 2 of 4 answered") == 2
    assert "6 cells, 1 done; 16 answers to give" in text


# killed --------------------------------------------------------------------------------------------------------------

KILLED = {"methods": ["divprune", "random", "downsample"], "budgets": [0.3, 0.1], "limit": 8, "batch_size": 2}


class Audit(Answering):
    """Writes every answer down before the sweep stores it, in a file that a killed process leaves behind."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.write, self.handle = os.write, os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, unit):
        for event in answer_unit(unit):
            if isinstance(event, Answered):
                lines = [f"{event.digest} {a['task']} {a['doc_id']}\n" for a in event.answers]
                self.write(self.handle, "".join(lines).encode())
            yield event


def child(folder: Path, audit: Path, arm=lambda: None) -> int:
    """Start a sweep in a process of its own, which has this one's imports, backbone and tasks; its id."""
    # Whatever tests ran before: what is loaded after a fork meets locks and threads that are not there any more.
    worker.backbone_of(*_unit_of(folder.parent / "planned").checkpoint)
    for task in SMALL["tasks"]:
        worker.bound_task(task, "qwen2_5_vl", KILLED["limit"])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the threads of the parent are not there
            # tqdm's own lock is shared with the parent, which would wait for it forever after a kill.
            tqdm.set_lock(threading.RLock())
            answering = Audit(audit)
            arm()
            _, result = sweep(folder, answer=answering, **KILLED)
            code = 0 if not result.failed else 3
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """Wait for a child; 0 where it finished its sweep, -9 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stored(folder: Path) -> dict[tuple[str, str, int], str]:
    """Every document that is finished, in a journal or a finished cell, with its answer."""
    run, found = Run(folder), {}
    for digest in run.digests():
        if run.is_done(digest):
            table = pd.read_parquet(folder / "cells" / digest / "samples.parquet")
            rows = zip(table.subtask, table.doc_id, table.answer, strict=True)
            found.update({(digest, task, doc_id): answer for task, doc_id, answer in rows})
        else:
            lines = run.journal(digest).read()
            answers = [a for line in lines for a in line["answers"]]
            assert len({(a["task"], a["doc_id"]) for a in answers}) == len(answers), "journaled twice"
            found.update({(digest, a["task"], a["doc_id"]): a["answer"] for a in answers})
    return found


def answered(audit: Path) -> list[tuple[str, str, int]]:
    """Every answer that was ever given, in order."""
    lines = [line.split() for line in audit.read_text().splitlines()] if audit.exists() else []
    return [(digest, task, int(doc_id)) for digest, task, doc_id in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The sweep that the killed ones must equal, in a child like theirs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert ended(child(folder / "run", folder / "audit")) == 0
    assert len(answered(folder / "audit")) == 2 * 7 * 8
    return folder / "run"


def _unit_of(folder: Path) -> worker.WorkUnit:
    from visionselector_eval.harness.sweep import run as module

    planned = plan(small(folder, **KILLED), None, "cpu")
    return module._unit(planned.spec, planned.groups[0], Run(folder), "cpu")


def finish_after_kills(folder: Path, audit: Path, undisturbed: Path, start, least: int) -> None:
    """Start sweeps that get killed until one ends by itself; audit each and compare the end with the undisturbed."""
    kills = 0
    while True:
        before, count = stored(folder), len(answered(audit))
        code = ended(start())
        again = set(answered(audit)[count:]) & set(before)
        assert not again, "a finished document was answered again"
        after = stored(folder)
        assert before.items() <= after.items(), "a finished answer was lost or changed"
        if code != -signal.SIGKILL:
            assert code == 0
            break
        kills += 1
    assert kills >= least
    assert records(folder) == records(undisturbed)
    assert contents(folder) == contents(undisturbed), "the same files, byte for byte, and nothing left behind"
    for ours, theirs in zip(load_run(folder), load_run(undisturbed), strict=True):
        pd.testing.assert_frame_equal(
            *(f.drop(columns=["seconds", "finished_at"], errors="ignore") for f in (ours, theirs))
        )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seed", [0, 1])
def test_a_sweep_killed_at_random_moments_ends_like_an_undisturbed_one(seed, undisturbed, tmp_path):
    moments = random.Random(seed)
    kills = 0

    def start() -> int:
        nonlocal kills
        pid = child(tmp_path / "run", tmp_path / "audit")
        if kills < 12:  # then it may end
            kills += 1
            time.sleep(moments.uniform(0.05, 0.6))
            os.kill(pid, signal.SIGKILL)
        return pid

    finish_after_kills(tmp_path / "run", tmp_path / "audit", undisturbed, start, least=6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("torn", [False, True], ids=["between", "inside a write"])
def test_a_sweep_killed_at_any_step_of_its_writing_ends_like_an_undisturbed_one(torn, undisturbed, tmp_path):
    """Killed at, or half way through, the n-th step that reaches the disk: write, sync, rename, unlink, new folder."""
    moments = random.Random(int(torn))

    def start() -> int:
        left = moments.randint(1, 60)

        def dying(name: str, real):
            def step(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    if torn and name == "write":
                        real(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return step

        def arm() -> None:
            for name in ("write", "fsync", "replace", "unlink", "mkdir"):
                setattr(os, name, dying(name, getattr(os, name)))

        return child(tmp_path / "run", tmp_path / "audit", arm)

    finish_after_kills(tmp_path / "run", tmp_path / "audit", undisturbed, start, least=6)


def test_the_command_itself_killed_goes_on_where_it_was(tmp_path):
    """`python run_eval.py`, killed with its whole process group as soon as answers are stored, then run again."""
    folder = tmp_path / "run"
    fields = {"limit": 64, "tasks": ["tiny_chartqa"], "methods": ["divprune"]}
    command = [sys.executable, str(ROOT / "run_eval.py"), "--tasks", "tiny_chartqa", "--methods", "divprune"]
    command += ["--budgets", "0.2", "--limit", "64", "--batch-size", "2", "--device", "cpu"]
    command += ["--output", str(folder)]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    try:
        deadline = time.monotonic() + 120
        while len(stored(folder)) < 20 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before, rest = stored(folder), Answering()
    assert 20 <= len(before) < 128
    _, result = sweep(folder, answer=rest, **fields)
    assert len(result.done) + len(result.before) == 2
    assert sorted(rest.answers) == sorted(set(rest.answers))
    assert len(rest.answers) == 128 - len(before)
    assert not set(rest.answers) & set(before)
    assert before.items() <= stored(folder).items()
    assert len(cells_of(SweepSpec.make({**SMALL, **fields}))) == len(load_run(folder).cells) == 2
