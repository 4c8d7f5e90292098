"""What a run ran on, as plain data: versions and hardware, nothing that names machine, user or folders."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

DISTRIBUTION = "visionselector-eval"
PACKAGES = (DISTRIBUTION, "lmms-eval", "torch", "transformers")


def environment() -> dict[str, Any]:
    """Everything about this process's surroundings that can change a number; ready for JSON.

    Keys: python, platform, cpu {model, cores, threads}, memory_gib, packages {name: version or None}, cuda {version,
    driver, devices: [{name, memory_gib, capability}]} or None, attention [names], commit, modified.
    """
    commit, modified = git_commit()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": {"model": cpu_model(), "cores": psutil.cpu_count(logical=False), "threads": _usable_threads()},
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "packages": {name: installed(name) for name in PACKAGES},
        "cuda": cuda(),
        "attention": [name for name, why in attention().items() if why is None],
        "commit": commit,
        "modified": modified,
    }


def installed(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cuda() -> dict[str, Any] | None:
    """CUDA version, driver and devices; None without a usable device."""
    import torch

    if not torch.cuda.is_available():
        return None
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return {"version": torch.version.cuda, "driver": driver_version(), "devices": devices}


def driver_version() -> str | None:
    """The NVIDIA driver's version through NVML, or None."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            text = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no library, no driver, no permission: the version is unknown, whatever the reason
        return None
    return text.decode() if isinstance(text, bytes) else str(text)


def attention() -> dict[str, str | None]:
    """Attention back-ends by name: None where usable, else what is missing."""
    import torch

    if installed("flash-attn") is None:
        flash: str | None = "flash-attn is not installed"
    elif not torch.cuda.is_available():
        flash = "flash-attn is installed, but there is no CUDA device"
    else:
        from transformers.utils import is_flash_attn_2_available

        flash = None if is_flash_attn_2_available() else "flash-attn is installed, but transformers cannot use it"
    return {"sdpa": None, "eager": None, "flash_attention_2": flash}


def git_commit() -> tuple[str | None, bool | None]:
    """Commit of our checkout and whether tracked files differ from it; (None, None) outside a checkout.

    A copy installed inside somebody else's repository (their `.venv`) must not report their commit, so the top of the
    work tree has to be the folder that holds `harness/`.
    """
    root = Path(__file__).resolve().parents[1]
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None, None
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, None
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit, None if status is None else bool(status)


def _git(root: Path, *arguments: str) -> str | None:
    # GIT_DIR and its kin would answer for another repository (a hook of another repository sets them)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env=clean,
            encoding="utf-8",
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _usable_threads() -> int | None:
    # a container or batch system often allows fewer than the machine has
    with suppress(AttributeError, OSError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
