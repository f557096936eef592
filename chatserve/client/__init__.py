"""A Python client of protocol `chatserve.v1`, used by the command line and by the tests alike."""

from chatserve.client.chat import ChatClient
from chatserve.client.errors import CommandFailedError, ConnectionEndedError
from chatserve.client.http import HttpApi
from chatserve.client.link import Patience

__all__ = ["ChatClient", "CommandFailedError", "ConnectionEndedError", "HttpApi", "Patience"]
