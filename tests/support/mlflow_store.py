"""An MLflow store that is made once for the whole test session: its first use runs migrations, which take seconds."""

import atexit
import shutil
import warnings
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp


@lru_cache(maxsize=1)
def _template() -> Path:
    from hbi.infra.mlflow import store

    folder = Path(mkdtemp(prefix="mlflow-store-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    uri = store.tracking_uri(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # MLflow's use of SQLAlchemy, when first imported
        store.client(uri).search_experiments()
    return folder / "mlflow.db"


def fresh_store(folder: Path) -> str:
    """The tracking URI of an empty sqlite store inside `folder`."""
    from hbi.infra.mlflow import store

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_template(), folder / "mlflow.db")
    return store.tracking_uri(str(folder))
