"""The `clara` command."""
