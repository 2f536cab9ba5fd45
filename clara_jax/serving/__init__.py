"""HTTP: retrieve and answer."""
