"""TokenCipher: encrypts page tokens. Pure, without the database; `TokenKeys` reads the keys."""

from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from secrets import token_bytes

DAY_BYTES = 4
NONCE_BYTES = 12  # https://datatracker.ietf.org/doc/html/rfc5116#section-5.1


def utc_today() -> date:
    """Return the current day in UTC."""
    return datetime.now(UTC).date()


class TokenCipher:
    """Encrypts with the key of today, and decrypts with the key that a text was encrypted with.

    An encrypted text is the day of its key, a random nonce, and the output of AES-GCM, which detects every
    change.
    """

    def __init__(
        self, keys: Mapping[date, bytes], today: Callable[[], date] = utc_today, *, is_in_use: bool = True
    ) -> None:
        # Imported by the few servers that need it: it takes 35 ms and 9 MiB.
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

        self.days = keys.keys()
        self.is_in_use = is_in_use  # otherwise it only decrypts
        self._by_day = {_day_bytes(day): AESGCM(key) for day, key in keys.items()}
        self._today = today
        self._invalid = InvalidTag

    def encrypt(self, text: bytes) -> bytes:
        """Return an encrypted text."""
        day, nonce = _day_bytes(self._today()), token_bytes(NONCE_BYTES)
        return day + nonce + self._by_day[day].encrypt(nonce, text, None)

    def decrypt(self, encrypted: bytes) -> bytes:
        """Return the text; raises LookupError if its key is unknown, ValueError if it is damaged."""
        day, rest = encrypted[:DAY_BYTES], encrypted[DAY_BYTES:]
        try:
            return self._by_day[day].decrypt(rest[:NONCE_BYTES], rest[NONCE_BYTES:], None)
        except self._invalid:
            raise ValueError from None


def _day_bytes(day: date) -> bytes:
    return day.toordinal().to_bytes(DAY_BYTES, "big")
