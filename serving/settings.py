"""What `hbi index` and `hbi serve` can be told. Light: nothing heavy is imported to fill them."""

import ipaddress
import os
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Suppress, UseAppendAction, arg

KEY_VARIABLE = "HBI_API_KEY"


@dataclass(frozen=True)
class IndexSettings:
    """How an index is made."""

    split: str | None = None
    """Index this split only; all of them otherwise."""
    batch: int = 32
    """Clips encoded at once."""
    gpus: int = 0
    """GPUs to encode on; 0 encodes on the CPU."""
    thumbnail_pixels: int = 96
    """Side of the pictures that the page shows of each frame (3 KB each); 0 keeps none."""
    add: bool = False
    """Merge these shards into the index that is there."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"--batch {self.batch}: must be at least 1")
        if self.gpus < 0:
            raise ValueError(f"--gpus {self.gpus}: must be 0 or more")
        if not 0 <= self.thumbnail_pixels <= 512:
            raise ValueError(f"--thumbnail-pixels {self.thumbnail_pixels}: must lie between 0 and 512")


@dataclass(frozen=True)
class ServeSettings:
    """Who may ask for what, how much of it, and how many processes answer."""

    host: str = "127.0.0.1"
    """To listen on; 0.0.0.0 for every interface, which needs a key in HBI_API_KEY."""
    port: int = 8000
    """To listen on."""
    media_root: Annotated[UseAppendAction[list[str]], arg(metavar="PATH")] = field(default_factory=list)
    """Folders or s3:// prefixes whose videos may be added by path and played; none: uploads alone."""
    read_only: bool = False
    """Refuse to add and remove videos."""
    allowed_host: Annotated[UseAppendAction[list[str]], arg(metavar="NAME")] = field(default_factory=list)
    """Names under which it is reached, beside localhost and the address; *: any (behind a proxy that checks)."""
    replicas: int = 1
    """Processes that hold the model and answer, at least."""
    max_replicas: int = 1
    """At most so many, as the load asks for them."""
    replica_load: float = 4.0
    """Requests at once that each replica should have: more ask for another replica, fewer let one go."""
    grow_seconds: float = 10.0
    """How long there must be more before a replica is added."""
    shrink_seconds: float = 300.0
    """How long there must be fewer before one goes."""
    replica_cpus: float = 0.5
    """CPUs that Ray sets aside for a replica."""
    replica_gpus: float = 0.0
    """GPUs that Ray sets aside for a replica; above 0 the model runs there."""
    batch_queries: int = 16
    """Sentences that a replica encodes at once when many wait."""
    batch_wait_seconds: float = 0.003
    """How long the first of them waits for others."""
    ongoing: int = 16
    """Requests that a replica works on at once."""
    queued: int = 128
    """Requests that wait for a replica; more are answered with 503."""
    request_seconds: float = 60.0
    """How long a request may be worked on (504 after it); adding a video may take three times as long."""
    body_seconds: float = 20.0
    """How long a client may pause while it sends (408 after it)."""
    max_results: int = 1000
    """Most videos of one answer, paging included."""
    max_upload_mb: int = 512
    """Largest video that is uploaded or added, in megabytes (413 above it)."""
    api_key: Suppress[str] = field(default_factory=lambda: os.environ.get(KEY_VARIABLE, ""), repr=False)
    """Not a flag: what HBI_API_KEY holds. Clients send it as `Authorization: Bearer KEY`."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port}: must lie between 0 (any that is free) and 65535")
        for name in ("replicas", "batch_queries", "ongoing", "queued", "max_results", "max_upload_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in ("request_seconds", "body_seconds", "replica_cpus", "replica_load"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        for name in ("grow_seconds", "shrink_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 or more")
        if not self.api_key and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host}: whoever reaches it could search and add: set a key in {KEY_VARIABLE}, "
                "or listen on 127.0.0.1"
            )

    @property
    def most_replicas(self) -> int:
        """`max_replicas`, which may be left out when `replicas` is given."""
        return max(self.replicas, self.max_replicas)

    @property
    def max_upload_bytes(self) -> int:
        """The same in bytes."""
        return self.max_upload_mb * 10**6


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
