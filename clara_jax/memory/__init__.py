"""The store of compressed documents."""
