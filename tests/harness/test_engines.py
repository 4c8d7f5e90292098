"""Engines: the same events wherever units run, and nothing lost with a worker."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from visionselector_eval.baselines import InputError
from visionselector_eval.baselines.contract.budget import Share
from visionselector_eval.harness.sweep.engines import engine
from visionselector_eval.harness.sweep.worker import Answered, Failed, PendingCell, WorkUnit

ray = pytest.importorskip("ray", reason="the ray extra is optional")


@pytest.fixture(scope="module")
def cluster():
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers don't have the tests on their path
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    chosen = engine("ray", workers=2)
    yield chosen
    ray.shutdown()


def unit(task: str, cells: int = 2) -> WorkUnit:
    return WorkUnit(
        pretrained="tiny",
        revision=None,
        device="cpu",
        dtype="float32",
        attn_implementation="sdpa",
        media={},
        task=task,
        base_model="qwen2_5_vl",
        limit=None,
        generation={},
        batch_size=1,
        on_bad_document="fail",
        cells=tuple(PendingCell(f"{task}-{i}", "full", {}, Share(1.0)) for i in range(cells)),
    )


def answers(unit: WorkUnit):
    """Four documents a cell; what is done already is left out."""
    for number in range(4):
        for work in unit.cells:
            if (unit.task, number) not in work.done:
                yield Answered(work.digest, number, [{"task": unit.task, "doc_id": number, "answer": f"{number}"}])


def dies_once(unit: WorkUnit):
    """Loses its worker in the middle, the first time."""
    for i, event in enumerate(answers(unit)):
        yield event
        marker = Path(unit.pretrained)
        if i == 2 and not marker.exists():
            marker.write_text("died")
            time.sleep(0.5)  # what was yielded reaches the driver first
            os._exit(1)


def always_dies(unit: WorkUnit):
    os._exit(1)
    yield


def refuses(unit: WorkUnit):
    if unit.task == "bad":
        raise InputError("this unit can't be run")
    yield Failed(unit.cells[0].digest, "a reason")


def seen(events):
    return sorted((u.task, e.digest, e.batch) for u, e in events if isinstance(e, Answered))


EVERYTHING = sorted((t, f"{t}-{c}", n) for t in ("a", "b", "c") for c in range(2) for n in range(4))


def test_both_engines_give_the_same_events(cluster):
    units = [unit(t) for t in "abc"]
    assert seen(engine("local")(units, answers)) == EVERYTHING
    assert seen(cluster(units, answers)) == EVERYTHING


def test_a_lost_worker_loses_nothing(cluster, tmp_path):
    import dataclasses

    lost = dataclasses.replace(unit("a"), pretrained=str(tmp_path / "marker"))
    events = list(cluster([lost], dies_once))
    assert (tmp_path / "marker").exists()
    assert not [e for _, e in events if isinstance(e, Exception)]
    assert seen(events) == [row for row in EVERYTHING if row[0] == "a"], "every document once"


def test_a_unit_that_always_kills_its_worker_is_given_up(cluster):
    events = list(cluster([unit("a")], always_dies))
    assert len(events) == 1
    assert "lost 3 times" in str(events[0][1])


@pytest.mark.parametrize("name", ["local", "ray"])
def test_one_unit_that_fails_leaves_the_others(name, cluster):
    chosen = cluster if name == "ray" else engine("local")
    events = {u.task: e for u, e in chosen([unit("bad"), unit("good")], refuses)}
    assert isinstance(events["bad"], InputError)
    assert events["good"] == Failed("good-0", "a reason")


def test_calls_run_where_units_run(cluster):
    assert cluster.call(lambda u: (u.task, os.getpid()), unit("a"))[0] == "a"
    assert cluster.call(lambda u: os.getpid(), unit("a")) != os.getpid()

    def refuse(unit):
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        cluster.call(refuse, unit("a"))
    assert cluster.device("auto") == "cpu"


def test_bad_engines():
    with pytest.raises(InputError, match="did you mean 'local'"):
        engine("locla")
    with pytest.raises(InputError, match="--workers 0"):
        engine("ray", workers=0)
