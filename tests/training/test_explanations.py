"""How true explanations are, over a split: against the same by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hbi.model.coalitions import importance
from hbi.model.curves import areas, best_areas, random_areas
from hbi.model.hbi import HBI
from hbi.model.moments import moment, temporal_iou
from hbi.model.tokenizer import tokenize, train_tokenizer
from hbi.pipelines.sample import ShardIndex, ShardInfo
from hbi.training.evaluate.explanations import METHODS, explanation_metrics, explanation_table, match_of
from tests.support.training_shards import make_shards, sample, tiny_model, write_shard


def test_shares_are_those_of_the_summed_areas(tmp_path: Path) -> None:
    index = make_shards(tmp_path / "shards", test=[3])
    tokenizer = train_tokenizer(["red green blue grey brighter darker gets 0 1 2"], 300)
    torch.manual_seed(0)
    model = HBI(tiny_model()).eval()
    metrics = explanation_metrics(model, tokenizer, index, "test", 2)
    assert metrics["test/explain/matches"] == 2
    totals = torch.zeros(3, 2, dtype=torch.float64)
    for number in range(2):
        made = sample(number)
        frames = model.encode_frames(torch.from_numpy(made.images())[None])[0]
        match = match_of(model, tokenizer, made.captions[0], frames)
        assert match is not None
        ids, mask = tokenize(tokenizer, made.captions[:1], model.config.words)
        assert torch.equal(match.input_ids, ids[0, : int(mask.sum())])
        everyone = torch.ones(1, len(match.input_ids), dtype=torch.bool)
        text = model.text_levels(model.encode_text(match.input_ids[None], everyone)[0], everyone)["entity"]
        scores = torch.zeros(16, dtype=torch.float64)
        for number in range(1, 16):
            there = torch.tensor([[bool(number >> j & 1) for j in range(4)]])
            with torch.no_grad():
                seen = model.encode_video(torch.from_numpy(made.images())[None], there)
                video = model.video_levels(seen, there)["entity"]
                scores[number] = float(model.similarity(text, video))
        shown = importance(model, match.input_ids, match.word_of_token, match.frames).frames
        order = shown.argsort(descending=True)
        each = (areas(scores, order), random_areas(scores), best_areas(scores))
        totals += torch.tensor(each, dtype=torch.float64)
    for row, way in enumerate(("input values", "random")):
        for column, kind in enumerate(("deletion", "insertion")):
            share = float(100 * totals[row, column] / totals[2, column])
            assert metrics[f"test/explain/frames/{way}/{kind}"] == pytest.approx(share, abs=0.1)
    table = explanation_table(metrics, "test").splitlines()
    assert len(table) == len(METHODS) + 3 and "2 matches" in table[0]


def test_what_is_pointed_at_is_read_off_the_clause(tmp_path: Path) -> None:
    told = [
        {"text": "red gets brighter", "start": 0.0, "end": 2.0},
        {"text": "it shines", "start": 2.0, "end": 4.0},
    ]
    made = replace(sample(0, captions=["red gets brighter then it shines"]), extra={"moments": told})
    untold = sample(1)
    entry = write_shard(tmp_path / "test-000000.tar", [untold, made])
    index = ShardIndex(str(tmp_path), {"frames": 4, "size": 16}, [ShardInfo(**entry)])
    tokenizer = train_tokenizer(made.captions + untold.captions, 300)
    torch.manual_seed(3)
    model = HBI(tiny_model()).eval()
    metrics = explanation_metrics(model, tokenizer, index, "test", 4)
    assert metrics["test/explain/moments"] == 2 and metrics["test/explain/pointing/chance"] == 50
    frames = model.encode_frames(torch.from_numpy(made.images())[None])[0].detach()
    whole = match_of(model, tokenizer, made.captions[0], frames)
    assert whole is not None and whole.places("it shines") == [4, 5] and whole.places("shines red") == []
    for way, explain in METHODS.items():
        with torch.inference_mode():
            pairs = explain(whole).pairs
        hits = (int(pairs[:3].sum(0).argmax()) < 2) + (int(pairs[4:].sum(0).argmax()) >= 2)
        assert metrics[f"test/explain/pointing/{way}"] == 50 * hits
        overlaps = []
        for moment_told in told:
            match = match_of(model, tokenizer, str(moment_told["text"]), frames)
            assert match is not None
            with torch.inference_mode():
                named = moment(explain(match).frames, made.timestamps, made.end)
            overlaps.append(temporal_iou(named, (moment_told["start"], moment_told["end"])))  # type: ignore[arg-type]
        assert metrics[f"test/explain/moment/{way}/IoU"] == pytest.approx(50 * sum(overlaps))
        assert metrics[f"test/explain/moment/{way}/R1@0.5"] == 50 * sum(o >= 0.5 for o in overlaps)
    assert "2 moments" in explanation_table(metrics, "test")


def test_no_match_is_short_enough(tmp_path: Path) -> None:
    index: ShardIndex = make_shards(tmp_path / "shards", frames=1, test=[2])
    tokenizer = train_tokenizer(["red"], 300)
    with pytest.raises(ValueError, match="no match of test has 2 to 12"):
        explanation_metrics(HBI(tiny_model()).eval(), tokenizer, index, "test", 2)
