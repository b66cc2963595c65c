"""`python -m hbi`."""

import sys

from hbi.infra.cluster.attempts import MISTAKE

try:
    from hbi.cli import main
except ModuleNotFoundError as missing:
    if str(missing.name).startswith("hbi"):
        raise
    print(
        f"hbi: {sys.executable} has no {missing.name}: install there what constraints.txt pins",
        file=sys.stderr,
    )
    sys.exit(MISTAKE)

main()
