"""What a request can be refused with."""


class RefusedError(Exception):
  """A request is refused.

  Args:
    status: of HTTP.
    text: what is wrong.
    field: of the request's body, where it is one.
  """

  def __init__(self, status: int, text: str, field: str | None = None):
    super().__init__(text)
    self.status, self.field = status, field
