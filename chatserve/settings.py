"""Everything an operator can set for `chatserve serve`, in one validated, frozen class.

Flags go before `CHATSERVE_` environment variables, these before `chatserve.toml`, this before the defaults. Flags and
help are derived from the fields here; nothing else lists them. It knows no server.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError
from pydantic_settings import TomlConfigSettingsSource as TomlSource

from chatserve.api_keys import ApiKey, TenantLimits, check_distinct, parse_api_key, read_keys_file
from chatserve.errors import StartupError

CONFIG_FILE = "chatserve.toml"
ENV_PREFIX = "CHATSERVE_"
MIN_KV_BYTES = 1 << 20
LOCAL_TENANT = "local"

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)", re.IGNORECASE)
_DURATION_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Option:
    """How a field looks on the command line. `flag` defaults to the field's name; `repeat` collects values.

    `default` describes a default that the help could not show by itself.
    """

    group: str
    metavar: str | None = None
    flag: str | None = None
    default: str | None = None
    repeat: bool = False


def parse_size(value: Any) -> Any:
    """`32k`, `4G`, `1.5GiB` or a plain number to an integer, with powers of 1,024; other types pass unchanged."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("not a size; write a number with an optional k, M, G or T, such as 32k or 4G")
    return int(float(match[1]) * _SIZE_UNITS[match[2].lower()])


def parse_duration(value: Any) -> Any:
    """`30d`, `12h`, `45m`, `90s` or a plain number of seconds to seconds; other types pass unchanged."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if match is None:
        raise ValueError("not a time; write a number of seconds, or one with s, m, h or d, such as 12h or 30d")
    return float(match[1]) * _DURATION_UNITS[match[2].lower()]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _split_commas(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _hash_keys(value: Any) -> Any:
    """Keys as they are written, hashed at once."""
    listed = _split_commas(value)
    if not isinstance(listed, list | tuple):
        return listed
    return tuple(parse_api_key(entry) if isinstance(entry, str) else entry for entry in listed)


Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[float, BeforeValidator(parse_duration)]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)]
Keys = Annotated[tuple[ApiKey, ...], NoDecode, BeforeValidator(_hash_keys)]


class ServeSettings(BaseSettings):
    """The settings of one server process; `load_settings` builds it and names faults as an operator reads them."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, toml_file=CONFIG_FILE, extra="forbid", frozen=True, validate_default=True
    )
    secret_fields: ClassVar[frozenset[str]] = frozenset({"api_keys", "redis_url"})
    _keys: tuple[ApiKey, ...] = PrivateAttr(())

    host: Annotated[str, Option("Network", "ADDRESS")] = Field(
        "127.0.0.1", min_length=1, description="Address to listen on; beyond this machine an API key is required."
    )
    port: Annotated[int, Option("Network", "PORT")] = Field(
        8000, ge=0, le=65535, description="TCP port; 0 picks a free one."
    )
    api_keys: Annotated[Keys, Option("Network", "[NAME=]KEY", flag="--api-key", default="none", repeat=True)] = Field(
        (), description="Key that clients must present; its name is the tenant whose sessions it opens.", repr=False
    )
    api_keys_file: Annotated[Path | None, Option("Network", "FILE", default="none")] = Field(
        None, description="File of such keys, NAME=KEY or NAME=sha256:HEX a line, limits of that key behind it."
    )
    insecure: Annotated[bool, Option("Network")] = Field(
        False, description="Serve beyond this machine without any API key."
    )
    allowed_origins: Annotated[
        Words, Option("Network", "ORIGIN", flag="--allowed-origin", default="own host only", repeat=True)
    ] = Field((), description="Web origin, such as https://chat.example.org, whose pages may connect.")

    data_dir: Annotated[Path, Option("Storage", "DIR")] = Field(
        Path("chatserve-data"), description="Directory of everything that survives a restart."
    )
    session_ttl_s: Annotated[Duration | None, Option("Storage", "TIME", flag="--session-ttl", default="kept")] = Field(
        None, gt=0, description="Sessions unused for this long, such as 30d or 12h, are deleted for good."
    )
    redis_url: Annotated[str | None, Option("Storage", "URL", default="one started with the server")] = Field(
        None, description="Redis to keep sessions in, such as redis://localhost:6379/0.", repr=False
    )

    model: Annotated[str, Option("Model", "NAME")] = Field(
        "bundled", min_length=1, description="Hugging Face name or local directory of a model, or 'bundled'."
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], Option("Model", "DEVICE")] = Field(
        "auto", description="Where the model runs: auto, cpu or cuda; auto is the GPU where one is found."
    )
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option("Model", "DTYPE", default="auto: float32 on a CPU, bfloat16 on a GPU"),
    ] = Field("auto", description="Number format of weights and attention history.")
    load_format: Annotated[Literal["auto", "dummy"], Option("Model", "FORMAT")] = Field(
        "auto", description="auto reads the weights; dummy makes random ones to measure speed, the text is noise."
    )
    max_context: Annotated[Size | None, Option("Model", "TOKENS", default="the model's own")] = Field(
        None, ge=16, description="Longest session, prompt and reply together, such as 32k."
    )
    kv_device_memory: Annotated[
        Size | None,
        Option("Model", "BYTES", default="on a CPU a quarter of the memory, at most 4G; 90 % of what a GPU has free"),
    ] = Field(None, ge=MIN_KV_BYTES, description="Memory for attention history, such as 4G.")

    kv_host_memory: Annotated[Size | None, Option("Model", "BYTES", default="by device")] = Field(
        None,
        ge=0,
        description="Main memory for histories that left the device; what goes to disk passes through it. "
        "256M on a CPU; on a GPU a quarter of the memory, at most 16G, taken at the start.",
    )
    kv_disk_space: Annotated[Size | None, Option("Model", "BYTES", default="by device")] = Field(
        None,
        ge=0,
        description="Disk space for histories, which are found there again after a restart; 0 for none. "
        "A quarter of what is free; at most 4G on a CPU, 64G on a GPU.",
    )
    kv_disk_path: Annotated[Path | None, Option("Model", "DIR", default="kv in the data directory")] = Field(
        None, description="Directory for these histories; one server at a time."
    )

    max_message_bytes: Annotated[Size, Option("Limits", "BYTES")] = Field(
        1 << 20, ge=1 << 10, le=64 << 20, description="Largest message or request body taken from a client."
    )
    max_import_bytes: Annotated[Size, Option("Limits", "BYTES")] = Field(
        16 << 20, ge=1 << 10, le=256 << 20, description="Largest session document taken by an import."
    )
    max_connection_sessions: Annotated[int, Option("Limits", "N")] = Field(
        32, ge=1, description="Sessions that one connection may follow at a time."
    )
    max_key_connections: Annotated[int, Option("Limits", "N")] = Field(
        64, ge=1, description="Connections that one API key may hold at a time."
    )
    max_connections: Annotated[int, Option("Limits", "N")] = Field(
        1024, ge=1, description="Connections in all, also those that have not said hello yet."
    )
    max_running: Annotated[int | None, Option("Limits", "N", default="64 on a CPU, 256 on a GPU")] = Field(
        None, ge=1, description="Turns that generate at the same time; others wait."
    )
    max_step_tokens: Annotated[Size | None, Option("Limits", "TOKENS", default="256 on a CPU, 2048 on a GPU")] = Field(
        None, ge=1, description="Tokens that one step computes for all turns together; more favours long prompts."
    )
    max_waiting: Annotated[int, Option("Limits", "N")] = Field(
        1024, ge=1, description="Turns that may wait; the next one is refused with queue_full."
    )
    key_max_sessions: Annotated[int | None, Option("Limits", "N", default="no limit")] = Field(
        None, ge=1, description="Sessions that one API key may have, unless the keys file says otherwise for it."
    )
    key_max_turns: Annotated[int | None, Option("Limits", "N", default="no limit")] = Field(
        None, ge=1, description="Turns and completions that one API key may run or have waiting at a time."
    )
    key_tokens_per_minute: Annotated[Size | None, Option("Limits", "N", default="no limit")] = Field(
        None, ge=1, description="Tokens that may be computed for one API key a minute; cached ones are free."
    )
    resume_ttl_s: Annotated[float, Option("Limits", "SECONDS")] = Field(
        600.0, ge=1, description="How long a finished reply can be replayed piece by piece."
    )
    drain_timeout_s: Annotated[float, Option("Limits", "SECONDS")] = Field(
        20.0, ge=0, description="How long replies in progress may go on after SIGTERM."
    )

    log_level: Annotated[Literal["debug", "info", "warning", "error"], Option("Logging", "LEVEL")] = Field(
        "info", description="Least severe level that is logged: debug, info, warning or error."
    )
    log_format: Annotated[Literal["console", "json"], Option("Logging", "FORMAT")] = Field(
        "console", description="console, or json for one object a line."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, file: in this order, and nothing else."""
        return init_settings, env_settings, TomlSource(settings_cls)

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(
                    f"{origin!r} is not an origin; write scheme and host only, as https://chat.example.org"
                )
        return tuple(origin.lower() for origin in origins)

    @model_validator(mode="after")
    def _read_keys(self) -> ServeSettings:
        listed = self.api_keys + (read_keys_file(self.api_keys_file) if self.api_keys_file else ())
        check_distinct(listed)
        self._keys = tuple(replace(key, limits=key.limits.over(self.default_limits)) for key in listed)
        return self

    @model_validator(mode="after")
    def _refuse_open_server(self) -> ServeSettings:
        if not (is_loopback(self.host) or self.keys or self.insecure):
            raise ValueError(
                f"host {self.host!r} is reachable from other machines and no API key is set: add --api-key KEY "
                f"(or {ENV_PREFIX}API_KEYS), listen on 127.0.0.1, or accept the risk with --insecure"
            )
        return self

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """All API keys with their tenants and limits; none means that everyone is the tenant `local`."""
        return self._keys

    @property
    def kv_directory(self) -> Path:
        """Where histories on disk lie."""
        return self.kv_disk_path or self.data_dir / "kv"

    @property
    def default_limits(self) -> TenantLimits:
        """What a tenant may use where its key does not say."""
        return TenantLimits(self.key_max_sessions, self.key_max_turns, self.key_tokens_per_minute)


def option_of(name: str) -> Option:
    """The command-line side of a field."""
    return next(item for item in ServeSettings.model_fields[name].metadata if isinstance(item, Option))


def flag_of(name: str) -> str:
    """The flag of a field, such as `--data-dir`."""
    return option_of(name).flag or "--" + name.replace("_", "-")


def load_settings(flags: Mapping[str, Any] | None = None) -> ServeSettings:
    """Settings from flags (field name to value as written), environment, file and defaults.

    Raises StartupError with one line for each bad value: what it is, what is wrong, how to set it.
    """
    try:
        return ServeSettings(**(flags or {}))
    except ValidationError as error:
        raise StartupError("\n".join(_describe(fault) for fault in error.errors())) from None
    except (SettingsError, tomllib.TOMLDecodeError, OSError) as error:
        raise StartupError(f"{CONFIG_FILE} or the environment cannot be read: {error}") from None


def _describe(fault: ErrorDetails) -> str:
    message = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return message
    name = str(fault["loc"][0])
    if name not in ServeSettings.model_fields:
        return f"{name!r} in {CONFIG_FILE} is not a setting; `chatserve serve --help` lists them"
    value = "(hidden)" if name in ServeSettings.secret_fields else repr(fault["input"])
    remedy = f"Set it with {flag_of(name)}, {ENV_PREFIX}{name.upper()} or {name} in {CONFIG_FILE}"
    return f"{name} = {value}: {message}. {remedy}: {ServeSettings.model_fields[name].description}"
