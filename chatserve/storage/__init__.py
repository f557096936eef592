"""Everything durable: sessions, their logs and records in Redis, and the Redis that we start ourselves.

The only package that imports redis.
"""
