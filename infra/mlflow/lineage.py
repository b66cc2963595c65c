"""Where a run comes from: the commit, and the shards."""

import hashlib
import subprocess

from hbi.infra import storage
from hbi.infra.project import ROOT


def lineage(shards: str) -> dict[str, str]:
    """Where a run comes from, as tags: the commit, whether tracked files differ from it, and the shards' digest."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, timeout=20, check=True
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit = git("rev-parse", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    index = storage.read_bytes(storage.join(shards, "index.json"))
    return {
        "mlflow.source.git.commit": commit,
        "commit": commit,
        "dirty": "unknown" if changed is None else str(bool(changed)).lower(),
        "data": storage.absolute(shards),
        "data_sha256": hashlib.sha256(index).hexdigest(),
    }
