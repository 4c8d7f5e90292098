"""`doctor` and `environment`: they report what is there, survive what is not, and name nothing private."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from visionselector_eval.harness import environment as env
from visionselector_eval.harness.doctor import machine as doctor
from visionselector_eval.harness.doctor.machine import Check, checks, exit_code, render, to_table


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Check]:
    return checks(tmp_path_factory.mktemp("doctor") / "runs")


def test_all_subjects_are_covered(found: list[Check]) -> None:
    names = {check.name for check in found}
    assert {
        "python",
        "visionselector-eval",
        "torch",
        "transformers",
        "lmms-eval",
        "device cpu",
        "attention sdpa",
        "attention eager",
        "attention flash_attention_2",
        "entry point",
        "compressors",
        "embedded checkpoint tiny",
        "embedded checkpoint tiny-llava",
        "embedded checkpoint tiny-llava-stf",
        "video decoder",
        "hub",
        "run folder",
        "hub cache",
        "NVML",
        "extra [flash]",
        "extra [ray]",
    } <= names


def test_what_surely_works_here(found: list[Check]) -> None:
    by_name = {check.name: check for check in found}
    for name in ("python", "visionselector-eval", "torch", "transformers", "lmms-eval", "device cpu", "video decoder"):
        assert by_name[name].ok is True, by_name[name]
    for name in ("hub", "NVML", "attention flash_attention_2", "extra [ray]", "extra [flash]"):
        assert by_name[name].ok in (True, None)
    assert "full" in by_name["compressors"].detail


def test_every_problem_has_a_remedy_and_every_text_is_one_line(found: list[Check]) -> None:
    for check in found:
        assert "\n" not in check.detail + check.remedy
        assert check.ok is True or check.remedy, check


def test_exit_code() -> None:
    good, absent, bad = Check("a", True, ""), Check("b", None, "", "c"), Check("d", False, "", "e")
    assert exit_code([good, absent]) == 0
    assert exit_code([]) == 0
    assert exit_code([good, bad, absent]) == 3


def test_text_holds_everything_and_no_markup_is_eaten() -> None:
    text = render([Check("one [flash]", False, "[red]not found[/red]", "pip install 'x[flash]'")], width=200)
    assert "FAILED" in text
    for part in ("one [flash]", "[red]not found[/red]", "pip install 'x[flash]'"):
        assert part in text
    assert to_table([]).row_count == 0


def test_one_broken_check_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> Any:
        raise RuntimeError("first line\nsecond line")

    for name in ("_hub", "_plugin", "_compressors", "_versions"):
        monkeypatch.setattr(doctor, name, broken)
    found = checks(tmp_path)
    broke = [check for check in found if "check itself broke" in check.detail]
    assert len(broke) == 4
    assert all(check.ok is False and check.detail.endswith("first line second line") for check in broke)
    assert any(check.name == "video decoder" and check.ok for check in found)
    assert exit_code(found) == 3


def test_versions_out_of_range_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"transformers": "4.57.1", "torch": "2.11.0+cu130", "lmms-eval": None}
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: have.get(name, real(name)))
    by_name = {check.name: check for check in doctor._versions()}
    assert by_name["transformers"].ok is False
    assert "pip install 'transformers" in by_name["transformers"].remedy
    assert by_name["torch"].ok is True
    assert by_name["lmms-eval"].ok is False
    assert "not installed" in by_name["lmms-eval"].detail
    assert "pytest" not in by_name  # extras are no requirement


def test_missing_entry_point_and_unlisted_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda **_: [])
    (only,) = doctor._plugin()
    assert only.ok is False
    monkeypatch.undo()
    found = [check for check in doctor._plugin() if check.name == "lmms-eval model"]
    assert [check.ok for check in found] == [True] * len(doctor.MODEL_IDS)
    monkeypatch.setattr(doctor, "MODEL_IDS", ("no_such_model",))
    last = list(doctor._plugin())[-1]
    assert last.ok is False


def test_a_compressor_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    from visionselector_eval.baselines.contract import registry

    monkeypatch.setitem(registry.BUILTIN, "ghost", "visionselector_eval.baselines.no_such_file:Ghost")
    by_name = {check.name: check for check in doctor._compressors()}
    assert by_name["compressor ghost"].ok is False
    assert by_name["compressors"].ok is True
    assert "full" in by_name["compressors"].detail


def test_hub_offline_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    (check,) = doctor._hub()
    assert check.ok is None
    assert "HF_HUB_OFFLINE" in check.detail


def test_hub_that_refuses_or_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "_HUB_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        (check,) = doctor._hub()
        assert time.monotonic() - start < 2
    assert check.ok is None
    (check,) = doctor._hub()  # nobody listens any more
    assert check.ok is None
    assert "HF_HUB_OFFLINE=1" in check.remedy


def test_unusable_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    by_name = {check.name: check for check in doctor._folders(tmp_path / "file" / "runs")}
    assert by_name["run folder"].ok is False


# ---------------------------------------------------------------- environment


def test_environment_is_json_and_stable() -> None:
    first = env.environment()
    assert first == env.environment() == json.loads(json.dumps(first))
    assert first["packages"]["torch"]
    assert {"sdpa", "eager"} <= set(first["attention"])
    assert first["cpu"]["threads"] >= 1


def test_environment_names_nothing_private() -> None:
    def texts(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for item in value.values() for text in texts(item)]
        if isinstance(value, list):
            return [text for item in value for text in texts(item)]
        return [value] if isinstance(value, str) else []

    for text in texts(env.environment()):
        assert "/" not in text
        assert "\\" not in text
        assert text != socket.gethostname()
        assert text != getpass.getuser()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_only_of_our_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "environment.py").write_text("")
    monkeypatch.setattr(env, "__file__", str(tmp_path / "harness" / "environment.py"))
    assert env.git_commit() == (None, None)
    git("init", "-q")
    assert env.git_commit() == (None, None)  # no commit yet
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert env.git_commit() == (git("rev-parse", "HEAD"), False)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert env.git_commit()[0] is not None
    monkeypatch.delenv("GIT_DIR")
    (tmp_path / "harness" / "environment.py").write_text("x")
    assert env.git_commit()[1] is True
    inside = tmp_path / "venv" / "site-packages" / "harness"
    inside.mkdir(parents=True)
    monkeypatch.setattr(env, "__file__", str(inside / "environment.py"))
    assert env.git_commit() == (None, None)  # somebody else's repository around an installed copy


def test_attention_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "installed", lambda name: None)
    assert env.attention()["flash_attention_2"] == "flash-attn is not installed"
