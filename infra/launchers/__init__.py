"""Start a run's processes on this machine, through Slurm or on Kubernetes; `job` has the interface they share."""
