"""LSMDC: clips of films, a sentence each."""

from collections.abc import Iterator

from hbi.pipelines.datasets.files import Files, Videos, read_lines
from hbi.pipelines.manifest import Row


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
            for number, line in enumerate(read_lines(path), 1):
                # clip, start and end aligned, start and end extracted, sentence: the clips are cut already.
                columns = line.split("\t")
                if len(columns) < 6:
                    raise ValueError(
                        f"{path} line {number}: {len(columns)} columns, LSMDC has 6 (tab-separated)"
                    )
                yield Row(videos.path(columns[0]), columns[0], [columns[5].strip()], split)
