"""Specs: flags and YAML say the same thing, a grid has the cells it should, and every wrong value is one clear line."""

from __future__ import annotations

import math
import shutil

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from visionselector_eval.baselines import InputError, available
from visionselector_eval.baselines.contract.budget import Share
from visionselector_eval.harness import cli
from visionselector_eval.harness.cli import sweep as sweep_command
from visionselector_eval.harness.cli.arguments import spec_from
from visionselector_eval.harness.sweep.spec import BackboneSpec, MethodSpec, SweepSpec, cells_of
from visionselector_eval.models.inputs import MediaSettings
from visionselector_eval.models.protocols import PROTOCOLS
from visionselector_eval.models.tiny import checkpoint
from visionselector_eval.tasks.suites import load_suites

RICH = {
    "name": "mine",
    "output": "somewhere/else",
    "backbones": ["tiny", {"pretrained": "Qwen/Qwen2.5-VL-7B-Instruct", "revision": "main"}],
    "methods": [
        "divprune",
        {"name": "divprune", "upstream_exact": True, "label": "DivPrune (paper)"},
        {"name": "random", "options": {"seed": 3}},
    ],
    "budgets": [0.3, "20%", "64tok"],
    "suite": "tiny",
    "tasks": ["chartqa"],
    "seeds": [0, 1, 2],
    "limit": 8,
    "batch_size": 4,
    "device": "cpu",
    "dtype": "bfloat16",
    "attn_implementation": "eager",
    "protocol": "checkpoint",
    "min_pixels": 3136,
    "max_pixels": 50176,
    "max_num_frames": 8,
    "fps": 2.0,
    "system_prompt": "Answer briefly: ä, \n and 'quotes'.",
    "generation": {"max_new_tokens": 16, "temperature": 0.7, "until": ["\n"]},
}


def from_flags(*flags: str) -> SweepSpec:
    parser = sweep_command.parser()
    return spec_from(parser.parse_all(list(flags)))


# round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, RICH, {"tasks": ["tiny_pope"], "budgets": 0.2}], ids=["default", "all", "few"])
def test_a_spec_written_as_yaml_is_read_back_the_same(fields, tmp_path):
    spec = SweepSpec.make(fields)
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    assert SweepSpec.load(tmp_path / "spec.yaml") == spec
    assert cells_of(SweepSpec.load(tmp_path / "spec.yaml")) == cells_of(spec)


@given(
    st.lists(st.floats(0.01, 1.0).map(lambda r: round(r, 4)), min_size=1, max_size=4),
    st.lists(st.integers(0, 99), min_size=1, max_size=3),
    st.lists(st.sampled_from(["divprune", "random", "uniform", "visionzip"]), min_size=1, max_size=3, unique=True),
)
def test_any_grid_survives_yaml(budgets, seeds, methods):
    spec = SweepSpec.make({"budgets": budgets, "seeds": seeds, "methods": methods})
    assert SweepSpec.make(yaml.safe_load(spec.to_yaml())) == spec


def test_flags_and_yaml_say_the_same(tmp_path):
    by_flags = from_flags(
        *("--pretrained", "tiny", "--methods", "divprune", "random:seed=2", "divprune:upstream_exact=true"),
        *("--budgets", "0.2", "20%", "64tok", "--tasks", "tiny_pope", "--limit", "4", "--batch-size", "2"),
        *("--seeds", "1", "2", "--generation", "max_new_tokens=4", "--max-pixels", "50176", "--fps", "0.5"),
    )
    by_yaml = SweepSpec.make(
        {
            "methods": ["divprune", {"name": "random", "seed": 2}, {"name": "divprune", "upstream_exact": True}],
            "budgets": ["0.2", "64tok"],
            "tasks": "tiny_pope",
            "limit": 4,
            "batch_size": 2,
            "seeds": [1, 2],
            "generation": {"max_new_tokens": 4},
            "max_pixels": 50176,
            "fps": 0.5,
        }
    )
    assert by_flags == by_yaml
    assert by_flags.suite is None


def test_flags_win_over_the_file_and_tasks_replace_its_suite(tmp_path):
    (tmp_path / "spec.yaml").write_text("suite: tiny\nbudgets: [0.3, 0.1]\nlimit: 8\n")
    spec = from_flags("--spec", str(tmp_path / "spec.yaml"), "--limit", "2", "--tasks", "tiny_pope")
    assert (spec.limit, spec.task_names(), spec.budgets) == (2, ["tiny_pope"], [Share(0.3), Share(0.1)])


def test_a_scorer_given_by_flag_goes_to_every_method_that_takes_one(tmp_path):
    spec = from_flags("--methods", "visionselector", "divprune", "--scorer", "some/where")
    assert [(m.label, m.options) for m in spec.methods] == [
        ("visionselector", {"scorer": "some/where"}),
        ("divprune", {}),
    ]
    both = from_flags("--methods", "visionselector", "visionselector:upstream_exact=true", "--scorer", "some/where")
    assert [m.label for m in both.methods] == ["visionselector", "visionselector[upstream_exact=True]"]
    assert from_flags("--scorer", "some/where").methods == spec.methods[:1]
    with pytest.raises(InputError, match="option scorer; none is among the methods divprune"):
        from_flags("--methods", "divprune", "--scorer", "some/where")
    (tmp_path / "spec.yaml").write_text("methods: [visionselector]\n")
    with pytest.raises(InputError, match="--scorer goes with --methods"):
        from_flags("--spec", str(tmp_path / "spec.yaml"), "--scorer", "x")
    names = ("idpruner", "visionselector+fastv", "divprune+dynamic_qwen", "visionselector+idpruner")
    spec = from_flags("--methods", *names, "--scorer", "a", "--predictor", "b")
    assert [(m.label, m.options) for m in spec.methods] == [
        ("idpruner", {"scorer": "a"}),
        ("visionselector+fastv", {"visionselector.scorer": "a"}),
        ("divprune+dynamic_qwen", {"dynamic_qwen.predictor": "b"}),
        ("visionselector+idpruner", {"visionselector.scorer": "a", "idpruner.scorer": "a"}),
    ]
    assert [m.name for m in from_flags("--scorer", "a", "--predictor", "b").methods] == [
        "visionselector",
        "dynamic_qwen",
    ]


def test_every_field_has_a_flag_and_words(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--help"])
    text = capsys.readouterr().out
    for name, info in SweepSpec.model_fields.items():
        assert info.description, name
        assert "--" + {"backbones": "pretrained"}.get(name, name).replace("_", "-") in text


# the grid ------------------------------------------------------------------------------------------------------------


def places(spec: SweepSpec) -> list[tuple[str, str, str, int]]:
    return [(c.task, c.label, str(c.budget), c.seed) for c in cells_of(spec)]


def test_full_stands_once_for_each_task_whatever_the_budgets():
    for methods in (["divprune"], ["full", "divprune"], ["divprune", "full"]):
        spec = SweepSpec.make({"methods": methods, "budgets": [0.3, 0.1], "tasks": ["tiny_pope", "tiny_mme"]})
        assert places(spec) == [
            (task, *cell)
            for task in ("tiny_pope", "tiny_mme")
            for cell in (("full", "1", 0), ("divprune", "0.3", 0), ("divprune", "0.1", 0))
        ]


def test_budget_one_is_the_full_row_and_no_other():
    spec = SweepSpec.make({"methods": ["divprune"], "budgets": [1.0, "100%", 0.2], "tasks": ["tiny_pope"]})
    assert places(spec) == [("tiny_pope", "full", "1", 0), ("tiny_pope", "divprune", "0.2", 0)]
    only = SweepSpec.make({"methods": ["divprune", "random"], "budgets": 1, "tasks": ["tiny_pope"]})
    assert places(only) == [("tiny_pope", "full", "1", 0)]


def test_seeds_multiply_what_draws_and_nothing_else():
    fields = {"methods": ["divprune", "random"], "budgets": 0.2, "tasks": ["tiny_pope"], "seeds": [0, 1, 1, 2]}
    drawn = [(c.label, c.seed, c.options.get("seed")) for c in cells_of(SweepSpec.make(fields))]
    assert drawn == [
        ("full", 0, None),
        ("divprune", 0, None),
        ("random", 0, 0),
        ("random", 1, 1),
        ("random", 2, 2),
    ]
    fixed = SweepSpec.make({**fields, "methods": [{"name": "random", "seed": 7}]})
    assert [(c.label, c.seed, c.options.get("seed")) for c in cells_of(fixed)][1:] == [("random[seed=7]", 0, 7)]
    for sampled in ({"temperature": 0.7}, {"do_sample": True}):
        everything = cells_of(SweepSpec.make({**fields, "methods": ["divprune"], "generation": sampled}))
        assert [(c.label, c.seed) for c in everything] == [(m, s) for m in ("full", "divprune") for s in (0, 1, 2)]
    greedy = cells_of(SweepSpec.make({**fields, "methods": ["divprune"], "generation": {"temperature": 0}}))
    assert len(greedy) == 2


def test_options_are_complete_and_budgets_are_counted_once():
    cells = cells_of(
        SweepSpec.make({"methods": ["visionzip"], "budgets": [0.2, "20%", "0.20"], "tasks": ["tiny_pope"]})
    )
    assert [c.budget for c in cells] == [Share(1.0), Share(0.2)]
    assert "upstream_exact" in cells[1].options
    assert "on tiny_pope" in cells[1].title


def test_a_suite_and_tasks_add_up_without_repeats():
    spec = SweepSpec.make({"suite": "tiny", "tasks": ["chartqa", "tiny_pope"]})
    assert spec.task_names() == [*load_suites().suites["tiny"], "chartqa"]
    assert SweepSpec.make({}).suite == "tiny"


def test_labels_tell_options_apart():
    labels = [m.label for m in SweepSpec.make(RICH).methods]
    assert labels == ["divprune", "DivPrune (paper)", "random[seed=3]"]
    twice = ["divprune", {"name": "random", "label": "divprune"}]
    same = ["divprune", {"name": "divprune", "upstream_exact": False}]
    for methods, message in (
        (twice, "'divprune' is listed twice"),
        (["divprune", "divprune"], "listed twice"),
        (same, "'divprune' and 'divprune.upstream_exact=False.' are the same method"),
        ([{"name": "divprune", "label": "full"}], "label 'full'"),
    ):
        with pytest.raises(InputError, match=message):
            SweepSpec.make({"methods": methods})


def test_protocols_resolve_by_checkpoint_and_give_way_to_the_spec(tmp_path, llava_folder):
    tiny, real = BackboneSpec(pretrained="tiny"), BackboneSpec(pretrained=str(tmp_path))
    shutil.copy(checkpoint() / "config.json", tmp_path)
    published = PROTOCOLS["visionselector"].fields
    auto = SweepSpec.make({})
    assert auto.media(tiny) == {}
    assert auto.media(real) == published
    assert auto.media(BackboneSpec(pretrained=str(llava_folder))) == PROTOCOLS["llava_stf"].fields
    assert published["max_pixels"] == 2048 * 28 * 28
    for name, row in PROTOCOLS.items():
        assert (
            SweepSpec.make({"protocol": name}).media(tiny)
            == SweepSpec.make({"protocol": name}).media(real)
            == row.fields
        )
        MediaSettings(**row.fields)
    over = SweepSpec.make({"max_pixels": 300_000, "system_prompt": "", "max_num_frames": 4, "fps": 1, "jpeg": False})
    assert over.media(tiny)["max_pixels"] == over.media(tiny)["video_max_pixels"] == 300_000
    media = over.media(real)
    assert (media["max_pixels"], media["video_max_pixels"], media["min_pixels"]) == (300_000, 300_000, 256 * 28 * 28)
    assert (media["system_prompt"], media["max_num_frames"], media["fps"], media["jpeg"]) == ("", 4, 1.0, False)


# wrong input ---------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict, str]] = {
    "unknown method": ({"methods": ["divprun"]}, "unknown method 'divprun': did you mean 'divprune'"),
    "unknown option": (
        {"methods": [{"name": "divprune", "upstream_exakt": True}]},
        "unknown option of method divprune 'upstream_exakt': did you mean 'upstream_exact'",
    ),
    "unknown option below options": (
        {"methods": [{"name": "divprune", "options": {"upstreamexact": True}}]},
        "unknown option of method divprune 'upstreamexact': did you mean 'upstream_exact'",
    ),
    "mistyped label": ({"methods": [{"name": "divprune", "lable": "x"}]}, "'lable': did you mean 'label'"),
    "mistyped name": ({"methods": [{"nam": "divprune"}]}, "unknown field of the spec 'nam': did you mean 'name'"),
    "method without name": ({"methods": [{"label": "x"}]}, "methods.0.name"),
    "method that is a number": ({"methods": [3]}, "methods.0"),
    "options that are no mapping": ({"methods": [{"name": "divprune", "options": [1]}]}, "must be a mapping"),
    "option of another type": ({"methods": [{"name": "divprune", "upstream_exact": 3}]}, "wrong type: give a bool"),
    "unknown suite": ({"suite": "tinny"}, "unknown suite 'tinny': did you mean 'tiny'"),
    "mistyped field": ({"budget": [0.2]}, "unknown field of the spec 'budget': did you mean 'budgets'"),
    "mistyped nested field": (
        {"backbones": [{"pretraned": "tiny"}]},
        "unknown field of the spec 'pretraned': did you mean 'pretrained'",
    ),
    "two backbones of a name": ({"backbones": ["tiny", "tiny"]}, "backbone 'tiny' is listed twice"),
    "no methods": ({"methods": []}, "invalid methods in the spec: list should have at least 1 item"),
    "no budgets": ({"budgets": []}, "invalid budgets in the spec: list should have at least 1 item"),
    "no backbones": ({"backbones": []}, "invalid backbones in the spec: list should have at least 1 item"),
    "no seeds": ({"seeds": []}, "invalid seeds in the spec: list should have at least 1 item"),
    "seed that is no number": ({"seeds": ["a"]}, "seeds.0"),
    "half a seed": ({"seeds": 1.5}, "seeds.0"),
    "no documents": ({"limit": 0}, "invalid limit 0 in the spec: expected a number greater than or equal to 1"),
    "half a document": ({"limit": 1.5}, "invalid limit .* in the spec: expected "),
    "half a pair of documents": ({"limit": 3, "tasks": ["tiny_mme"]}, "groups of 2, try 4"),
    "half a pair in a suite": ({"limit": 3}, "limit 3 for tiny_mme"),
    "empty batch": ({"batch_size": 0}, "invalid batch_size .* in the spec: expected "),
    "unknown protocol": ({"protocol": "losless"}, "unknown protocol 'losless': did you mean 'lossless'"),
    "no frames": ({"max_num_frames": 0}, "invalid max_num_frames .* in the spec: expected "),
    "no time": ({"fps": 0}, "invalid fps .* in the spec: expected "),
    "unknown generation setting": (
        {"generation": {"max_new_token": 4}},
        "unknown generation setting 'max_new_token': did you mean 'max_new_tokens'",
    ),
    "generation that is no mapping": ({"generation": 3}, "invalid generation .* in the spec: expected "),
    "temperature in words": (
        {"generation": {"temperature": "hot"}},
        "invalid generation setting temperature='hot': expected ",
    ),
    "answers of no tokens": (
        {"generation": {"max_new_tokens": 0}},
        "invalid generation setting max_new_tokens=0: expected ",
    ),
    "until a number": ({"generation": {"until": 3}}, "invalid generation setting until=3: expected "),
    "do_sample in words": (
        {"generation": {"do_sample": "yes"}},
        "invalid generation setting do_sample='yes': expected ",
    ),
    **{
        f"budget {value!r}": ({"budgets": [0.2, value]}, "invalid budget .*: expected a ratio")
        for value in (0, -1, 1.5, math.nan, math.inf, "abc", "0tok", "-3tok", "120%", "", None, True, [0.2], {"a": 1})
    },
    "budget nan in words": ({"budgets": "nan"}, "invalid budget 'nan': expected "),
}


@pytest.mark.parametrize("what", BAD)
def test_every_wrong_value_is_one_clear_line(what):
    fields, message = BAD[what]
    with pytest.raises(InputError, match=message) as caught:
        SweepSpec.make(fields)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_a_wrong_file_is_one_clear_line(tmp_path):
    for content, message in (
        (None, "can't be read: No such file"),
        (b"budgets: [0.2\n", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- divprune\n", "expected a mapping of fields"),
        (b"", "expected a mapping of fields"),
        (b"budgts: [0.2]\n", "unknown field of the spec 'budgts': did you mean 'budgets'"),
        (b"3: 4\n", "spec"),
    ):
        path = tmp_path / "spec.yaml"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            SweepSpec.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="can't be read"):
        SweepSpec.load(tmp_path)


def test_wrong_flags_are_one_clear_line():
    for flags, message in (
        (
            ["--methods", "divprune:upstream_exact"],
            "invalid option of method divprune 'upstream_exact': expected KEY=VALUE",
        ),
        (["--methods", "divprune:"], "expected KEY=VALUE"),
        (["--generation", "=3"], "invalid generation setting '=3': expected KEY=VALUE"),
        (["--limit", "few"], "argument --limit: invalid int value: 'few'"),
        (["--budgets"], "argument --budgets: expected at least one argument"),
        (["--budgets", "-1"], "invalid budget '-1': expected "),
        (["--budget", "0.2"], "unknown argument '--budget': did you mean --budgets"),
        (["--overwrite"], "--overwrite is now --existing overwrite"),
        (["--replace-stale"], "--replace-stale is now --existing replace-stale"),
        (["--only-missing"], "--only-missing is now --existing keep"),
        (["--existing", "drop"], "invalid choice: 'drop'"),
        (["stray"], "unknown argument 'stray'"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            from_flags(*flags)
        assert "\n" not in str(caught.value)


def test_one_method_alone_has_the_same_errors():
    """What `ask` uses."""
    assert MethodSpec.make("divprune").label == "divprune"
    for name in available():
        assert MethodSpec.make({"name": name}).options == {}
    with pytest.raises(InputError, match="did you mean 'divprune'"):
        MethodSpec.make("divprun")


def test_a_headline_metric_is_chosen_for_a_task_of_the_sweep(capsys) -> None:
    assert SweepSpec.make({"tasks": ["chartqa"], "metric": {"chartqa": "relaxed_overall"}}).metric == {
        "chartqa": "relaxed_overall"
    }
    with pytest.raises(InputError, match="unknown task of this sweep 'chartq': did you mean 'chartqa'"):
        SweepSpec.make({"tasks": ["chartqa"], "metric": {"chartq": "relaxed_overall"}})
    from visionselector_eval.harness import cli

    assert cli.main(["sweep", "--tasks", "tiny_pope", "--device", "cpu", "--metric", "tiny_pope=pope_acuracy"]) == 2
    assert "unknown metric of tiny_pope 'pope_acuracy': did you mean 'pope_accuracy'" in capsys.readouterr().err
