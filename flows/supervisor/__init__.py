"""Run supervision: device leases, rank processes, checkpoint uploads, exit classification and restarts."""
