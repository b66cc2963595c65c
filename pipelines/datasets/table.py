"""The annotation files of public datasets, as they were published, to manifests.

A file a dataset, with a small function for each format; here is the table of their names. Rows are in the order of the
published files. `start` and `end` are set only where the published videos are not already cut.

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

import re
import sys
from collections.abc import Callable, Iterator

from hbi.pipelines.datasets.activitynet import activitynet, activitynet_qa, activitynet_segments
from hbi.pipelines.datasets.didemo import didemo
from hbi.pipelines.datasets.files import Files, Videos
from hbi.pipelines.datasets.lsmdc import lsmdc
from hbi.pipelines.datasets.msrvtt import msrvtt_1ka, msrvtt_full, msrvtt_qa
from hbi.pipelines.datasets.msvd import msvd, msvd_qa
from hbi.pipelines.datasets.vatex import vatex
from hbi.pipelines.datasets.webvid import webvid
from hbi.pipelines.manifest import Row, write_manifest

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
