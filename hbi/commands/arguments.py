"""What the command line's arguments are called in its help."""

from typing import Annotated

from tyro.conf import Positional, arg

Manifest = Annotated[Positional[str], arg(metavar="MANIFEST")]
"""JSON Lines, CSV, TSV or Parquet, local or remote."""
Shards = Annotated[Positional[str], arg(metavar="SHARDS")]
"""A folder that `hbi shard` wrote, local or s3://."""
Model = Annotated[Positional[str], arg(metavar="MODEL")]
"""A folder, models:/name@alias, models:/name/version, or the file of a published checkpoint."""
Index = Annotated[Positional[str], arg(metavar="INDEX")]
"""A folder that `hbi index` wrote, local or s3://."""
Out = Annotated[Positional[str], arg(metavar="OUT")]
"""What is to be written."""
Text = Annotated[Positional[str], arg(metavar="TEXT")]
"""A sentence."""
Path = Annotated[str | None, arg(metavar="PATH", help_behavior_hint="")]
"""An optional file or folder."""
Tracking = Annotated[str | None, arg(metavar="URI", help_behavior_hint="")]
"""An MLflow store: a server, a folder, or sqlite:///FILE."""
