"""What `bench/multiturn.py` is made of: workloads, the two ways to a server, client processes, and the report."""
