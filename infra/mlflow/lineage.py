"""Where a run comes from: the commit, and the shards."""

import getpass
import hashlib
import json
import subprocess
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Shards:
    """A shard folder as MLflow knows a dataset."""

    name: str
    """Last part of the folder's path."""
    digest: str
    """Of its index; MLflow takes 36 characters."""
    source_type: str
    """`local` or `s3`."""
    source: str
    """The folder, as JSON with `uri`."""
    profile: str
    """Counts, as JSON."""

    @staticmethod
    def of(folder: str, counts: dict[str, int]) -> "Shards":
        """counts: samples by split."""
        place = storage.absolute(folder)
        index = storage.read_bytes(storage.join(folder, "index.json"))
        return Shards(
            name=place.rstrip("/").rpartition("/")[2],
            digest=hashlib.sha256(index).hexdigest()[:36],
            source_type="s3" if storage.is_remote(place) else "local",
            source=json.dumps({"uri": place}),
            profile=json.dumps({"num_rows": sum(counts.values()), **counts}),
        )


def origin(description: str, source: str, command: str) -> dict[str, str]:
    """What MLflow shows of a run beside its numbers: who began it, with what, and what it is.

    source: short and without slashes, for MLflow's pages show what stands behind the last; the whole command is a part
    of the description.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without the user's name
        user = "unknown"
    return {
        "mlflow.note.content": f"{description}\n\n`{command}`",
        "mlflow.source.name": source,
        "command": command,
        "mlflow.source.type": "LOCAL",
        "mlflow.user": user,
    }
