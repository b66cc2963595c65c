"""What one can ask of `hbi shard`, in one object that travels whole. Light: the command line starts from it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from hbi.model.config import FrameSettings
from hbi.pipelines.sharding.filters import FilterSettings


@dataclass(frozen=True)
class ShardSettings:
    """How a manifest becomes shards."""

    frames: int = FrameSettings.num_frames
    """Most frames of a clip. A clip that has fewer gives fewer, never copies."""
    size: int = FrameSettings.size
    """Height and width of a frame in pixels."""
    sampling: Literal["uniform", "fps", "segments"] = FrameSettings.sampling
    """uniform from the first frame to the last; the centres of equal segments; or so many per second (fps)."""
    fps: float = FrameSettings.fps
    """Frames per second of sampling fps."""
    samples_per_shard: int = 100
    """Manifest rows per tar; those that fail leave it smaller."""
    jpeg_quality: int = 95
    """Of the frames, 1 to 100."""
    decoder: Literal["pyav", "decord"] = "pyav"
    """decord (the extra hbi[decord]) is used only for clips for which its answer is PyAV's."""
    clip_timeout: float = 60.0
    """Seconds after which the decoding of a clip is ended and recorded as a failure."""
    clip_memory: int = 2048
    """MiB that the decoding of a clip may take."""
    filters: FilterSettings = field(default_factory=FilterSettings)
    """What a clip must be; those rejected are rows of failures.jsonl with stage filter."""

    def __post_init__(self) -> None:
        """Raises ValueError naming a field whose value cannot be meant."""
        rules = {
            "frames": (self.frames >= 1, "at least 1"),
            "size": (1 <= self.size <= 4096, "between 1 and 4096 pixels"),
            "fps": (0 < self.fps < float("inf"), "above 0"),
            "samples_per_shard": (self.samples_per_shard >= 1, "at least 1"),
            "jpeg_quality": (1 <= self.jpeg_quality <= 100, "between 1 and 100"),
            "clip_memory": (self.clip_memory >= 64, "at least 64 MiB"),
            "clip_timeout": (self.clip_timeout > 0, "above 0 seconds"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {rule}")
        _ = self.frame_settings

    @property
    def frame_settings(self) -> FrameSettings:
        """How a clip becomes frames."""
        return FrameSettings(self.frames, self.size, self.sampling, self.fps)

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the shards, as `index.json` holds it: all but the patience with a clip."""
        return {
            "frames": self.frames,
            "size": self.size,
            "choice": self.sampling,
            "fps": self.fps,
            "jpeg_quality": self.jpeg_quality,
            "samples_per_shard": self.samples_per_shard,
            "decoder": self.decoder,
            "filters": self.filters.identity(),
        }
