"""`doctor`: is everything there, and what to do about what is not.

Every check stands alone: one that breaks is reported as a failed check and the others still run.
"""

from __future__ import annotations

import io
import logging
import platform
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, requires
from importlib.metadata import metadata as distribution_metadata
from importlib.resources import files
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from visionselector_eval.baselines.contract.errors import one_line
from visionselector_eval.harness.environment import (
    DISTRIBUTION,
    attention,
    cpu_model,
    driver_version,
    git_commit,
    installed,
)
from visionselector_eval.models.backbones import FAMILIES

log = logging.getLogger(__name__)

MODEL_IDS = tuple(family.model_id for family in FAMILIES.values())
_REINSTALL = "install the package again in this environment: pip install -e ."
_HUB_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: what was looked at.
        ok: True; False: something required is missing or broken; None: optional and absent.
        detail: what was found, one line.
        remedy: what to do; empty where nothing has to be done.
    """

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def checks(run_folder: str | Path = "runs") -> list[Check]:
    """Run all checks. Takes some seconds (imports, at most 3 s for the hub) and changes nothing.

    Args:
        run_folder: where runs are going to be written.
    """
    sections: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("python", _python),
        ("package", _package),
        ("versions", _versions),
        ("devices", _devices),
        ("attention", _attention),
        ("lmms-eval plug-in", _plugin),
        ("compressors", _compressors),
        ("embedded checkpoint", _checkpoint),
        ("video decoder", _video),
        ("hub", _hub),
        ("folders", lambda: _folders(Path(run_folder))),
        ("NVML", _nvml),
        ("extras", _extras),
    ]
    found: list[Check] = []
    for name, section in sections:
        try:
            found.extend(section())
        except Exception as error:
            log.debug("check %s broke", name, exc_info=True)
            found.append(Check(name, False, f"the check itself broke: {one_line(error, kind=True)}", _REINSTALL))
    return found


def exit_code(found: Sequence[Check]) -> int:
    """0 when no required check failed, else 3."""
    return 3 if any(check.ok is False for check in found) else 0


def to_table(found: Sequence[Check]) -> Table:
    """The checks as a table for `rich`, with colours."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("")
    table.add_column("check", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    marks = {True: Text("ok", "green"), False: Text("FAILED", "bold red"), None: Text("absent", "yellow")}
    for check in found:
        # Text, not str: a detail such as "[flash]" must not be read as markup
        table.add_row(marks[check.ok], Text(check.name), Text(check.detail), Text(check.remedy))
    return table


def render(found: Sequence[Check], width: int = 120) -> str:
    """The checks as plain text of at most `width` columns."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(to_table(found))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _python() -> Iterable[Check]:
    from packaging.specifiers import SpecifierSet

    have = platform.python_version()
    try:
        expected = distribution_metadata(DISTRIBUTION)["Requires-Python"] or ">=3.11"
    except PackageNotFoundError:
        expected = ">=3.11"
    fits = SpecifierSet(expected).contains(have, prereleases=True)
    yield Check("python", fits, f"{have} (wanted {expected})", "" if fits else f"use a Python {expected}")


def _package() -> Iterable[Check]:
    have = installed(DISTRIBUTION)
    if have is None:
        yield Check(DISTRIBUTION, False, "not installed, so lmms-eval cannot find it", _REINSTALL)
        return
    commit, modified = git_commit()
    origin = f", commit {commit[:12]}{' with changes' if modified else ''}" if commit else ""
    yield Check(DISTRIBUTION, True, f"{have}{origin}")


def _versions() -> Iterable[Check]:
    """Every package that our metadata requires, against its range; those of the model stack always get a line."""
    from packaging.requirements import Requirement

    always = {"torch", "transformers", "lmms-eval"}
    others = 0
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return  # already reported
    for line in lines:
        expected = Requirement(line)
        if expected.marker is not None and not expected.marker.evaluate({"extra": ""}):
            continue
        have = installed(expected.name)
        # a local build such as 2.11.0+cu130 or a nightly is inside its range
        fits = have is not None and expected.specifier.contains(have, prereleases=True)
        if fits and expected.name not in always:
            others += 1
            continue
        remedy = "" if fits else f"pip install '{expected.name}{expected.specifier}'"
        yield Check(expected.name, fits, f"{have or 'not installed'} (wanted {expected.specifier})", remedy)
    yield Check("other packages", True, f"{others} more are inside their ranges")


def _devices() -> Iterable[Check]:
    import torch

    memory = psutil.virtual_memory()
    gib = 2**30
    yield Check(
        "device cpu",
        True,
        f"{cpu_model()}, {torch.get_num_threads()} threads, "
        f"{memory.available / gib:.1f} of {memory.total / gib:.1f} GiB free",
    )
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            why, remedy = (
                "this torch is built without CUDA",
                "fine for the embedded checkpoint; else install a CUDA torch",
            )
        elif driver_version() is None:
            why, remedy = (
                "no NVIDIA driver found",
                "fine for the embedded checkpoint; else run on a machine with a GPU",
            )
        else:
            why = f"torch (CUDA {torch.version.cuda}) sees no device, driver {driver_version()}"
            remedy = "check CUDA_VISIBLE_DEVICES and that the driver is new enough for this torch"
        yield Check("device cuda", None, why, remedy)
        return
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            torch.ones(2, device=f"cuda:{index}").sum().item()  # a device can be listed and still unusable
        except RuntimeError as error:
            yield Check(
                f"device cuda:{index}",
                False,
                one_line(error, kind=True),
                "see whether another process holds the device",
            )
        else:
            yield Check(f"device cuda:{index}", True, f"{name}, {free / gib:.1f} of {total / gib:.1f} GiB free")


def _attention() -> Iterable[Check]:
    for name, missing in attention().items():
        if missing is None:
            yield Check(f"attention {name}", True, "usable")
        else:
            remedy = "optional, for CUDA: pip install 'visionselector-eval[flash]'; sdpa is used meanwhile"
            yield Check(f"attention {name}", None, missing, remedy)


def _plugin() -> Iterable[Check]:
    points = [point for point in entry_points(group="lmms_eval.models") if point.name == "visionselector_eval"]
    if not points:
        yield Check("entry point", False, "lmms_eval.models has no entry visionselector_eval", _REINSTALL)
        return
    try:
        points[0].load()
    except Exception as error:
        yield Check("entry point", False, f"{points[0].value} does not load: {one_line(error, kind=True)}", _REINSTALL)
        return
    yield Check("entry point", True, f"lmms_eval.models: {points[0].value}")
    registry = import_module("lmms_eval.models").MODEL_REGISTRY_V2
    for name in MODEL_IDS:
        if name not in registry.list_canonical_model_ids():
            # lmms-eval only warns when a plug-in breaks, so this is the one place where its absence is seen
            yield Check("lmms-eval model", False, f"lmms-eval does not list {name}", _REINSTALL)
            continue
        try:
            found = registry.get_model_class(name)
        except Exception as error:
            yield Check(
                "lmms-eval model",
                False,
                f"{name} is listed but does not import: {one_line(error, kind=True)}",
                _REINSTALL,
            )
            continue
        yield Check("lmms-eval model", True, f"{name} -> {found.__name__}")


def _compressors() -> Iterable[Check]:
    from visionselector_eval.baselines.contract.registry import BUILTIN, available, compressor_class

    good = []
    for name in available():
        try:
            compressor_class(name)
        except Exception as error:
            remedy = _REINSTALL if name in BUILTIN else "update or remove the package that provides it"
            yield Check(f"compressor {name}", False, one_line(error, kind=True), remedy)
        else:
            good.append(name)
    yield Check("compressors", bool(good), ", ".join(good) or "none can be imported", "" if good else _REINSTALL)


def _checkpoint() -> Iterable[Check]:
    from visionselector_eval.models.tiny import EMBEDDED

    for name, entry in EMBEDDED.items():
        label, place = f"embedded checkpoint {name}", f"models/tiny/{entry.folder}"
        remedy = f"restore the folder {place} from the repository, or {_REINSTALL}"
        folder = files("visionselector_eval.models.tiny").joinpath(entry.folder)
        if not folder.is_dir():
            yield Check(label, False, f"{place} is missing", remedy)
            continue
        there = {file.name: file for file in folder.iterdir()}
        missing = [needed for needed in ("config.json", "tokenizer.json") if needed not in there]
        weights = [file for file in there if file.endswith(".safetensors")]
        if missing or not weights:
            lacking = ", ".join([*missing, *([] if weights else ["weights (*.safetensors)"])])
            yield Check(label, False, f"{place} lacks {lacking}", remedy)
            continue
        size = sum(len(there[file].read_bytes()) for file in weights)
        yield Check(label, True, f"{len(there)} files, weights {size / 1e6:.1f} MB")


def _video() -> Iterable[Check]:
    """Encodes four frames in memory and decodes them again: imports alone do not show a working codec."""
    remedy = "pip install --force-reinstall av"
    try:
        import av
        import numpy as np

        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as target:
            stream = target.add_stream("mpeg4", rate=4)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for shade in (0, 80, 160, 240):
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), shade, dtype=np.uint8), format="rgb24")
                target.mux(stream.encode(frame))
            target.mux(stream.encode())
        buffer.seek(0)
        with av.open(buffer) as source:
            shades = [float(frame.to_ndarray(format="rgb24").mean()) for frame in source.decode(video=0)]
    except Exception as error:
        yield Check("video decoder", False, f"PyAV does not work: {one_line(error, kind=True)}", remedy)
        return
    right = len(shades) == 4 and all(abs(a - b) < 12 for a, b in zip(shades, (0, 80, 160, 240), strict=True))
    detail = f"PyAV {av.__version__} encoded and decoded {len(shades)} frames"
    yield Check("video decoder", right, detail if right else f"{detail}, but not the same", "" if right else remedy)


def _hub() -> Iterable[Check]:
    from huggingface_hub import constants

    local = "the embedded checkpoint and local folders work without it"
    if constants.HF_HUB_OFFLINE:
        yield Check("hub", None, "not asked: HF_HUB_OFFLINE is set", f"unset it to download models; {local}")
        return
    outcome: list[str] = []

    def ask() -> None:
        import urllib.error
        import urllib.request

        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=_HUB_SECONDS).close()
            outcome.append("")
        except urllib.error.HTTPError:
            outcome.append("")  # an answer, if not a welcome: it is reachable
        except Exception as error:
            outcome.append(one_line(error, kind=True))

    # In a thread, because the time limit does not cover a name server that does not answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS + 0.5)
    why = outcome[0] if outcome else f"no answer in {_HUB_SECONDS:g} s"
    if why:
        advice = f"set HF_HUB_OFFLINE=1 to save the waiting, or set HF_ENDPOINT or a proxy; {local}"
        yield Check("hub", None, f"not reachable: {why}", advice)
    else:
        yield Check("hub", True, "reachable")


def _folders(run_folder: Path) -> Iterable[Check]:
    from huggingface_hub import constants

    for name, folder, variable in (
        ("run folder", run_folder, "give another output folder"),
        ("hub cache", Path(constants.HF_HUB_CACHE), "set HF_HOME to a folder that you may write to"),
    ):
        place = folder.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
            free = psutil.disk_usage(str(place)).free / 2**30
        except OSError as error:
            yield Check(name, False, f"'{folder}' cannot be written to: {error.strerror or error}", variable)
        else:
            yield Check(
                name,
                True,
                f"'{folder}' can be {'used' if place == folder.absolute() else 'made'}, {free:.0f} GiB free",
            )


def _nvml() -> Iterable[Check]:
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            count = pynvml.nvmlDeviceGetCount()
        finally:
            pynvml.nvmlShutdown()
    except Exception as error:
        yield Check(
            "NVML",
            None,
            f"no device memory or energy readings: {one_line(error, kind=True)}",
            "needs an NVIDIA driver; optional",
        )
        return
    yield Check("NVML", True, f"{count} devices, driver {driver_version()}")


def _extras() -> Iterable[Check]:
    for distribution, extra, purpose in (
        ("flash-attn", "flash", "faster attention on CUDA"),
        ("ray", "ray", "sweeps over several GPUs and machines"),
    ):
        have = installed(distribution)
        if have:
            yield Check(f"extra [{extra}]", True, f"{distribution} {have}")
        else:
            remedy = f"for {purpose}: pip install '{DISTRIBUTION}[{extra}]'"
            yield Check(f"extra [{extra}]", None, f"{distribution} is not installed", remedy)
