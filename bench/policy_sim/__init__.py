"""Replays of chat traffic through the prefix index and its eviction policies, in simulated time."""
