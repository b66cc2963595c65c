"""The demo: its folder, its questions, what it says of the answers, and what it refuses. The chain is run by hand."""

import json
import socket
from collections import Counter
from pathlib import Path

import pytest

from hbi import answers
from hbi.answers import Clips, count_verdicts, example_lines, verdict_table
from hbi.demo import FORMAT, Demo, DemoSettings, _next_free, next_commands, run
from hbi.pipelines.corpus.captions import caption
from hbi.pipelines.corpus.scripts import make_scripts


@pytest.fixture
def clips(tmp_path: Path) -> Clips:
    """Every second clip of a small corpus is its test."""
    rows = [
        {
            "id": f"clip-{n}",
            "captions": [caption(script, 0), caption(script, 1)],
            "split": ("train", "test")[n % 2],
        }
        for n, script in enumerate(make_scripts(40, seed=3))
    ]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Clips.read(manifest, seed=3)


def test_questions_are_captions_of_test_clips(clips: Clips) -> None:
    assert set(clips.scripts) == {f"clip-{n}" for n in range(1, 40, 2)}
    assert len(clips.questions()) == 40
    for question in clips.questions():
        assert question.text in (caption(clips.scripts[question.id], style) for style in (0, 1))
    examples = clips.examples()
    assert [len(clips.scripts[question.id]) for question in examples] == sorted(
        {len(s) for s in clips.scripts.values()}
    )


def test_the_first_answers_are_counted_by_clauses(clips: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {question.text: question.id for question in clips.questions()}
    wrong = next(id for id, script in clips.scripts.items() if len(script) == 3)
    texts = [question.text for question in clips.questions() if len(clips.scripts[question.id]) == 1]

    def ask(address: str, text: str, k: int) -> list[dict]:
        return [{"id": wrong if text == texts[0] else own[text], "score": 0.5}][:k]

    monkeypatch.setattr(answers, "ask", ask)
    counted = count_verdicts(clips, "http://nowhere")
    assert counted[1] == Counter(right=len(texts) - 1, wrong=1)
    assert all(set(counts) == {"right"} for clauses, counts in counted.items() if clauses > 1)
    table = verdict_table(counted).splitlines()
    assert table[-1].split()[:2] == ["all", "40"] and f"{100 * 39 / 40:.1f} %" in table[-1]


def test_an_answer_shows_what_does_not_hold(clips: Clips) -> None:
    question = clips.examples()[-1]
    other = next(id for id, script in clips.scripts.items() if len(script) == 1)
    results = [{"score": 0.75, "id": question.id}, {"score": 0.5, "id": other}]
    lines = example_lines(clips, question, results)
    assert question.text in lines[1] and "right" in lines[2] and "(" not in lines[2]
    assert "wrong" in lines[3] and "(" in lines[3] and "it shows 1 things" in lines[3]


def test_a_folder_is_resumed_only_by_the_demo_that_made_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    first = Demo(folder, {"clips": 12, "seed": 0})
    first.open(fresh=False)
    with first.stage("corpus", "clips"):
        pass
    again = Demo(folder, {"clips": 12, "seed": 0})
    again.open(fresh=False)
    assert list(again.stages) == ["corpus"] and "Resuming" in capsys.readouterr().out
    held = json.loads(again.file.read_text())
    again.file.write_text(json.dumps(held | {"format": FORMAT - 1}))
    with pytest.raises(ValueError, match="another version of the demo made it: --fresh"):
        Demo(folder, {"clips": 12, "seed": 0}).open(fresh=False)
    Demo(folder, {"clips": 12, "seed": 0}).open(fresh=True)
    assert json.loads(again.file.read_text())["stages"] == {}
    again.file.write_text("{")
    with pytest.raises(ValueError, match="not what a demo wrote"):
        Demo(folder, {"clips": 12, "seed": 0}).open(fresh=False)


def test_a_stage_that_fails_is_not_kept(tmp_path: Path) -> None:
    demo = Demo(tmp_path, {})
    with pytest.raises(OSError, match="No space left"), demo.stage("corpus", "clips"):
        raise OSError(28, "No space left on device")
    assert not demo.stages


def test_too_few_clips_and_a_taken_port_leave_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"--clips 5: .* ask for 12 or more"):
        run(DemoSettings(out=str(out), clips=5))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}"):
            run(DemoSettings(out=str(out), port=port))
        assert _next_free(port) > port
    assert not out.exists()


def test_the_next_commands_name_the_demos_own_store() -> None:
    text = next_commands(Path("demo-out"), "sqlite:////tmp/demo-out/mlflow.db")
    serve = next(line for line in text.splitlines() if " serve models:" in line)
    assert serve.split()[1:] == [
        "serve", "models:/hbi@champion", "demo-out/index", "--tracking", "sqlite:////tmp/demo-out/mlflow.db",
    ]  # fmt: skip
