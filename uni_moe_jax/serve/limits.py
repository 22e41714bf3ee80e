"""Bounds of requests, and the refusal of one that exceeds them."""

import dataclasses
import math

from uni_moe_jax.utils.errors import UsageError


class Refused(Exception):
  """A request that gets no answer: HTTP status, and one sentence that names value, bound and fix."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status, self.message = status, message

  @property
  def headers(self) -> dict[str, str]:
    """What the client should do: wait a second, send a token, or not send the rest of the body."""
    later, close = {'Retry-After': '1'}, {'Connection': 'close'}
    return {401: {'WWW-Authenticate': 'Bearer'}, 408: close, 413: close, 429: later, 503: later}.get(self.status, {})

  def __reduce__(self):  # crosses the pipe of the worker
    return Refused, (self.status, self.message)


def _bound(default: int | float, help_string: str, at_least: int = 1) -> int | float:
  return dataclasses.field(default=default, metadata={'help': help_string, 'at_least': at_least})


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the service accepts. Every field is a flag of uni-moe serve. Raises UsageError: one is not finite."""
  max_body_bytes: int = _bound(8 * 2**20, 'Bytes per request; larger ones get status 413.')
  max_pixels: int = _bound(2**24, 'Pixels per image or frame, checked in the header before decoding.')
  max_frames: int = _bound(1000, 'Frames per video.')
  max_seconds: float = _bound(60, 'Seconds per video.')
  max_names: int = _bound(1000, 'Names or texts per request.')
  max_characters: int = _bound(2000, 'Characters per name or text.')
  max_queue: int = _bound(256, 'Requests waiting or running; further ones get status 429.')
  max_batch: int = _bound(32, 'Requests per program call; a power of two.')
  batch_wait_ms: float = _bound(3, 'Milliseconds that a request waits for others to join its batch.', at_least=0)
  timeout: float = _bound(10, 'Seconds until a request gets status 503 and a busy worker is replaced.')

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not math.isfinite(value := getattr(self, field.name)):  # no bound of a flag excludes nan, and JSON has neither
        raise UsageError(f'--{field.name}={value} is not finite; give a number, such as {field.default}.')

  def check_text(self, text: str, field: str) -> str:
    """Returns the text. Raises Refused: it is empty, too long or not valid Unicode."""
    if not text.strip():
      raise Refused(422, f'{field} is empty; give some text.')
    if len(text) > self.max_characters:
      raise Refused(422, f'{field} has {len(text):,} characters, but at most {self.max_characters:,} are accepted; '
                         'shorten it.')
    try:
      text.encode()
    except UnicodeEncodeError:
      raise Refused(422, f'{field} has half of a surrogate pair, which is not a character; remove it.') from None
    return text

  def check_texts(self, texts: list[str], field: str) -> list[str]:
    """Returns the texts. Raises Refused: there are too many, or one is wrong."""
    if len(texts) > self.max_names:
      raise Refused(422, f'{field} has {len(texts):,} entries, but at most {self.max_names:,} are accepted; give '
                         'fewer.')
    return [self.check_text(text, f'{field}[{i}]') for i, text in enumerate(texts)]
