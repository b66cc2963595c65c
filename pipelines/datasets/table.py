"""The annotation files of public datasets, as they were published, to manifests.

One small function a format, one table of names. Rows are in the order of the published files. `start` and `end` are
set only where the published videos are not already cut.

    msrvtt                MSR-VTT 1k-A: MSRVTT_train.9k.csv (or .7k), MSRVTT_JSFUSION_test.csv, MSRVTT_data.json
    msrvtt-full           MSRVTT_data.json, or train_val_videodatainfo.json and test_videodatainfo.json
    msvd                  {train,val,test}_list.txt, and raw-captions.pkl or AllVideoDescriptions.txt
    didemo                {train,val,test}_data.json, and {train,val,test}_list.txt if there
    activitynet           ActivityNet Captions, a paragraph a video: train.json, val_1.json, val_2.json; *_ids.json
    activitynet-segments  the same, a sentence a clip
    lsmdc                 LSMDC16_annos_training.csv, LSMDC16_annos_val.csv, LSMDC16_challenge_1000_publictect.csv
    vatex                 vatex_training_v1.0.json, vatex_validation_v1.0.json, vatex_public_test_english_v1.1.json
    webvid                results_{2M,10M}_{train,val}.csv
    msrvtt-qa, msvd-qa    {train,val,test}_qa.json (or .jsonl); for MSVD youtube_mapping.txt if there
    activitynet-qa        {train,val,test}_q.json and {train,val,test}_a.json
"""

import csv
import io
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hbi.infra import storage
from hbi.pipelines.manifest import VIDEO_NAME, Row, write_manifest

SPLITS = ("train", "val", "test")


class Files:
    """A folder of annotation files, found by name at any depth. One of the files stands for its folder."""

    def __init__(self, folder: str) -> None:
        self.folder = storage.absolute(folder)
        one = storage.exists(self.folder) if storage.is_remote(folder) else Path(self.folder).is_file()
        self.folder = storage.parent(self.folder) if one else self.folder
        paths = storage.list_files(self.folder, recursive=not one)
        self.paths = {path.rsplit("/", 1)[-1]: path for path in paths}

    def find(self, *names: str) -> str | None:
        """The path of the first of the names that is there."""
        return next((self.paths[name] for name in names if name in self.paths), None)

    def need(self, *names: str) -> str:
        """Likewise; ValueError if none is there."""
        found = self.find(*names)
        if found is None:
            raise ValueError(
                f"{self.folder}: no {' or '.join(names)} in it, which this dataset is published with"
            )
        return found

    def splits(self, pattern: str) -> list[tuple[str, str]]:
        """(split, path) of the files named by a pattern with `{}` for train, val and test; at least one."""
        found = [(split, path) for split in SPLITS if (path := self.find(pattern.format(split)))]
        if not found:
            self.need(pattern.format("train"))
        return found


class Videos:
    """The videos below a folder, found by what they are called, whatever their extension or folder."""

    def __init__(self, folder: str) -> None:
        self.folder = storage.absolute(folder)
        self.by_name: dict[str, str] = {}
        self.missing: set[str] = set()
        for path in storage.list_files(self.folder, recursive=True):
            name = path.rsplit("/", 1)[-1]
            self.by_name.setdefault(VIDEO_NAME.sub("", name), path)

    def known(self, *names: str) -> str | None:
        """The path of the first of the names for which there is a video."""
        # "a.avi" may be there as a.avi.mp4, or as a.mp4.
        for name in (*names, *(VIDEO_NAME.sub("", name) for name in names)):
            if name in self.by_name:
                return self.by_name[name]
        return None

    def path(self, *names: str) -> str:
        """Likewise. A video that is not there gets the path where it should be: its clips will be failures."""
        found = self.known(*names)
        if found is None:
            self.missing.add(names[0])
            return storage.join(self.folder, names[0] if VIDEO_NAME.search(names[0]) else f"{names[0]}.mp4")
        return found


def read_dataset(name: str, annotations: str, videos: str) -> tuple[Iterator[Row], Videos]:
    """The rows of a published dataset, and the videos that they were looked up in (`missing` fills as rows are read).

    Raises ValueError for a name that is not known, a file that is not there, or one that is not as it was published.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    made = {re.sub("-", "", known): function for known, function in FORMATS.items()}.get(
        ALIASES.get(plain, plain)
    )
    if made is None:
        raise ValueError(f"dataset {name!r} is not known; known are {', '.join(FORMATS)}")
    found = Videos(videos)

    def rows() -> Iterator[Row]:
        try:
            yield from made(Files(annotations), found)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{annotations}: not as {name} was published ({what})") from error

    return rows(), found


# --- Retrieval ------------------------------------------------------------------------------------------------------


def msrvtt_1ka(files: Files, videos: Videos) -> Iterator[Row]:
    """9,000 (or 7,010) videos with all their captions to train, 1,000 videos with one sentence each to test."""
    captions = _msrvtt_captions([files.need("MSRVTT_data.json")])
    for line in _csv(files.need("MSRVTT_train.9k.csv", "MSRVTT_train.7k.csv")):
        id = line["video_id"]
        yield Row(videos.path(id), id, captions.get(id, []), "train")
    for line in _csv(files.need("MSRVTT_JSFUSION_test.csv")):
        yield Row(videos.path(line["video_id"]), line["video_id"], [line["sentence"]], "test")


def msrvtt_full(files: Files, videos: Videos) -> Iterator[Row]:
    """6,513 videos to train, 497 to validate, 2,990 to test, with all their captions."""
    one = files.find("MSRVTT_data.json")
    paths = (
        [one] if one else [files.need("train_val_videodatainfo.json"), files.need("test_videodatainfo.json")]
    )
    captions = _msrvtt_captions(paths)
    names = {"train": "train", "validate": "val", "test": "test"}
    for path in paths:
        for video in _json(path)["videos"]:
            id = video["video_id"]
            split = names[video["split"]]
            yield Row(
                videos.path(id), id, captions.get(id, []), split, extra={"category": video.get("category")}
            )


def _msrvtt_captions(paths: list[str]) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for path in paths:
        for sentence in _json(path)["sentences"]:
            captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    return captions


def msvd(files: Files, videos: Videos) -> Iterator[Row]:
    """1,200, 100 and 670 videos with all their captions (about 40 each)."""
    pickled = files.find("raw-captions.pkl")
    captions = _msvd_pickle(pickled) if pickled else _msvd_text(files.need("AllVideoDescriptions.txt"))
    names = _msvd_names(files)
    for split, path in files.splits("{}_list.txt"):
        for id in _words(path):
            yield Row(videos.path(id, names.get(id, id)), id, captions.get(id, []), split)


class _Plain(pickle.Unpickler):
    """Reads pickles of lists, dicts and strings; whatever else they name is refused, so nothing is run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, not only text")


def _msvd_pickle(path: str) -> dict[str, list[str]]:
    """{id: [[word, …], …]}"""
    try:
        content = _Plain(io.BytesIO(storage.read_bytes(path)), encoding="utf-8").load()
        return {
            str(id): [text if isinstance(text, str) else " ".join(text) for text in texts]
            for id, texts in content.items()
        }
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not MSVD's captions ({error})") from None


def _msvd_text(path: str) -> dict[str, list[str]]:
    """Lines `<youtube id>_<start>_<end> <caption>`, after comments that begin with `#`."""
    captions: dict[str, list[str]] = {}
    for line in _lines(path):
        id, _, caption = line.partition(" ")
        if caption and not line.startswith("#"):
            captions.setdefault(id, []).append(caption.strip())
    return captions


def _msvd_names(files: Files) -> dict[str, str]:
    """{youtube name: vid<number>} and back, from `youtube_mapping.txt`; empty without it."""
    path = files.find("youtube_mapping.txt")
    pairs = [line.split() for line in _lines(path)] if path else []
    return {a: b for pair in pairs if len(pair) == 2 for a, b in (pair, pair[::-1])}


def didemo(files: Files, videos: Videos) -> Iterator[Row]:
    """A video's descriptions as one paragraph, in the order of the file; the annotated part is its beginning."""
    for split, path in files.splits("{}_data.json"):
        wanted = files.find(f"{split}_list.txt")
        keep = set(_words(wanted)) if wanted else None
        texts: dict[str, list[str]] = {}
        for moment in _json(path):
            texts.setdefault(moment["video"], []).append(moment["description"])
        for id, descriptions in texts.items():
            if keep is None or id in keep or VIDEO_NAME.sub("", id) in keep:
                # Annotators saw the first 30 s; the published protocol ends at 31.
                yield Row(videos.path(id), id, [" ".join(descriptions)], split, 0.0, 31.0)


def activitynet(files: Files, videos: Videos) -> Iterator[Row]:
    """The sentences of a video as one paragraph; retrieval is tested on `val`, which is val_1."""
    for split, id, video in _activitynet(files):
        paragraph = " ".join(sentence.strip() for sentence in video["sentences"])
        yield Row(
            _activitynet_path(videos, id), id, [paragraph], split, extra={"duration": video["duration"]}
        )


def activitynet_segments(files: Files, videos: Videos) -> Iterator[Row]:
    """A clip for each sentence."""
    for split, id, video in _activitynet(files):
        pairs = zip(video["timestamps"], video["sentences"], strict=True)
        for number, ((start, end), sentence) in enumerate(pairs):
            # Some moments are annotated backwards.
            begin, finish = sorted((float(start), float(end)))
            finish = finish if finish > begin else None
            yield Row(
                _activitynet_path(videos, id), f"{id}_{number}", [sentence.strip()], split, begin, finish
            )


def _activitynet(files: Files) -> Iterator[tuple[str, str, dict[str, Any]]]:
    names = [("train", "train.json", "train_ids.json"), ("val", "val_1.json", "val_ids.json")]
    names += [("val_2", "val_2.json", "val_ids.json")]
    if not any(files.find(name) for _, name, _ in names):
        files.need("train.json")
    for split, name, ids in names:
        if path := files.find(name):
            keep = set(_json(listed)) if (listed := files.find(ids)) else None
            for id, video in _json(path).items():
                if keep is None or id in keep:
                    yield split, id, video


def _activitynet_path(videos: Videos, id: str) -> str:
    return videos.path(id, id.removeprefix("v_"), f"v_{id}")


def lsmdc(files: Files, videos: Videos) -> Iterator[Row]:
    """101,079 clips to train, 7,408 to validate, 1,000 to test; a sentence a clip, tab-separated, no header."""
    names = {
        "train": "LSMDC16_annos_training.csv",
        "val": "LSMDC16_annos_val.csv",
        "test": "LSMDC16_challenge_1000_publictect.csv",
    }
    if not any(files.find(name) for name in names.values()):
        files.need(names["train"])
    for split, name in names.items():
        if path := files.find(name):
            for number, line in enumerate(_lines(path), 1):
                # clip, start and end aligned, start and end extracted, sentence: the clips are cut already.
                columns = line.split("\t")
                if len(columns) < 6:
                    raise ValueError(
                        f"{path} line {number}: {len(columns)} columns, LSMDC has 6 (tab-separated)"
                    )
                yield Row(videos.path(columns[0]), columns[0], [columns[5].strip()], split)


def vatex(files: Files, videos: Videos) -> Iterator[Row]:
    """Ten English captions a video; `{train,val,test}_list.txt`, where there, decide the splits."""
    names = {
        "train": ("vatex_training_v1.0.json",),
        "val": ("vatex_validation_v1.0.json",),
        "test": ("vatex_public_test_english_v1.1.json", "vatex_public_test_english_v1.0.json"),
    }
    if not any(files.find(*some) for some in names.values()):
        files.need(*names["train"])
    lists = {split: path for split in SPLITS if (path := files.find(f"{split}_list.txt"))}
    listed = {id: split for split, path in lists.items() for id in _words(path)}
    for split, some in names.items():
        if path := files.find(*some):
            for video in _json(path):
                id = video["videoID"]
                if listed and id not in listed:
                    continue
                # <youtube id>_<start>_<end>: whole videos, too, can be used.
                whole, start, end = id.rsplit("_", 2)
                cut = videos.known(id) is None and videos.known(whole) is not None
                times = (float(start), float(end)) if cut else (None, None)
                yield Row(videos.path(id, whole), id, list(video["enCap"]), listed.get(id, split), *times)


def webvid(files: Files, videos: Videos) -> Iterator[Row]:
    """One caption a video; columns videoid, contentUrl, duration, page_dir, name. Videos lie in `<page_dir>/`."""
    names = [(f"results_{size}_{split}.csv", split) for size in ("2M", "10M") for split in ("train", "val")]
    found = [(path, split) for name, split in names if (path := files.find(name))]
    if not found:
        files.need(*(name for name, _ in names))
    for path, split in found:
        for line in _csv(path):
            id = line["videoid"]
            place = videos.known(id)
            if place is None:
                videos.missing.add(id)
                place = storage.join(videos.folder, line["page_dir"], f"{id}.mp4")
            yield Row(place, id, [line["name"]], split)


# --- Questions ------------------------------------------------------------------------------------------------------


def msrvtt_qa(files: Files, videos: Videos) -> Iterator[Row]:
    """A row a video, with all its questions."""
    for split, path in _qa_files(files):
        yield from _by_video(split, _qa(path, "video"), lambda id: videos.path(id))


def msvd_qa(files: Files, videos: Videos) -> Iterator[Row]:
    """Likewise; videos are called vid<number>, or as on YouTube (`youtube_mapping.txt`)."""
    names = _msvd_names(files)
    for split, path in _qa_files(files):
        yield from _by_video(split, _qa(path, "vid"), lambda id: videos.path(id, names.get(id, id)))


def activitynet_qa(files: Files, videos: Videos) -> Iterator[Row]:
    """Likewise; questions and answers are apart, joined by question_id."""
    for split, path in files.splits("{}_q.json"):
        answers = {answer["question_id"]: answer["answer"] for answer in _json(files.need(f"{split}_a.json"))}
        asked = ((q["video_name"], q["question"], answers.get(q["question_id"])) for q in _json(path))
        pairs = ((id, question, answer) for id, question, answer in asked if answer is not None)
        yield from _by_video(split, pairs, lambda id: _activitynet_path(videos, id))


def _qa_files(files: Files) -> list[tuple[str, str]]:
    names = [(split, (f"{split}_qa.json", f"{split}.jsonl", f"{split}_qa.jsonl")) for split in SPLITS]
    found = [(split, path) for split, some in names if (path := files.find(*some))]
    if not found:
        files.need("train_qa.json", "train.jsonl")
    return found


def _qa(path: str, prefix: str) -> Iterator[tuple[str, str, str]]:
    """(video, question, answer); a video that is a number is called <prefix><number>."""
    entries = map(json.loads, _lines(path)) if path.endswith(".jsonl") else _json(path)
    for entry in entries:
        id = str(entry["video_id"])
        yield f"{prefix}{id}" if id.isdecimal() else id, entry["question"], entry["answer"]


def _by_video(
    split: str, pairs: Iterable[tuple[str, str, Any]], place: Callable[[str], str]
) -> Iterator[Row]:
    asked: dict[str, list[dict[str, str]]] = {}
    for id, question, answer in pairs:
        asked.setdefault(id, []).append({"question": question, "answer": str(answer)})
    for id, qa in asked.items():
        yield Row(place(id), id, split=split, qa=qa)


# --- Files ----------------------------------------------------------------------------------------------------------


def _bytes_text(content: bytes) -> str:
    """UTF-8, or what some of the older files are written in."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def _lines(path: str) -> Iterator[str]:
    """Lines that are not empty."""
    with storage.open_file(path) as stream:
        for line in stream:
            if text := _bytes_text(line).strip("\r\n"):
                yield text


def _words(path: str) -> list[str]:
    return [line.strip() for line in _lines(path) if line.strip()]


def _json(path: str) -> Any:
    try:
        return json.loads(_bytes_text(storage.read_bytes(path)))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def _csv(path: str) -> Iterator[dict[str, str]]:
    with io.TextIOWrapper(storage.open_file(path), "utf-8-sig", errors="replace", newline="") as stream:
        yield from csv.DictReader(stream)


FORMATS: dict[str, Callable[[Files, Videos], Iterator[Row]]] = {
    "msrvtt": msrvtt_1ka,
    "msrvtt-full": msrvtt_full,
    "msvd": msvd,
    "didemo": didemo,
    "activitynet": activitynet,
    "activitynet-segments": activitynet_segments,
    "lsmdc": lsmdc,
    "vatex": vatex,
    "webvid": webvid,
    "msrvtt-qa": msrvtt_qa,
    "msvd-qa": msvd_qa,
    "activitynet-qa": activitynet_qa,
}
ALIASES = {
    "msrvtt1ka": "msrvtt",
    "activitynetcaptions": "activitynet",
    "activitynetparagraphs": "activitynet",
    "activitynetcaptionssegments": "activitynetsegments",
    "webvid2m": "webvid",
    "webvid10m": "webvid",
}


def import_dataset(name: str, annotations: str, videos: str, out: str) -> int:
    """Writes the manifest of a published dataset (see `hbi.pipelines.datasets`); how many rows it has.

    annotations: the folder of the published files. videos: the folder of the videos. A video that is missing keeps its
    row, and will be a row of failures.jsonl; how many are missing is said on standard error.
    """
    rows, found = read_dataset(name, annotations, videos)
    count = write_manifest(rows, out)
    if found.missing:
        some = ", ".join(sorted(found.missing)[:3]) + ", …" * (len(found.missing) > 3)
        print(
            f"{len(found.missing)} videos are not in {found.folder} ({some}): their rows are written, and will fail",
            file=sys.stderr,
        )
    return count
