"""The start of rounds: the dispatcher, attempts, deployments, and the processes of flow runs."""
