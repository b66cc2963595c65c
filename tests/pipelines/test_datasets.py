"""Published annotation files, small but in exactly their formats, and the manifests that they become."""

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from hbi.pipelines.datasets.table import FORMATS, import_dataset
from hbi.pipelines.manifest import Row, read_manifest


class Dataset:
    """A folder of annotations and one of videos, and what comes out of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.videos = folder / "videos"
        self.annotations = folder / "annotations"
        self.videos.mkdir()
        self.annotations.mkdir()

    def video(self, *names: str) -> None:
        for name in names:
            path = self.videos / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")

    def text(self, name: str, *lines: str) -> None:
        (self.annotations / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def json(self, name: str, content: Any) -> None:
        (self.annotations / name).write_text(json.dumps(content))

    def rows(self, name: str) -> list[Row]:
        out = self.folder / "out.jsonl"
        count = import_dataset(name, str(self.annotations), str(self.videos), str(out))
        rows = list(read_manifest(str(out)))
        assert len(rows) == count
        return rows

    def place(self, name: str) -> str:
        return str(self.videos / name)


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path)


def msrvtt(data: Dataset) -> None:
    videos = [
        {
            "category": 9,
            "url": "u",
            "video_id": f"video{i}",
            "start time": 1.0,
            "end time": 9.0,
            "split": split,
            "id": i,
        }
        for i, split in ((0, "train"), (6513, "validate"), (7020, "test"), (7021, "test"))
    ]
    sentences = [
        {"sen_id": 10 * i + k, "video_id": f"video{i}", "caption": f"caption {k} of {i}"}
        for k in (0, 1)
        for i in (0, 6513, 7020, 7021)
    ]
    data.json("MSRVTT_data.json", {"info": {"year": "2016"}, "videos": videos, "sentences": sentences})


def test_msrvtt_1ka(data: Dataset) -> None:
    msrvtt(data)
    data.text("MSRVTT_train.9k.csv", "video_id", "video0", "video7021")
    data.text(
        "MSRVTT_JSFUSION_test.csv",
        "key,vid_key,video_id,sentence",
        'ret0,msr7020,video7020,"a woman, in red, sings"',
    )
    data.video("all/video0.mp4", "all/video7020.webm", "video7021.mp4")
    rows = data.rows("MSR-VTT 1k-A")
    assert [(row.id, row.split, row.captions) for row in rows] == [
        ("video0", "train", ["caption 0 of 0", "caption 1 of 0"]),
        ("video7021", "train", ["caption 0 of 7021", "caption 1 of 7021"]),
        ("video7020", "test", ["a woman, in red, sings"]),
    ]
    assert rows[2].video == data.place("all/video7020.webm")  # whatever the folder or extension


def test_msrvtt_full(data: Dataset) -> None:
    msrvtt(data)
    rows = data.rows("msrvtt-full")
    assert [(row.id, row.split) for row in rows] == [
        ("video0", "train"),
        ("video6513", "val"),
        ("video7020", "test"),
        ("video7021", "test"),
    ]
    assert rows[0].extra == {"category": 9} and rows[3].captions == ["caption 0 of 7021", "caption 1 of 7021"]


@pytest.mark.parametrize("kind", ["pickle", "text"])
def test_msvd(data: Dataset, kind: str) -> None:
    data.text("train_list.txt", "mv89psg6zh4_33_46")
    data.text("val_list.txt", "-8y1Q0rA3n8_95_102")
    data.text("test_list.txt", "4wsuPCjDBc_5_15")
    data.text(
        "youtube_mapping.txt", "mv89psg6zh4_33_46 vid1", "-8y1Q0rA3n8_95_102 vid2", "4wsuPCjDBc_5_15 vid3"
    )
    if kind == "pickle":
        words = {
            "mv89psg6zh4_33_46": [["a", "bird", "bathes"], ["a", "bird", "in", "a", "sink"]],
            "-8y1Q0rA3n8_95_102": [["a", "man", "runs"]],
            "4wsuPCjDBc_5_15": [["a", "cat"]],
        }
        (data.annotations / "raw-captions.pkl").write_bytes(pickle.dumps(words, protocol=2))
    else:
        data.text(
            "AllVideoDescriptions.txt",
            "# Descriptions of the videos",
            "",
            "mv89psg6zh4_33_46 a bird bathes",
            "mv89psg6zh4_33_46 a bird in a sink",
            "-8y1Q0rA3n8_95_102 a man runs",
            "4wsuPCjDBc_5_15 a cat",
        )
    data.video("mv89psg6zh4_33_46.avi", "vid2.avi", "4wsuPCjDBc_5_15.avi")
    rows = data.rows("msvd")
    assert [(row.split, row.captions) for row in rows] == [
        ("train", ["a bird bathes", "a bird in a sink"]),
        ("val", ["a man runs"]),
        ("test", ["a cat"]),
    ]
    assert [Path(row.video).name for row in rows] == [
        "mv89psg6zh4_33_46.avi",
        "vid2.avi",
        "4wsuPCjDBc_5_15.avi",
    ]


def test_a_pickle_that_would_run_something_is_refused(data: Dataset) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (data.folder / "ran",))  # type: ignore[return-value]

    data.text("train_list.txt", "a")
    (data.annotations / "raw-captions.pkl").write_bytes(pickle.dumps({"a": Bomb()}))
    with pytest.raises(ValueError, match=r"raw-captions\.pkl: not MSVD's captions"):
        data.rows("msvd")
    assert not (data.folder / "ran").exists()


def test_didemo(data: Dataset) -> None:
    id = "54322086@N00_2408598493_274c77d26a.avi"
    data.json(
        "train_data.json",
        [
            {
                "annotation_id": 1,
                "description": description,
                "times": [[0, 0], [0, 0], [1, 1], [0, 0]],
                "video": video,
                "num_segments": 6,
                "download_link": "https://example.com",
            }
            for video, description in (
                (id, "the cat sits."),
                ("other.mov", "a dog."),
                (id, "the cat leaves."),
            )
        ],
    )
    data.json("test_data.json", [{"description": "rain", "times": [[0, 1]], "video": "third.mov"}])
    data.text("train_list.txt", id)
    data.video("54322086@N00_2408598493_274c77d26a.mp4", "third.mov")
    rows = data.rows("didemo")
    assert [(row.id, row.captions, row.split, row.start, row.end) for row in rows] == [
        (id, ["the cat sits. the cat leaves."], "train", 0.0, 31.0),
        ("third.mov", ["rain"], "test", 0.0, 31.0),
    ]
    assert rows[0].video == data.place("54322086@N00_2408598493_274c77d26a.mp4")


@pytest.fixture
def activitynet(data: Dataset) -> Dataset:
    train = {
        "v_aaa": {
            "duration": 82.73,
            "timestamps": [[0.83, 19.86], [60.81, 17.37]],  # the second is backwards, as some are
            "sentences": ["A young woman kneels.", " She scrubs. "],
        },
        "v_bbb": {"duration": 10.0, "timestamps": [[0, 5]], "sentences": ["Not in the list."]},
    }
    data.json("train.json", train)
    data.json("train_ids.json", ["v_aaa"])
    data.json("val_1.json", {"v_ccc": {"duration": 9.5, "timestamps": [[1, 2.5]], "sentences": ["A jump."]}})
    data.video("v_aaa.mp4", "ccc.mkv")
    return data


def test_activitynet_paragraphs(activitynet: Dataset) -> None:
    rows = activitynet.rows("ActivityNet Captions")
    assert [(row.id, row.split, row.captions, row.start, row.end) for row in rows] == [
        ("v_aaa", "train", ["A young woman kneels. She scrubs."], None, None),
        ("v_ccc", "val", ["A jump."], None, None),
    ]
    assert [Path(row.video).name for row in rows] == ["v_aaa.mp4", "ccc.mkv"]


def test_activitynet_segments(activitynet: Dataset) -> None:
    rows = activitynet.rows("activitynet-segments")
    assert [(row.id, row.captions, row.start, row.end) for row in rows] == [
        ("v_aaa_0", ["A young woman kneels."], 0.83, 19.86),
        ("v_aaa_1", ["She scrubs."], 17.37, 60.81),
        ("v_ccc_0", ["A jump."], 1.0, 2.5),
    ]


def test_lsmdc(data: Dataset) -> None:
    clip = "0001_American_Beauty_00.00.51.926-00.00.54.129"
    times = "00.00.51.926\t00.00.54.129\t00.00.51.926\t00.00.54.129"
    data.text("LSMDC16_annos_training.csv", f'{clip}\t{times}\tSOMEONE films "JANE", a teenager.')
    data.text(
        "LSMDC16_challenge_1000_publictect.csv", f"1012_X_00.00.01.000-00.00.02.000\t{times}\tIt rains."
    )
    data.video(f"0001_American_Beauty/{clip}.avi")
    rows = data.rows("lsmdc")
    assert [(row.id, row.split, row.captions) for row in rows] == [
        (clip, "train", ['SOMEONE films "JANE", a teenager.']),
        ("1012_X_00.00.01.000-00.00.02.000", "test", ["It rains."]),
    ]
    assert rows[0].video == data.place(f"0001_American_Beauty/{clip}.avi")


def test_vatex(data: Dataset) -> None:
    def entry(id: str) -> dict[str, Any]:
        return {"videoID": id, "enCap": [f"{id} is good", "second"], "chCap": ["一个"]}

    data.json("vatex_training_v1.0.json", [entry("Ptf_2VRj-V0_000122_000132"), entry("gQ7_zK_000004_000014")])
    data.json("vatex_public_test_english_v1.1.json", [entry("zzz_000000_000010")])
    data.video("Ptf_2VRj-V0_000122_000132.mp4", "gQ7_zK.mp4")
    rows = data.rows("vatex")
    assert [(Path(row.video).name, row.split, row.start, row.end) for row in rows] == [
        ("Ptf_2VRj-V0_000122_000132.mp4", "train", None, None),
        ("gQ7_zK.mp4", "train", 4.0, 14.0),  # the whole video is there, not the cut one
        ("zzz_000000_000010.mp4", "test", None, None),
    ]
    assert rows[0].captions == ["Ptf_2VRj-V0_000122_000132 is good", "second"]


def test_webvid(data: Dataset) -> None:
    with (data.annotations / "results_2M_val.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
        table.writerow(
            ["21179416", "https://e.com/a.mp4", "PT00H00M11S", "006001_006050", "Aerial shot,\nwinter"]
        )
        table.writerow(["5629184", "https://e.com/b.mp4", "PT00H00M29S", "071501_071550", "Senior couple"])
    data.video("006001_006050/21179416.mp4")
    rows = data.rows("webvid")
    assert [(row.id, row.split, row.captions, row.video) for row in rows] == [
        ("21179416", "val", ["Aerial shot,\nwinter"], data.place("006001_006050/21179416.mp4")),
        ("5629184", "val", ["Senior couple"], data.place("071501_071550/5629184.mp4")),
    ]


@pytest.mark.parametrize(("name", "prefix"), [("msrvtt-qa", "video"), ("msvd-qa", "vid")])
def test_questions_of_msrvtt_and_msvd(data: Dataset, name: str, prefix: str) -> None:
    entries = [
        {"answer": "knife", "category_id": 14, "id": 0, "question": "what does a man hold?", "video_id": 7},
        {"answer": "man", "category_id": 14, "id": 1, "question": "who cooks?", "video_id": 8},
        {"answer": "two", "category_id": 14, "id": 2, "question": "how many?", "video_id": 7},
    ]
    data.json("train_qa.json", entries)
    data.text(
        "test.jsonl",
        json.dumps({"answer": "a", "question": "q", "video_id": f"{prefix}9", "answer_type": "what"}),
    )
    data.video(f"{prefix}7.avi")
    rows = data.rows(name)
    assert [(row.id, row.split, [pair["answer"] for pair in row.qa]) for row in rows] == [
        (f"{prefix}7", "train", ["knife", "two"]),
        (f"{prefix}8", "train", ["man"]),
        (f"{prefix}9", "test", ["a"]),
    ]
    assert rows[0].qa[1] == {"question": "how many?", "answer": "two"} and rows[0].captions == []


def test_questions_of_activitynet(data: Dataset) -> None:
    data.json(
        "val_q.json", [{"question": "what colour", "video_name": "1QIUV7WYKXg", "question_id": "v_1QIUV_5"}]
    )
    data.json("val_a.json", [{"answer": "blue", "type": 4, "question_id": "v_1QIUV_5"}])
    data.video("v_1QIUV7WYKXg.mp4")
    (row,) = data.rows("ActivityNet-QA")
    assert row.video == data.place("v_1QIUV7WYKXg.mp4")
    assert row.split == "val" and row.qa == [{"question": "what colour", "answer": "blue"}]


def test_missing_videos_keep_their_rows_and_are_counted(
    data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    msrvtt(data)
    rows = data.rows("msrvtt-full")
    assert rows[0].video == data.place("video0.mp4")
    assert "4 videos are not in" in capsys.readouterr().err


def test_one_of_the_files_stands_for_its_folder(data: Dataset) -> None:
    msrvtt(data)
    out = data.folder / "out.jsonl"
    file = data.annotations / "MSRVTT_data.json"
    assert import_dataset("msrvtt-full", str(file), str(data.videos), str(out)) == 4


def test_faults_are_told_in_one_line(data: Dataset) -> None:
    with pytest.raises(ValueError, match="dataset 'imagenet' is not known; known are msrvtt, "):
        data.rows("imagenet")
    with pytest.raises(ValueError, match=r"annotations: no results_2M_train\.csv or "):
        data.rows("webvid")
    data.text("train_q.json", "nonsense")
    data.json("train_a.json", [])
    with pytest.raises(ValueError, match=r"train_q\.json: not JSON"):
        data.rows("activitynet-qa")
    data.json("train_q.json", [{"question": "q"}])
    with pytest.raises(ValueError, match="not as activitynet-qa was published"):
        data.rows("activitynet-qa")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_which_file_it_misses(data: Dataset, name: str) -> None:
    with pytest.raises(ValueError, match=r"annotations: no \S+"):
        data.rows(name)
