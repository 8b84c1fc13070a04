"""The limits of a server, and the tokens that it accepts."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ConfigError

LIMITS = ("max_upload_bytes", "max_pixels", "max_requests", "decode_workers", "upload_timeout")


@dataclass(frozen=True)
class ServerSettings:
    """What a server accepts.

    Attributes:
        tokens: bearer tokens, one of which a request must carry; none: requests need none.
        max_upload_bytes: of the body of a request.
        max_pixels: height times width of an image, read from its header before it is decoded.
        max_requests: predictions in progress, uploads included; more are refused with status 503.
        decode_workers: threads that decode images. Each takes up to 7 bytes of memory for a pixel.
        upload_timeout: seconds that the body of a request may take to arrive.
    """

    tokens: frozenset[str] = field(default=frozenset(), repr=False)
    max_upload_bytes: int = 10 * 2**20
    max_pixels: int = 50_000_000
    max_requests: int = 256
    decode_workers: int = 2
    upload_timeout: float = 60.0

    def __post_init__(self) -> None:
        for name in LIMITS:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}.")
        if any(not token or not token.isascii() or not token.isprintable() or " " in token for token in self.tokens):
            raise ConfigError(
                "Tokens must be of printable ASCII characters without spaces, got another one (not shown)."
            )

    def accepts(self, token: str | None) -> bool:
        """Whether a request with this token may pass. The time that it takes does not tell how a token begins."""
        given = (token or "").encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(given, own.encode()) for own in self.tokens]
        return not self.tokens or any(matches)


def read_tokens(file: Path | None, from_environment: str | None) -> frozenset[str]:
    """The tokens in a file, one a line, and that of the environment.

    Raises:
        ConfigError: the file cannot be read, or there is no token in what should contain one.
    """
    tokens: list[str] = []
    if file is not None:
        try:
            tokens += _stripped(file.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The file of tokens '{file}' cannot be read: {error}") from error
        if not tokens:
            raise ConfigError(f"The file of tokens must contain one token a line, got none in '{file}'.")
    if from_environment is not None:
        tokens += _stripped([from_environment])
        if not from_environment.strip():
            raise ConfigError("The token in the environment must not be empty. Set it, or unset the variable.")
    return frozenset(tokens)


def _stripped(lines: Iterable[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip()]
