"""Where a run came from: command, versions, commit."""

import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fastadvisor.runtime.environment import environment


def provenance(ranks: int, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Return when, how and with what this part of a run was started, as plain values for ``run.json``."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": list(sys.argv if argv is None else argv),
        "ranks": ranks,
        "commits": {"fastadvisor": git_commit(Path(__file__).parent), "working folder": git_commit(Path.cwd())},
        "versions": environment(),
    }


def git_commit(folder: Path) -> str | None:
    """Return the commit of the repository that ``folder`` lies in, with ``+changes`` if files differ from it; None without."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
