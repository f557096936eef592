"""Many readers of one server: light connections, what they hear and when, and the runs of `bench/frontend.py`."""
