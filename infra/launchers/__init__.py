"""Ways to start a run's processes: on this machine, through Slurm, on Kubernetes; `job` is what they share."""
