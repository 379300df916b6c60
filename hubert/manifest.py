"""What there is to train on: the parts of the manifest stage under one name.

hubert.sources         folders, archives and people's manifests -> rows
hubert.rows            the columns, the fileid, checks, segments
hubert.verification    every file decoded once; what is unusable is rejected with a reason
hubert.split           validation, the k-means sample, shards, digests: all by hash
hubert.manifest_files  reading and writing manifests
"""

from hubert.manifest_files import read_manifest, scan_foreign_manifest, scan_manifest, write_manifest
from hubert.rows import SCHEMA, audio_refs, build_fileid, check_rows, check_unique, conform, cut_segments
from hubert.sources import AUDIO_EXTENSIONS, list_audio
from hubert.split import manifest_digest, plan_shards, select_sample, shard_digests, split_manifest, stable_hash
from hubert.verification import REJECTED_SCHEMA, check_rejected, count_reasons, verify_rows

__all__ = [
    "AUDIO_EXTENSIONS",
    "REJECTED_SCHEMA",
    "SCHEMA",
    "audio_refs",
    "build_fileid",
    "check_rejected",
    "check_rows",
    "check_unique",
    "conform",
    "count_reasons",
    "cut_segments",
    "list_audio",
    "manifest_digest",
    "plan_shards",
    "read_manifest",
    "scan_foreign_manifest",
    "scan_manifest",
    "select_sample",
    "shard_digests",
    "split_manifest",
    "stable_hash",
    "verify_rows",
    "write_manifest",
]
