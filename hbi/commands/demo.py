"""The whole chain."""

from dataclasses import dataclass

from tyro.conf import OmitArgPrefixes

from hbi.demo import DemoSettings


@dataclass(frozen=True)
class Demo:
    """The whole chain on the made corpus: videos, shards, training, registry, index, search.

    Example: hbi demo --serve
    """

    settings: OmitArgPrefixes[DemoSettings] = DemoSettings()  # noqa: RUF009 (frozen)
    """What is made, and where."""

    def run(self) -> None:
        from hbi.demo import run

        run(self.settings)
