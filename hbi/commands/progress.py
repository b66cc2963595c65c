"""How long work shows itself."""

import sys
from typing import Any


def progress_bar(what: str, total: int | None = None) -> Any:
    """A bar of clips: it redraws itself on a terminal, and adds a line now and then to a file."""
    from tqdm import tqdm

    calm: dict[str, Any] = {} if sys.stderr.isatty() else {"mininterval": 10, "maxinterval": 30}
    return tqdm(total=total, unit="clip", desc=what, **calm)
