"""Shards to rows of the index: the plain loop's rows, whoever reads and decodes."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pytest

from hbi.pipelines.sample import ShardIndex
from hbi.serving.index import build
from hbi.serving.index.embed import Embedded, Embedder, decoded, decoded_ahead, embed
from hbi.serving.index.table import IndexMetadata
from hbi.serving.settings import IndexSettings

# Ray Data warns of its own settings when it sends them to its workers.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
SETTINGS = IndexSettings(batch=3)


def collected(found: Iterable[Embedded]) -> dict[tuple[str, int], bytes]:
    return {(each.part, each.number): each.rows for each in found}


def tables(found: dict[tuple[str, int], bytes]) -> dict[str, pa.Table]:
    """The rows of each shard."""
    parts: dict[str, list[pa.Table]] = {}
    for part, number in sorted(found):
        parts.setdefault(part, []).append(pa.ipc.open_stream(found[part, number]).read_all())
    return {part: pa.concat_tables(rows).combine_chunks() for part, rows in parts.items()}


def test_rows_are_those_of_the_plain_loop_whoever_decodes(chain: Path):
    index, model = ShardIndex.read(str(chain / "shards")), str(chain / "model")
    rows = [{"path": index.path(s), "split": s.split, "part": s.name} for s in index.shards if s.samples]
    embedder = Embedder(model, "", SETTINGS)
    plain = {
        row["part"]: pa.concat_tables(
            embedder.rows(batch) for batch in decoded(row, SETTINGS)
        ).combine_chunks()
        for row in rows
    }
    by_one = collected(embed(rows, model, "", SETTINGS))
    by_two = collected(decoded_ahead(rows, (model, "", SETTINGS), 1, num_cpus=0.5))
    assert len(plain) == len(by_one) == 3 and len(by_two) > 3
    assert tables(by_one) == tables(by_two) == plain


def test_a_shard_that_holds_fewer_samples_than_its_index_says_is_named(
    chain: Path, monkeypatch: pytest.MonkeyPatch
):
    index = ShardIndex.read(str(chain / "shards"))
    shards = [shard for shard in index.shards if shard.samples]
    metadata = IndexMetadata(str(chain / "model"), "", "", {}, 32)
    monkeypatch.setattr(build, "embed", lambda *_: iter(()))
    said = rf"{shards[0].name} holds fewer samples than index.json says \({len(shards)} such shards\)"
    with pytest.raises(ValueError, match=said):
        list(build._embedded(index, shards[::-1], metadata, SETTINGS))
