"""The small pictures of a clip that lie in the index."""

import io
from collections.abc import Sequence

from PIL import Image


def thumbnails(jpegs: Sequence[bytes], pixels: int) -> list[bytes]:
    """A clip's frames made small, as JPEG; none where `pixels`, the side, is 0."""
    return [_thumbnail(jpeg, pixels) for jpeg in jpegs] if pixels else []


def _thumbnail(jpeg: bytes, pixels: int) -> bytes:
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    picture.thumbnail((pixels, pixels))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=70)
    return buffer.getvalue()
