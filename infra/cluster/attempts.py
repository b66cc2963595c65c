"""On the cluster: a command, tried again where what failed may pass. `python -m hbi.infra.cluster.attempts N COMMAND`

It stands beside the command, so that a user who has gone home loses none of the attempts.
"""

import signal
import subprocess
import sys
import time

WAIT_SECONDS = 5.0
"""Before the second attempt; before each further one twice as long."""
MISTAKE = 2
"""Exit status of a user's mistake: the same command would make it again."""
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit statuses of a command that someone stopped."""


def main() -> None:
    """Runs `hbi COMMAND` up to 1 + N times; ends with the last one's exit status."""
    retries, command = int(sys.argv[1]), sys.argv[2:]
    for attempt in range(retries + 1):
        status = subprocess.run([sys.executable, "-m", "hbi", *command], check=False).returncode
        if status in (0, MISTAKE, *STOPPED) or attempt == retries:
            sys.exit(status if status >= 0 else 128 - status)
        pause = WAIT_SECONDS * 2**attempt
        print(
            f"hbi: ended with status {status}; attempt {attempt + 2} of {retries + 1} in {pause:.0f} s",
            flush=True,
        )
        time.sleep(pause)


if __name__ == "__main__":
    main()
