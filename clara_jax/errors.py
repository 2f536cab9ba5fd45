"""What all errors of the user's input have in common."""


class InputError(ValueError):
  """Something that the user gave cannot be used; the message names it, what was expected and what
  came. Commands end with status 2."""
