"""moto's S3 server, with one writer at a time: its preconditions are checked apart from the write."""

import threading

from moto.s3.responses import S3Response
from moto.server import main

_put_object, _lock = S3Response.put_object, threading.Lock()


def _put_alone(self):
  with _lock:
    return _put_object(self)


if __name__ == '__main__':
  S3Response.put_object = _put_alone
  main()
