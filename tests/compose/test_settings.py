"""compose.yaml and .env.example name settings that exist, so that none is set in vain."""

from __future__ import annotations

import re

import yaml

from chatserve.settings import ENV_PREFIX, ServeSettings
from tests.live import ROOT

COMPOSE = (ROOT / "compose.yaml").read_text()
READ_BY_COMPOSE = set(re.findall(r"\$\{(\w+)", COMPOSE))


def environment(service: str) -> dict[str, str | None]:
    """What compose.yaml puts into a service's environment."""
    return dict(yaml.safe_load(COMPOSE)["services"][service]["environment"])


def test_environment_of_services_is_settings():
    """Each variable of ours is a field of the settings."""
    names = {*environment("chatserve"), *environment("chatserve-cpu")} - {"HF_TOKEN"}
    fields = {ENV_PREFIX + name.upper() for name in ServeSettings.model_fields}
    assert names <= fields


def test_example_has_what_compose_reads():
    """Each variable of the example file is read by compose.yaml or passed on by it, and the other way round."""
    example = set(re.findall(r"^#(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    passed_on = {name for name, value in environment("chatserve").items() if value is None}
    assert example == READ_BY_COMPOSE | passed_on


def test_defaults_of_compose_are_taken(monkeypatch):
    """What compose.yaml sets where nothing is configured makes settings: no key needed, and everything on /data."""
    for name, value in environment("chatserve").items():
        if value is not None:
            monkeypatch.setenv(name, re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value))
    monkeypatch.setenv("CHATSERVE_HOST", "0.0.0.0")
    settings = ServeSettings()
    assert (settings.keys, settings.device, settings.model) == ((), "cuda", "bundled")
    assert settings.redis_url == "redis://redis:6379/0"
