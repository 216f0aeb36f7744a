"""Let uploads to MLflow's artifact store in S3 be resumed, however long they take.

MLflow signs the addresses of an upload's parts once, for an hour, when it creates the upload. `ResumableArtifacts`
also signs them for an upload that the request names; MLflow checks the same permission for both.
"""

from collections.abc import Sequence
from typing import Any

from botocore.exceptions import ClientError
from flask import has_request_context, request
from mlflow.entities.multipart_upload import (
    CreateMultipartUploadResponse,
    MultipartUploadCredential,
    MultipartUploadPart,
)
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST
from mlflow.store.artifact import artifact_repository_registry
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

from infra.mlflow_rules import PART_PARAMETER, UPLOAD_PARAMETER
from infra.transfer_records import MAX_ARTIFACT_PARTS

UPLOAD_ADDRESS_S = 3600
LOST_UPLOAD_CODES = ("NoSuchUpload", "InvalidPart")


class ResumableArtifacts(S3ArtifactRepository):  # type: ignore[misc]  # MLflow's classes have no types
    """MLflow's artifact store in S3, with uploads that can be resumed."""

    def create_multipart_upload(
        self, local_file: str, num_parts: int = 1, artifact_path: str | None = None
    ) -> CreateMultipartUploadResponse:
        """Create an upload, or sign addresses for the one that the HTTP request names in its parameter `upload_id`.

        The first address is that of the part `part_number`, if the request has this parameter too.

        Raises:
            MlflowException: if the store does not have that upload (status 404), which is not asked where a part is
                named, or for a part that no upload has (400).
        """
        upload_id = request.args.get(UPLOAD_PARAMETER) if has_request_context() else None
        if upload_id is None:
            return super().create_multipart_upload(local_file, num_parts, artifact_path)

        client = self._get_s3_client()
        upload = {**self._locate(local_file, artifact_path), "UploadId": upload_id}
        first = parse_part_number(request.args.get(PART_PARAMETER, "1"))
        if PART_PARAMETER not in request.args:
            try:
                client.list_parts(**upload, MaxParts=1)
            except ClientError as error:
                raise _translate_lost_upload(error) from error
        credentials = []
        for number in range(first, first + num_parts):
            params = {**upload, "PartNumber": number}
            url = client.generate_presigned_url("upload_part", Params=params, ExpiresIn=UPLOAD_ADDRESS_S)
            credentials.append(MultipartUploadCredential(url=url, part_number=number, headers={}))
        return CreateMultipartUploadResponse(credentials=credentials, upload_id=upload_id)

    def complete_multipart_upload(
        self,
        local_file: str,
        upload_id: str,
        parts: Sequence[MultipartUploadPart] | None = None,
        artifact_path: str | None = None,
    ) -> None:
        """Create the object of an upload's parts.

        Raises:
            MlflowException: if the store does not have the upload, or not these parts (status 404).
        """
        try:
            super().complete_multipart_upload(local_file, upload_id, parts, artifact_path)
        except ClientError as error:
            raise _translate_lost_upload(error) from error

    def _locate(self, local_file: str, artifact_path: str | None) -> dict[str, Any]:
        """Return the parameters that name the object in requests to the store."""
        bucket, prefix = self.parse_s3_compliant_uri(self.artifact_uri)
        key = "/".join(part for part in (prefix, artifact_path, local_file.rpartition("/")[2]) if part)
        return {"Bucket": bucket, "Key": key, **self._bucket_owner_params}


def register_resumable_artifacts() -> None:
    """Make the MLflow server in this process use `ResumableArtifacts` for `s3://` destinations."""
    artifact_repository_registry._artifact_repository_registry.register("s3", ResumableArtifacts)


def parse_part_number(text: str) -> int:
    """Read the number of a part.

    Raises:
        MlflowException: if no upload has such a part (status 400).

    >>> parse_part_number("17")
    17
    """
    if text.isascii() and text.isdecimal() and 1 <= int(text[:6]) <= MAX_ARTIFACT_PARTS:
        return int(text[:6])
    message = f"{PART_PARAMETER} must be from 1 to {MAX_ARTIFACT_PARTS}, got {text[:20]!r}; send the number of a part"
    raise MlflowException(message, INVALID_PARAMETER_VALUE)


def _translate_lost_upload(error: ClientError) -> Exception:
    """Return MLflow's error for an upload that the store does not have; any other error is the store's own."""
    if error.response.get("Error", {}).get("Code") not in LOST_UPLOAD_CODES:
        return error
    lost: Exception = MlflowException(
        "the store does not have this upload, or not these parts; create another upload", RESOURCE_DOES_NOT_EXIST
    )
    return lost
