"""Test the stored form of a checkpoint's manifest and of a run's seal."""

import hashlib
import json

import pytest

from yuan.train.checkpoint_manifest import CheckpointManifest, compute_seal, parse_sealed_manifest
from yuan.train.file_digest import FileDigest, compute_digest, digest_content, find_difference

CONTENT = b"weights"
STORED_DIGEST = {"bytes": 7, "sha256": hashlib.sha256(CONTENT).hexdigest()}
# The stored form, as releases before `CheckpointManifest` wrote it.
STORED = {
    "schema": 1,
    "step": 5,
    "model": {"name": "m"},
    "order": {"seed": 1},
    "updates": 4,
    "loss": 2.5,
    "decisions": "{}",
    "files": {"__0_0.distcp": STORED_DIGEST},
}
MANIFEST = CheckpointManifest(
    step=5,
    model={"name": "m"},
    order={"seed": 1},
    num_updates=4,
    loss=2.5,
    decisions="{}",
    files={"__0_0.distcp": digest_content(CONTENT)},
)


def make_sealed(content):
    return json.dumps({**content, "sha256": compute_seal(content)}).encode()


def test_stored_form_is_unchanged_and_round_trips():
    stored = {**STORED, "sha256": compute_seal(STORED)}
    assert list(MANIFEST.to_json().items()) == list(stored.items())
    assert parse_sealed_manifest(json.dumps(stored).encode()) == MANIFEST


def test_unknown_fields_are_ignored_and_loss_and_decisions_may_be_missing():
    older = {key: value for key, value in STORED.items() if key not in ("loss", "decisions")}
    manifest = parse_sealed_manifest(make_sealed({**older, "added_later": 1}))
    assert (manifest.step, manifest.loss, manifest.decisions) == (5, None, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", 2),
        ("step", "5"),
        ("step", True),
        ("step", -1),
        ("step", 10**400),
        ("updates", -1),
        ("updates", False),
        ("loss", float("nan")),
        ("loss", 10**400),
        ("loss", True),
        ("updates", None),
        ("model", "m"),
        ("order", []),
        ("loss", "low"),
        ("files", ["a"]),
        ("files", {"a": "sha"}),
        ("files", {"a": {"bytes": -1, "sha256": "0"}}),
        ("files", {"a": {"bytes": 1}}),
    ],
)
def test_a_sealed_manifest_with_a_wrong_field_is_none(key, value):
    assert parse_sealed_manifest(make_sealed({**STORED, key: value})) is None


def test_a_digest_is_stored_with_bytes_and_sha256_and_finds_a_changed_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    digest = compute_digest(file)
    assert digest.to_json() == STORED_DIGEST and FileDigest.from_json(STORED_DIGEST) == digest
    assert find_difference(tmp_path, "file", digest) is None
    file.write_bytes(b"WEIGHTS")
    assert find_difference(tmp_path, "file", digest) == "has another sha256"
