"""A command as a Slurm batch script: Ray on every node of the allocation, the command on the first."""

import re
import shlex
from collections.abc import Sequence

from hbi.infra.cluster.kuberay import ClusterSettings

SCRIPT = """#!/bin/bash
# Its shell is tested; no Slurm ran it. The environment, with hbi on the path, is the one that sbatch is called in.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
{gpus}#SBATCH --time={hours}:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.log
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$head" | awk 'NR == 1 {{print $1}}'):$((20000 + SLURM_JOB_ID % 20000))
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

status=0
srun --kill-on-bad-exit=0 ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" -- \\
    python -m hbi.infra.cluster.attempts {retries} {command} || status=$?

# A mistake ({mistake}) would be made again; whatever else ended it may pass, and what was done stays done.
if [ "$status" -ne 0 ] && [ "$status" -ne {mistake} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {retries} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def sbatch(command: Sequence[str], name: str, retries: int, settings: ClusterSettings) -> str:
    """The script, for `sbatch`. ValueError for a name that is no file's, or a command without end."""
    from hbi.infra.cluster.attempts import MISTAKE

    if command[0] == "serve":
        raise ValueError("--print slurm: serve does not end: run it where it is to be reached")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,60}", name):
        raise ValueError(f"--name {name}: use letters, digits, dots and dashes, 61 at most")
    gpus = f"#SBATCH --gpus-per-node={settings.gpus}\n" if settings.gpus else ""
    return SCRIPT.format(
        name=name,
        nodes=settings.gpu_nodes if settings.gpus else settings.cpu_nodes,
        gpus=gpus,
        hours=settings.hours,
        retries=retries,
        command=shlex.join(command),
        mistake=MISTAKE,
    )
