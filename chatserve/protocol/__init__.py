"""Protocol `chatserve.v1`: commands, events and their two encodings. No I/O, no state."""
