"""Turn off the telemetry of the libraries that have any."""

# With telemetry, MLflow also writes into the user's home folder at import, so set these before it is imported.
NO_TELEMETRY_VARIABLES = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
