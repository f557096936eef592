"""Sessions and their turns: state, event log, recovery. No connections, no Redis commands, no model."""
