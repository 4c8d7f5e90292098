"""The run folder: digests, journal, completion records, reading."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from visionselector_eval.baselines import InputError, Share, Tokens
from visionselector_eval.harness.store.files import canonical_json, digest_of, write_atomic
from visionselector_eval.harness.store.journal import Journal
from visionselector_eval.harness.store.record import CellRecord
from visionselector_eval.harness.store.run import Run, load_run

SETTINGS = {"backbone": "tiny", "method": "divprune", "options": {"upstream_exact": False}, "budget": "0.2"}
DIGEST = digest_of(SETTINGS)


def record(digest: str = DIGEST, **changes: Any) -> CellRecord:
    values: dict[str, Any] = {
        "digest": digest,
        "backbone": "tiny",
        "method": "divprune",
        "options": {"upstream_exact": False},
        "budget": "0.2",
        "task": "chartqa",
        "metric": "relaxed_overall",
        "score": 0.5,
        "metrics": {"relaxed_overall": 0.5},
        "n_documents": 3,
        "kept_tokens": 4.0,
        "total_tokens": 20.0,
        "settings": SETTINGS,
    }
    return CellRecord(**{**values, **changes})


def samples(n: int = 3) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "doc_id": range(n),
            "answer": [f"answer {i}" for i in range(n)],
            "target": [["a", "b"] if i % 2 else "c" for i in range(n)],
            "score": [float(i % 2) for i in range(n)],
            "kept_tokens": [4] * n,
            "total_tokens": [20] * n,
        }
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "run", create=True)


# ---------------------------------------------------------------- digests


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), PLAIN, max_size=6), st.randoms())
def test_digest_ignores_order_and_survives_json(settings: dict[str, Any], shuffle: random.Random) -> None:
    keys = list(settings)
    shuffle.shuffle(keys)
    digest = digest_of({key: settings[key] for key in keys})
    assert digest == digest_of(settings) == digest_of(json.loads(canonical_json(settings)))
    assert len(digest) == 16
    assert int(digest, 16) >= 0


def test_digest_tells_what_differs() -> None:
    values = [1, 1.0, "1", True, None, [1], {"a": 1}, 0.1, 0.1 + 1e-17 + 2e-17, "0.1", [], {}]
    digests = [digest_of({"x": value}) for value in values]
    assert len(set(digests)) == len(values)


def test_digest_is_fixed() -> None:
    # A change here orphans every run folder that exists.
    assert digest_of({"budget": "0.2", "seed": 0, "options": {"b": 0.5, "a": [1, None]}}) == "857198c1b96a89bd"


def test_digest_takes_our_own_types_and_refuses_objects() -> None:
    numpy_values = {"a": np.float64(0.5), "b": np.int64(3), "c": (1, 2), "d": Share(0.2), "e": Tokens(64)}
    assert digest_of(numpy_values) == digest_of({"a": 0.5, "b": 3, "c": [1, 2], "d": "0.2", "e": "64tok"})
    with pytest.raises(TypeError, match="not plain data"):
        digest_of({"x": object()})
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_of({"x": float("nan")})
    with pytest.raises(TypeError, match="same text"):
        digest_of({"x": {1: "a", "1": "b"}})


# ---------------------------------------------------------------- opening


def test_open_without_create_needs_the_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no run folder"):
        Run.open(tmp_path / "absent", create=False)


def test_open_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="cannot write to the run folder") as caught:
            Run.open(place, create=True)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_open_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot write"):
        Run.open(tmp_path, create=True)


def test_lock_keeps_a_second_writer_out_and_dies_with_its_holder(run: Run) -> None:
    pytest.importorskip("fcntl")
    code = "import sys, time; from visionselector_eval.harness.store import Run\n"
    code += "with Run.open(sys.argv[1], create=True).lock():\n    print('locked', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code, str(run.folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match="another process is writing"), run.lock():
            pass
    finally:
        child.kill()
        child.communicate()
    with run.lock():
        pass
    with run.lock():
        pass


# ---------------------------------------------------------------- cells


def test_finish_makes_a_cell_done(run: Run) -> None:
    journal = run.journal(DIGEST)
    journal.append(0, [{"doc_id": 0}])
    assert not run.is_done(DIGEST)
    assert run.record(DIGEST) is None
    run.finish(DIGEST, record(), samples())
    assert run.is_done(DIGEST)
    assert run.digests() == [DIGEST]
    stored = run.record(DIGEST)
    assert stored is not None
    assert CellRecord(**stored) == record()
    folder = run.folder / "cells" / DIGEST
    assert sorted(path.name for path in folder.iterdir()) == ["cell.json", "samples.parquet"]


def test_a_torn_or_foreign_record_counts_as_none(run: Run) -> None:
    run.finish(DIGEST, record(), samples())
    path = run.folder / "cells" / DIGEST / "cell.json"
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:size])
        assert run.record(DIGEST) is None
        assert not run.is_done(DIGEST)
    path.write_bytes(whole.replace(DIGEST.encode(), b"0123456789abcdef"))
    assert run.record(DIGEST) is None
    path.write_bytes(whole)
    assert run.is_done(DIGEST)


def test_done_needs_all_samples(run: Run) -> None:
    run.finish(DIGEST, record(), samples())
    path = run.folder / "cells" / DIGEST / "samples.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert not run.is_done(DIGEST)
    samples(2).drop(columns="target").to_parquet(path)
    assert not run.is_done(DIGEST)
    path.unlink()
    assert not run.is_done(DIGEST)
    cells, _ = load_run(run.folder)
    assert cells["status"].tolist() == ["failed"]
    assert "samples.parquet" in cells["error"].iloc[0]


def test_finish_refuses_what_does_not_fit(run: Run) -> None:
    with pytest.raises(ValueError, match="2 samples for 3 documents"):
        run.finish(DIGEST, record(), samples(2))
    with pytest.raises(ValueError, match="no column score"):
        run.finish(DIGEST, record(), samples().drop(columns="score"))
    with pytest.raises(ValueError, match="was given for cell"):
        run.finish("0123456789abcdef", record(), samples())
    with pytest.raises(ValueError, match="not a cell's digest"):
        run.remove("../outside")
    assert run.digests() == []


def test_fail_keeps_the_journal_and_a_later_finish_wins(run: Run) -> None:
    run.journal(DIGEST).append(0, [{"doc_id": 0}])
    run.fail(DIGEST, record(score=None), "CUDA out of memory\n")
    stored = run.record(DIGEST)
    assert stored is not None
    assert (stored["status"], stored["error"]) == ("failed", "CUDA out of memory")
    assert not run.is_done(DIGEST)
    assert run.journal(DIGEST).read() == [{"batch": 0, "answers": [{"doc_id": 0}]}]
    run.finish(DIGEST, record(), samples())
    assert run.is_done(DIGEST)


def test_remove_forgets(run: Run) -> None:
    run.finish(DIGEST, record(), samples())
    run.remove(DIGEST)
    run.remove(DIGEST)
    assert run.digests() == []
    with pytest.raises(InputError, match="no finished or failed cell"):
        load_run(run.folder)


def test_a_kill_between_samples_and_record_leaves_the_cell_open(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.journal(DIGEST).append(0, [{"doc_id": 0}])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_write_record", killed)
    with pytest.raises(KeyboardInterrupt):
        run.finish(DIGEST, record(), samples())
    monkeypatch.undo()
    assert not run.is_done(DIGEST)
    assert len(run.journal(DIGEST).read()) == 1
    run.finish(DIGEST, record(), samples())
    assert run.is_done(DIGEST)


# ---------------------------------------------------------------- records


def test_record_refuses_unknown_fields_and_wrong_budgets() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        record(acuracy=1.0)
    with pytest.raises(ValidationError, match="budget"):
        record(budget="1.5")
    assert record(budget="20%").budget == "0.2"
    assert record(budget=Tokens(64)).budget == "64tok"


def test_record_holds_numpy_and_no_nan(run: Run) -> None:
    made = record(
        score=np.float32(0.5),
        n_documents=np.int64(3),
        metrics={"a": np.float64(1), "b": float("nan"), "c": None},
        kept_tokens=float("inf"),
        options={"k": np.int64(2), "pair": (1, 2)},
    )
    run.finish(DIGEST, made, samples())
    text = (run.folder / "cells" / DIGEST / "cell.json").read_text()
    parsed = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert parsed["metrics"] == {"a": 1.0, "b": None, "c": None}
    assert parsed["kept_tokens"] is None
    assert parsed["options"] == {"k": 2, "pair": [1, 2]}
    assert run.is_done(DIGEST)


# ---------------------------------------------------------------- reading


def test_load_run_gives_both_frames(run: Run) -> None:
    other = digest_of({**SETTINGS, "task": "mme"})
    run.finish(DIGEST, record(label="divprune[x]"), samples().assign(cluster=[1, 1, 2]))
    run.finish(other, record(other, task="mme", score=1.0), samples().assign(doc_id=["a", "b", "c"]))
    failed = digest_of({**SETTINGS, "task": "pope"})
    run.fail(failed, record(failed, task="pope", score=None, n_documents=0), "no such image")
    cells, table = load_run(run.folder)
    assert cells["task"].tolist() == ["chartqa", "mme", "pope"]
    assert cells["label"].tolist() == ["divprune[x]", "divprune", "divprune"]
    assert cells["options"].tolist() == ['{"upstream_exact":false}'] * 3
    assert {"metric", "score", "n_documents", "kept_tokens", "total_tokens", "status", "error", "digest"} <= set(cells)
    assert cells["score"].isna().tolist() == [False, False, True]
    wanted = "cell backbone method label budget task seed doc_id answer target score kept_tokens total_tokens"
    assert list(table.columns)[:13] == wanted.split()
    assert len(table) == 6
    first = table[table["cell"] == DIGEST]
    assert first["target"].tolist() == ["c", '["a", "b"]', "c"]
    assert first["cluster"].tolist() == [1, 1, 2]
    assert table["kept_tokens"].tolist() == [4] * 6


def test_load_run_of_failed_cells_only(run: Run) -> None:
    run.fail(DIGEST, record(score=None), "broken")
    cells, table = load_run(str(run.folder))
    assert len(cells) == 1
    assert len(table) == 0
    assert "score" in table.columns


def test_load_run_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no run folder"):
        load_run(tmp_path / "absent")
    with pytest.raises(InputError, match="no finished or failed cell"):
        load_run(tmp_path)


def test_samples_of_any_kind_can_be_stored(run: Run) -> None:
    odd = samples().assign(
        answer=["\ud800 lone", None, {"a": 1}],
        target=pd.Series([1, 2.5, None], dtype=object),
        score=[True, None, 0.25],
        kept_tokens=[None, 3, 4],
        extra=[{"b": 2}, "x", None],
    )
    run.finish(DIGEST, record(), odd)
    _, table = load_run(run.folder)
    assert table["answer"].tolist() == ["? lone", "", '{"a": 1}']
    assert table["target"].tolist() == ["1", "2.5", ""]
    assert table["score"].isna().tolist() == [False, True, False]
    assert table["kept_tokens"].tolist() == [0, 3, 4]


def test_environment_of_a_resumed_run_keeps_the_earlier_ones(run: Run) -> None:
    assert run.environment() == {}
    for device in ("A", "A", "B", "A"):
        run.write_environment({"device": device})
    assert run.environment() == {"device": "A", "earlier": [{"device": "B"}]}
    run.write_spec("budgets: [0.2]\n")
    assert (run.folder / "spec.yaml").read_text() == "budgets: [0.2]\n"


def test_write_atomic_replaces_and_clears_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / ".x.tmp").write_text("left")
    write_atomic(tmp_path / "x", "one")
    write_atomic(tmp_path / "x", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "two"


# ---------------------------------------------------------------- journal


def test_journal_round_trip(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "cells" / "x" / "answers.jsonl")
    assert journal.read() == []
    journal.append(0, [{"doc_id": 0, "answer": "zwölf\nlines\u2028 😀", "kept": np.int64(3)}])
    journal.append(1, [])
    assert journal.read() == [
        {"batch": 0, "answers": [{"doc_id": 0, "answer": "zwölf\nlines\u2028 😀", "kept": 3}]},
        {"batch": 1, "answers": []},
    ]


@given(st.lists(st.text(max_size=20), min_size=1, max_size=6), st.data())
def test_any_cut_leaves_a_prefix_and_can_be_appended_to(
    tmp_path_factory: pytest.TempPathFactory, answers: list[str], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "answers.jsonl"
    for number, answer in enumerate(answers):
        Journal(path).append(number, [{"answer": answer}])
    whole = Journal(path).read()
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut] + data.draw(st.sampled_from([b"", b"\0\0\0", b"\0\n", b"[]\n", b'{"batch": 1}\n'])))
    left = Journal(path).read()
    assert left == whole[: len(left)]
    assert len(left) >= content[:cut].count(b"\n")
    Journal(path).append(99, [{"answer": "next"}])
    assert Journal(path).read() == [*left, {"batch": 99, "answers": [{"answer": "next"}]}]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_full_disk_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "answers.jsonl")
    journal.append(0, [])
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[: len(data) // 2]))
    with pytest.raises(OSError, match="bytes could be written"):
        journal.append(1, [{"answer": "x" * 100}])
    monkeypatch.undo()
    journal.append(2, [])
    assert [entry["batch"] for entry in journal.read()] == [0, 2]


def _write_for_ever(path: Path, ready: Any) -> None:
    journal = Journal(path)
    start = len(journal.read())
    ready.set()
    for batch in range(start, 100000):
        journal.append(batch, [{"doc_id": 4 * batch + i, "answer": "x" * (37 * batch % 5000)} for i in range(4)])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    chance = random.Random(0)
    context = multiprocessing.get_context("fork")  # a fresh interpreter would spend its time on imports
    before = 0
    for _ in range(10):
        ready = context.Event()
        child = context.Process(target=_write_for_ever, args=(path, ready), daemon=True)
        child.start()
        assert ready.wait(30)
        time.sleep(0.01 + 0.05 * chance.random())
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        entries = Journal(path).read()
        # what was there stays, what follows goes on in order, every line is whole
        assert [entry["batch"] for entry in entries] == list(range(len(entries)))
        assert all(len(entry["answers"]) == 4 for entry in entries)
        assert len(entries) >= before
        before = len(entries)
    assert before > 0
    with open(path, "ab") as file:  # a power cut can also tear the last line
        file.write(b'{"batch": 7, "answers": [{"doc')
    Journal(path).append(before, [])
    assert [entry["batch"] for entry in Journal(path).read()] == list(range(before + 1))
    assert path.read_bytes().endswith(b"\n")
