"""The model in MTEB: a task of local files is scored as the model itself would score it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbi.model.config import ModelConfig, TowerConfig
from hbi.model.hbi import HBI
from hbi.model.tokenizer import train_tokenizer
from hbi.serving.model import Model
from hbi.serving.mteb import MTEBModel
from tests.support.videos import make

mteb = pytest.importorskip("mteb", reason="the extra mteb is not installed")
TEXTS = ["a red ball", "a ball on grass that rolls away", "water"]
TOWERS = TowerConfig(
    image_size=32, patch_size=16, vision_width=32, vision_layers=1, vision_heads=2, text_width=32, text_layers=1,
    text_heads=2, vocab_size=300, context=32, dim=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    towers = HBI(ModelConfig(towers=TOWERS, words=20, frames=4, temporal_layers=1))
    return Model(towers, train_tokenizer(TEXTS, 300), "cpu")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of several lengths: the last has fewer frames than the model takes."""
    folder = tmp_path_factory.mktemp("videos")
    for number, frames in enumerate((30, 12, 3)):
        (folder / f"{number}.mp4").write_bytes(make(frames))
    return [str(folder / f"{number}.mp4") for number in range(3)]


@pytest.fixture(scope="module")
def corpus(videos: list[str]) -> Any:
    from datasets import Dataset, Video

    held = {"id": [str(i) for i in range(len(videos))], "video": videos}
    return Dataset.from_dict(held).cast_column("video", Video())


def task(corpus: Any) -> Any:
    """Texts to videos, each text with one right video."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalT2V", description="Files of this machine.", reference=None, type="Any2AnyRetrieval",
            dataset={"path": "local/files", "revision": "1"}, category="t2v", modalities=["text", "video"],
            eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10",
        )  # fmt: skip

        def load_data(self, num_proc: int | None = None, **_: Any) -> None:
            queries = Dataset.from_dict({"id": [f"q{i}" for i in range(len(TEXTS))], "text": TEXTS})
            relevant = {f"q{i}": {str(i): 1} for i in range(len(TEXTS))}
            self.dataset = {"default": {"test": RetrievalSplitData(
                corpus=corpus, queries=queries, relevant_docs=relevant, top_ranked=None)}}  # fmt: skip
            self.data_loaded = True

    return Local()


def test_a_task_of_local_files_is_scored_by_the_models_own_similarity(
    model: Model, videos: list[str], corpus: Any, tmp_path: Path
) -> None:
    scores = model.similarity(TEXTS, videos)
    ranks = [1 + int((scores[i] > scores[i, i]).sum()) for i in range(len(TEXTS))]
    expected = float(np.mean([1 / np.log2(1 + rank) for rank in ranks]))
    done = mteb.evaluate(MTEBModel(model), task(corpus), cache=None, encode_kwargs={"batch_size": 2})
    assert done.task_results[0].get_score() == pytest.approx(expected, abs=1e-5)


def test_vectors_of_other_tasks_are_pooled(model: Model, videos: list[str], corpus: Any) -> None:
    from torch.utils.data import DataLoader

    about: Any = type("About", (), {"type": "VideoClustering", "name": "clusters"})
    found = MTEBModel(model).encode(DataLoader(corpus), task_metadata=about)
    np.testing.assert_allclose(found, model.encode_video(videos), atol=1e-6)
    with pytest.raises(ValueError, match="takes text or video"):
        MTEBModel(model).encode(DataLoader(corpus.remove_columns("video")), task_metadata=about)
