"""What starts a round: the dispatcher, attempts, deployments, and the processes of flow runs."""
