"""Video-language representation learning with Hierarchical Banzhaf Interaction.

    model = hbi.load("models:/hbi@champion")        # or a folder, or the file of a published checkpoint
    model.encode_text(["a red square"])             # numpy, [texts, dim]
    model.encode_video(["one.mp4"])                 # numpy, [videos, dim]
    model.caption(["one.mp4"]), model.answer("one.mp4", "what moves left?")

Nothing is loaded before it is asked for.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hbi.serving.model import Model


def load(
    model: str, *, tracking: str | None = None, tokenizer: str | None = None, device: str | None = None
) -> "Model":
    """A model by name, ready to use.

    model: a folder, models:/name@alias, models:/name/version, or the file of a published checkpoint; local or s3://.
    tracking: MLflow store of a models:/ name (default: MLFLOW_TRACKING_URI, else runs/mlflow.db). tokenizer: folder or
    name, for a published checkpoint, which has none (default: CLIP's). device: by default a GPU where there is one.

    ValueError, in one line, for what is not there.
    """
    from pathlib import Path

    from hbi.infra import storage
    from hbi.infra.mlflow.store import tracking_uri
    from hbi.serving.model import Model
    from hbi.training.init import ModelSource, load_named

    store = tracking_uri(tracking) if model.startswith("models:/") else tracking
    loaded, words = load_named(ModelSource(model, store, tokenizer))

    def fetch(path: str) -> bytes | Path:
        return storage.read_bytes(path) if storage.is_remote(path) else Path(path)

    return Model(loaded, words, device, fetch)
