"""suites.yaml: what it says exists in the installed lmms-eval, and wrong names explain themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.tasks import headline, lmms, suites
from visionselector_eval.tasks.local import upstream
from visionselector_eval.tasks.suites import TaskEntry
from visionselector_eval.tasks.tiny import MIRRORS, generate

TASKS = suites.load_suites().tasks
REAL = sorted(name for name, entry in TASKS.items() if entry.mirror_of is None)


def definition(name: str) -> dict:
    """The upstream task file, read without importing its code."""
    from lmms_eval.utils import load_yaml_config

    return load_yaml_config(lmms.task_manager("qwen2_5_vl").task_index[name]["yaml_path"], mode="simple")


def members(name: str) -> list[str]:
    config = definition(name)
    return config["task"] if isinstance(config["task"], list) else [name]


def test_importing_suites_is_light() -> None:
    code = (
        "import sys, visionselector_eval.tasks.suites as s; s.suite('tiny');"
        "sys.exit(', '.join(m for m in ('torch', 'lmms_eval', 'datasets', 'transformers') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_published_suites() -> None:
    text = "docvqa_val chartqa textvqa_val ocrbench scienceqa_img ai2d_no_mask mmmu_val mme pope"
    nine = text.split()
    assert suites.suite("visionselector9") == nine
    assert suites.suite("visionselector13") == [*nine, "mvbench", "seedbench", "videomme", "nextqa_mc_test"]
    assert suites.suite("tiny") == list(MIRRORS)
    text = "vqav2_val gqa vizwiz_vqa_val scienceqa_img textvqa_val pope mme mmbench_en_dev_static mmbench_cn_dev"
    assert suites.suite("llava_stf9") == text.split()
    # Only what is scored by a server differs.
    assert {
        (a, b) for a, b in zip(suites.suite("llava_stf9"), suites.suite("llava_stf9_server"), strict=True) if a != b
    } == {("vqav2_val", "vqav2_test"), ("vizwiz_vqa_val", "vizwiz_vqa_test")}
    assert suites.suite("ocr") == ["docvqa_val", "chartqa", "textvqa_val", "ocrbench"]
    assert suites.suite("video") == ["mvbench", "seedbench", "videomme", "nextqa_mc_test"]
    assert suites.suite("smoke") == list(MIRRORS)


@pytest.mark.parametrize("suite", ["visionselector13", "llava_stf9"])
def test_every_task_of_the_papers_has_a_mirror(suite: str) -> None:
    mirrored = {m.upstream for m in MIRRORS.values()}
    mirrored.add("mvbench")  # by one of its 20 subtasks
    assert set(suites.suite(suite)) <= mirrored
    assert set(members("mvbench")) >= {"mvbench_moving_direction"}


def test_entries_say_what_papers_report() -> None:
    for name, entry in TASKS.items():
        assert bool(entry.published) == (entry.mirror_of is None), name
        assert entry.about
        assert "\n" not in entry.published


def test_suites_hold_no_mirror_beside_the_real_ones() -> None:
    for name, tasks in suites.load_suites().suites.items():
        assert len({TASKS[t].mirror_of is None for t in tasks}) == 1, name


@pytest.mark.parametrize("name", REAL)
def test_entries_exist_upstream(name: str) -> None:
    entry = TASKS[name]
    assert lmms.lmms_eval().version.startswith("0.7.")
    for member in members(name):
        config = definition(member)
        metrics = {m["metric"]: m for m in config["metric_list"]}
        assert entry.metric in metrics
        assert metrics[entry.metric]["higher_is_better"] == entry.higher_is_better
        filters = [f["name"] for f in config.get("filter_list", [])] or ["none"]
        assert entry.filter in filters
        assert config["output_type"] == "generate_until"
        assert config.get("test_split") or config.get("validation_split")
        columns = upstream.upstream(member).columns
        if columns:  # a test of the local data compares them with what upstream's functions read
            assert {entry.target} <= {None, *columns}
        assert entry.needs_submission == (entry.metric == "submission")
    assert (entry.combine == "mean") == (len(members(name)) > 1)


@pytest.mark.parametrize("name", list(MIRRORS))
def test_mirrors_follow_their_original(name: str) -> None:
    mirror, entry = MIRRORS[name], TASKS[name]
    original = TASKS[mirror.upstream]
    assert entry.mirror_of == mirror.upstream
    inherited = TaskEntry.model_fields.keys() - {"about", "scale", "mirror_of", "published"}
    assert {k: getattr(entry, k) for k in inherited} == {k: getattr(original, k) for k in inherited}
    assert mirror.pair % entry.pair == 0
    index = lmms.task_manager("qwen2_5_vl").task_index
    assert str(lmms.lmms_eval().tasks_folder / mirror.config) == index[mirror.upstream]["yaml_path"]
    config = definition(mirror.upstream)
    assert mirror.split == config.get("test_split", config.get("validation_split"))
    assert set(mirror.changes) <= set(config)
    (document, *_) = generate(name, 0, mirror.pair)
    columns = {*document.row, "image", "image_1"}
    assert set(upstream.upstream(mirror.upstream).columns) <= columns
    assert {entry.cluster_key, entry.target} <= {None, *columns}


def test_unknown_names_get_a_near_match() -> None:
    with pytest.raises(InputError, match="unknown suite 'visionselector12': did you mean 'visionselector13'"):
        suites.suite("visionselector12")
    with pytest.raises(InputError, match="unknown task 'charqa': did you mean 'chartqa'"):
        suites.entry("charqa")


@pytest.mark.parametrize("limit", [0, -2, 0.5, 2.5, True, "8"])
def test_limits_are_whole_numbers(limit: object) -> None:
    with pytest.raises(InputError, match="whole number"):
        suites.check_limit("chartqa", limit)  # type: ignore[arg-type]


def test_limits_keep_pairs_together() -> None:
    assert suites.check_limit("mme", 8, 2) == 8
    assert suites.check_limit("mme", None, 2) is None
    with pytest.raises(InputError, match="groups of 2, try 8"):
        suites.check_limit("mme", 7, 2)


def test_a_wrong_file_is_refused() -> None:
    entry = {"metric": "anls"}
    for raw in (
        {"tasks": {"a": {**entry, "scales": 1}}, "suites": {}},
        {"tasks": {"a": entry}, "suites": {"s": ["b"]}},
        {"tasks": {"a": entry}, "suites": {"s": ["a", "a"]}},
        {"tasks": {"a": {"mirror_of": "b"}}, "suites": {}},
    ):
        with pytest.raises(ValidationError):
            suites.Suites.model_validate(raw)


@pytest.mark.parametrize(
    ("names", "metric", "others"),
    [
        (["coarse perception", "math", "average"], "average", ()),
        (["relaxed_overall"], "relaxed_overall", ()),
        (["submission", "anls"], "anls", ()),
        (["submission"], "submission", ()),
        (["precision", "recall", "f1"], "precision", ("recall", "f1")),
        (["acc_overall", "math", "avg_f1"], "acc_overall", ("avg_f1",)),
        (["overallocated", "small"], "overallocated", ("small",)),
    ],
)
def test_the_headline_is_the_aggregate_that_a_definition_states(names, metric, others) -> None:
    assert headline.headline(names) == headline.Headline(metric, others)


def test_upstreams_tasks_get_their_aggregate() -> None:
    number, found = headline.guesses()
    assert number > 500
    assert found
    assert not {"mmstar", "mmstar_ko", "mmstar_oc"} & set(found)
    for task, metric in (("mmstar", "average"), ("mmstar_ko", "average"), ("chartqa", "relaxed_overall")):
        names = [item["metric"] for item in upstream.upstream(task).config["metric_list"]]
        assert headline.headline(names).metric == metric
        assert headline.chosen(task, names[0], names) == names[0]
    with pytest.raises(InputError, match="unknown metric of mmstar 'averag': did you mean 'average'"):
        headline.chosen("mmstar", "averag", ["math", "average"])


def test_a_group_states_which_number_of_its_members_is_its_own() -> None:
    assert [made.metric for made in headline.aggregates("c4_bench")] == ["c4_exact_match"]
    assert headline.aggregates("c4_bench")[0].weighted
    assert [(made.weighted, made.is_mean) for made in headline.aggregates("mvp_mini")] == [(False, True)] * 2
    assert not any(made.is_mean for made in headline.aggregates("wm_abench")[:2])
    assert headline.aggregates("mmstar") == headline.aggregates("mvbench") == []
    stated = headline.aggregates("c4_bench")
    assert headline.headline(["c4_json_valid", "c4_exact_match"], stated) == headline.Headline("c4_exact_match")
    # A group whose number the members lack leaves the choice to them.
    assert headline.headline(["c4_json_valid"], stated) == headline.Headline("c4_json_valid")
    number, found = headline.guesses(["c4_bench", "mvp_mini"])
    assert number == 10
    assert "mvp_mini" in found
    assert "c4_bench" not in found
