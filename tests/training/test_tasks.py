"""Questions and captions in the loop: they are learned, resumed to the bit, the same on two ranks, and measured."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hbi.infra.mlflow.tracker import Tracker
from hbi.model.config import AnswerConfig
from hbi.model.hbi import HBI
from hbi.model.weights import build_model, load_model, save_model
from hbi.pipelines.sample import ShardIndex
from hbi.training.answers import TRAINED, refuse_seen_tests, training_answers
from hbi.training.data.loader import Loader
from hbi.training.data.order import LoaderState
from hbi.training.evaluate.answers import evaluate_answers
from hbi.training.evaluate.captions import evaluate_captions
from hbi.training.evaluate.encode import SplitEncoder
from hbi.training.evaluate.retrieval import evaluate, evaluate_named
from hbi.training.evaluate.table import table
from hbi.training.init import ModelSource, init_model, with_init
from hbi.training.job import TrainingAborted
from hbi.training.loop import Hooks
from hbi.training.parallel import Process
from hbi.training.settings import HeadSettings, TrainConfig
from hbi.training.tokenizers import tokenizer_of, with_tokenizer
from hbi.training.worker import evaluation, run
from tests.support.task_runs import TASKS, both_heads, resolved
from tests.support.training_shards import make_shards, tiny_model, tiny_run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "shards"
    make_shards(folder, train=[9, 7, 8], val=[4], questions=True)
    return folder


def train(config: TrainConfig, shards: Path, out: Path, **hooks: Any) -> dict[str, float]:
    hooks = {"log": lambda line: None, **hooks}
    return run(resolved(config, shards, out), str(shards), str(out), Process.current(), Hooks(**hooks))


def measured(config: TrainConfig, shards: Path, out: Path) -> Callable:
    config = resolved(config, shards, out)
    tracker = Tracker("", "", "", out)
    return evaluation(config, str(shards), str(out), Process.current(), tracker)


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- what a step sees -----------------------------------------------------------------------------------------------


def test_tasks_take_turns_by_the_number_of_the_step(shards: Path, tmp_path: Path) -> None:
    config = resolved(both_heads(task=("retrieval", "retrieval", "qa")), shards, tmp_path)
    loader = Loader(ShardIndex.read(str(shards)), config, Process.current())
    assert [batch.task for batch in loader.batches(LoaderState())] == ["retrieval", "retrieval", "qa"]
    assert [batch.task for batch in loader.batches(LoaderState(1), 4)] == ["retrieval", "qa", "retrieval"]
    done = LoaderState(1, ((1, 8, 2),))
    assert [batch.task for batch in loader.batches(done, 5)] == ["qa"]
    loader.close()


def test_a_clip_shows_some_questions_and_all_of_them_in_turn(shards: Path, tmp_path: Path) -> None:
    config = resolved(both_heads(task=("qa",)), shards, tmp_path)
    loader = Loader(ShardIndex.read(str(shards)), config, Process.current())
    seen: dict[str, set[str]] = {}
    for epoch in range(2):
        for batch in loader.batches(LoaderState(epoch)):
            assert batch.video_of_text == sorted(batch.video_of_text)
            assert (
                len(batch.captions) == len(batch.answers) == len(batch.video_of_text) == 2 * len(batch.video)
            )
            for question, answer in zip(batch.captions, batch.answers, strict=True):
                seen.setdefault(question, set()).add(config.heads.vocabulary[answer])
    loader.close()
    assert seen == {
        "what colour is it?": {"red", "green", "blue", "grey"},
        "how does it change?": {"brighter", "darker"},
        "is it red?": {"yes", "no"},
    }


def test_a_question_that_cannot_be_answered_is_left_out_and_counted(shards: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    model = replace(both_heads().model, answers=AnswerConfig("open", 1))
    config = resolved(both_heads(task=("qa",), model=model), shards, tmp_path, lines.append)
    assert config.heads.vocabulary == ("no",) and config.model.answers.vocabulary == 1
    assert lines == [
        "answers: the 1 commonest of 8; 54 of 72 training questions have another answer and are left out"
    ]
    loader = Loader(ShardIndex.read(str(shards)), config, Process.current())
    batches = list(loader.batches(LoaderState()))
    loader.close()
    # Only what is not red has the answer "no".
    assert (
        sum(len(batch.video) for batch in batches) == 18 and sum(batch.uncaptioned for batch in batches) == 6
    )
    assert (
        resolved(both_heads(task=("qa",), model=model), shards, tmp_path) == config
    )  # kept, and not counted anew


def test_shards_without_questions_are_refused(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", train=[3])
    with pytest.raises(ValueError, match=r"no clip of split 'train' has a question"):
        resolved(both_heads(), tmp_path / "shards", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": ("qa",), "model": tiny_model()},
            "--set.model.answers.head none: must be published or open",
        ),
        ({"task": ("caption",), "model": tiny_model()}, "--set.model.captions.layers 0: must be 1 or more"),
        ({"task": ()}, r"--set.task \(\): must be some of retrieval, qa, caption"),
        ({"heads": HeadSettings(texts_per_clip=0)}, "--set.heads.texts-per-clip 0: must be 1 or more"),
    ],
)
def test_settings_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        both_heads(**changes)


def test_a_task_has_its_own_metric() -> None:
    assert [both_heads(task=(task,)).metric for task in TASKS] == ["t2v/R@1", "qa/accuracy", "caption/CIDEr"]


# --- the run --------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_all_tasks_are_learned_and_measured(shards: Path, tmp_path: Path) -> None:
    config = both_heads()
    config = replace(
        config,
        optim=replace(config.optim, lr=5e-3, backbone_lr=5e-3, epochs=16),
        checkpoint=replace(config.checkpoint, every_steps=0),
        evaluate=replace(config.evaluate, every_epochs=16),
    )
    tracked: dict[str, list[float]] = {}

    def track(metrics: dict, step: int) -> None:
        for name, value in metrics.items():
            tracked.setdefault(name, []).append(value)

    evaluate = measured(config, shards, tmp_path / "out")
    metrics = train(config, shards, tmp_path / "out", track=track, evaluate=evaluate)
    for name in ("train/qa/cross_entropy", "train/caption/cross_entropy"):
        assert len(tracked[name]) == 16 and tracked[name][-1] < 0.8 * tracked[name][0], name
    assert metrics["val/qa/accuracy"] > metrics["val/qa/baseline"]
    assert metrics["val/qa/questions"] == 12 and 0 <= metrics["val/caption/CIDEr"] <= 10
    assert {"val/t2v/R@1", "val/caption/BLEU@4", "val/qa/accuracy_in_vocabulary"} <= metrics.keys()
    shown = table(metrics, "val")
    assert "val: 12 questions" in shown and "val: 4 captions" in shown and "t2v by chance" in shown
    model = load_model(tmp_path / "out" / "model")
    assert model.vocabulary[0] == "no" and len(model.vocabulary) == 8 == model.config.answers.vocabulary
    assert json.loads((tmp_path / "out" / "model" / TRAINED).read_text()) == [
        {"data": str(shards), "split": "train"}
    ]


@pytest.mark.parametrize("metric", ["t2v/R@1", "qa/accuracy", "caption/CIDEr"])
def test_the_best_checkpoint_is_chosen_by_any_task_s_metric(
    metric: str, shards: Path, tmp_path: Path
) -> None:
    """Each of the metrics is highest in another epoch."""
    config = both_heads()
    config = replace(
        config,
        optim=replace(config.optim, epochs=3),
        checkpoint=replace(config.checkpoint, metric=metric, every_steps=0, keep=3),
    )
    found = {
        "val/t2v/R@1": [9.0, 1.0, 2.0],
        "val/qa/accuracy": [1.0, 9.0, 2.0],
        "val/caption/CIDEr": [1.0, 2.0, 9.0],
    }
    rounds = iter(range(3))
    lines: list[str] = []

    def evaluate(model: HBI, split: str) -> dict[str, float]:
        epoch = next(rounds, None)
        return {} if epoch is None else {name: values[epoch] for name, values in found.items()}

    train(config, shards, tmp_path, evaluate=evaluate, log=lines.append)
    best = found[f"val/{metric}"].index(9.0) + 1
    [checkpoint] = (tmp_path / "checkpoints").glob(f"epoch-{best:05d}-*")
    assert same(weights(tmp_path), load_file(checkpoint / "model.safetensors"))
    assert "epoch 2  val/t2v/R@1 1.0  val/qa/accuracy 9.0  val/caption/CIDEr 2.0" in lines


@pytest.mark.parametrize("step", [2, 4])
def test_a_broken_off_run_ends_with_the_weights_of_an_unbroken_one(
    step: int, shards: Path, tmp_path: Path
) -> None:
    """With dropout, whose random numbers go on where they were, and the published loss of questions."""
    model = both_heads().model
    model = replace(
        model, answers=replace(model.answers, dropout=0.3), captions=replace(model.captions, dropout=0.3)
    )
    heads = HeadSettings(texts_per_clip=2, qa_pairs=0.5, qa_distillation=2.0)
    config = both_heads(model=model, heads=heads)
    train(config, shards, tmp_path / "unbroken")

    def track(metrics: dict, at: int) -> None:
        if at == step:
            raise Killed

    with pytest.raises(Killed):
        train(config, shards, tmp_path / "broken", track=track)
    train(config, shards, tmp_path / "broken")
    assert same(weights(tmp_path / "unbroken"), weights(tmp_path / "broken"))


def test_another_order_of_tasks_is_another_run(shards: Path, tmp_path: Path) -> None:
    train(both_heads(), shards, tmp_path)
    (tmp_path / "result.json").unlink(missing_ok=True)
    with pytest.raises(TrainingAborted, match="holds another run"):
        train(both_heads(task=("retrieval", "caption", "qa")), shards, tmp_path)


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_answers_and_captions_one_by_one(shards: Path, tmp_path: Path) -> None:
    """The measured answers are those that the model gives to each question alone; so are the captions."""
    from hbi.model.config import DecodeSettings
    from hbi.model.tokenizer import caption_marks, detokenize, tokenize
    from hbi.training.evaluate.encode import readable

    config = resolved(both_heads(), shards, tmp_path)
    torch.manual_seed(1)
    model = build_model(config.model).eval()
    model.vocabulary = config.heads.vocabulary
    tokenizer = tokenizer_of(config, str(tmp_path))
    index = ShardIndex.read(str(shards))
    encoder = SplitEncoder(model, tokenizer, index, Process.current())
    asked = list(training_answers(index, "train"))
    assert len(asked) == 72 and ("what", "red") in asked
    answers = evaluate_answers(encoder, "val", asked)
    captions = evaluate_captions(encoder, "val")
    expected_answers, expected_captions = [], []
    candidates = tokenize(tokenizer, model.vocabulary, 12)
    with torch.no_grad():
        for clip, images in readable(index, "val", range(4), model.config.frames, []):
            video, mask = torch.from_numpy(images)[None], torch.ones(1, len(images), dtype=torch.bool)
            frames = model.encode_video(video, mask)
            for entry in clip.qa:
                ids, words = tokenize(tokenizer, [entry["question"]], 12)
                best = int(model.answer_logits(ids, words, frames, mask, candidates).argmax())
                expected_answers.append(model.vocabulary[best])
            written = model.write_captions(frames, mask, caption_marks(tokenizer), DecodeSettings())
            expected_captions += detokenize(tokenizer, written)
    assert [row["answer"] for row in answers.rows] == expected_answers
    assert [row["caption"] for row in captions.rows] == expected_captions
    right = sum(row["answer"] == row["truth"] for row in answers.rows)
    assert answers.metrics["val/qa/accuracy"] == pytest.approx(100 * right / 12)


@pytest.mark.parametrize("heads", [(), ("qa",), ("caption",), ("qa", "caption")])
def test_the_command_measures_what_a_model_has_heads_for(
    heads: tuple[str, ...], shards: Path, tmp_path: Path
) -> None:
    config = resolved(both_heads(), shards, tmp_path)
    chosen = {"qa": {"answers": config.model.answers}, "caption": {"captions": config.model.captions}}
    model = build_model(tiny_model(**{k: v for head in heads for k, v in chosen[head].items()})).eval()
    if "qa" in heads:
        model.vocabulary = config.heads.vocabulary
    tokenizer = tokenizer_of(config, str(tmp_path))
    save_model(model, tmp_path / "model", tokenizer)
    found = evaluate_named(ModelSource(str(tmp_path / "model")), str(shards), "val", device="cpu")
    encoder = SplitEncoder(model, tokenizer, ShardIndex.read(str(shards)), Process.current())
    expected = evaluate(encoder, "val").metrics
    if "qa" in heads:
        expected |= evaluate_answers(encoder, "val", list(training_answers(encoder.index, "train"))).metrics
    if "caption" in heads:
        expected |= evaluate_captions(encoder, "val").metrics
    assert found == pytest.approx(expected)
    assert any(name.startswith("val/qa/") for name in found) == ("qa" in heads)
    assert any(name.startswith("val/caption/") for name in found) == ("caption" in heads)


def test_nothing_to_measure_is_one_line(tmp_path: Path) -> None:
    index = make_shards(tmp_path / "shards", train=[2])
    config = both_heads(heads=HeadSettings(vocabulary=("yes", "no")))
    config = with_tokenizer(config, index, str(tmp_path))
    model = build_model(config.model)
    model.vocabulary = ("yes", "no")
    encoder = SplitEncoder(model, tokenizer_of(config, str(tmp_path)), index, Process.current())
    with pytest.raises(ValueError, match="no clip of split 'train' has a question: nothing to answer"):
        evaluate_answers(encoder, "train")
    bare = SplitEncoder(build_model(tiny_model()), encoder.tokenizer, index, Process.current())
    with pytest.raises(ValueError, match="this model answers no questions"):
        evaluate_answers(bare, "train")
    with pytest.raises(ValueError, match="this model writes no captions"):
        evaluate_captions(bare, "train")


# --- a model to begin with ------------------------------------------------------------------------------------------


def test_heads_are_added_to_the_model_that_a_run_begins_from(shards: Path, tmp_path: Path) -> None:
    train(tiny_run(), shards, tmp_path / "first")
    config = both_heads(init_from=str(tmp_path / "first" / "model"))
    config = with_init(config, str(tmp_path / "second"), None)
    assert config.model.answers.head == "open" and config.model.captions.layers == 1
    model = init_model(config.model, str(tmp_path / "second" / "start"))
    begun = weights(tmp_path / "first")
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in begun.items())
    added = {name.split(".")[0] for name in state.keys() - begun.keys()}
    assert added == {"reconstruction", "answerer", "captioner"}


def test_a_start_that_has_seen_the_test_s_clips_is_refused_with_their_number(
    shards: Path, tmp_path: Path
) -> None:
    train(tiny_run(), shards, tmp_path / "first")
    start = str(tmp_path / "first" / "model")
    config = both_heads(init_from=start)
    lines: list[str] = []
    # Clips 0 to 23 were in training; this test has 20 to 24.
    overlapping = make_shards(tmp_path / "other", train=[20], test=[5], questions=True)
    with pytest.raises(
        ValueError, match=r"it was trained on 4 of the 5 clips of the test split \(clip-20, for one\)"
    ):
        refuse_seen_tests(config, overlapping, None, lines.append)
    apart = make_shards(tmp_path / "apart", train=[24], test=[5], questions=True)
    refuse_seen_tests(config, apart, None, lines.append)
    refuse_seen_tests(replace(config, task=("retrieval",)), overlapping, None, lines.append)
    assert not lines
    (tmp_path / "first" / "model" / TRAINED).unlink()
    refuse_seen_tests(config, overlapping, None, lines.append)
    assert "which clips it was trained on is not known" in lines[0]
