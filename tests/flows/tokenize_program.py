"""Tokenize the shards of a folder, as a process that a test kills: `tokenize_program.py FOLDER CACHE`."""

import json
import sys
from pathlib import Path

from flows.round.token_cache import TokenCache
from flows.round.tokenize_shards import tokenize_snapshot
from yuan.data.row_shards import SnapshotManifest, decompress_shard
from yuan.data.shard_tokens import SampleRules


def main(folder, cache_folder):
    manifest = SnapshotManifest.from_json(json.loads((folder / "manifest.json").read_text()))
    cache = TokenCache(cache_folder)
    with cache.hold():
        tokenize_snapshot(
            cache,
            manifest,
            lambda part, shard, target: decompress_shard(folder / shard.sha256, target, shard),
            tokenizer_folder=folder,
            rules={part.name: SampleRules(seq_len=32) for part in manifest.parts},
            num_workers=2,
            report=lambda progress: print(progress.num_done, progress.num_shards, flush=True),
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
